"""Time a bundle's cold start on the CPU beside ONNX Runtime's own session on the same graph.

usage: bench_start.py BUNDLE [--rounds 7] [--num-threads N] [--prompt TEXT]

Both read the bundle with one prompt and choose one token, greedily, each time in a fresh process
and in turns. A first round fills the page cache and does not count. Seconds are from the start of
the process to the token, CPU seconds are all that it has used by then, and ratios are medians of
the rounds' ratios. The session is as plain as can be: the graph by its path, weights in their
files, activations rounded to int8 as edge-llm does it, rows of the token table by NumPy, and no
file hashed. Prints a table, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from edge import __version__
from edge.bundle.manifest import read_manifest
from edge.errors import EdgeError

PROMPT = "Explain in two or three plain sentences why the sky is blue at noon and red at sunset."

_SAY = """
import json, os, sys
def say(text, prompt_tokens):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    used = os.times()
    memory = [int(status[name].split()[0]) / 1024 for name in ("VmHWM", "VmRSS")]
    print(json.dumps([text, prompt_tokens, sum(used[:4]), *memory]), flush=True)
bundle, threads, capacity, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
"""

_EDGE_LLM = """
from edge import LLM, SamplingParams
llm = LLM(bundle, backend="ort-cpu", num_threads=threads or None, kv_capacity=capacity)
for chunk in llm.stream(prompt, SamplingParams(max_tokens=1, temperature=0)):
    last = chunk
say(last.text, last.stats.prompt_tokens)
llm.close()
"""

# Inputs as docs/design.md has them ("The graph contract").
_SESSION = """
import numpy as np, onnxruntime as ort
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(f"{bundle}/tokenizer.json")
ids = tokenizer.encode(prompt).ids
options = ort.SessionOptions()
options.intra_op_num_threads = threads
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
path = f"{bundle}/decoder.cpu.onnx"
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
with open(f"{bundle}/embeddings.safetensors", "rb") as file:
    header = int.from_bytes(file.read(8), "little")
    table = json.loads(file.read(header))
def tensor(name):
    entry = table[name]
    dtype = {"F16": np.float16, "I8": np.int8, "F32": np.float32}[entry["dtype"]]
    place = {"offset": 8 + header + entry["data_offsets"][0], "shape": tuple(entry["shape"])}
    return np.memmap(f"{bundle}/embeddings.safetensors", dtype, "r", **place)
rows = tensor("token_embeddings")[ids].astype(np.float32)
if "token_embeddings.scale" in table:
    rows *= tensor("token_embeddings.scale")[ids][:, None]
n = len(ids)
types = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
feed = {
    "inputs_embeds": rows[None],
    "position_ids": np.arange(n)[None],
    "write_indices": np.zeros(1, np.int64),
    "past_lengths": np.zeros(1, np.int64),
    "kv_positions": np.arange(n),
    "logits_indices": np.array([[n - 1]]),
}
made = {each.name for each in session.get_outputs()}
binding = session.io_binding()
for each in session.get_inputs():
    if not each.name.startswith("past_key_values."):
        binding.bind_cpu_input(each.name, feed[each.name])
        continue
    cache = np.zeros((1, *each.shape[1:]), types[each.type])
    value = ort.OrtValue.ortvalue_from_numpy(cache)
    binding.bind_ortvalue_input(each.name, value)
    present = each.name.replace("past_key_values", "present")
    if present in made:  # updated in place
        binding.bind_ortvalue_output(present, value)
binding.bind_output("logits")
session.run_with_iobinding(binding)
logits = binding.copy_outputs_to_cpu()[-1]
say(tokenizer.decode([int(logits[0, 0].argmax())]), n)
"""
PROGRAMS = {"edge-llm": _EDGE_LLM, "ONNX Runtime's session": _SESSION}


class Start(NamedTuple):
    """One process up to its first token."""

    text: str
    prompt_tokens: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    resident_mib: float


def main() -> None:
    """Parse, measure in turns, print."""
    parser = argparse.ArgumentParser(
        "python3 -m lab bench-start", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-threads", type=int, default=0, help="0: one per physical core")
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be positive")
    try:
        found = measure(options.bundle, options.rounds, options.num_threads, options.prompt)
    except EdgeError as error:
        parser.error(str(error))
    print(table(found))
    result = {
        "bundle": options.bundle.name,
        "edge_llm": __version__,
        "num_threads": options.num_threads,
        "loadavg": round(os.getloadavg()[0], 2),
        "starts": {name: [start._asdict() for start in starts] for name, starts in found.items()},
    }
    print(json.dumps(result))


def measure(bundle: Path, rounds: int, threads: int, prompt: str) -> dict[str, list[Start]]:
    """Start each program once to warm up, then ``rounds`` times in turns."""
    manifest = read_manifest(bundle)
    if manifest.graphs.cpu != "decoder.cpu.onnx" or manifest.model.task != "generate":
        raise SystemExit(f"{bundle} is no bundle that generates on a CPU; give one that does")
    arguments = [str(bundle.resolve()), str(threads), str(manifest.kv_capacity), prompt]
    found: dict[str, list[Start]] = {name: [] for name in PROGRAMS}
    for number in range(rounds + 1):
        names = list(PROGRAMS) if number % 2 else list(PROGRAMS)[::-1]
        for name in names:
            start = _start(PROGRAMS[name], arguments)
            if number:
                found[name].append(start)
    lengths = {start.prompt_tokens for starts in found.values() for start in starts}
    if len(lengths) > 1:
        raise SystemExit(f"both should read the same prompt, and they read {lengths} tokens of it")
    return found


def _start(program: str, arguments: list[str]) -> Start:
    command = [sys.executable, "-c", _SAY + program, *arguments]
    root = Path(__file__).resolve().parents[2]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
    if process.returncode or not line:
        raise SystemExit(f"a process ended with {process.returncode}; what it said is above")
    text, prompt_tokens, *used = json.loads(line)
    return Start(text, prompt_tokens, seconds, *used)


def table(found: dict[str, list[Start]]) -> str:
    """Write the medians of each program, and of the ratios of each round, in Markdown."""
    columns = {
        "s": "seconds",
        "CPU s": "cpu_seconds",
        "peak MiB": "peak_mib",
        "resident MiB": "resident_mib",
    }
    lines = [f"| | {' | '.join(columns)} | token |", "|---|---|---|---|---|---|"]
    for name, starts in found.items():
        values = [median(getattr(start, field) for start in starts) for field in columns.values()]
        text = [f"{value:.2f}" for value in values[:2]] + [f"{value:,.0f}" for value in values[2:]]
        lines.append(f"| {name} | {' | '.join(text)} | {starts[0].text!r} |")
    ours, theirs = found.values()
    ratios = [
        median(
            getattr(mine, field) / getattr(other, field)
            for mine, other in zip(ours, theirs, strict=True)
        )
        for field in columns.values()
    ]
    lines.append(f"| ratio | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
