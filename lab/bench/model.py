"""Benchmark the exact shape of DeepSeek-R1-Distill-Qwen-1.5B on the CPU; prints one JSON line.

usage: bench_model.py [--quant int4] [--keep lm_head=int4] [--work DIRECTORY] [--repeats 5]

Weights are random: speed and memory do not depend on their values. Prefill, decode and the
runtime's own time are measured apart, as medians after a warm-up. The export runs in a process of
own, so its memory is not counted here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edge import LLM, SamplingParams, __version__
from edge.runtime.generation import GenerationStats
from edge_lab.prove.checkpoint import CONFIG, write_checkpoint
from tools.command import say

CONTEXT = 4000
NEW_TOKENS = 128


def main() -> None:
    """Parse, prepare, measure, print."""
    parser = argparse.ArgumentParser(
        "python3 -m lab bench", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--quant", choices=["fp16", "int8", "int4"], default="int4")
    parser.add_argument("--keep", default="lm_head=int8", metavar="PATTERN=SCHEME")
    parser.add_argument("--clip", choices=["absmax", "mse"], default="absmax")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="for models; 6 GB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--no-long", action="store_true", help=f"skip {CONTEXT} tokens of context")
    options = parser.parse_args()
    bundle, export = prepare(options)
    result = {
        "model": "DeepSeek-R1-Distill-Qwen-1.5B shape, random weights",
        "quant": options.quant,
        "keep": options.keep,
        "edge_llm": __version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **export,
        **measure(bundle, options),
        "loadavg": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(result))


def prepare(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Make the checkpoint and the bundle if they are missing."""
    checkpoint = options.work / "r1-1.5b-random"
    if not (checkpoint / "generation_config.json").exists():
        say("writing a random checkpoint of the 1.5B shape")
        write_checkpoint(checkpoint, CONFIG["num_hidden_layers"])
    bundle = options.work / f"r1-1.5b-{options.quant}-{options.keep}-{options.clip}".replace(
        "=", "-"
    ).replace("*", "all")
    if bundle.exists():
        return bundle, {}
    say(f"exporting {bundle}")
    command = [sys.executable, "-m", "edge.cli", "export", str(checkpoint), "-o", str(bundle)]
    command += ["--quant", options.quant, "--clip", options.clip]
    command += ["--keep", options.keep, "--kv-capacity", "8192", "--no-verify"]
    if options.quant == "int4":  # random weights have no quality; the groups of docs/benchmarks.md
        command += ["--method", "rtn", "--group-size", "128"]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - started
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return bundle, {"export_s": round(seconds, 1), "export_peak_mb": round(peak_kb / 1024)}


def measure(bundle: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Load, then prefill and decode at two lengths of context."""
    started = time.perf_counter()
    llm = LLM(bundle, num_threads=options.num_threads)
    load_s = time.perf_counter() - started
    loaded = memory_mb()
    random = np.random.default_rng(0)

    def run(num_prompt: int, num_new: int) -> GenerationStats:
        prompt = random.integers(300, 151000, num_prompt).tolist()
        params = SamplingParams(
            temperature=0.6, top_p=0.95, max_tokens=num_new, ignore_eos=True, seed=1
        )
        stats = None
        for chunk in llm.stream(prompt, params):
            stats = chunk.stats
        assert stats is not None
        assert stats.completion_tokens == num_new
        return stats

    with llm:
        run(128, 4)
        short = [run(128, NEW_TOKENS) for _ in range(options.repeats)]
        long_prompts = [run(512, 1) for _ in range(options.repeats)]
        result: dict[str, Any] = {
            "load_s": round(load_s, 2),
            "prefill_128_tps": round(median(s.prefill_tps for s in short), 1),
            "prefill_512_tps": round(median(s.prefill_tps for s in long_prompts), 1),
            "decode_128_tps": round(median(s.decode_tps for s in short), 2),
            "decode_128_tps_all": [round(s.decode_tps, 2) for s in short],
            "itl_128_ms": round(median(median(s.itl_s) for s in short) * 1e3, 2),
            "own_ms_per_token": round(
                median(s.own_s / s.completion_tokens for s in short) * 1e3, 3
            ),
            "resident_loaded_mb": loaded,
            "resident_mb": memory_mb(),
        }
        if not options.no_long:
            long = run(CONTEXT, 64)
            step_ms = median(long.itl_s) * 1e3
            result |= {
                f"prefill_{CONTEXT}_tps": round(long.prefill_tps, 1),
                f"itl_{CONTEXT}_ms": round(step_ms, 2),
                "itl_ratio": round(step_ms / result["itl_128_ms"], 2),
                f"resident_{CONTEXT}_mb": memory_mb(),
            }
    return result


def memory_mb() -> dict[str, int]:
    """Resident memory of this process now and at its peak, in MB (Linux)."""
    fields = ("VmRSS", "VmHWM", "RssAnon", "RssFile")
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[name].split()[0]) // 1024 for name in fields}


if __name__ == "__main__":
    main()
