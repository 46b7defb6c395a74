"""Defines `EngineConfig`: every option of the engine, with type, range, default and description.

`edge.LLM`, the scheduler, the backends, the service and the command line all read this class. Its
fields are their options, keys and flags, and a field's text in the docstring is the help of its
flag. A new option is added here and where it takes effect.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypedDict

from msgspec import Meta

from .errors import ConfigError
from .settings_fields import FINDER, Section, check_fields, unknown_name

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

BackendName = Literal["auto", "tensorrt", "ort-cuda", "ort-cpu"]
Prefill = Literal["plain", "int8"]
GpuWait = Literal["auto", "spin", "yield", "block"]
GPU_BACKENDS = ("tensorrt", "ort-cuda")
INT8_PREFILL_TOKENS = 16
"""Tokens of a sequence in one step from which on ``prefill`` int8 uses the INT8 products."""
LEAST_CHUNK = 3
"""Shortest limit of a step that runs no token alone: an odd number is twos and one three."""
_DRAFT_TOKENS = 5
EAGLE3 = Path("eagle3")
"""The `EngineConfig.draft` that means the bundle's own head."""
_Positive = Annotated[int, Meta(ge=1)]
_Count = Annotated[int, Meta(ge=0)]


def _find_draft(text: str, base: Path) -> Path:
    if text == str(EAGLE3):
        return EAGLE3
    from .bundle.library import find_setting

    return find_setting(text, base)


