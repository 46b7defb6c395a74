"""Reads a bundle's ``engines/<name>/``, and decides whether the engine may be loaded here.

``engine.json`` says what the plan was built from and for. A plan is executable code: its hash is
checked before TensorRT sees a byte of it, and `engine_records` decides whose engines are read at
all. A plan's file name contains its hash, so replacing ``engine.json`` replaces the engine in one
step.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import mmap
import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edge.errors import BundleError, IntegrityError, install_command
from edge.files import MALFORMED, drop_cached, read_file
from edge.model.parts import Rows

from . import io_spec
from .manifest import ENGINES_DIR, Count, Line, Manifest, Sha256
from .profile_layers import ProfileLayers
from .sizes import ALIGNMENT, ProfileName, StepLimits

ENGINE_JSON = "engine.json"
_MAX_BYTES = 1 << 24
ENGINE_SCHEMA_VERSION = 1
Flavour = Literal["tensorrt", "tensorrt-rtx"]
KvRead = Literal["slice", "full", "lengths"]
Attention = Literal["fused", "decomposed", "own"]
Scales = Literal["stored", "fp32"]
Kernels = Literal["tensorrt", "own"]
Plugins = Literal["compiled", "python"]
PackedKernels = Annotated[bytes, msgspec.Meta(max_length=1 << 20)]  # base64 in JSON


def where_tensorrt_is_from(flavour: Flavour) -> str:
    """Say how to install TensorRT, for a `DependencyError`; running needs more than building."""
    if flavour == "tensorrt-rtx":
        return install_command("check")
    return (
        "on a Jetson it comes with JetPack (sudo apt install nvidia-jetpack; use a venv with "
        "--system-site-packages, and for running engines what docs/orin.md installs), "
        f"on a workstation: {install_command('tensorrt')}, which brings cuda-bindings for running "
        "engines"
    )


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every struct of ``engine.json``."""


