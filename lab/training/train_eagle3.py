"""Train an EAGLE-3 head for a model, in the layout that ``edge-llm export --eagle3`` takes.

usage: python3 -m lab train-eagle3 BUNDLE TEXTS.jsonl -o HEAD [--minutes 20] [--draft-vocab N] ...

BUNDLE is the model as it will be served: the head learns from the hidden states and distributions
of its CPU graph, so from those of its quantized weights. TEXTS is anything that ``--calibration``
takes. The model's own answers are best (``python3 -m lab distill``), since the head will guess such
text.

The head is trained as it is used (training-time test, arXiv 2503.01840, section 3.2): it goes on
from its own hidden states for some tokens, and each of them counts. Every tenth text is held out.
The share of right guesses there is printed, and the last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.backends.ort.cpu import load_cpu_graph
from edge.backends.ort.session import open_session
from edge.backends.step import all_tokens
from edge.bundle import io_spec
from edge.bundle.embeddings import EMBEDDINGS_NAME, EmbeddingTable
from edge.bundle.manifest import Manifest, read_manifest
from edge.bundle.onnx_file import ELEMENT_NUMBERS, OnnxFile, tensor_info
from edge.bundle.verified_files import verify_files
from edge.errors import ConfigError, DependencyError
from edge.files import decode_text
from edge.model.cache import cache_tensors
from edge.model.parts import Linear, only
from edge.model.spec import LayerRun, ModelSpec, RopeSpec
from edge.text.chat_template import ChatTemplate, encode_chat
from edge.text.tokenizer import Tokenizer
from edge_make.families.dense import dense_layer
from edge_make.graph_edits import add_output
from edge_make.safetensors_writer import TensorSource, write_safetensors
from export.sources.documents import encode_document, read_calibration_text
from tools.command import run_main, say

from .lessons import Lesson

if TYPE_CHECKING:
    from .eagle3_module import HeadModule

HELD_OUT_EVERY = 10
BEST = 16
"""Number of most probable tokens to keep of the model's distribution at each place."""
_DECAY = 0.8  # weight of a guess relative to the one before it
_SHORTEST = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab train-eagle3", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("texts", type=Path, metavar="TEXTS.jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="HEAD")
    parser.add_argument("--minutes", type=float, default=20.0, help="of CPU time (default 20)")
    parser.add_argument("--draft-vocab", type=int, default=8192, help="tokens that it can guess")
    parser.add_argument("--intermediate", type=int, help="width of its MLP; default: the model's")
    parser.add_argument("--ahead", type=int, default=4, help="guesses in a row (default 4)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=8, help="texts at once (default 8)")
    parser.add_argument("--max-tokens", type=int, default=256, help="a longer text is cut")
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="multiply in bfloat16: 1.5 times the steps with AVX512-BF16; tried on no other CPU",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = train(
        options.bundle,
        options.texts,
        options.output,
        minutes=options.minutes,
        draft_vocab=options.draft_vocab,
        intermediate=options.intermediate,
        ahead=options.ahead,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        bfloat16=options.bfloat16,
        seed=options.seed,
    )
    say(f"Go on with: edge-llm export SOURCE -o BUNDLE --eagle3 {options.output}")
    print(json.dumps(report))


def train(
    bundle: Path,
    texts: Path,
    output: Path,
    *,
    minutes: float = 20.0,
    draft_vocab: int = 8192,
    intermediate: int | None = None,
    ahead: int = 4,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    max_tokens: int = 256,
    bfloat16: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a head and write it as it is published.

    Args:
        bundle: the model.
        texts: texts to learn from, some of which are held out.
        output: directory of the head; it must not exist, or be empty.
        minutes: CPU time for the training, all threads together; the learning rate falls with it.
        draft_vocab: tokens that the head can guess: the most frequent of the texts.
        intermediate: width of the head's MLP; None is the model's.
        ahead: guesses in a row that are trained.
        learning_rate: highest learning rate.
        batch_size: texts at once.
        max_tokens: most tokens of a text.
        bfloat16: whether to multiply in bfloat16; weights and sums stay float32.
        seed: seed of weights and order.

    Returns:
        Numbers of texts and tokens; ``right``, the share of held-out places at which each guess in
        a row is right; and ``tokens_per_verify``, the tokens per step of the model with a greedy
        chain of ``ahead`` guesses on the held-out texts.

    Raises:
        ConfigError: a number is out of range, the output exists, there are too few texts, or
            states or a loss are not finite.
        DependencyError: torch is missing.
        BundleError, BackendError: the bundle cannot be opened or run.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists; name a new directory")
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest)
    if not 1 <= draft_vocab <= manifest.model.vocab_size or ahead < 1 or minutes <= 0:
        raise ConfigError(
            f"--draft-vocab {draft_vocab}, --ahead {ahead} and --minutes {minutes:g} must be "
            f"positive, the first at most {manifest.model.vocab_size}"
        )
    try:
        import torch

        from .eagle3_module import HeadModule
    except ImportError as error:
        raise DependencyError(
            f"{error.name} is missing; run python3 -m lab train-eagle3"
        ) from error
    lessons = list(make_lessons(bundle, manifest, texts, max_tokens))
    held_out = lessons[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    learned = [lesson for number, lesson in enumerate(lessons, 1) if number % HELD_OUT_EVERY]
    if not held_out:
        raise ConfigError(
            f"{texts} has {len(lessons)} texts of {_SHORTEST} tokens and more; give "
            f"{HELD_OUT_EVERY} or more, of which every tenth is held out"
        )
    vocabulary = choose_tokens(learned, draft_vocab, manifest.model.vocab_size)
    torch.manual_seed(seed)
    spec = head_spec(manifest.model, draft_vocab, intermediate)
    table, weights = read_weights(bundle, manifest)
    head = HeadModule(spec, table, vocabulary, *weights)
    say(f"{len(learned)} texts, {sum(len(each.ids) for each in learned):,} tokens to learn from")
    steps = learn(head, learned, minutes, ahead, learning_rate, batch_size, bfloat16, seed)
    right, chains = measure(head, held_out, ahead, batch_size)
    write_head(output, head, vocabulary, manifest, layers_of(manifest.model))
    report = {
        "bundle": manifest.name,
        "texts_learned": len(learned),
        "texts_held_out": len(held_out),
        "tokens_learned": sum(len(each.ids) for each in learned),
        "steps": steps,
        "right": [round(share, 4) for share in right],
        "tokens_per_verify": round(1 + sum(chains), 3),
    }
    shares = ", ".join(f"{share:.0%}" for share in right)
    say(
        f"right on {len(held_out)} held-out texts, guess after guess: {shares}; "
        f"{report['tokens_per_verify']} tokens per verify"
    )
    return report


def layers_of(model: ModelSpec) -> tuple[int, int, int]:
    """Return the layers whose inputs are read, as usual; a model of few layers has others."""
    count = model.num_layers
    return (2, count // 2, count - 3) if count >= 6 else (0, count // 2, count)


def head_spec(model: ModelSpec, draft_vocab: int, intermediate: int | None) -> ModelSpec:
    """Return the head's own numbers: one layer like the model's, with fewer tokens."""
    attention = model.attentions()[0]
    heads = attention.heads, attention.kv_heads, attention.dim
    layer = dense_layer(model.hidden_size, heads, intermediate or _mlp_width(model))
    return ModelSpec(
        architecture="llama",
        hidden_size=model.hidden_size,
        vocab_size=draft_vocab,
        rms_norm_eps=model.rms_norm_eps,
        max_position_embeddings=model.max_position_embeddings,
        ropes=model.ropes[:1],
        layers=(LayerRun(1, layer),),
    )


def _mlp_width(model: ModelSpec) -> int:
    return next(part.width for part in only(model.layer(0), Linear) if part.name == "down")


def make_lessons(
    bundle: Path, manifest: Manifest, texts: Path, max_tokens: int
) -> Iterator[Lesson]:
    """Let the model read texts, and yield what it computes on the way for the head to learn."""
    tokenizer = Tokenizer(
        (bundle / "tokenizer.json").read_bytes(), manifest.tokens, str(bundle / "tokenizer.json")
    )
    path = bundle / "chat_template.jinja"
    template = None
    if path.name in manifest.files:
        template = ChatTemplate(decode_text(path.read_bytes()), manifest.tokens)
    capacity = min(max_tokens, manifest.rope_positions)
    graph = load_cpu_graph(bundle, manifest, capacity, fuse_attention=True, int8_activations=True)
    names = [io_spec.layer_output(i - 1) for i in layers_of(manifest.model) if i]
    shape = (io_spec.BATCH, io_spec.SEQ, manifest.model.hidden_size)
    for name in dict.fromkeys(names):
        add_output(graph, tensor_info(name, ELEMENT_NUMBERS["fp32"], shape))
    session = open_session(graph, bundle, manifest, None, int8_activations=True)
    table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
    documents = read_calibration_text(texts).documents
    for number, document in enumerate(documents, 1):
        ids = np.array(encode_document(tokenizer, template, document)[:capacity], np.int64)
        if len(ids) < _SHORTEST:
            continue
        embeds = table[ids[None]].astype(np.float32)
        logits, *streams = session.run([io_spec.LOGITS, *names], feeds(manifest, capacity, embeds))
        if 0 in layers_of(manifest.model):
            streams.insert(0, embeds)
        yield lesson(ids, streams, logits[0], first_own(tokenizer, template, document))
        if number % 50 == 0:
            say(f"{number} of {len(documents)} texts read")
    table.close()


def first_own(
    tokenizer: Tokenizer, template: ChatTemplate | None, document: Mapping[str, Any]
) -> int:
    """Return where the assistant's last turn begins in a chat's tokens; 0 for other texts."""
    messages = document.get("messages")
    if template is None or not messages or messages[-1].get("role") != "assistant":
        return 0
    return len(encode_chat(tokenizer, template, messages[:-1]))


def lesson(
    ids: NDArray[np.int64],
    streams: Sequence[NDArray[np.float32]],
    logits: NDArray[np.float32],
    first: int,
) -> Lesson:
    """Keep those of the model's numbers that count.

    Raises:
        ConfigError: float16 does not hold the hidden states, or they are not finite.
    """
    best = np.argpartition(logits, -BEST, axis=-1)[:, -BEST:]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, -1)), -1)
    top = np.exp(np.take_along_axis(logits, best, -1) - logits.max(axis=-1, keepdims=True))
    states = np.concatenate([stream[0] for stream in streams], axis=-1)
    largest = float(np.abs(states).max())
    if not largest <= float(np.finfo(np.float16).max):
        raise ConfigError(
            f"the model's hidden states reach {largest:g}, and a head learns from float16, which "
            "ends at 65504; this model gets no head here"
        )
    chances = top / top.sum(axis=-1, keepdims=True)
    return Lesson(ids, states.astype(np.float16), best.astype(np.int64), chances, first)


