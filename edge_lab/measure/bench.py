"""Benchmarks an engine: prefill and decode apart, after a warm-up, many times.

The engine is driven through `edge.backends.Backend`, so every backend is measured alike, at any
batch and without a scheduler. A repeat prefills every slot, one after the other, then decodes all
slots together; prompts are random tokens, and no token ends an answer. The times include what a
user would notice: embedding rows are read from their file, tokens are sampled (temperature 0.6,
top-p 0.95). Only text is left out. `edge_lab.measure.bench_report` turns the samples into figures.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.backends.step import prefill, step_after
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.manifest import Manifest
from edge.errors import ConfigError
from edge.runtime.sampling import Sampler
from edge.runtime.sampling_params import SamplingParams
from edge_lab.telemetry import EnergyMeter
from edge_make.progress import Progress, silent

_METER_INTERVAL_S = 0.05


@dataclass(frozen=True)
class BenchConfig:
    """Settings of a benchmark.

    Attributes:
        prompt_tokens: tokens of each prompt.
        output_tokens: tokens sampled per sequence; the first one ends the prefill.
        repeats: measured runs.
        warmup: runs before them that are not counted.
        batch: sequences decoded together; the backend needs this many slots.
        seed: seed of the prompts and of sampling.
    """

    prompt_tokens: int = 512
    output_tokens: int = 128
    repeats: int = 5
    warmup: int = 1
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--prompt-tokens", self.prompt_tokens, 1),
            ("--output-tokens", self.output_tokens, 2),
            ("--repeats", self.repeats, 1),
            ("--warmup", self.warmup, 0),
            ("--batch", self.batch, 1),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{option} {value} is out of range: {least} or more")


def check_room(config: BenchConfig, capacity: int) -> None:
    """Refuse prompts and answers that a KV cache of ``capacity`` tokens has no room for.

    Raises:
        ConfigError: they are longer.
    """
    if config.prompt_tokens + config.output_tokens > capacity:
        raise ConfigError(
            f"--prompt-tokens {config.prompt_tokens} and --output-tokens {config.output_tokens} "
            f"exceed the KV capacity of {capacity} tokens; give less, or a larger --kv-capacity"
        )


@dataclass
class Samples:
    """Raw times and energies.

    Attributes:
        prefill_s: seconds of each prompt, up to its logits.
        ttft_s: seconds of each prompt, up to its first token.
        itl_s: seconds of each decode step, by repeat.
        decode_model_s: seconds of the decode steps inside the backend, by repeat.
        decode_cpu_s: CPU seconds of all threads of the process in the decode steps, by repeat.
        decode_joules, decode_watts: energy and power of each repeat's decode, where the module has
            power rails.
        prefill_joules: energy of each repeat's prefills.
    """

    prefill_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[list[float]] = field(default_factory=list)
    decode_model_s: list[float] = field(default_factory=list)
    decode_cpu_s: list[float] = field(default_factory=list)
    decode_joules: list[float] = field(default_factory=list)
    decode_watts: list[float] = field(default_factory=list)
    prefill_joules: list[float] = field(default_factory=list)


def run_bench(
    backend: Backend,
    embeddings: EmbeddingTable,
    manifest: Manifest,
    config: BenchConfig,
    *,
    make_meter: Callable[[], EnergyMeter] = lambda: EnergyMeter(interval_s=_METER_INTERVAL_S),
    progress: Progress = silent,
) -> Samples:
    """Run the benchmark and return its samples.

    Raises:
        ConfigError: the backend has too few slots or too small a cache.
        BackendError: the engine failed.
    """
    check_room(config, backend.capacity)
    if config.batch > backend.num_slots:
        raise ConfigError(
            f"--batch {config.batch} exceeds the {backend.num_slots} slots of backend "
            f"{backend.name}; give less"
        )
    samples = Samples()
    random = np.random.default_rng(config.seed)
    total = config.warmup + config.repeats
    for index in range(total):
        progress("bench", index, total, "runs")
        prompts = random.integers(
            0, manifest.model.vocab_size, (config.batch, config.prompt_tokens), dtype=np.int64
        )
        run = _Repeat(backend, embeddings, manifest, prompts, config)
        with make_meter() as prefill_meter:
            run.prefill()
        with make_meter() as decode_meter:
            run.decode()
        if index >= config.warmup:
            run.record(samples, prefill_meter, decode_meter)
    progress("bench", total, total, "runs")
    return samples


class _Repeat:
    """One prefill of every slot, and the decode of all of them."""

    def __init__(
        self,
        backend: Backend,
        embeddings: EmbeddingTable,
        manifest: Manifest,
        prompts: NDArray[np.int64],
        config: BenchConfig,
    ) -> None:
        self.backend, self.embeddings, self.prompts = backend, embeddings, prompts
        self.steps = config.output_tokens - 1
        self.samplers = [
            Sampler(
                SamplingParams(temperature=0.6, top_p=0.95, seed=config.seed + slot).resolve(
                    manifest.sampling
                ),
                manifest.model.vocab_size,
                prompt.tolist(),
            )
            for slot, prompt in enumerate(prompts)
        ]
        self.tokens = np.zeros(len(prompts), dtype=np.int64)
        self.prefill_s: list[float] = []
        self.ttft_s: list[float] = []
        self.itl_s: list[float] = []
        self.model_s = self.cpu_s = 0.0

    def prefill(self) -> None:
        for slot, prompt in enumerate(self.prompts):
            started = time.perf_counter()
            chunks = prefill(self.backend, self.embeddings, prompt, slot=slot)
            [(_, logits)] = deque(chunks, maxlen=1)
            self.prefill_s.append(time.perf_counter() - started)
            self.tokens[slot] = self.samplers[slot].sample(logits[0]).id
            self.ttft_s.append(time.perf_counter() - started)

    def decode(self) -> None:
        batch, length = self.prompts.shape
        slots, first = list(range(batch)), np.zeros((batch, 1), dtype=np.int64)
        forward = self.backend.forward_best or self.backend.forward  # as the scheduler does
        cpu_started = time.process_time()
        last = time.perf_counter()
        for index in range(self.steps):
            embeds = self.embeddings[self.tokens[:, None]]
            started = time.perf_counter()
            past = [length + index] * batch
            rows = forward(step_after(slots, past, embeds, first))
            self.model_s += time.perf_counter() - started
            for slot, sampler in enumerate(self.samplers):
                self.tokens[slot] = sampler.sample(rows[slot][0]).id
            now = time.perf_counter()
            self.itl_s.append(now - last)
            last = now
        self.cpu_s = time.process_time() - cpu_started

    def record(self, samples: Samples, prefill: EnergyMeter, decode: EnergyMeter) -> None:
        samples.prefill_s += self.prefill_s
        samples.ttft_s += self.ttft_s
        samples.itl_s.append(self.itl_s)
        samples.decode_model_s.append(self.model_s)
        samples.decode_cpu_s.append(self.cpu_s)
        if prefill.joules is not None:
            samples.prefill_joules.append(prefill.joules)
        if decode.joules is not None and decode.mean_watts is not None:
            samples.decode_joules.append(decode.joules)
            samples.decode_watts.append(decode.mean_watts)
