"""Time the first token after a picture, in edge-llm and in llama.cpp's mtmd, in turns.

usage: python3 -m lab vision-peer CHECKPOINT [--repeats 5] [--threads 1] [-o PEER.json]

CHECKPOINT is one that `python3 -m lab train-vision` made. Its decoder is kept, and its encoder
gives way to one of SmolVLM-256M's shape with random weights, whose answers mean nothing and whose
time is that of the real one. Both sides get INT8 weights of decoder and encoder, and one picture
that becomes five tiles. llama.cpp is compiled here. Run this where the dependency group ``parity``
and sentencepiece are.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from edge.errors import EdgeError
from edge_lab.telemetry import read_cpu_name
from tools.command import run_main, say

from .peers import LLAMA_CPP_PYTHON, build_llama_cpp

TILES = 5  # two by two, and the whole picture
QUESTION = "What colour is it?"
ENCODER = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        "python3 -m lab vision-peer", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--repeats", type=int, default=5, help="of each; default 5")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--work", type=Path, default=Path(".peers"), help="default .peers")
    parser.add_argument("-o", "--output", type=Path, metavar="PEER.json")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    llama = build_llama_cpp(work, ("llama-mtmd-cli",))
    wide, bundle, photo = work / "wide", work / "wide-int8", work / "photo.png"
    widen(options.checkpoint, wide)
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(noise).resize((1000, 1000)).save(photo)
    models = convert(wide, work)
    quant = ("--quant", "int8", "--vision-quant", "int8", "--no-verify", "--force")
    _run(sys.executable, "-m", "edge.cli", "export", wide, "-o", bundle, *quant)
    ours, theirs = [], []
    for _ in range(options.repeats):
        theirs.append(ask_llama(llama / "llama-mtmd-cli", models, photo, options.threads))
        say(f"llama.cpp: {theirs[-1]}")
        ours.append(ask_edge_llm(bundle, photo, options.threads))
        say(f"edge-llm: {ours[-1]}")
    report = {
        "cpu": read_cpu_name(),
        "threads": options.threads,
        "repeats": options.repeats,
        "tiles": TILES,
        "llama_cpp_python": LLAMA_CPP_PYTHON,
        "edge_llm": {**medians(ours), "runs_ttft_s": [round(run["ttft_s"], 3) for run in ours]},
        "llama_cpp": {**medians(theirs), "runs_ttft_s": [run["ttft_s"] for run in theirs]},
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report))


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the runs."""
    return {name: round(median(run[name] for run in runs), 3) for name in runs[0]}


def widen(checkpoint: Path, output: Path) -> None:
    """Write a checkpoint with the same decoder and an encoder of SmolVLM-256M's shape."""
    import torch
    import transformers

    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config["vision_config"].update(ENCODER)
    config["text_config"]["architectures"] = ["VLlama3ForCausalLM"]  # llama.cpp asks for it
    given = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    made = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16
    )
    made.model.text_model.load_state_dict(given.model.text_model.state_dict())
    made.lm_head.load_state_dict(given.lm_head.state_dict())
    made.save_pretrained(output)
    for name in ("chat_template", "generation_config", "tokenizer", "tokenizer_config"):
        shutil.copy(checkpoint / f"{name}.json", output)
    rows = (ENCODER["image_size"] // ENCODER["patch_size"] // config["scale_factor"]) ** 2
    # One step below SmolVLM's 2,048 pixels: 5 tiles instead of 17 keep a run below a minute.
    sizes = {"max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 1024}}
    changes: dict[str, dict[str, Any]] = {
        "preprocessor_config": sizes,
        "processor_config": {"image_seq_len": rows},
    }
    for name, changed in changes.items():
        read = json.loads((checkpoint / f"{name}.json").read_text("utf-8"))
        (output / f"{name}.json").write_text(json.dumps({**read, **changed}), "utf-8")
    (output / "config.json").write_text(json.dumps(config), "utf-8")


def convert(checkpoint: Path, work: Path) -> tuple[Path, Path]:
    """Decoder and encoder as GGUF files in Q8_0, by llama.cpp's own script."""
    source = work / f"llama_cpp_python-{LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"
    decoder, encoder = work / "decoder.gguf", work / "encoder.gguf"
    command = (sys.executable, source / "convert_hf_to_gguf.py", checkpoint, "--outtype", "q8_0")
    _run(*command, "--outfile", decoder)
    _run(*command, "--mmproj", "--outfile", encoder)
    return decoder, encoder


def ask_llama(
    program: Path, models: tuple[Path, Path], photo: Path, threads: int
) -> dict[str, float]:
    """Run llama.cpp on the picture and read its log by `read_llama`."""
    decoder, encoder = models
    said = _run(
        program, "-m", decoder, "--mmproj", encoder, "--image", photo, "-p", QUESTION,
        "-t", threads, "-n", 1, "--temp", 0, "-c", 4096, "--jinja", "--perf", "-lv", 4,
    )  # fmt: skip
    return read_llama(said)


def read_llama(said: str) -> dict[str, float]:
    """Read llama.cpp's log; its time of the prompt has that of the encoder in it.

    Returns:
        Seconds until the first token from the decoded picture, those of the encoder among them,
        and the tokens of the prompt.

    Raises:
        EdgeError: the log says nothing of them, or of another number of tiles.
    """
    tiles = re.findall(r"mtmd batch encoding done in (\d+) ms", said)
    prompt = re.search(r"prompt eval time = +([\d.]+) ms / +(\d+) tokens", said)
    if prompt is None or len(tiles) != TILES:
        raise EdgeError(
            f"llama.cpp encoded {len(tiles)} tiles, not {TILES}, or gave no time: {said[-2000:]}"
        )
    return {
        "ttft_s": float(prompt[1]) / 1000,
        "vision_s": sum(map(int, tiles)) / 1000,
        "prompt_tokens": int(prompt[2]),
    }


def ask_edge_llm(bundle: Path, photo: Path, threads: int) -> dict[str, float]:
    """Run ``edge-llm bench --image``; its times leave out decoding the picture, as llama.cpp's."""
    said = _run(
        sys.executable, "-m", "edge.cli", "bench", bundle, "--image", photo,
        "--image-tiles", TILES - 1, "--num-threads", threads, "--repeats", 1,
        "--prompt-tokens", 16, "--output-tokens", 2, "--json",
    )  # fmt: skip
    picture = json.loads(said.splitlines()[-1])["picture"]
    if picture["tiles"] != TILES:
        raise EdgeError(f"edge-llm cut the picture into {picture['tiles']} tiles, not {TILES}")
    return {
        "ttft_s": picture["ttft_s"] - picture["decode_s"],
        "vision_s": picture["vision_s"],
        "prompt_tokens": picture["prompt_tokens"],
    }


def _run(*command: object) -> str:
    """Run a command; returns its stdout, and stderr before it.

    Raises:
        EdgeError: it failed.
    """
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, check=False, errors="replace")
    if done.returncode:
        raise EdgeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stderr + done.stdout


if __name__ == "__main__":
    run_main(main)