class ShapeInfo(_Struct, frozen=True):
    """Least, usual and largest shape of an input in a profile."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class ProfileInfo(_Struct, frozen=True):
    """One optimization profile; its index in the engine is its place in the list."""

    name: ProfileName
    inputs: dict[str, ShapeInfo]

    @property
    def limits(self) -> StepLimits:
        """Return the most that one run takes.

        Raises:
            BundleError: the profile lacks an input of the graph.
        """
        try:
            batch, seq = self.inputs[io_spec.POSITION_IDS].max
            _, num_logits = self.inputs[io_spec.LOGITS_INDICES].max
        except (KeyError, ValueError) as error:
            raise BundleError(
                f"{ENGINE_JSON} has no shapes of {io_spec.POSITION_IDS} and "
                f"{io_spec.LOGITS_INDICES} in profile {self.name}; build the engine again"
            ) from error
        return StepLimits(self.name, batch, seq, num_logits)


class LayerCount(_Struct, frozen=True):
    """The number of layers of one kind and type."""

    kind: str
    dtype: str
    count: int


class WeightBytes(_Struct, frozen=True):
    """Number of linear layers that store their weights in one type, and their bytes."""

    dtype: str
    count: int
    num_bytes: int


class RefusedRung(_Struct, frozen=True):
    """A variant that TensorRT refused before it built the engine.

    Attributes:
        kv_read: how attention was to read the cache.
        attention: requested kind of attention (`EngineInfo`); None if nothing can be requested.
        reason: TensorRT's reason.
        scales: ``stored``, or ``fp32`` if the scales of INT8 inputs were widened.
        kernels: ``own`` if edge-llm's kernels were to compute the products of few bits.
    """

    kv_read: KvRead
    attention: Attention | None
    reason: str
    scales: Scales = "stored"
    kernels: Kernels = "tensorrt"

    @property
    def label(self) -> str:
        """Describe the variant in a few words."""
        return _label(self)


class TunedRung(_Struct, frozen=True):
    """A variant that was built and tried on the device.

    Attributes:
        kv_read: how attention reads the cache.
        attention: requested kind of attention (`EngineInfo`); None if nothing can be requested.
        decode_s: median time of a decode step in seconds; None if it was not timed.
        problem: why it is not usable; None if its answers are right.
        scales: ``stored``, or ``fp32`` if the scales of INT8 inputs were widened.
        kernels: ``own`` if edge-llm's kernels compute the products of few bits.
        prefill_s: median time of a prompt of 256 tokens in seconds; None if it was not timed.
    """

    kv_read: KvRead
    attention: Attention | None
    decode_s: float | None
    problem: str | None
    scales: Scales = "stored"
    kernels: Kernels = "tensorrt"
    prefill_s: float | None = None

    @property
    def label(self) -> str:
        """Describe the variant in a few words."""
        return _label(self)


class SkippedTactics(_Struct, frozen=True):
    """Kernels that TensorRT did not try, because too little GPU memory was free.

    Attributes:
        count: number of kernels.
        largest_bytes: largest request of one of them.
        available_bytes: least memory available at such a request; None if TensorRT did not say.
    """

    count: Annotated[int, msgspec.Meta(ge=1)]
    largest_bytes: Count
    available_bytes: Count | None

    def __str__(self) -> str:
        had = self.available_bytes
        free = "" if had is None else f", {had / 1e6:,.0f} MB were free"
        largest = f"{self.largest_bytes / 1e6:,.0f} MB"
        return f"tactics skipped for lack of memory: {self.count:,} ({largest} asked for{free})"


def _label(rung: RefusedRung | TunedRung) -> str:
    wide = ", FP32 scales" if rung.scales == "fp32" else ""
    own = ", own kernels" if rung.kernels == "own" else ""
    return f"{rung.kv_read}, {rung.attention}{wide}{own}"


class OutsideTensor(_Struct, frozen=True):
    """A weight that an engine takes as an input: type, shape, and its first byte in the file."""

    dtype: io_spec.ElementType
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)]
    offset: Count

    @property
    def end(self) -> int:
        """Return the offset after its last byte."""
        return self.offset + math.prod(self.shape) * io_spec.ELEMENT_BYTES[self.dtype]


class OutsideWeights(_Struct, frozen=True):
    """Weights in a file beside the plan, in the layout that they have in device memory.

    Attributes:
        file: name of the file.
        tensors: inputs of the engine by name.
    """

    file: Line
    num_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
    sha256: Sha256
    tensors: dict[Line, OutsideTensor]


class EngineInfo(_Struct, frozen=True):
    """The content of ``engine.json``.

    Attributes:
        key: hash of everything that the plan depends on; the same key is the same engine.
        plan: the plan's file name.
        compute_capability: compute capability of the GPU it was built for, e.g. ``8.7``.
        device: the GPU's name; None if it was compiled without one.
        num_sms: streaming multiprocessors that were on; None without a GPU, and in older engines.
        jetpack, l4t: versions of the Jetson that built it.
        sources: SHA-256 of the graph and of its weights.
        kv_buckets: numbers of cache rows that a step may read (see ``kv_read``), ascending.
        kv_read: ``slice``, ``full`` or ``lengths``.
        options: build options that `rebuild_command` repeats.
        profiles: optimization profiles in the order of the engine.
        builder: ``api`` or ``trtexec``.
        peak_memory_bytes: peak of the build's resident memory; None if it was not measured.
        weights, layers: summary of the parsed network.
        attention: ``own`` if edge-llm's kernels compute the attentions of ``own_attentions``. Else
            ``fused`` if TensorRT had to make one kernel of each, or ``decomposed`` if it was free
            to choose. None in dialect ``portable``; not known of older engines.
        refused: variants that TensorRT refused before this one.
        tuned: variants that were built and tried; this engine is the fastest that is right.
        compiled: summary per profile of the compiled layers; all layers are in the file beside the
            plan (`engine_layers.read_layers`).
        compiled_unknown: why ``compiled`` is empty; None if it is not.
        scales: ``fp32`` if the scales of INT8 inputs were widened for this TensorRT, else
            ``stored``.
        best_logits: number of best logits of each row that have outputs of their own
            (`io_spec.best_outputs`); 0 for none.
        kernels: ``own`` if edge-llm's kernels compute the layers of ``own_linears``, else
            ``tensorrt``.
        own_linears: linear layers that own kernels compute.
        left_linears: with own kernels, layers that TensorRT computes all the same, and why;
            includes attentions, and the search for the best logits as ``top_k``.
        own_attentions: attentions that own kernels compute, such as ``layers.0.attention``.
        own_top_k: whether own kernels find the best logits; they do not in older engines.
        plugins: how own kernels are in the engine: ``compiled`` into the plan, or ``python``, whose
            launches `edge.backends.tensorrt.plugins` makes. None without own kernels; also in
            engines from before there were two kinds, which have the first.
        skipped_tactics: kernels that were not tried for lack of memory; None if there were none,
            and in older engines.
        power_mode, gpu_clocks_hz: the Jetson's power mode at the build, and the range in which the
            GPU's clock could move while kernels were timed.
        python_kernels: with ``python``, the kernels (`edge.backends.tensorrt.plugin_kernels.pack`).
        outside: weights that only own kernels read; None if all are in the plan, as in older
            engines and in those without own kernels.
        extras: sections of optional packages by name, as in the manifest.
    """

    schema_version: int
    producer: Line
    created: Line
    key: Line
    plan: Line
    plan_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
    plan_sha256: Sha256
    flavour: Flavour
    tensorrt_version: Line
    compute_capability: Line
    device: Line | None
    jetpack: Line | None
    l4t: Line | None
    sources: dict[Line, Line]
    max_batch: Rows
    max_prefill: Rows
    kv_capacity: Rows
    kv_buckets: Annotated[tuple[Rows, ...], msgspec.Meta(max_length=1000)]
    kv_read: KvRead
    options: dict[str, Any]
    profiles: tuple[ProfileInfo, ...]
    builder: Literal["api", "trtexec"]
    build_s: Annotated[float, msgspec.Meta(ge=0)]
    peak_memory_bytes: Count | None
    weights: tuple[WeightBytes, ...]
    layers: tuple[LayerCount, ...]
    attention: Attention | None = None
    refused: tuple[RefusedRung, ...] = ()
    tuned: tuple[TunedRung, ...] = ()
    compiled: tuple[ProfileLayers, ...] = ()
    compiled_unknown: str | None = None
    scales: Scales = "stored"
    best_logits: Annotated[int, msgspec.Meta(ge=0, le=io_spec.MOST_BEST_LOGITS)] = 0
    kernels: Kernels = "tensorrt"
    own_linears: tuple[Line, ...] = ()
    left_linears: dict[Line, Line] = {}
    plugins: Plugins | None = None
    python_kernels: tuple[PackedKernels, ...] = ()
    own_attentions: tuple[Line, ...] = ()
    own_top_k: bool = False
    num_sms: Count | None = None
    skipped_tactics: SkippedTactics | None = None
    power_mode: Line | None = None
    gpu_clocks_hz: tuple[int, int] | None = None
    outside: OutsideWeights | None = None
    extras: Annotated[dict[Line, dict[str, Any]], msgspec.Meta(max_length=64)] = {}

    @property
    def weights_bytes(self) -> int:
        """Return how many bytes are loaded: the plan's, and those of the weights outside it."""
        return self.plan_bytes + (self.outside.num_bytes if self.outside else 0)

    @property
    def buckets_read(self) -> tuple[int, ...]:
        """Return the ``kv_buckets`` in use; empty if attention reads only a sequence's rows."""
        left = any(name.endswith(".attention") for name in self.left_linears)
        if self.kv_read == "lengths" or (self.own_attentions and not left):
            return ()
        return self.kv_buckets