def feeds(manifest: Manifest, capacity: int, embeds: NDArray[np.float32]) -> dict[str, Any]:
    """Return the inputs of a step that reads a whole text."""
    model, dialect = manifest.model, io_spec.DIALECTS[manifest.dialect]
    count = embeds.shape[1]
    caches = {
        io_spec.PAST_PREFIX + name: np.zeros(spec.shape(1, capacity), np.float32)
        for name, spec in cache_tensors(model, "fp32").items()
    }
    return {
        io_spec.INPUTS_EMBEDS: embeds,
        io_spec.POSITION_IDS: all_tokens(count)[None],
        dialect.cursor: np.zeros(1, np.int64),
        io_spec.KV_POSITIONS: np.arange(dialect.rows_read([0], count)),
        io_spec.LOGITS_INDICES: all_tokens(count)[None],
        **caches,
    }


def choose_tokens(lessons: Sequence[Lesson], count: int, total: int) -> NDArray[np.int64]:
    """Return the tokens most often most probable, ascending, filled up with the first ones."""
    found = np.zeros(total)
    for each in lessons:
        np.add.at(found, each.best[:, 0], 1.0)
        np.add.at(found, each.ids, 0.5)
    order = np.argsort(-found, kind="stable")[:count]
    return np.sort(order).astype(np.int64)


