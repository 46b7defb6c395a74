"""Hides on the host what differs between TensorRT 10, 11 and RTX; nothing else imports TensorRT.

`support` says which version takes which feature.

=======================  ============================================================
since                    feature
=======================  ============================================================
10.0                     strongly typed networks, INT4 weights, progress monitor, ``IPluginV3``
10.13                    plugins in Python that are compiled into the engine: own kernels
10.14                    attention, and its ``decomposable`` mark
10.15                    rotary embedding, KV-cache update: dialect ``native``
11.0                     always strongly typed; attention v2 with lengths per sequence
TensorRT for RTX         compiles on a CPU for named GPUs; keeps no timing cache; no plugins
=======================  ============================================================
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.backends.tensorrt import plugins
from edge.backends.tensorrt.listener import Listener, stoppable
from edge.bundle import io_spec
from edge.bundle.engine_file import Attention, Flavour, KvRead, Plugins, where_tensorrt_is_from
from edge.device.tensorrt_version import loaded_version
from edge.errors import BuildError, ConfigError, DependencyError, EdgeError
from edge_make.engine_layers import told_profiles
from edge_make.progress import Progress
from engines.config import TIMINGS, PluginChoice
from engines.kernels import plugin, plugin_v3
from engines.kernels.own_plugins import element_types
from engines.kernels.package import Cubin, load_cubins, load_ptx
from engines.profiles import Profile

from .advice import build_advice, builder_cause, parser_advice, parser_cause
from .network import AttentionView, LayerView, NetworkView, TensorView
from .progress import PhaseTree
from .support import LENGTHS_SINCE, parse_release

_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_COMPILED_PLUGINS_SINCE = (10, 13)
_DTYPES = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT8": "int8",
    "INT4": "int4",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "FP8": "fp8",
    "UINT8": "uint8",
}


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT.

    Attributes:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        version: e.g. ``10.16.2.10``.
    """

    module: Any
    flavour: Flavour
    version: str

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        return parse_release(self.version)

    @property
    def label(self) -> str:
        """Short name for engine directories: ``trt10.16``, ``rtx1.7``."""
        short = "trt" if self.flavour == "tensorrt" else "rtx"
        return f"{short}{self.release[0]}.{self.release[1]}"

    @property
    def keeps_timings(self) -> bool:
        """Whether it has a timing cache (RTX picks kernels without timing them)."""
        return self.flavour == "tensorrt"


def load(flavour: Flavour | None = None) -> TensorRT:
    """Import TensorRT.

    Args:
        flavour: package to import; None tries ``tensorrt``, then ``tensorrt-rtx``.

    Raises:
        DependencyError: it is not installed, or cannot be loaded.
    """
    wanted: list[Flavour] = [flavour] if flavour else ["tensorrt", "tensorrt-rtx"]
    problem = ""
    for name in wanted:
        try:
            module = importlib.import_module(_MODULES[name])
        except ModuleNotFoundError as error:
            if error.name != _MODULES[name]:
                problem = f" (importing {_MODULES[name]} failed: {error})"
            continue
        except (ImportError, OSError, RuntimeError) as error:  # its shared libraries
            problem = f" (importing {_MODULES[name]} failed: {error})"
            continue
        return TensorRT(module, name, loaded_version(module))
    if flavour == "tensorrt-rtx":
        raise DependencyError(
            f"this needs TensorRT for RTX, which is not here{problem}; install it with: "
            f"{where_tensorrt_is_from('tensorrt-rtx')}"
        )
    raise DependencyError(
        f"building an engine needs TensorRT, which is not here{problem}; "
        f"{where_tensorrt_is_from('tensorrt')}"
    )


def plugins_of(rt: TensorRT, choice: PluginChoice = "auto") -> Plugins:
    """Choose the kind of plugin that own kernels become.

    Raises:
        DependencyError: this TensorRT compiles no plugins into its engines.
    """
    if choice == "python":
        return "python"
    if rt.release >= _COMPILED_PLUGINS_SINCE:
        return "compiled"
    if choice == "aot":
        raise DependencyError(
            f"--plugins aot needs TensorRT >= 10.13, found {rt.version}; leave it out: before, "
            "Python launches own kernels"
        )
    return "python"


def pack_own_kernels(rt: TensorRT, used: Iterable[tuple[str, int]]) -> tuple[bytes, ...]:
    """Pack own kernels as ``engine.json`` stores them.

    Args:
        rt: TensorRT after `register_own_kernels`.
        used: plugins in use, from `own_kernels.OwnGraph`.
    """
    return plugin_v3.registered_kernels(rt.module, used)


