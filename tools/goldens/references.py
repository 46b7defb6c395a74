"""Compute the golden references of the parity tests with `transformers` in float32.

Run from the repository's root where torch and transformers are installed (dependency group
``parity``)::

    python3 -m tools goldens [qwen2] [llama] [qwen3] [smollm2] [pooling] [pictures]

The tests read the files through `tests.makers.goldens`, which describes their content, and
recompute them wherever torch is installed, so a stale file does not go unnoticed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tests.edge.vision import judge
from tests.edge.vision.pictures import GOLDEN_PATH, LIMITS, LOSSLESS, SECTIONS, SIZES, digest
from tests.makers.goldens import GOLDEN_DIR, Golden, PoolingGolden, SmolGolden
from tests.makers.tiny_models import BOS_ID, FIRST_CONTROL_ID, KINDS, write_checkpoint
from tests.makers.tiny_pooling import PAIRS, TEXTS, write_embedder, write_judge
from tools.models.smollm2 import smollm2_gguf

PROMPT_TOKENS = 40
NEW_TOKENS = 64
CANDIDATES = 1024
# A continuation with fewer distinct tokens is a loop, which hides errors: the answer repeats.
MIN_DISTINCT = 24
SMOLLM2_PROMPTS = (
    "Write the days of the week and the number of hours in 7 days.",
    "Write a Python function that adds 10 numbers.",
)
VERSIONS = f"transformers {transformers.__version__}, torch {torch.__version__}"


def load_model(directory: Path | str, **options: Any) -> Any:
    """Load a model in float32 with the plainest attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", **options
    )
    return model.eval()


@torch.no_grad()  # type: ignore[untyped-decorator]
def forward(model: Any, ids: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a sequence's logits ``[n, vocab]``, cache ``[2 * layers, kv_heads, n, head_dim]``."""
    output = model(torch.from_numpy(ids)[None], use_cache=True)
    rows = [x[0] for layer in output.past_key_values.layers for x in (layer.keys, layer.values)]
    return output.logits[0].numpy(), torch.stack(rows).numpy()


@torch.no_grad()  # type: ignore[untyped-decorator]
def generate(model: Any, prompts: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return greedy continuations and their margins (best minus second logit), ``[b, n]`` each."""
    ids = torch.from_numpy(prompts)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = [logits.topk(2).values for logits in output.logits]
    margins = torch.stack([top[:, 0] - top[:, 1] for top in best], dim=1)
    return output.sequences[:, prompts.shape[1] :].numpy(), margins.numpy()


def make_tiny(kind: str, directory: Path) -> Golden:
    """Take the prompt whose greedy continuation has no near tie, stays in text and is no loop."""
    model = load_model(directory)
    rng = np.random.RandomState(0)
    prompts = rng.randint(0, FIRST_CONTROL_ID, size=(CANDIDATES, PROMPT_TOKENS)).astype(np.int64)
    prompts[:, 0] = BOS_ID
    answers, margins = generate(model, prompts)
    distinct = np.array([len(set(answer)) for answer in answers.tolist()])
    fit = (distinct >= MIN_DISTINCT) & (answers.max(axis=1) < FIRST_CONTROL_ID)
    choice = int(np.argmax(np.where(fit, margins.min(axis=1), -1)))
    ids = np.concatenate([prompts[choice], answers[choice]])
    logits, cache = forward(model, ids[:-1])
    assert np.array_equal(logits[PROMPT_TOKENS - 1 :].argmax(-1), ids[PROMPT_TOKENS:])
    print(f"{kind}: {distinct[choice]} distinct new tokens, logits of std {logits.std():.2f}")
    return Golden(ids, PROMPT_TOKENS, logits, cache, VERSIONS)


def load_smollm2() -> tuple[Any, Any]:
    """Load model (weights dequantized to float32) and tokenizer from SmolLM2's GGUF file."""
    gguf = smollm2_gguf()
    model = load_model(gguf.parent, gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers drops the model's pre-tokenizer ("smollm"), which splits numbers into digits.
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return model, tokenizer


def encode_chat(tokenizer: Any, prompt: str) -> NDArray[np.int64]:
    """Encode one user message in the model's own template."""
    message = {"role": "user", "content": prompt}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64)


def make_smollm2() -> list[SmolGolden]:
    """Make a small golden for each chat prompt."""
    model, tokenizer = load_smollm2()
    goldens = []
    for prompt in SMOLLM2_PROMPTS:
        prompt_ids = encode_chat(tokenizer, prompt)
        answer, margins = generate(model, prompt_ids[None])
        ids = np.concatenate([prompt_ids, answer[0]])
        logits, cache = forward(model, ids[:-1])
        golden = SmolGolden.build(prompt, ids, len(prompt_ids), logits, cache, margins[0], VERSIONS)
        print(f"smollm2: {prompt!r} -> {tokenizer.decode(answer[0])!r}")
        goldens.append(golden)
    return goldens


@torch.no_grad()  # type: ignore[untyped-decorator]
def make_pooling(embedder: Path, judge: Path) -> PoolingGolden:
    """Compute vectors and scores by the model cards' code of Qwen3-Embedding and Qwen3-Reranker."""
    from tokenizers import Tokenizer

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModel.from_pretrained(embedder, **options).eval()
    tokenizer = Tokenizer.from_file(str(embedder / "tokenizer.json"))
    vectors = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text).ids])  # its post-processor appends the end
        last = model(ids).last_hidden_state[0, -1]
        vectors.append(torch.nn.functional.normalize(last, dim=0).numpy())

    model = load_model(judge)
    tokenizer = Tokenizer.from_file(str(judge / "tokenizer.json"))

    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n"
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    published = "Given a web search query, retrieve relevant passages that answer the query"
    answers = [tokenizer.token_to_id(answer) for answer in ("no", "yes")]
    scores = []
    for query, document, instruction in PAIRS:
        pair = f"<Instruct>: {instruction or published}\n<Query>: {query}\n<Document>: {document}"
        parts = [
            tokenizer.encode(each, add_special_tokens=False).ids for each in (prefix, pair, suffix)
        ]
        ids = torch.tensor([[token for part in parts for token in part]])
        logits = model(ids).logits[0, -1, answers]
        scores.append(float(torch.nn.functional.log_softmax(logits, dim=0)[1].exp()))
    return PoolingGolden(np.stack(vectors), np.array(scores, np.float32), VERSIONS)


