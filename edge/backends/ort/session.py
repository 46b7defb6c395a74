"""Opens sessions of ONNX Runtime on a bundle's graphs, after checking their options."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from edge.bundle import io_spec
from edge.bundle.manifest import FloatType, Manifest
from edge.bundle.onnx_file import OnnxFile
from edge.device.process import choose_num_threads, count_usable_cpus
from edge.errors import BackendError, BundleError, ConfigError, DependencyError, install_command
from edge.model.cache import cache_tensors, check_cache

from .join_planes import hand_over
from .mapped_weights import lend

if TYPE_CHECKING:
    import onnxruntime

_log = logging.getLogger(__name__)
_EXACT_SINCE_SCHEMA = 3
_ROUNDS_INT8_WEIGHTS_SINCE = (1, 25)  # MatMulNBits with INT8 weights; with INT4 since 1.23


def check_sizes(
    manifest: Manifest, num_slots: int, kv_capacity: int | None, max_step_tokens: int
) -> int:
    """Check the sizes of a cache and of its steps, and return the rows per slot.

    Args:
        manifest: manifest of the bundle.
        num_slots: sequences that the cache holds.
        kv_capacity: rows per slot; None is the bundle's own.
        max_step_tokens: the most tokens per sequence and step.

    Raises:
        ConfigError: a number is out of range, or a cache tensor has no rows.
    """
    tensors = cache_tensors(manifest.model, manifest.dtype)
    check_cache(tensors, "can_cut", "a slot of ONNX Runtime")
    if num_slots < 1 or max_step_tokens < 1:
        raise ConfigError(
            f"num_slots ({num_slots}) and max_step_tokens ({max_step_tokens}) must be positive"
        )
    capacity = manifest.kv_capacity if kv_capacity is None else kv_capacity
    io_spec.check_capacity(capacity, manifest.rope_positions)
    return capacity


def check_threads(num_threads: int | None) -> None:
    """Refuse a number of CPU threads that this process has no CPUs for.

    Raises:
        ConfigError: it is out of range.
    """
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"num_threads ({num_threads}) must be positive; leave it open for all")
    cpus = count_usable_cpus()
    if num_threads is not None and num_threads > cpus:
        # They would spin and wait for each other; with thousands, no step ever ends.
        raise ConfigError(
            f"num_threads ({num_threads}) is more than the {cpus} CPUs that this process may use; "
            "leave it open for all"
        )


def load_graph(
    path: Path,
    manifest: Manifest,
    float_type: FloatType,
    capacity: int,
    *,
    hidden_states: bool = False,
) -> OnnxFile:
    """Read a decoder, give its cache ``capacity`` rows and check it against `io_spec`.

    Args:
        path: the graph.
        manifest: manifest of the decoder.
        float_type: float type of the graph.
        capacity: rows of the cache.
        hidden_states: whether to keep the output for a head; without it that is not computed.

    Raises:
        BundleError: its inputs and outputs are not those of `io_spec`.
    """
    graph = OnnxFile(path.read_bytes())
    cache = [
        value.name
        for value in [*graph.inputs, *graph.outputs]
        if value.name.startswith((io_spec.PAST_PREFIX, io_spec.PRESENT_PREFIX))
    ]
    graph.set_dimension(cache, 2, capacity)
    spec = (manifest.model, manifest.dialect, float_type, capacity, manifest.int8_layers)
    inputs = io_spec.decoder_inputs(*spec, manifest.embeds_width)
    if "adapters" in manifest.extras:
        from edge.adapters.graph_inputs import adapter_inputs

        inputs += adapter_inputs(manifest, float_type)
    for found, expected in (
        (graph.inputs, inputs),
        (graph.outputs, io_spec.decoder_outputs(*spec, manifest.hidden_width)),
    ):
        ours = [(value.name, value.dtype, value.shape) for value in found]
        theirs = [(value.name, value.dtype, value.shape) for value in expected]
        if ours != theirs:
            wrong = next(
                (pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]),
                (f"{len(ours)} tensors", f"{len(theirs)} tensors"),
            )
            raise BundleError(
                f"{path} does not fit the decoder's contract: found {wrong[0]}, expected "
                f"{wrong[1]}; export the bundle again with this edge-llm"
            )
    if not hidden_states:
        graph.remove_values([io_spec.HIDDEN_STATES])
        graph.prune()
    return graph


def open_session(
    graph: OnnxFile,
    bundle: Path,
    manifest: Manifest,
    num_threads: int | None,
    *,
    int8_activations: bool,
) -> onnxruntime.InferenceSession:
    """Open a session on the CPU.

    Args:
        graph: the graph, whose weights are beside it in ``bundle``.
        bundle: the bundle's directory.
        manifest: its manifest.
        num_threads: CPU threads; None is one per physical core (`choose_num_threads`).
        int8_activations: let MatMulNBits round activations to int8.

    Raises:
        DependencyError: `import_onnxruntime` finds none that is new enough.
        BackendError: ONNX Runtime refuses the graph.
    """
    ort = import_onnxruntime(manifest, "the CPU backend needs onnxruntime", "cpu")
    # Weights are packed in the order of the file, whatever runs first. The largest is packed first,
    # while the others do not take memory twice.
    model = graph.serialize(first="lm_head.weight")
    with lend(graph, bundle) as folder:
        options = session_options(ort, folder, manifest)
        hand_over(graph, ort, options)
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        # The arena grows in powers of two and never shrinks: 250 MB more resident at 1.5B.
        options.enable_cpu_mem_arena = False
        level = str(accuracy_level(int8_activations))
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(f"ONNX Runtime cannot load {bundle}: {error}") from error


def accuracy_level(int8_activations: bool) -> int:
    """Return MatMulNBits's number of the type that it computes with: 1 is fp32, 4 is int8."""
    return 4 if int8_activations else 1