def register_own_kernels(rt: TensorRT, compute_capability: str, kind: Plugins | None = None) -> int:
    """Register own kernels with TensorRT as plugins.

    Python plugins get the GPU's machine code where we ship it, so that no start waits for the
    driver's compiler. Plugins that TensorRT compiles into engines are PTX, the only form that it
    takes (``tensorrt.plugin.aot_impl``: "Presently, only PTX is supported").

    Args:
        rt: a TensorRT that passed `check_own_kernels`.
        compute_capability: the GPU's compute capability, e.g. ``8.7``.
        kind: kind of plugin; None means the one that `plugins_of` chooses.

    Returns:
        The most bytes that each use of a kernel may add to a plan.

    Raises:
        DependencyError: this TensorRT's Python package lacks its plugins.
        IntegrityError: the kernels' files are missing or damaged.
    """
    kernels = load_ptx()
    if (kind or plugins_of(rt)) == "python":
        plugin_v3.register(rt.module, _machine_code(compute_capability) or kernels, kernels)
        return 0  # a number
    name = f"{_MODULES[rt.flavour]}.plugin"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise DependencyError(
            f"own kernels need {name}, which does not import here ({error}); build with "
            "--kernels tensorrt"
        ) from error
    plugin.register(module, kernels, element_types(rt.module))
    return max(len(kernel.text) for kernel in kernels.values())


def _machine_code(compute_capability: str) -> dict[str, Cubin] | None:
    try:
        return load_cubins(compute_capability)
    except DependencyError:
        return None  # we ship none for this GPU


def has_lengths(rt: TensorRT) -> bool:
    """Whether TensorRT's attention takes the length of each sequence."""
    return rt.flavour == "tensorrt-rtx" or rt.release >= LENGTHS_SINCE