def read_weights(
    bundle: Path, manifest: Manifest
) -> tuple[NDArray[np.float16], tuple[NDArray[np.float32], bool]]:
    """Read the token table; the weight of the final norm, and whether the table is the lm_head."""
    table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
    rows = table[np.arange(table.vocab_size)]
    table.close()
    graph = OnnxFile((bundle / manifest.graphs.cpu).read_bytes())
    norm = graph.external_tensors()["final_norm.weight"]
    with (bundle / norm.file).open("rb") as file:
        file.seek(norm.offset)
        weight = np.frombuffer(file.read(norm.num_bytes), np.float32)
    return rows, (weight, manifest.model.tied_embeddings)


def learn(
    head: HeadModule,
    lessons: Sequence[Lesson],
    minutes: float,
    ahead: int,
    learning_rate: float,
    batch_size: int,
    bfloat16: bool,
    seed: int,
) -> int:
    """Train until the time is over; return the steps of the optimizer.

    Raises:
        ConfigError: the loss became infinite or NaN.
    """
    import torch

    batches = make_batches([len(lesson.ids) for lesson in lessons], batch_size, seed)
    optimizer = torch.optim.AdamW(head.trained(), lr=learning_rate, betas=(0.9, 0.95))
    began, steps = time.process_time(), 0
    share, running = 0.0, 0.0
    while share < 1.0:
        chosen = [lessons[i] for i in next(batches)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(share / 0.03, 1.0, 1e-2 + math.cos(share * 1.5708))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses, _, _ = head.losses(chosen, ahead)
        loss = sum(each * _DECAY**k for k, each in enumerate(losses))
        assert isinstance(loss, torch.Tensor)
        if not loss.isfinite():
            raise ConfigError(
                f"the loss is {float(loss.detach())} after {steps} steps; give a lower "
                f"--learning-rate than {learning_rate:g}"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.trained(), 1.0)
        optimizer.step()
        steps += 1
        first = float(losses[0].detach())
        running = first if steps == 1 else running + 0.05 * (first - running)
        share = (time.process_time() - began) / (60 * minutes)
        if steps % 20 == 0:
            say(f"{steps} steps, {share:.0%} of the time, loss of the first guess {running:.3f}")
    return steps


def make_batches(lengths: Sequence[int], size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield batches of texts for ever, each text once a round; lengths are similar, to pad little.

    Which neighbours in length share a batch, and when, is drawn anew in each round.
    """
    rng = np.random.RandomState(seed)
    while True:
        nearly = np.array(lengths) * rng.uniform(0.9, 1.1, len(lengths))
        order = np.argsort(nearly, kind="stable")
        starts = np.arange(0, len(order), size)
        for start in rng.permutation(starts):
            yield order[start : start + size]


def measure(
    head: HeadModule, lessons: Sequence[Lesson], ahead: int, batch_size: int
) -> tuple[list[float], list[float]]:
    """Return the shares of places at which each guess is right, and at which all up to it are.

    Only places in the model's own turns count: a template's repetitions are easily guessed.
    """
    import torch

    right, chains, places = np.zeros(ahead), np.zeros(ahead), np.zeros(ahead)
    with torch.no_grad():
        for start in range(0, len(lessons), batch_size):
            some = lessons[start : start + batch_size]
            _, hits, inside = head.losses(some, ahead)
            guessed = torch.arange(hits[0].shape[1])[None] + 2  # by the first guess of a row
            own = guessed >= torch.tensor([each.first for each in some])[:, None]
            valid = [each & own for each in inside]
            chain = torch.ones_like(hits[0])
            for k in range(ahead):
                chain = chain & hits[k]
                right[k] += int((hits[k] & valid[k]).sum())
                chains[k] += int((chain & valid[k]).sum())
                places[k] += int(valid[k].sum())
    shares = np.maximum(places, 1)
    return (right / shares).tolist(), (chains / shares).tolist()


def rope_scaling(rope: RopeSpec) -> dict[str, Any] | None:
    """Write a config's ``rope_scaling``, from which `parse_config` reads this RoPE."""
    if rope.kind == "default":
        return None
    names = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor"),
    }[rope.kind]
    values: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.original_max_positions:
        values["original_max_position_embeddings"] = rope.original_max_positions
    return values | {name: getattr(rope, name) for name in names}


def write_head(
    output: Path,
    head: HeadModule,
    vocabulary: NDArray[np.int64],
    manifest: Manifest,
    layers: tuple[int, int, int],
) -> None:
    """Write config and weights as they are published.

    Raises:
        ConfigError: float16 does not hold a weight.
    """
    spec, model = head.spec, manifest.model
    weights = {name: value.astype(np.float16) for name, value in head.published().items()}
    for name, weight in weights.items():
        if not np.isfinite(weight).all():
            raise ConfigError(f"{name} is not finite in float16; give a lower --learning-rate")
    output.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.attentions()[0].heads,
        "num_key_value_heads": spec.attentions()[0].kv_heads,
        "head_dim": spec.attentions()[0].dim,
        "intermediate_size": _mlp_width(spec),
        "vocab_size": model.vocab_size,
        "draft_vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.ropes[0].theta,
        "rope_scaling": rope_scaling(spec.ropes[0]),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers)},
    }
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        name: TensorSource("F16", weight.shape, [weight]) for name, weight in weights.items()
    }
    chosen = np.isin(np.arange(model.vocab_size), vocabulary)
    offsets = vocabulary - np.arange(len(vocabulary))
    tensors["d2t"] = TensorSource("I64", offsets.shape, [offsets])
    tensors["t2d"] = TensorSource("BOOL", chosen.shape, [chosen])
    write_safetensors(output / "model.safetensors", tensors)


if __name__ == "__main__":
    run_main(main)