def rounds_activations(manifest: Manifest) -> bool:
    """Whether the CPU rounds activations to int8 when it runs a bundle."""
    kinds = {linear.scheme.kind for linear in manifest.quantization.linears.values()}
    return not kinds.isdisjoint(("int4", "int8"))


def check_int8_activations(manifest: Manifest) -> None:
    """Refuse the option to round activations if it would change nothing.

    Raises:
        ConfigError: no linear layer of the bundle has integer weights and float inputs.
        DependencyError: this ONNX Runtime multiplies them in float regardless of the option.
    """
    schemes = [linear.scheme for linear in manifest.quantization.linears.values()]
    if any(scheme.kind == "int4" or scheme.planes for scheme in schemes):
        return
    if all(scheme.kind != "int8" for scheme in schemes):
        raise ConfigError(
            f"int8 activations have no effect on {manifest.name} ({manifest.quantization.name}): "
            "only inputs of INT8 or INT4 weights are rounded; leave the option out"
        )
    ort = import_onnxruntime(manifest, "int8 activations need onnxruntime", "cpu")
    if not multiplies_8_bits(ort):
        needed = _ROUNDS_INT8_WEIGHTS_SINCE
        raise DependencyError(
            f"int8 activations with INT8 weights in one piece, as older bundles have them, need "
            f"onnxruntime >= {needed[0]}.{needed[1]}; found {ort.__version__}, which multiplies "
            "them in float; upgrade it, export the model again, or leave the option out"
        )


def onnxruntime_version(ort: ModuleType) -> tuple[int, int]:
    """Return major and minor version of the module ``onnxruntime``."""
    major, minor = ort.__version__.split(".")[:2]
    return int(major), int(minor)


def multiplies_8_bits(ort: ModuleType) -> bool:
    """Whether MatMulNBits takes INT8 weights; in older versions they are dequantized."""
    return onnxruntime_version(ort) >= _ROUNDS_INT8_WEIGHTS_SINCE


def import_onnxruntime(manifest: Manifest, need: str, extra: str) -> ModuleType:
    """Import the module ``onnxruntime``.

    Args:
        manifest: manifest of the bundle that it will run.
        need: first words of the message if it is missing.
        extra: name of the extra to install then.

    Raises:
        DependencyError: it is missing or too old for the bundle's dialect.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise DependencyError(f"{need}; install it with: {install_command(extra)}") from error
    int8_cache = manifest.kv_cache is not None
    needed = io_spec.needed_onnxruntime(manifest.dialect, int8_cache=int8_cache)
    if onnxruntime_version(ort) < needed:
        what = f"dialect {manifest.dialect}{' with an 8-bit KV cache' if int8_cache else ''}"
        raise DependencyError(
            f"this bundle ({what}) needs onnxruntime >= "
            f"{needed[0]}.{needed[1]}, found {ort.__version__}; upgrade it, or export with "
            "--dialect portable"
        )
    module: ModuleType = ort
    return module


def session_options(
    ort: ModuleType, bundle: Path, manifest: Manifest
) -> onnxruntime.SessionOptions:
    """Make the options of every session on a bundle: quiet, exact, and able to find the weights."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = choose_num_threads()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.fspath(bundle.resolve())
    )
    schemes = [linear.scheme for linear in manifest.quantization.linears.values()]
    if any(scheme.kind == "w8a8" for scheme in schemes):
        # On x86 without VNNI the kernel for INT8 inputs adds pairs of products in 16 bits, where
        # they saturate. This selects another (onnxruntime_session_options_config_keys.h). It does
        # not run the INT8 in groups without zero points that old bundles hold.
        if manifest.schema_version < _EXACT_SINCE_SCHEMA:
            _log.warning(
                "%s: on an x86 CPU without VNNI its INT8 products are not exact; export it again",
                manifest.name,
            )
        else:
            options.add_session_config_entry("session.x64quantprecision", "1")
    return options