class _AnyEngine(msgspec.Struct):
    """The fields that are read from an engine of any version of edge-llm."""

    schema_version: int
    options: dict[str, Any] = {}


def read_engine_bytes(directory: Path) -> bytes:
    """Read ``engine.json`` without parsing it.

    Raises:
        BundleError: it is missing or cannot be read.
    """
    try:
        return read_file(directory / ENGINE_JSON, _MAX_BYTES)
    except OSError as error:
        raise BundleError(
            f"no engine at {directory}: cannot read {ENGINE_JSON} ({error.strerror}); "
            "build one with: edge-llm build BUNDLE"
        ) from error


def read_engine_info(directory: Path, trusted_keys: Path | None = None) -> EngineInfo:
    """Read ``engine.json``; the plan is hashed only by `open_plan`.

    Args:
        directory: the engine's directory.
        trusted_keys: file of public keys, if somebody has to vouch for the engine before it is
            parsed (`who_vouches`). None to look at any engine, and to run any on a machine without
            a policy.

    Raises:
        BundleError: it is missing, not JSON, or of another schema.
        UnvouchedError: nobody vouches for it.
        ConfigError: the file of trusted keys cannot be used.
    """
    data = read_engine_bytes(directory)
    if trusted_keys is not None:
        from .engine_records import who_vouches

        who_vouches(directory, data, trusted_keys)
    return decode_engine_info(directory, data)


