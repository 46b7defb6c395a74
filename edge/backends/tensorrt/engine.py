"""Chooses a bundle's engine for this machine, and loads its plan.

Calls and their versions, checked against NVIDIA's bindings (python/src/infer/pyCore.cpp):
``create_execution_context(strategy)`` and ``set_optimization_profile_async`` since 10.0;
``device_memory_size_v2`` and ``set_device_memory(memory, size)`` since 10.1;
``get_aliased_input_tensor`` since 10.15. TensorRT for RTX has the same names.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge.bundle import io_spec
from edge.bundle.engine_file import (
    EngineInfo,
    Flavour,
    check_engine,
    engine_rank,
    find_engines,
    no_engine,
    open_plan,
    read_engine_info,
    rebuild_command,
    where_tensorrt_is_from,
)
from edge.bundle.manifest import Manifest
from edge.bundle.trust import trusted_keys_file
from edge.device.tensorrt_version import loaded_version
from edge.errors import BackendError, BundleError, DependencyError, DeviceMemoryError, EdgeError
from edge.model.cache import cache_tensors

from .listener import Listener, stoppable

if TYPE_CHECKING:
    from .layer_times import LayerTimes

_log = logging.getLogger(__name__)
_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_DTYPES = {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}
_DTYPES |= {name: name.upper() for name in ("int64", "int32", "int8")}


class ChosenEngine(NamedTuple):
    """An engine that fits this machine.

    Attributes:
        directory: directory of the engine.
        info: its ``engine.json``.
        module: ``tensorrt`` or ``tensorrt_rtx``.
    """

    directory: Path
    info: EngineInfo
    module: Any


def choose_engine(
    bundle: Path,
    manifest: Manifest,
    compute_capability: str,
    *,
    engine_dir: Path | None = None,
    num_slots: int | None = None,
    kv_capacity: int | None = None,
    trusted_keys: Path | None = None,
) -> ChosenEngine:
    """Find the engine of a bundle that this GPU and this TensorRT can run.

    On a machine with trusted keys, no engine is read unless somebody vouches for it.

    Args:
        bundle: the bundle's directory.
        manifest: its manifest.
        compute_capability: compute capability of this GPU.
        engine_dir: the only engine to consider; None considers all.
        num_slots: sequences that will run at once; engines with at least this batch come first.
        kv_capacity: KV capacity that the engine must have; None takes any.
        trusted_keys: the option, as `trusted_keys_file` takes it.

    Raises:
        BundleError: there is none, or none fits; the message has the command that builds one.
        ConfigError: the file of trusted keys cannot be used.
        DependencyError: TensorRT is missing.
    """
    directories = [engine_dir] if engine_dir is not None else find_engines(bundle)
    if not directories:
        raise no_engine(bundle)
    policy = trusted_keys_file(trusted_keys)
    fitting: list[ChosenEngine] = []
    problems: list[EdgeError] = []
    for directory in directories:
        try:
            info = read_engine_info(directory, policy)
            module = load_module(info.flavour)
            check_engine(
                directory,
                info,
                manifest,
                flavour=info.flavour,
                tensorrt_version=loaded_version(module),
                compute_capability=compute_capability,
            )
            if kv_capacity not in (None, info.kv_capacity):
                raise BundleError(
                    f"the engine {directory} has a KV capacity of {info.kv_capacity} tokens, "
                    f"{kv_capacity} were asked for; build one with: edge-llm build {bundle} "
                    f"--kv-capacity {kv_capacity} --max-batch {info.max_batch}"
                )
        except (BundleError, DependencyError) as error:
            problems.append(error)
        else:
            fitting.append(ChosenEngine(directory, info, module))
    if not fitting:
        more = f" ({len(problems) - 1} more engines do not fit either)" if problems[1:] else ""
        raise type(problems[0])(f"{problems[0]}{more}") from problems[0]
    if policy is not None and problems:
        from edge.bundle.engine_records import UnvouchedError

        for problem in problems:
            if isinstance(problem, UnvouchedError):
                _log.warning("%s", problem)
    return max(fitting, key=lambda engine: engine_rank(engine.info, num_slots or 1))


class Engine:
    """A deserialized engine.

    Args:
        chosen: the engine to load.
        manifest: manifest of the bundle.

    Attributes:
        activations_bytes: memory that one execution context needs while it runs.
        weights: addresses of the inputs that are weights (`EngineInfo.outside`); the code that
            opens the engine sets them.
        listener: collects TensorRT's messages, for `last_error`.

    Raises:
        IntegrityError: the plan is damaged; TensorRT has not seen it.
        BackendError: TensorRT refuses it, or it does not match ``engine.json``.
        DeviceError: the GPU is lost.
        DeviceMemoryError: it has too little memory for the weights.
        BundleError: its own kernels are damaged, or not all in ``engine.json``.
        DependencyError: TensorRT does not start, or the engine has own kernels that TensorRT or
            cuda-bindings do not run.
    """

    def __init__(self, chosen: ChosenEngine, manifest: Manifest) -> None:
        self.info, self._module = chosen.info, chosen.module
        self.listener = Listener(self._module)
        path = chosen.directory / chosen.info.plan
        with self.listener:
            self._runtime = self._start()
            with open_plan(chosen.directory, chosen.info) as plan, stoppable():
                if chosen.info.plugins == "python":
                    from .plugins import register_kernels

                    register_kernels(self._module, chosen.info)
                self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._refusal(chosen, path)
        self._check(chosen, manifest)
        self.weights: dict[str, int] = {}
        self.activations_bytes = int(self._engine.device_memory_size_v2)

    def _start(self) -> Any:
        """Make a runtime, with which TensorRT starts CUDA."""
        try:
            return self._module.Runtime(self.listener.logger)
        except TypeError as error:  # pybind11's, if TensorRT makes no runtime; it logs the reason
            raise DependencyError(
                f"TensorRT {self._module.__version__} does not start: "
                f"{self.listener.said or error}; edge-llm doctor looks for the cause"
            ) from error

    def _refusal(self, chosen: ChosenEngine, path: Path) -> EdgeError:
        """Make the error of a plan that TensorRT has not loaded; raise a plugin's own error."""
        from edge.backends.cuda.errors import (
            cure_for_memory,
            device_error,
            is_fatal,
            is_out_of_memory,
        )

        self.raise_failure()
        reason = self.last_error()
        if is_fatal(reason):
            return device_error(f"load {path.name}", BackendError(reason))
        if is_out_of_memory(reason):
            size = chosen.info.plan_bytes
            cure = "stop other programs, or export with --quant int4"
            return DeviceMemoryError(
                f"TensorRT has no memory for the {size / 1e6:,.0f} MB of {path.name}: "
                f"{reason}; {cure_for_memory(size, cure)}"
            )
        command = rebuild_command(chosen.directory, chosen.info, again=True)
        return BackendError(
            f"TensorRT cannot load {path}: {reason}; build it again with: {command}"
        )

    def _check(self, chosen: ChosenEngine, manifest: Manifest) -> None:
        """Compare names, types and profiles with the contract: wrong ones give wrong addresses."""
        engine, trt = self._engine, self._module
        capacity = chosen.info.kv_capacity
        spec = (manifest.model, manifest.dialect, manifest.dtype, capacity, manifest.int8_layers)
        inputs = io_spec.decoder_inputs(*spec)
        if "adapters" in manifest.extras:
            from edge.adapters.graph_inputs import adapter_inputs

            inputs += adapter_inputs(manifest, manifest.dtype)
        outputs = io_spec.decoder_outputs(*spec, best_logits=chosen.info.best_logits)
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        outside = chosen.info.outside.tensors if chosen.info.outside else {}
        inputs += [io_spec.TensorSpec(name, t.shape, t.dtype) for name, t in outside.items()]
        wanted = {tensor.name for tensor in [*inputs, *outputs]}
        # With lengths instead of a mask nothing reads the positions of the cache, and own attention
        # uses those of the tokens.
        optional = {io_spec.KV_POSITIONS} if chosen.info.kv_read == "lengths" else set()
        if chosen.info.own_attentions:
            optional |= {io_spec.KV_POSITIONS, io_spec.PAST_LENGTHS}
        problems = [f"no tensor {name}" for name in sorted(wanted - names - optional)]
        problems += [f"an unknown tensor {name}" for name in sorted(names - wanted)]
        for tensor in [*inputs, *outputs]:
            if tensor.name not in names:
                continue
            dtype = engine.get_tensor_dtype(tensor.name)
            if dtype != getattr(trt.DataType, _DTYPES[tensor.dtype]):
                problems.append(f"{tensor.name} is {dtype}, not {tensor.dtype}")
            if engine.get_tensor_location(tensor.name) != trt.TensorLocation.DEVICE:
                problems.append(f"{tensor.name} is wanted on the host")
            shape = tuple(engine.get_tensor_shape(tensor.name))
            if tensor.name in outside and shape != tensor.shape:
                problems.append(f"{tensor.name} is {list(shape)}, not {list(tensor.shape)}")
        if engine.num_optimization_profiles != len(chosen.info.profiles):
            problems.append(f"{engine.num_optimization_profiles} profiles")
        problems += self._check_aliases(manifest, names)
        if problems:
            raise BackendError(
                f"the engine {chosen.directory} is not the one that engine.json describes: "
                f"{'; '.join(problems[:3])}; build it again with: "
                f"{rebuild_command(chosen.directory, chosen.info, again=True)}"
            )
        self.tensors = frozenset(names)

    def _check_aliases(self, manifest: Manifest, names: set[str]) -> list[str]:
        find = getattr(self._engine, "get_aliased_input_tensor", None)
        dialect = io_spec.DIALECTS[manifest.dialect]
        if not dialect.in_place or find is None:
            return []
        pairs = [
            (dialect.new_prefix + name, io_spec.PAST_PREFIX + name)
            for name in cache_tensors(manifest.model, manifest.dtype)
        ]
        return [
            f"{output} is not updated in place"
            for output, past in pairs
            if output in names and find(output) != past
        ]

    def profile(self, name: str) -> int:
        """Return the index of an optimization profile."""
        return [profile.name for profile in self.info.profiles].index(name)  # type: ignore[arg-type]

    def last_error(self) -> str:
        """Return TensorRT's last message, and forget it."""
        text = "; ".join(self.listener.errors) or "it gives no reason"
        self.listener.errors.clear()
        return text

    def raise_failure(self) -> None:
        """Raise a plugin's error (`plugins.raise_failure`); only plugins in Python keep errors."""
        if self.info.plugins == "python":
            from .plugins import raise_failure

            raise_failure(self._module)

    def create_context(self) -> Any:
        """Make an execution context without device memory of its own.

        Raises:
            DeviceMemoryError: TensorRT cannot make one.
        """
        strategy = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        with self.listener, stoppable():
            context = self._engine.create_execution_context(strategy)
        if context is None:
            self.raise_failure()
            raise DeviceMemoryError(
                f"TensorRT cannot make an execution context: {self.last_error()}; free memory of "
                "the GPU, or build the engine with a smaller --max-batch or --max-prefill"
            )
        return context

    def make_profiler(self, times: LayerTimes) -> Any:
        """Make TensorRT's profiler for a context; it reports to ``times``."""
        from .layer_times import make_profiler

        return make_profiler(self._module, times)

    def close(self) -> None:
        """Free the weights; every context must be closed before."""
        self._engine = self._runtime = None


def load_module(flavour: Flavour) -> Any:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        DependencyError: it is missing, or cannot be loaded.
    """
    name = _MODULES[flavour]
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # also from its shared libraries
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        problem = "is not here" if missing else f"cannot be loaded ({error})"
        raise DependencyError(
            f"the engine needs {name}, which {problem}; {where_tensorrt_is_from(flavour)}"
        ) from error
