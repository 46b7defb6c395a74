"""Holds the options of a build; every number is checked before TensorRT is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge.bundle import io_spec
from edge.bundle.engine_file import Kernels, KvRead
from edge.bundle.manifest import Manifest
from edge.bundle.sizes import DEFAULT_WORKSPACE_BYTES, cache_element_bytes, check_slots
from edge.errors import ConfigError

KV_READS: tuple[KvRead, ...] = ("slice", "full", "lengths")
KvReadChoice = Literal["auto", "slice", "full", "lengths"]
AttentionChoice = Literal["auto", "fused", "decomposed", "own"]
TENSORRT_ATTENTIONS: tuple[AttentionChoice, ...] = ("auto", "fused", "decomposed")
ATTENTIONS: tuple[AttentionChoice, ...] = (*TENSORRT_ATTENTIONS, "own")
KernelChoice = Literal["auto", "own", "tensorrt"]
PluginChoice = Literal["auto", "aot", "python"]
PLUGINS: tuple[PluginChoice, ...] = ("auto", "aot", "python")
KERNELS: tuple[Kernels, ...] = ("tensorrt", "own")
"""Whose kernels, in the order they are tried: our fault on the GPU spoils no earlier engine."""
TIMINGS = 8
"""How often each tactic is timed, as in ``trtexec``. TensorRT's default of one picks tactics by
chance on a machine whose clocks follow the load."""

_MIN_WORKSPACE_BYTES = 1 << 20
_MAX_BATCH = 64
_SMALLEST_BUCKET = 256


@dataclass(frozen=True)
class BuildConfig:
    """Options of one engine.

    Attributes:
        bundle: the bundle's directory.
        max_batch: the most sequences per step.
        max_prefill: the most tokens per sequence and prefill step; longer prompts go in chunks.
        kv_capacity: cache rows per sequence; None takes the bundle's own.
        kv_buckets: numbers of cache rows that a step may read, ascending; the last one is the
            capacity. The runtime rounds up to them, so that one CUDA graph per bucket serves all
            steps. Empty means the powers of two from 256 on, and the capacity.
        kv_read: how attention reads the cache: ``slice`` (the first rows, up to the bucket),
            ``full`` (all rows under a mask, with one shape), ``lengths`` (each sequence's own
            length, inside TensorRT's attention; from TensorRT 11 on), or ``auto``, the first of
            these that TensorRT builds.
        attention: ``fused`` demands one kernel for all of an attention; ``decomposed`` allows
            several where TensorRT has no such kernel; ``own`` uses edge-llm's kernels and needs
            ``kernels="own"`` (docs/kernels.md); ``auto`` takes ``decomposed``, or with own kernels
            the first of ``own`` and ``decomposed`` that builds.
        kernels: ``own`` computes low-bit products, and attention as ``attention`` says, with
            edge-llm's kernels (docs/kernels.md); ``tensorrt`` uses TensorRT's; ``auto`` builds one
            engine with each, and keeps the faster one that answers right on this machine's GPU.
        plugins: how own kernels get into the engine: ``aot`` compiles them into it, which TensorRT
            supports from 10.13 on; ``python`` launches them from Python; ``auto`` takes the first
            of these that works.
        tune: build every variant that ``kv_read``, ``attention`` and ``kernels`` leave open, and
            keep the fastest one that answers right.
        workspace_bytes: scratch memory that a kernel may use.
        opt_level: 0 (fast build) to 5 (slow build, perhaps a faster engine).
        timing_cache: file with the timings of earlier builds; None is the one beside the engine.
        best_logits: number of best logits of each row to put out by themselves, so that the others
            stay on the device until someone asks; 0 puts out none.
        force: build even if the memory plan says that the engine will not fit.
        again: build even if the same engine is there already.
    """

    bundle: Path
    max_batch: int = 1
    max_prefill: int = 512
    kv_capacity: int | None = None
    kv_buckets: tuple[int, ...] = ()
    kv_read: KvReadChoice = "slice"
    attention: AttentionChoice = "auto"
    kernels: KernelChoice = "tensorrt"
    plugins: PluginChoice = "auto"
    tune: bool = False
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    opt_level: int = 3
    timing_cache: Path | None = None
    best_logits: int = 0
    force: bool = False
    again: bool = False

    @property
    def measures(self) -> bool:
        """Whether several engines are built and timed, to choose from."""
        return self.tune or self.kernels == "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch <= _MAX_BATCH:
            raise ConfigError(f"--max-batch {self.max_batch} is out of range: 1 to {_MAX_BATCH}")
        if self.max_prefill < 1:
            raise ConfigError(f"--max-prefill {self.max_prefill} is out of range: 1 or more tokens")
        if self.workspace_bytes < _MIN_WORKSPACE_BYTES:
            raise ConfigError(
                f"--workspace of {self.workspace_bytes} bytes is too small: 1 MiB or more"
            )
        if not 0 <= self.opt_level <= 5:
            raise ConfigError(f"--opt-level {self.opt_level} is out of range: 0 to 5")
        if self.kv_read not in ("auto", *KV_READS):
            raise ConfigError(f"--kv-read {self.kv_read} is none of auto, {', '.join(KV_READS)}")
        if self.attention not in ATTENTIONS:
            raise ConfigError(f"--attention {self.attention} is none of {', '.join(ATTENTIONS)}")
        if self.attention == "own" and self.kernels != "own":
            raise ConfigError("--attention own is for engines with own kernels; add --kernels own")
        if self.kernels not in ("auto", *KERNELS):
            raise ConfigError(f"--kernels {self.kernels} is none of auto, own, tensorrt")
        if self.plugins not in PLUGINS:
            raise ConfigError(f"--plugins {self.plugins} is none of {', '.join(PLUGINS)}")
        if self.plugins != "auto" and self.kernels == "tensorrt":
            raise ConfigError(
                f"--plugins {self.plugins} is for engines with own kernels; add --kernels own"
            )
        if not 0 <= self.best_logits <= io_spec.MOST_BEST_LOGITS:
            raise ConfigError(
                f"--best-logits {self.best_logits} is out of range: 0 to "
                f"{io_spec.MOST_BEST_LOGITS}; 256 decide nearly every token"
            )
        if self.kv_buckets and self.kv_read != "slice":
            raise ConfigError(
                f"--kv-buckets says how many rows the slice of the cache has, but --kv-read "
                f"{self.kv_read} has none, or may take another way; leave one of the two out"
            )
        ascending = all(a < b for a, b in zip(self.kv_buckets, self.kv_buckets[1:], strict=False))
        if not ascending or any(bucket < 1 for bucket in self.kv_buckets):
            raise ConfigError(
                f"--kv-buckets {_list(self.kv_buckets)} must be positive and ascending"
            )


@dataclass(frozen=True)
class BuildShapes:
    """The numbers of a `BuildConfig` that depend on the model, filled in and checked.

    Attributes:
        capacity: cache rows per sequence.
        kv_buckets: numbers of cache rows that a step may read; never empty, the last is
            ``capacity``.
        best_logits: number of best logits put out for each row, at most its length; 0 is none.
    """

    max_batch: int
    max_prefill: int
    capacity: int
    kv_buckets: tuple[int, ...]
    best_logits: int = 0


def resolve(config: BuildConfig, manifest: Manifest) -> BuildShapes:
    """Fill in the options for a model and check them against it.

    Raises:
        ConfigError: the capacity exceeds the RoPE table, or its slots exceed what TensorRT takes; a
            prefill step or a bucket does not fit the cache; the dialect cannot read the cache in
            this way; or the model draws no tokens, and an option is about drawing them.
    """
    capacity = manifest.kv_capacity if config.kv_capacity is None else config.kv_capacity
    io_spec.check_capacity(capacity, manifest.rope_positions)
    check_slots(manifest.model, capacity, cache_element_bytes(manifest))
    if config.max_prefill > capacity:
        raise ConfigError(
            f"--max-prefill {config.max_prefill} exceeds the KV capacity of {capacity} tokens; "
            f"give --max-prefill {capacity} or less, or a larger --kv-capacity"
        )
    if config.kv_read == "lengths" and manifest.dialect != "native":
        raise ConfigError(
            "--kv-read lengths needs TensorRT's own attention, which dialect "
            f"{manifest.dialect} does not use; export with --dialect native"
        )
    if config.attention not in ("auto", "own") and manifest.dialect != "native":
        raise ConfigError(
            f"--attention {config.attention} is about TensorRT's own attention, which dialect "
            f"{manifest.dialect} does not use; leave it out, or export with --dialect native"
        )
    if config.kv_read not in ("auto", "slice"):
        buckets: tuple[int, ...] = (capacity,)
    elif config.kv_buckets:
        buckets = config.kv_buckets
        if buckets[-1] != capacity:
            raise ConfigError(
                f"the last of --kv-buckets {_list(buckets)} must be the KV capacity, {capacity}"
            )
    else:
        buckets = default_kv_buckets(capacity)
    if manifest.model.task != "generate":
        for option, given, purpose in (
            (f"--best-logits {config.best_logits}", config.best_logits, "is for drawing tokens"),
            ("--tune", config.tune, "times decode steps"),
            ("--kernels auto", config.kernels == "auto", "times decode steps"),
        ):
            if given:
                raise ConfigError(
                    f"{option} {purpose}, and this bundle's task is to {manifest.model.task}; "
                    "leave the option out"
                )
    best = min(config.best_logits, manifest.model.vocab_size)
    return BuildShapes(config.max_batch, config.max_prefill, capacity, buckets, best)


def default_kv_buckets(capacity: int) -> tuple[int, ...]:
    """Return the powers of two from 256 on below the capacity, then the capacity itself."""
    buckets = []
    size = _SMALLEST_BUCKET
    while size < capacity:
        buckets.append(size)
        size *= 2
    return (*buckets, capacity)


def _list(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
