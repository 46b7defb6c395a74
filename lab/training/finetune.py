"""Train a LoRA adapter on texts of a domain, for ``edge-llm export --lora``.

usage: scripts/finetune BASE TEXTS.jsonl -o ADAPTER [--epochs 3] [--learning-rate 2e-4] ...

BASE is anything that ``edge-llm export`` takes: a directory in Hugging Face's layout, a hub id or a
GGUF file. TEXTS is anything that ``--calibration`` takes: JSONL of ``{"text": ...}`` or
``{"messages": [...]}`` whose last turn is the assistant's, perhaps with ``reasoning``. Tokens are
those of the exported model, its chat template and control tokens included. Only a chat's last turn
is learned.

Every tenth text is held out; the loss on these before and after is printed, and the last line of
standard output is JSON. peft and transformers' Trainer do the work, on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge.errors import CheckpointError, ConfigError, DependencyError
from edge.text.chat_template import ChatTemplate, encode_chat
from edge.text.tokenizer import Tokenizer
from edge_make.checkpoint_tensors import expected_tensors
from export.sources.checkpoint import Checkpoint
from export.sources.documents import encode_document, read_calibration_text
from export.sources.lora import LoraCheckpoint
from export.sources.opening import open_checkpoint
from tools.command import run_main, say

NOT_LEARNED = -100  # the label that torch's cross entropy leaves out
HELD_OUT_EVERY = 10
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Example:
    """Tokens of one text.

    Attributes:
        ids: the tokens.
        labels: the tokens again, with `NOT_LEARNED` where one is not to be learned.
    """

    ids: list[int]
    labels: list[int]

    @property
    def num_learned(self) -> int:
        """Number of tokens that are learned; the first of a text is never predicted."""
        return sum(label != NOT_LEARNED for label in self.labels[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab finetune", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("texts", type=Path, metavar="TEXTS.jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ADAPTER")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=16, help="of the adapter; alpha is twice it")
    parser.add_argument("--batch-size", type=int, default=4, help="texts at once (default 4)")
    parser.add_argument(
        "--accumulate", type=int, default=2, help="batches per step of the optimizer (default 2)"
    )
    parser.add_argument("--max-tokens", type=int, default=1024, help="a longer text is cut")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = finetune(
        options.base,
        options.texts,
        options.output,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        rank=options.rank,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    say(
        f"loss on {report['texts_held_out']} held-out texts: {report['loss_before']:.3f} before, "
        f"{report['loss_after']:.3f} after\n"
        f"Go on with: edge-llm export {options.base} -o BUNDLE --lora {options.output} --quant int8"
    )
    print(json.dumps(report))


def finetune(
    base: str,
    texts: Path,
    output: Path,
    *,
    epochs: float,
    learning_rate: float,
    rank: int,
    batch_size: int,
    accumulate: int,
    max_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Train an adapter and write it in peft's layout.

    Args:
        base: the model, as for `open_checkpoint`.
        texts: texts to learn, some of which are held out.
        output: directory of the adapter; it must not exist, or be empty.
        epochs: how often each text is learned.
        learning_rate: highest learning rate, reached after a twentieth of the steps.
        rank: rank of the adapter's matrices.
        batch_size: texts at once.
        accumulate: batches per step of the optimizer.
        max_tokens: length to which longer texts are cut.
        seed: seed of the adapter's first values and of the order of the texts.

    Returns:
        Figures: texts, steps, and the mean loss per learned token of the held-out texts, in nats,
        before and after.

    Raises:
        ConfigError: a number is not above 0, the texts are too few, or ``output`` is not empty.
        CheckpointError: the base cannot be exported.
        DependencyError: torch, transformers or peft is missing.
    """
    for option, value in (
        ("epochs", epochs),
        ("learning-rate", learning_rate),
        ("rank", rank),
        ("batch-size", batch_size),
        ("accumulate", accumulate),
        ("max-tokens", max_tokens),
    ):
        if not 0 < value < math.inf:
            raise ConfigError(f"--{option} {value} must be a number above 0")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; give a new directory")
    documents = read_calibration_text(texts, option="TEXTS").documents
    with open_checkpoint(base) as checkpoint:
        name = checkpoint.name
        examples = encode(checkpoint, documents, max_tokens)
    held_out = examples[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    learned = [e for number, e in enumerate(examples, 1) if number % HELD_OUT_EVERY]
    if not held_out:
        raise ConfigError(
            f"{texts} has {len(examples)} texts with something to learn; give {HELD_OUT_EVERY} or "
            "more, of which every tenth is held out to measure with"
        )
    try:
        import peft
        import transformers
    except ImportError as error:
        raise DependencyError(f"{error.name} is missing; run scripts/finetune") from error
    transformers.set_seed(seed)
    with open_checkpoint(base) as checkpoint:
        model = load_model(base, checkpoint)
    before = mean_loss(model, held_out)
    say(f"{name}: {len(learned)} texts to learn; loss on {len(held_out)} others {before:.3f}")
    lora = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)
    num_steps = math.ceil(len(learned) / (batch_size * accumulate)) * epochs
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(output),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(num_steps / 20),
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=model.device.type == "cuda",
            label_names=["labels"],
            seed=seed,
        ),
        train_dataset=learned,
        data_collator=collate,
    )
    trained = trainer.train()
    after = mean_loss(model, held_out)
    model.save_pretrained(str(output))
    with open_checkpoint(base) as checkpoint, LoraCheckpoint(checkpoint, output):
        pass  # what export takes
    return {
        "base": name,
        "texts_learned": len(learned),
        "texts_held_out": len(held_out),
        "tokens_learned": sum(example.num_learned for example in learned),
        "steps": trained.global_step,
        "loss_before": round(before, 4),
        "loss_after": round(after, 4),
        "train_s": round(trained.metrics["train_runtime"], 1),
    }