def decode_engine_info(directory: Path, data: bytes) -> EngineInfo:
    """Parse the bytes of an ``engine.json``.

    Raises:
        BundleError: it is not JSON, or of another schema.
    """
    path = directory / ENGINE_JSON
    try:
        known = msgspec.json.decode(data, type=_AnyEngine)
    except MALFORMED as error:
        raise BundleError(f"{path} is damaged ({error}); build the engine again") from error
    again = f"build the engine again with: {rebuild_command(directory, known)}"
    if known.schema_version != ENGINE_SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {known.schema_version}, this edge-llm reads "
            f"{ENGINE_SCHEMA_VERSION}; install the edge-llm that wrote it, or {again}"
        )
    try:
        info = msgspec.json.decode(data, type=EngineInfo)
    except MALFORMED as error:
        if "unknown field" in str(error):  # adding a field does not change the version
            raise BundleError(
                f"{path} is of a newer edge-llm ({error}); install that one, or {again}"
            ) from error
        raise BundleError(f"{path} is damaged ({error}); {again}") from error
    outside = info.outside
    for name in (info.plan, *([outside.file] if outside else [])):
        if Path(name).name != name or name.startswith("."):
            raise BundleError(f"{path} names a file outside its directory; build the engine again")
    for name, tensor in outside.tensors.items() if outside else ():
        if tensor.offset % ALIGNMENT or tensor.end > outside.num_bytes:  # type: ignore[union-attr]
            raise BundleError(f"{path} is damaged (where is {name}?); {again}")
    return info


def read_outside(
    directory: Path, info: EngineInfo, outside: OutsideWeights, buffer: Any
) -> Iterator[tuple[int, Any]]:
    """Read the weights outside a plan piece by piece, and hash them on the way.

    On a Jetson the pieces are dropped from the page cache, which would fill the GPU's memory.

    Args:
        directory: the engine's directory.
        info: its ``engine.json``.
        outside: the field of ``info``.
        buffer: bytes, an array of them or a view. Pieces alternate between its halves, so each
            stays unchanged until the next but one is requested.

    Yields:
        The offset of a piece in the file, and the piece.

    Raises:
        IntegrityError: the file cannot be read or, once all of it is read, does not match
            ``engine.json``.
    """
    path, digest, size = directory / outside.file, hashlib.sha256(), 0
    again = f"build it again with: {rebuild_command(directory, info, again=True)}"
    middle = len(buffer) // 2
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            for half in itertools.cycle((buffer[:middle], buffer[middle:])):
                piece = half[: file.readinto(half[: outside.num_bytes - size])]
                if not len(piece):
                    break
                yield size, piece
                digest.update(piece)
                drop_cached(descriptor)
                size += len(piece)
            size = os.fstat(descriptor).st_size
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror}); {again}") from error
    if (size, digest.hexdigest()) != (outside.num_bytes, outside.sha256):
        raise IntegrityError(
            f"{path} is damaged: {size} bytes with SHA-256 {digest.hexdigest()[:16]}…, "
            f"{ENGINE_JSON} says {outside.num_bytes} with {outside.sha256[:16]}…; {again}"
        )