class Compiler:
    """One network from parsing to a plan.

    Args:
        rt: TensorRT from `load`.
        log: called with the severity (``error``, ``warning``, ``info``) and text of every message
            of TensorRT.

    Raises:
        BuildError: TensorRT does not start.
    """

    def __init__(self, rt: TensorRT, log: Callable[[str, str], None]) -> None:
        self.rt = rt
        trt = rt.module
        self._listener = Listener(trt, log)
        flags = 0
        if rt.flavour == "tensorrt-rtx" or rt.release < (11, 0):
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        with self._listener:
            self._builder = _start(trt.Builder, self._listener, rt.version)
            self._network = self._builder.create_network(flags)
        if self._network is None:
            raise BuildError(f"TensorRT {rt.version} made no network: {self._listener.last_error}")

    def parse(
        self, graph: bytes, path: Path, kv_read: KvRead, attention: Attention | None = "decomposed"
    ) -> NetworkView:
        """Parse a graph and prepare its attentions.

        Args:
            graph: the ONNX file.
            path: the graph's path, which need not exist: external weights are found beside it.
            kv_read: ``lengths`` replaces each masked attention by one with lengths.
            attention: ``fused`` fails the build unless one kernel does all of an attention;
                ``decomposed`` lets TensorRT use several (10.16 on sm_87 has none for some shapes).

        Raises:
            BuildError: the parser refuses the graph; the message names node, operator and advice.
        """
        trt = self.rt.module
        with self._listener, stoppable():
            parser = trt.OnnxParser(self._network, self._listener.logger)
            if not parser.parse(graph, str(path)):
                self._raise_own_failure()
                problems = [parser.get_error(i) for i in range(parser.num_errors)]
                raise BuildError(self._explain(problems, path), parser_cause(problems))
            if kv_read == "lengths":
                self._attend_by_lengths()
            for each in self._attentions().values():
                each.decomposable = attention != "fused"
            return self.view()

    def build(
        self,
        profiles: Iterable[Profile],
        *,
        workspace_bytes: int,
        opt_level: int,
        timings: bytes | None,
        compute_capability: str | None,
        progress: Progress,
    ) -> tuple[Any, bytes | None]:
        """Compile the network into a plan.

        Args:
            profiles: optimization profiles in the engine's order.
            workspace_bytes: scratch memory that a kernel may use.
            opt_level: optimization level, 0 to 5.
            timings: timing cache of an earlier build, or None.
            compute_capability: GPU to compile for, e.g. ``8.6``; None is the GPU here. Only RTX
                compiles for another GPU.
            progress: called with the fraction done and, as its detail, TensorRT's phase.

        Returns:
            The plan (a buffer), and the timing cache or None.

        Raises:
            BuildError: TensorRT failed; the message has its last error.
            ConfigError: RTX does not compile for such a GPU.
        """
        trt = self.rt.module
        with self._listener, stoppable() as stopped:
            config = self._builder.create_builder_config()
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
            config.builder_optimization_level = opt_level
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
            if self.rt.keeps_timings:
                config.avg_timing_iterations = TIMINGS
            if compute_capability is not None and self.rt.flavour == "tensorrt-rtx":
                config.num_compute_capabilities = 1
                config.set_compute_capability(self._target(compute_capability), 0)
            for profile in profiles:
                ranges = self._builder.create_optimization_profile()
                for name, shape in profile.inputs.items():
                    ranges.set_shape(name, shape.min, shape.opt, shape.max)
                if config.add_optimization_profile(ranges) < 0:
                    raise BuildError(
                        f"TensorRT refuses the profile {profile.name}: {self._listener.last_error}"
                    )
            if self.rt.keeps_timings:
                cache = config.create_timing_cache(timings or b"")
                # A damaged cache, or another version's or GPU's, costs only time: start afresh.
                if cache is None or not config.set_timing_cache(cache, False):
                    config.set_timing_cache(config.create_timing_cache(b""), False)
            monitor = _make_monitor(trt, progress, stopped)
            config.progress_monitor = monitor
            plan = self._builder.build_serialized_network(self._network, config)
            if stopped.is_set():
                raise KeyboardInterrupt
            if plan is None:
                self._raise_own_failure()
                reason = self._listener.last_error
                raise BuildError(
                    f"TensorRT {self.rt.version} failed to build the engine: {reason}; "
                    f"{build_advice(reason, workspace_bytes)}",
                    builder_cause(reason),
                )
            written = None
            if self.rt.keeps_timings:
                written = bytes(memoryview(config.get_timing_cache().serialize()))
            return plan, written

    def view(self) -> NetworkView:
        """Read the network as plain data."""
        network = self._network
        layers = tuple(
            LayerView(
                layer.name,
                layer.type.name.lower(),
                tuple(_tensor(layer.get_input(i)) for i in range(layer.num_inputs)),
                tuple(_known(layer.get_output(i)) for i in range(layer.num_outputs)),
            )
            for layer in self._layers()
        )
        attentions = []
        for attention in self._attentions().values():
            if hasattr(attention, "causal_kind"):
                causal = attention.causal_kind.name.lower()
            else:
                causal = "upper_left" if attention.causal else "none"  # TensorRT 10
            lengths = getattr(attention, "key_value_lengths", None)
            attentions.append(
                AttentionView(
                    attention.name,
                    attention.get_output(0).name,
                    _tensor(attention.mask),
                    causal,
                    lengths.name if lengths is not None else None,
                )
            )
        return NetworkView(
            layers,
            tuple(attentions),
            tuple(_known(network.get_input(i)) for i in range(network.num_inputs)),
            tuple(_known(network.get_output(i)) for i in range(network.num_outputs)),
        )

    def _layers(self) -> Iterator[Any]:
        for i in range(self._network.num_layers):
            yield self._network.get_layer(i)

    def _attentions(self) -> dict[str, Any]:
        """Find attentions by their output; a network lists only their two ends."""
        found: dict[str, Any] = {}
        trt = self.rt.module
        if not hasattr(trt, "IAttention"):
            return found
        for layer in self._layers():
            if layer.type == trt.LayerType.ATTENTION_OUTPUT:
                layer.__class__ = trt.IAttentionOutputLayer  # the binding's own idiom
                attention = layer.attention
                found[attention.get_output(0).name] = attention
        return found

    def _attend_by_lengths(self) -> None:
        """Give attention the whole cache and each sequence's length instead of a mask.

        Query ``i`` of ``S`` then sees the rows up to ``length - S + i``: its own position, since
        ``length`` is ``write_index + S``.
        """
        trt, network = self.rt.module, self._network
        lengths = self._lengths()
        for attention in list(self._attentions().values()):
            query, scaled_key, value = (attention.get_input(i) for i in range(3))
            # The parser puts half of the scale on the keys; the cache itself must come in.
            key, factor = self._unscaled(scaled_key)
            if factor is not None:
                product = network.add_elementwise(query, factor, trt.ElementWiseOperation.PROD)
                query = product.get_output(0)
            softmax = trt.AttentionNormalizationOp.SOFTMAX
            new = network.add_attention_v2(
                query, key, value, softmax, trt.CausalMaskKind.LOWER_RIGHT
            )
            if new is None:
                raise BuildError(
                    f"TensorRT refuses {attention.name} with lengths: {self._listener.last_error}; "
                    "leave --kv-read out"
                )
            new.key_value_lengths = lengths
            new.name = f"{attention.name}/lengths"
            old = attention.get_output(0)
            for layer in self._layers():
                for i in range(layer.num_inputs):
                    tensor = layer.get_input(i)
                    if tensor is not None and tensor.name == old.name:
                        layer.set_input(i, new.get_output(0))

    def _lengths(self) -> Any:
        trt, network = self.rt.module, self._network
        inputs = {
            network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)
        }
        shape = network.add_shape(inputs[io_spec.POSITION_IDS]).get_output(0)
        seq = network.add_slice(shape, (1,), (1,), (1,)).get_output(0)
        total = network.add_elementwise(
            inputs[io_spec.WRITE_INDICES], seq, trt.ElementWiseOperation.SUM
        ).get_output(0)
        return network.add_cast(total, trt.int32).get_output(0)

    def _unscaled(self, tensor: Any) -> tuple[Any, Any]:
        trt = self.rt.module
        for layer in self._layers():
            if layer.num_outputs and layer.get_output(0).name == tensor.name:
                if layer.type == trt.LayerType.ELEMENTWISE:
                    return layer.get_input(0), layer.get_input(1)
                break
        return tensor, None

    def _target(self, compute_capability: str) -> Any:
        known = self.rt.module.ComputeCapability.__members__
        name = f"SM{compute_capability.replace('.', '')}"
        if name not in known:
            choices = ", ".join(sorted(n[2:] for n in known if n.startswith("SM")))
            raise ConfigError(
                f"TensorRT for RTX {self.rt.version} cannot compile for sm {compute_capability}; "
                f"it knows {choices}"
            )
        return known[name]

    def _raise_own_failure(self) -> None:
        """Raise what one of our plugins raised.

        Raises:
            DependencyError: cuda-bindings is missing.
            BuildError: anything else.
        """
        try:
            plugins.raise_failure(self.rt.module)
        except DependencyError:
            raise
        except EdgeError as error:
            raise BuildError(
                f"own kernels do not run while TensorRT {self.rt.version} builds: {error}"
            ) from error

    def _explain(self, problems: list[Any], path: Path) -> str:
        if not problems:
            return f"TensorRT's parser refuses {path}: {self._listener.last_error}"
        first = problems[0]
        more = f" ({len(problems) - 1} more such errors)" if len(problems) > 1 else ""
        name, operator = first.node_name(), first.node_operator()
        where = f"node {name!r}, operator {operator}" if operator else "the file as a whole"
        return (
            f"TensorRT {self.rt.version} cannot parse {path}: {where}: {first.desc()}{more}; "
            f"{parser_advice(operator)}"
        )


