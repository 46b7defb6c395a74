"""Cuts a decoder to the smallest part that TensorRT refuses for the same cause, for a bug report.

Polygraphy's Python API cuts parts out of the graph. (Its tool ``debug reduce`` would start a
process and write all weights again for every part.) Parts are tried in this process, and the
weights stay where they are. A part counts only if TensorRT refuses it for the same cause
(`edge.errors.BuildError`), so an error that the cut itself causes is not taken for the fault.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edge.bundle.manifest import FloatType
from edge.bundle.trust import open_manifest
from edge.bundle.verified_files import verify_files
from edge.errors import BuildError, ConfigError, DependencyError, install_command
from edge_make.progress import Progress, silent, uncounted
from engines.build_plan import BuildPlan, plan_build
from engines.builder.fallbacks import make_rungs
from engines.builder.target import Target, find_target
from engines.compiler.compat import Compiler
from engines.config import BuildConfig
from engines.graph.adapt import graph_files, graph_of

from .check import COMPUTE_CAPABILITIES

_INLINE_BYTES = 16 << 20  # weights larger than this go into a file beside the graph
_EXTERNAL_FROM_BYTES = 1024  # size from which on a tensor goes there

Fails = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class ReducedGraph:
    """A part of a graph that TensorRT refuses as it refuses the bundle's.

    Attributes:
        path: the ONNX file.
        weights: the file beside it with its weights, to send along; None if they are inside.
        num_bytes: size of both files.
        tensorrt: flavour and version that refuse the graph.
        step: step that fails: the parser, or the builder.
        error: TensorRT's message for this graph.
        nodes_before: number of nodes of the whole graph.
        nodes: operator and name of each node.
        inputs, outputs: name, type and shape of each.
        sizes: sizes that replaced dynamic dimensions of the whole graph; empty if none did.
        command: Polygraphy command that reproduces the refusal.
    """

    path: str
    weights: str | None
    num_bytes: int
    tensorrt: str
    step: Literal["parse", "build"]
    error: str
    nodes_before: int
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: Mapping[str, int]
    command: str


def reduce_bundle(
    config: BuildConfig, output: Path, sm: int | None = None, progress: Progress = silent
) -> ReducedGraph:
    """Write the smallest part of a bundle's graph that TensorRT refuses for the same cause.

    If the parser takes the graph and the builder refuses it, dynamic dimensions are replaced by the
    sizes of a profile, since a part has no profiles.

    Args:
        config: options of the build; of several variants (`fallbacks`) the last is reduced.
        output: the ONNX file to write; neither it nor ``<output>.data`` may exist.
        sm: compute capability without the dot that TensorRT for RTX compiles for; None takes the
            TensorRT and the GPU of this machine.
        progress: called in the steps ``hash``, ``try`` and ``reduce``.

    Raises:
        ConfigError: TensorRT takes the graph, a file exists, or the cause is not in the graph.
        DependencyError: Polygraphy or TensorRT is missing.
        IntegrityError: a file of the bundle is damaged.
        BuildError: the refusal does not show with fixed sizes.
    """
    cutter = _import_cutter()
    _refuse_existing(output)
    if config.kv_read == "lengths":
        raise ConfigError(
            "--reduce with --kv-read lengths: lengths are no part of the ONNX graph, so a file "
            "cannot show their refusal; leave --kv-read out"
        )
    build = plan_build(config, open_manifest(config.bundle))
    target = find_target(None if sm is None else COMPUTE_CAPABILITIES[sm])
    with uncounted(progress, "hash"):
        verify_files(config.bundle, build.manifest, graph_files(build.manifest))
    with uncounted(progress, "try"):
        trial, model, sizes = _find_refusal(cutter, build, target)
    whole = cutter.load(model)
    cut = cutter.bind(whole, build.manifest.dtype)

    def fails(nodes: Sequence[int]) -> bool:
        part = cut(nodes)
        return part is not None and trial.repeats(part.SerializeToString())

    kept = shrink(len(model.graph.node), fails, progress)
    part = cut(kept)
    files = _write(cutter.onnx, part, trial.path.parent, output)
    error = trial.refusal(output.read_bytes(), output.resolve())
    if error is None or error.cause != trial.cause:
        raise BuildError(f"{output} was written, but TensorRT does not refuse it as the whole")
    return ReducedGraph(
        str(output),
        str(files[1]) if len(files) > 1 else None,
        sum(file.stat().st_size for file in files),
        f"{target.rt.flavour} {target.rt.version}",
        trial.step,
        str(error),
        len(model.graph.node),
        tuple(f"{node.op_type} {node.name}".rstrip() for node in part.graph.node),
        tuple(map(cutter.describe, part.graph.input)),
        tuple(map(cutter.describe, part.graph.output)),
        sizes,
        _command(target, output),
    )


def shrink(num_nodes: int, fails: Fails, progress: Progress = silent) -> list[int]:
    """Drop nodes of a failing graph while the rest still fails: halves, quarters, single ones.

    Args:
        num_nodes: number of nodes of the graph, which fails as a whole.
        fails: whether a graph of these nodes, in ascending order, fails in the same way.
        progress: called with the number of nodes dropped so far (step ``reduce``).

    Returns:
        Nodes that fail together, but not without any one of them.
    """
    kept = list(range(num_nodes))
    size = max(num_nodes // 2, 1)
    progress("reduce", 0, num_nodes, "nodes")
    while True:
        before, at = len(kept), 0
        while at < len(kept):
            rest = kept[:at] + kept[at + size :]
            if rest and fails(rest):
                kept = rest
                progress("reduce", num_nodes - len(kept), num_nodes, "nodes")
            else:
                at += size
        if size == 1 and len(kept) == before:
            progress("reduce", num_nodes, num_nodes, "nodes")
            return kept
        size = max(size // 2, 1)


class _Trial:
    """Asks TensorRT whether it refuses a graph, and whether for the known cause."""

    def __init__(self, build: BuildPlan, target: Target) -> None:
        self._build, self._target = build, target
        self.path = build.config.bundle.resolve() / build.manifest.graphs.decoder
        self.step: Literal["parse", "build"] = "parse"
        self.cause = ""

    def refusal(
        self, graph: bytes, path: Path | None = None, *, dynamic: bool = False
    ) -> BuildError | None:
        """Parse a graph, and compile it if that is the failing step; None if TensorRT takes it.

        Args:
            graph: the ONNX file.
            path: path beside which its weights are; None is the bundle's.
            dynamic: whether this is the whole graph, with the profiles' dynamic inputs.
        """
        build = self._build
        compiler = Compiler(self._target.rt, lambda _severity, _text: None)
        try:
            compiler.parse(graph, path or self.path, "slice", build.attention)
            if self.step == "build":
                compiler.build(
                    build.profiles if dynamic else (),
                    workspace_bytes=build.config.workspace_bytes,
                    opt_level=build.config.opt_level,
                    timings=None,
                    compute_capability=self._target.compute_capability,
                    progress=silent,
                )
        except BuildError as error:
            return error
        return None

    def repeats(self, graph: bytes) -> bool:
        """Whether TensorRT refuses a graph for the known cause."""
        error = self.refusal(graph)
        return error is not None and error.cause == self.cause


def _find_refusal(
    cutter: _Cutter, build: BuildPlan, target: Target
) -> tuple[_Trial, Any, Mapping[str, int]]:
    """Find what TensorRT refuses: the trial that shows it, the graph, and its fixed sizes."""
    rungs = [rung for rung in make_rungs(build, target.rt) if rung.kv_read != "lengths"]
    trial, data, error = [_try_whole(rung, target) for rung in rungs][-1]
    model = cutter.onnx.load_model_from_string(data)
    if trial.step == "parse":
        return trial, model, {}
    for profile in build.profiles:
        largest = {name: shape.max for name, shape in profile.inputs.items()}
        fixed, sizes = cutter.fix_sizes(model, largest)
        if trial.repeats(fixed.SerializeToString()):
            return trial, fixed, sizes
    raise BuildError(
        "TensorRT compiles the graph with the largest sizes of each profile, so its refusal is of "
        f"dynamic dimensions and no part can be cut out: {error}"
    )


def _try_whole(build: BuildPlan, target: Target) -> tuple[_Trial, bytes, BuildError]:
    trial = _Trial(build, target)
    data = graph_of(build)
    error = trial.refusal(data)
    if error is None:
        trial.step = "build"
        error = trial.refusal(data, dynamic=True)
    if error is None:
        raise ConfigError(
            f"nothing to reduce: {target.rt.flavour} {target.rt.version} parses and compiles "
            f"{build.config.bundle}; leave --reduce out to see the audit"
        )
    trial.cause = error.cause
    return trial, data, error


class _Cutter:
    """Polygraphy and the packages it needs, imported together.

    Attributes:
        onnx: the package.
    """

    def __init__(self) -> None:
        import onnx
        import onnx_graphsurgeon
        from polygraphy.backend.onnx import extract_subgraph, gs_from_onnx, infer_shapes
        from polygraphy.common import TensorMetadata
        from polygraphy.logger import G_LOGGER

        self.onnx = onnx
        self._surgeon = onnx_graphsurgeon
        self._extract, self._import, self._infer = extract_subgraph, gs_from_onnx, infer_shapes
        self._metadata, self._logger = TensorMetadata, G_LOGGER

    def load(self, model: Any) -> Any:
        """Infer all shapes of a model that can be inferred."""
        with self._logger.verbosity(self._logger.CRITICAL):
            return self._infer(model, allow_onnxruntime=False)

    def bind(self, model: Any, float_type: FloatType) -> Callable[[Sequence[int]], Any]:
        """Make a function from node indices to their graph as a model, or None if it has none.

        A tensor at a cut needs a known type and rank to become an input. The type of an output may
        be unknown after an unknown operator: it is declared with the decoder's float type.
        """
        known = {
            value.name: value.type.tensor_type
            for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]
            if value.type.tensor_type.elem_type
        }
        constants = {tensor.name for tensor in model.graph.initializer} | {""}
        nodes = [(list(node.input), list(node.output)) for node in model.graph.node]
        proto = self.onnx.TensorProto
        unknown = {"fp16": proto.FLOAT16, "bf16": proto.BFLOAT16, "fp32": proto.FLOAT}[float_type]
        with self._logger.verbosity(self._logger.CRITICAL):
            graph = self._import(model)

        def cut(indices: Sequence[int]) -> Any:
            made = {name for i in indices for name in nodes[i][1]}
            read = {name: None for i in indices for name in nodes[i][0]}
            inputs, outputs = self._metadata(), self._metadata()
            for name in read:
                if name in made or name in constants:
                    continue
                if name not in known or not known[name].HasField("shape"):
                    return None
                inputs.add(name, known[name].elem_type, _shape(known[name]))
            for i in indices:
                for name in nodes[i][1]:
                    if name and name not in read:
                        kind = known[name].elem_type if name in known else unknown
                        outputs.add(name, kind, None)
            with self._logger.verbosity(self._logger.CRITICAL):
                part = self._extract(graph.copy(), inputs, outputs)
                return self._surgeon.export_onnx(part)

        return cut

    def fix_sizes(
        self, model: Any, shapes: Mapping[str, Sequence[int]]
    ) -> tuple[Any, dict[str, int]]:
        """Copy a model with these inputs' sizes for its dynamic dimensions; return both."""
        fixed = self.onnx.ModelProto()
        fixed.CopyFrom(model)
        sizes: dict[str, int] = {}
        for value in fixed.graph.input:
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
                if dim.dim_param:
                    sizes[dim.dim_param] = size
        for value in [*fixed.graph.input, *fixed.graph.output]:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_value = sizes[dim.dim_param]
        del fixed.graph.value_info[:]
        return fixed, sizes

    def describe(self, value: Any) -> str:
        """Describe an input or output by name, type and shape."""
        kind = value.type.tensor_type
        name = self.onnx.TensorProto.DataType.Name(kind.elem_type).lower()
        shape = _shape(kind) if kind.HasField("shape") else "unknown shape"
        return f"{value.name} {name} {shape}"