@contextmanager
def open_plan(directory: Path, info: EngineInfo) -> Iterator[mmap.mmap]:
    """Map the plan and hash the map, so that a later change at its path does not matter.

    On a Jetson, loading a plan takes its size of the GPU's memory a second time, and the page cache
    a third time. So cached pages are dropped before the plan is loaded and after.

    Raises:
        IntegrityError: it is missing, or has another size or hash than ``engine.json`` says.
    """
    path = directory / info.plan
    again = f"build it again with: {rebuild_command(directory, info)}"
    with ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            file = stack.enter_context(os.fdopen(descriptor, "rb"))
            size = os.fstat(descriptor).st_size
            plan = None
            if size == info.plan_bytes:  # an empty or endless file is never mapped
                stack.callback(drop_cached, descriptor)  # runs once it is no longer mapped
                plan = stack.enter_context(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
        except OSError as error:
            raise IntegrityError(f"{path} cannot be read ({error.strerror}); {again}") from error
        found = "-" if plan is None else hashlib.sha256(plan).hexdigest()
        if plan is None or found != info.plan_sha256:
            raise IntegrityError(
                f"{path} is damaged: {size} bytes with SHA-256 {found[:16]}…, "
                f"{ENGINE_JSON} says {info.plan_bytes} with {info.plan_sha256[:16]}…; {again}"
            )
        plan.madvise(mmap.MADV_DONTNEED)  # pages in use by this process are not dropped
        drop_cached(descriptor)
        yield plan


def check_engine(
    directory: Path,
    info: EngineInfo,
    manifest: Manifest,
    *,
    flavour: Flavour,
    tensorrt_version: str,
    compute_capability: str,
) -> None:
    """Refuse an engine of another graph, another TensorRT or another GPU.

    Args:
        directory: the engine's directory.
        info: its ``engine.json``.
        manifest: the bundle's manifest.
        flavour: which TensorRT is installed.
        tensorrt_version: its version, e.g. ``10.16.2.10``. Only parts that both versions have are
            compared, since ``trtexec`` and older records give three of the four.
        compute_capability: compute capability of this machine's GPU, e.g. ``8.7``.

    Raises:
        BundleError: it does not fit; the message has the command that rebuilds it.
    """
    found: list[tuple[str, str, str]] = []
    for name, sha256 in info.sources.items():
        current = manifest.files.get(name)
        if current is None or current.sha256 != sha256:
            found.append((f"another {name}", sha256[:12], current.sha256[:12] if current else "-"))
    if info.flavour != flavour or not versions_agree(info.tensorrt_version, tensorrt_version):
        theirs = f"{info.flavour} {info.tensorrt_version}"
        found.append(("another TensorRT", theirs, f"{flavour} {tensorrt_version}"))
    if info.compute_capability != compute_capability:
        found.append(("another GPU", f"sm {info.compute_capability}", f"sm {compute_capability}"))
    if found:
        what = "; ".join(f"{kind} ({theirs}, here {ours})" for kind, theirs, ours in found)
        raise BundleError(
            f"the engine {directory} was built for {what}; rebuild it with: "
            f"{rebuild_command(directory, info)}"
        )


def engine_rank(info: EngineInfo, num_slots: int) -> tuple[bool, int, int, str]:
    """Rank engines that fit a machine; the one with the greatest rank runs.

    Args:
        info: the engine's ``engine.json``.
        num_slots: sequences that will run at once.
    """
    enough = info.max_batch >= num_slots
    # The smallest batch that suffices, else the largest; then the longest cache.
    batch = -info.max_batch if enough else info.max_batch
    return enough, batch, info.kv_capacity, info.created


def rebuild_command(directory: Path, info: EngineInfo | _AnyEngine, *, again: bool = False) -> str:
    """Return the command line that builds this engine again, on the machine where it is typed.

    Args:
        directory: the engine's directory.
        info: its ``engine.json``.
        again: whether the command must also rebuild an engine that a build thinks is up to date.
    """
    parts = ["edge-llm", "build", str(directory.parent.parent)]
    for name, value in info.options.items():
        if value is None or value is False:
            continue
        if value is True:
            parts.append(f"--{name.replace('_', '-')}")
            continue
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        parts += [f"--{name.replace('_', '-')}", text]
    if again:
        parts.append("--again")
    return shlex.join(parts)


def find_engines(bundle: Path) -> list[Path]:
    """List the directories of the bundle's engines by name; unprintable names are left out."""
    found = (path.parent for path in (bundle / ENGINES_DIR).glob(f"[!.]*/{ENGINE_JSON}"))
    return sorted(directory for directory in found if directory.name.isprintable())


def no_engine(bundle: Path) -> BundleError:
    """Make the error for a bundle that has no engine."""
    return BundleError(
        f"{bundle} has no TensorRT engine; build one on this machine with: edge-llm build {bundle}"
    )


def versions_agree(*versions: str) -> bool:
    """Whether versions of TensorRT agree in all parts that they have in common."""
    parts = [version.split(".")[:4] for version in versions]
    return all(theirs == ours for theirs, ours in zip(*parts, strict=False))