def encode(
    checkpoint: Checkpoint, documents: Sequence[Mapping[str, Any]], max_tokens: int
) -> list[Example]:
    """Encode texts as the exported model reads and writes them.

    A text with nothing to learn within ``max_tokens`` is left out.

    Raises:
        RequestError: the chat template refuses a text's messages.
        ConfigError: a chat does not end with the assistant's turn, or the model has no template.
    """
    text = checkpoint.text
    tokenizer = Tokenizer.from_bytes(text.tokenizer_json, text.tokens)
    template = ChatTemplate(text.chat_template, text.tokens) if text.chat_template else None
    bos = [text.tokens.bos] if text.tokens.add_bos and text.tokens.bos is not None else []
    examples = []
    for number, document in enumerate(documents, 1):
        given = 0
        if "messages" in document:
            messages = document["messages"]
            if template is None:
                raise ConfigError(f"{checkpoint.name} has no chat template; give plain texts")
            if not messages or messages[-1].get("role") != "assistant":
                raise ConfigError(
                    f"text {number} does not end with the assistant's turn, which is what is "
                    "learned; python3 -m lab distill lets a teacher answer"
                )
            given = len(encode_chat(tokenizer, template, messages[:-1]))
        ids = [*([] if given else bos), *encode_document(tokenizer, template, document)]
        labels = [*[NOT_LEARNED] * given, *ids[given:]]
        example = Example(ids[:max_tokens], labels[:max_tokens])
        if example.num_learned:
            examples.append(example)
    return examples


def load_model(base: str, checkpoint: Checkpoint) -> Any:
    """Load the model in PyTorch, in bf16 if there is a GPU.

    Its weights are the ones that ``edge-llm export`` reads, so the adapter fits the model that it
    is merged into; transformers itself does not train a model that it loaded from a GGUF file.
    """
    import torch
    import transformers

    path = Path(base)
    options = {"gguf_file": path.name} if path.is_file() else {}
    config = transformers.AutoConfig.from_pretrained(
        str(path.parent) if path.is_file() else base, **options
    )
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {
        name: torch.from_numpy(checkpoint.tensor(name).astype(np.float32)).to(dtype)
        for name in expected_tensors(checkpoint.spec)
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if checkpoint.spec.tied_embeddings else set()
    if set(missing) != tied or unexpected:
        raise CheckpointError(
            f"transformers {transformers.__version__} has other weights for {checkpoint.name} than "
            f"export reads: {sorted({*missing, *unexpected} - tied)[:3]}"
        )
    model.tie_weights()
    return model.to("cuda" if gpu else "cpu")


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Make a batch of texts, padded at the end: ``[batch, longest]`` each."""
    import torch

    longest = max(len(example.ids) for example in examples)

    def padded(rows: Sequence[list[int]], value: int) -> Any:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([example.ids for example in examples], 0),
        "attention_mask": padded([[1] * len(example.ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], NOT_LEARNED),
    }


def mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """Compute the mean negative log-probability of all learned tokens, in nats."""
    import torch

    model.eval()
    total = 0.0
    with torch.inference_mode():
        for example in examples:
            batch = {name: value.to(model.device) for name, value in collate([example]).items()}
            total += example.num_learned * float(model(**batch).loss)
    return total / sum(example.num_learned for example in examples)


if __name__ == "__main__":
    run_main(main)