def inspect_plan(rt: TensorRT, plan: Any, num_profiles: int) -> list[str]:
    """Return the engine inspector's JSON for a plan, which is loaded for it and freed again.

    Args:
        rt: the TensorRT that built the plan.
        plan: the plan's bytes in any buffer, e.g. from `edge.bundle.engine_file.open_plan`.
        num_profiles: number of optimization profiles in the engine.

    Returns:
        One text with the layers of all profiles, or one text per profile.

    Raises:
        BuildError: this TensorRT does not start, cannot load the plan here, or lacks the memory
            for an execution context; the message has its reason.
        BundleError: the inspector lists no layers, or lists them without details.
    """
    trt = rt.module
    with Listener(trt, lambda _severity, _message: None) as listener, stoppable():
        runtime = _start(trt.Runtime, listener, rt.version)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BuildError(listener.last_error)
        inspector = engine.create_engine_inspector()
        form = trt.LayerInformationFormat.JSON
        whole = str(inspector.get_engine_information(form))
        if len(told_profiles(whole)) == num_profiles:
            return [whole]
        # Some versions show the profiles after the first one only in an execution context.
        texts = []
        for profile in range(num_profiles):
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = engine.create_execution_context(strategy)
            try:
                ready = context is not None and context.set_optimization_profile_async(profile, 0)
            except RuntimeError:  # the bindings' way to refuse
                ready = False
            if not ready:
                raise BuildError(listener.last_error)
            inspector.execution_context = context
            texts.append(str(inspector.get_engine_information(form)))
        return texts


def _tensor(tensor: Any) -> TensorView | None:
    return None if tensor is None else _known(tensor)


def _known(tensor: Any) -> TensorView:
    name = tensor.dtype.name
    try:
        shape = tuple(tensor.shape)
    except ValueError:  # its rank is unknown
        shape = (-1,)
    return TensorView(tensor.name, _DTYPES.get(name, name.lower()), shape)


def _start(kind: Any, listener: Listener, version: str) -> Any:
    """Make a builder or a runtime; this is when TensorRT starts CUDA.

    Raises:
        BuildError: TensorRT cannot make it.
    """
    try:
        return kind(listener.logger)
    except TypeError as error:  # pybind11 raises it where TensorRT makes none; see the log
        raise BuildError(
            f"TensorRT {version} does not start: {listener.said or error}; edge-llm doctor looks "
            "for the cause"
        ) from error


def _make_monitor(trt: Any, progress: Progress, stopped: threading.Event) -> Any:
    tree = PhaseTree(progress)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            tree.start(phase, parent, num_steps)

        def step_complete(self, phase: str, step: int) -> bool:
            tree.step(phase, step)
            return not stopped.is_set()

        def phase_finish(self, phase: str) -> None:
            tree.finish(phase)

    return Monitor()
