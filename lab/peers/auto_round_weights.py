"""Round a checkpoint's linear layers to INT4 by SignRound, with AutoRound itself.

usage: python3 -m lab auto-round-weights SOURCE OUTPUT [--group-size 32] [--iters 200] [--asym]
                                  [--calibration FILE] [--tokens 32768] [--seq-len 256] [--batch 8]

SOURCE is a GGUF file or a Hugging Face directory, OUTPUT a new directory with one in AutoRound's
own packing, whose name is printed, for ``edge-llm export`` and ``python3 -m lab quality
--checkpoint``. AutoRound (Cheng et al., arXiv 2309.05516) trains rounding offsets and clipping
ranges of a decoder layer's linears by signed gradients, 200 steps by default. It gets the text that
export calibrates GPTQ with, in the model's own chat format, so methods are compared on equal terms;
lm_head and embeddings stay floats. A model of 135M takes 23 minutes on two cores with AMX.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from auto_round import AutoRound

from edge.text.chat_template import ChatTemplate
from edge.text.tokenizer import Tokenizer
from export.sources.documents import calibration_batches, read_calibration_text
from export.sources.opening import open_checkpoint
from tools.command import run_main


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab auto-round-weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--iters", type=int, default=200, help="0 rounds to nearest")
    parser.add_argument("--asym", action="store_true", help="with zero points")
    parser.add_argument("--calibration", type=Path, help="by default the built-in, mixed text")
    parser.add_argument("--tokens", type=int, default=32768, help="of it, at most")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    options = parser.parse_args()
    if options.output.exists():
        sys.exit(f"error: {options.output} exists; remove it, or name another directory")
    ids = calibration_ids(options)
    model, tokenizer = read_floats(options.source)
    started, cpu = time.monotonic(), time.process_time()
    AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=options.group_size,
        sym=not options.asym,
        dataset=[
            {"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids[:, None]
        ],
        iters=options.iters,
        seqlen=options.seq_len,
        nsamples=len(ids),
        batch_size=options.batch,
        device_map="cpu",
        low_gpu_mem_usage=False,
        enable_torch_compile=False,
    ).quantize_and_save(str(options.output), format="auto_round")
    (config,) = options.output.rglob("config.json")
    print(
        f"{config.parent}: {ids.numel():,} tokens, {time.monotonic() - started:.0f} s, "
        f"{time.process_time() - cpu:.0f} CPU s"
    )


def calibration_ids(options: argparse.Namespace) -> torch.Tensor:
    """Encode the text as export does: token ids, int64 ``[sequences, seq_len]``."""
    text = read_calibration_text(options.calibration, mixed=True)
    with open_checkpoint(str(options.source)) as checkpoint:
        content = checkpoint.text
        tokenizer = Tokenizer.from_bytes(content.tokenizer_json, content.tokens)
        template = None
        if content.chat_template is not None:
            template = ChatTemplate(content.chat_template, content.tokens)
        ids = calibration_batches(tokenizer, template, text, options.tokens, options.seq_len)
        return torch.from_numpy(ids)


def read_floats(source: Path) -> tuple[Any, Any]:
    """Load the model in bf16, in which AutoRound trains on a CPU, and its tokenizer."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(source)}
    if source.is_file():
        place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    if source.is_file() and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # of the file, whose floats are here
    model.config.architectures = [type(model).__name__]
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**place)


if __name__ == "__main__":
    run_main(main)