def _shape(kind: Any) -> list[int | str | None]:
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
        for dim in kind.shape.dim
    ]


def _import_cutter() -> _Cutter:
    try:
        return _Cutter()
    except ImportError as error:
        raise DependencyError(
            f"--reduce needs Polygraphy and ONNX GraphSurgeon ({error}); install them with: "
            f"{install_command('check')}"
        ) from error


def _refuse_existing(output: Path) -> None:
    for path in (output, _data_path(output)):
        if path.exists():
            raise ConfigError(f"--reduce {path} exists; nothing is overwritten, so name a new file")
    if not output.parent.is_dir():
        raise ConfigError(f"--reduce {output}: there is no directory {output.parent}; make it")


def _data_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.data")


def _write(onnx: Any, model: Any, weights: Path, output: Path) -> list[Path]:
    """Write a graph with its weights, and return the files."""
    onnx.external_data_helper.load_external_data_for_model(model, str(weights))
    apart = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _INLINE_BYTES
    data = _data_path(output)
    with tempfile.TemporaryDirectory(prefix=".reduce-", dir=output.parent) as scratch:
        written = Path(scratch) / output.name
        if apart:
            onnx.save_model(
                model,
                str(written),
                save_as_external_data=True,
                location=data.name,
                size_threshold=_EXTERNAL_FROM_BYTES,
            )
        else:
            written.write_bytes(model.SerializeToString())
        _refuse_existing(output)
        files = [output, data] if apart else [output]
        for file in reversed(files):  # the graph last, since it names the other
            written.with_name(file.name).rename(file)
    return files


def _command(target: Target, output: Path) -> str:
    line = f"polygraphy convert {shlex.quote(str(output))} --convert-to trt -o /dev/null"
    if target.rt.flavour == "tensorrt-rtx":
        return (
            f"POLYGRAPHY_USE_TENSORRT_RTX=1 {line} "
            f"--compute-capabilities {target.compute_capability}"
        )
    return f"{line} --strongly-typed"