def make_pictures() -> dict[str, Any]:
    """Hash pixels, and compute grids of many sizes, by transformers' processors on Pillow.

    The results of another major version of Pillow are kept: from 13 on, tall pictures differ.
    """
    import PIL

    tiles = {}
    for name, section in SECTIONS.items():
        is_small = name.startswith("tiny")
        for picture in LOSSLESS if is_small else ("photo", "tall", "large"):
            data = LOSSLESS[picture]()
            for limit in LIMITS if is_small else (None,):
                values = judge.pixel_values(data, section, limit)
                tiles[f"{picture}, {name}, {limit}"] = digest(values)
    grids = {}
    for name, section in SECTIONS.items():
        for size in SIZES:
            for limit in LIMITS:
                options = judge.settings(size, section, limit)
                grids[f"{size}, {name}, {limit}"] = judge.grid(size, section, options)
    old = json.loads(GOLDEN_PATH.read_text()) if GOLDEN_PATH.exists() else {}
    by_pillow = old.get("tiles", {}) | {PIL.__version__.partition(".")[0]: tiles}
    return {"made by": VERSIONS, "tiles": dict(sorted(by_pillow.items())), "grids": grids}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m tools goldens", description=__doc__.splitlines()[0]
    )
    names = [*KINDS, "smollm2", "pooling", "pictures"]
    parser.add_argument("names", nargs="*", default=names, metavar="NAME")
    chosen = parser.parse_args().names
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    GOLDEN_DIR.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        if kind in chosen:
            with tempfile.TemporaryDirectory() as folder:
                golden = make_tiny(kind, write_checkpoint(Path(folder), kind))
            golden.save(kind)
            print(f"{kind}: narrowest margin {golden.margins.min():.4f}")
    if "pooling" in chosen:
        with tempfile.TemporaryDirectory() as folder:
            written = write_embedder(Path(folder, "embed")), write_judge(Path(folder, "judge"))
            pooling = make_pooling(*written)
        pooling.save()
        print(f"pooling: scores {pooling.scores.round(3).tolist()}")
    if "pictures" in chosen:
        pictures = make_pictures()
        GOLDEN_PATH.write_text(json.dumps(pictures, indent=0) + "\n")
        print(f"pictures: Pillow {[*pictures['tiles']]}, grids of {len(pictures['grids'])} sizes")
    if "smollm2" in chosen:
        goldens = make_smollm2()
        SmolGolden.save_all(goldens)
        for smol in goldens:
            print(f"smollm2: narrowest margin {smol.margins.min():.4f}")


if __name__ == "__main__":
    main()