class EngineOptions(TypedDict, total=False):
    """The fields of `EngineConfig` as keyword arguments, for type checkers and editors."""

    backend: BackendName
    kv_capacity: int | None
    num_threads: int | None
    gpu_wait: GpuWait
    prefill: Prefill
    prefill_chunk: int
    int8_activations: bool | None
    deterministic: bool
    num_slots: int
    max_batch: int | None
    queue_capacity: int
    target_itl_ms: float | None
    reuse_prefix: bool
    overflow: Literal["stop", "slide"]
    draft: str | Path | None
    speculative: int | None
    prefix_dir: str | Path | None
    stop_when_sure: float | None
    trusted_keys: str | Path | None
    image_tiles: int | None


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a bundle is opened and its answers are computed.

    Attributes:
        backend: engine that runs the bundle. auto takes the bundle's TensorRT engine, which must
            work if the machine has a GPU; else ONNX Runtime on a CUDA GPU, else on the CPU.
        kv_capacity: tokens that prompt and answer may take together; by default the bundle's own
            capacity, or as much of it as fits into memory.
        num_threads: CPU threads; if set, auto takes the CPU. By default one per physical core that
            this process may use.
        gpu_wait: how the thread that runs a TensorRT engine waits for the end of a step. spin asks
            again and again, yield lets other threads run in between, and block sleeps until the GPU
            interrupts: it wakes up latest, but frees its CPU. auto keeps the mode that this process
            uses already. Else it is spin if the process may run on four CPUs or more, and yield if
            not. With any other value than auto the backend auto takes TensorRT; without TensorRT it
            is refused.
        prefill: int8 makes the CPU read prompts two to three times as fast. It rounds activations
            to int8 and holds a second copy of the weights, one byte each; it is refused if memory
            does not suffice. plain multiplies as in decode.
        prefill_chunk: most prompt tokens per step; an engine may take fewer. Drafts need 2 or more,
            prefill int8 16.
        int8_activations: let the CPU round activations to int8, its fastest kernel; by default
            wherever it can. Off is many times slower, but exact. On is refused if nothing can be
            rounded; GPU engines never round.
        deterministic: on the CPU, give a request the same answer to the bit whatever else runs,
            however its prompt is cut and whatever is cached. Rows of earlier answers are then
            not used again, and nothing is drafted.
        num_slots: sequences that the KV cache has room for: running ones, and ended ones whose rows
            are kept.
        max_batch: sequences that are computed at once; by default one per slot. More than a
            TensorRT engine was built for (build --max-batch) take turns.
        queue_capacity: sequences that may wait for a slot. One more is refused, by the service with
            429; the same limit holds for new answer formats that are being prepared.
        target_itl_ms: milliseconds between two tokens of a stream that must be kept. Fewer
            sequences are then computed at once, and prompts get the time that is left. By default
            all slots are used, and a prompt runs at nine tenths of the speed that it has alone.
        reuse_prefix: keep the cache rows of ended sequences for later prompts that begin alike.
        overflow: what happens when a slot of the cache is full. stop ends the answer; slide drops
            old tokens, except the first ones, and continues.
        draft: a smaller bundle with the same tokenizer that drafts tokens (on the command line and
            in settings also by its name), or eagle3 for the bundle's own head. It drafts only where
            that is measured to pay, and changes no answer. It takes memory of its own, with as many
            slots.
        speculative: most drafted tokens per step; the engine drafts fewer where fewer are measured
            to pay. They come from draft, or without one from repetitions in the text. 0 drafts
            none; by default 0, or 5 with draft.
        prefix_dir: directory of prefixes that edge-llm cache build stored; prompts that begin with
            one of them load its rows.
        stop_when_sure: end a thought once trials at its paragraphs give the same answer twice, each
            with at least this probability, e.g. 0.9. Trials run in free slots, so it takes two
            slots or more; a request may set its own value. By default thoughts end by themselves.
        trusted_keys: file of minisign public keys; a bundle that none of them has signed is not
            opened. By default the file that EDGE_LLM_TRUSTED_KEYS names, or
            /etc/edge-llm/trusted-keys if it exists; without any, every bundle is opened.
        image_tiles: most tiles that a picture is cut into, beside the one that shows it whole. Each
            takes as many tokens as the others and shows more detail. By default 1 on a CPU, and on
            a GPU as many as the model was trained with. Only for bundles that read pictures.

    Raises:
        ConfigError: a value has a wrong type or is out of its range, or two exclude each other.
    """

    backend: BackendName = "auto"
    kv_capacity: _Positive | None = None
    num_threads: _Positive | None = None
    gpu_wait: GpuWait = "auto"
    prefill: Prefill = "plain"
    prefill_chunk: _Positive = 512
    int8_activations: bool | None = None
    deterministic: bool = False
    num_slots: _Positive = 4
    max_batch: _Positive | None = None
    queue_capacity: _Count = 64
    target_itl_ms: Annotated[float, Meta(gt=0)] | None = None
    reuse_prefix: bool = True
    overflow: Literal["stop", "slide"] = "stop"
    draft: Path | None = dataclasses.field(default=None, metadata={FINDER: _find_draft})
    speculative: _Count | None = None
    prefix_dir: Path | None = None
    stop_when_sure: Annotated[float, Meta(gt=0, le=1)] | None = None
    trusted_keys: Path | None = None
    image_tiles: _Count | None = None

    SECTIONS: ClassVar[dict[Section, tuple[str, ...]]] = {
        "Engine": (
            "backend", "num_threads", "prefill", "draft", "speculative", "stop_when_sure",
            "image_tiles",
        ),
        "Memory": ("kv_capacity", "num_slots", "overflow", "prefix_dir"),
        "Expert": (
            "gpu_wait", "prefill_chunk", "int8_activations", "deterministic", "max_batch",
            "queue_capacity", "target_itl_ms", "reuse_prefix", "trusted_keys",
        ),
    }  # fmt: skip
    """Says in which section of a verb's help each option is shown."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_batch is not None and self.max_batch > self.num_slots:
            raise ConfigError(
                f"max_batch is {self.max_batch}, but there are {self.num_slots} slots; raise "
                "num_slots, or leave max_batch open for one per slot"
            )
        if self.deterministic:
            self._check_deterministic()
        if self.draft is not None and self.speculative == 0:
            raise ConfigError(
                f"draft is {self.draft}, but speculative is 0, which drafts nothing: leave one out"
            )
        if self.max_draft_tokens and self.prefill_chunk < 2:
            raise ConfigError(
                f"prefill_chunk is {self.prefill_chunk}, so no step has room for a drafted token: "
                "raise it, or leave speculative and draft out"
            )
        if self.prefill == "int8" and self.prefill_chunk < INT8_PREFILL_TOKENS:
            raise ConfigError(
                f"prefill_chunk is {self.prefill_chunk}, and prefill int8 multiplies steps of "
                f"{INT8_PREFILL_TOKENS} tokens and more: raise it, or leave prefill out"
            )
        wish = self.cpu_option
        if wish is not None and self.backend in GPU_BACKENDS:
            raise ConfigError(
                f"{wish} is for ort-cpu, and {self.backend} computes on the GPU: leave one out"
            )
        if self.gpu_option is not None and (wish is not None or self.backend.startswith("ort-")):
            raise ConfigError(
                f"{self.gpu_option} is for tensorrt, and {wish or self.backend} is not: leave one "
                "out"
            )

    def _check_deterministic(self) -> None:
        for given, option, why in (
            (self.prefill == "int8", "prefill int8", "rounds a token by those beside it"),
            (self.max_draft_tokens, "speculative or draft", "computes tokens in steps of several"),
            (self.prefix_dir, "prefix_dir", "brings rows that another process computed"),
            (self.stop_when_sure, "stop_when_sure", "tries answers in slots that are free"),
        ):
            if given:
                raise ConfigError(
                    f"{option} {why}, so answers are not deterministic: leave one of the two out"
                )
        if self.prefill_chunk < LEAST_CHUNK:
            raise ConfigError(
                f"prefill_chunk is {self.prefill_chunk}; deterministic cuts prompts into chunks of "
                f"two tokens or more, which takes {LEAST_CHUNK}"
            )

    @property
    def cpu_option(self) -> str | None:
        """Return the name of a set option that only the CPU can honour; None if there is none."""
        if self.num_threads is not None:
            return "num_threads"
        if self.prefill == "int8":
            return "prefill"
        if self.deterministic:
            return "deterministic"
        return "int8_activations" if self.int8_activations else None

    @property
    def gpu_option(self) -> str | None:
        """Return the name of a set option that only TensorRT can honour; None if there is none."""
        return None if self.gpu_wait == "auto" else "gpu_wait"

    @property
    def drafts_with_head(self) -> bool:
        """Whether the bundle's own head drafts."""
        return self.draft == EAGLE3

    @property
    def max_draft_tokens(self) -> int:
        """Return the most drafted tokens per step: `speculative`, or its default."""
        if self.speculative is None:
            return 0 if self.draft is None else _DRAFT_TOKENS
        return self.speculative

    @property
    def target_itl_s(self) -> float | None:
        """Return `target_itl_ms` in seconds."""
        return None if self.target_itl_ms is None else self.target_itl_ms / 1e3

    def with_options(self, **options: Unpack[EngineOptions]) -> Self:
        """Return the same configuration with other values.

        Raises:
            ConfigError: an option is unknown, and the message names the nearest known one; or a
                value is refused, as in the class.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise unknown_name(f"the engine has no option {name!r}", name, known)
        # A text for draft, prefix_dir or trusted_keys becomes a path when it is checked.
        return dataclasses.replace(self, **options)  # type: ignore[arg-type]
