"""Runs an export: the stages in their order, and the manifest that describes the result."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from edge._version import __version__
from edge.adapters import graph_inputs
from edge.backends.ort.session import onnxruntime_version
from edge.bundle import io_spec, kv_scales, memory_facts
from edge.bundle.library import hub_address
from edge.bundle.manifest import (
    SCHEMA_VERSION,
    Dialect,
    DraftHead,
    Manifest,
    Quantization,
    Reranking,
    Tokens,
    printable,
    read_manifest,
)
from edge.bundle.weights import count_facts, manifest_linears
from edge.errors import ConfigError, DependencyError, EdgeError, ResourceError
from edge.text.reasoning import template_reasons
from edge_lab.measure.evaluate import check_gate, load_gate
from edge_make.atomic_swap import check_free_space
from edge_make.default_kv_capacity import default_kv_capacity
from edge_make.progress import Progress, prefixed, silent, uncounted
from edge_make.recipe import Clip
from edge_make.safetensors_writer import write_safetensors
from engines.rules.check import check_graph
from engines.rules.table import VERSIONS

from .bundle import BundleWriter
from .config import AS_IN_SOURCE, ExportRecipe, ExportSource, ExportTarget, values_of
from .config import ExportConfig as ExportConfig
from .decoder_files import DecoderFiles, WrittenDecoder, calibrates
from .encoder_files import with_vision, write_encoder
from .forecast import Forecast, estimated_bytes, forecast, forecast_of_preview, measures
from .graph.embedding_table import embedding_tensors
from .head_files import write_head
from .model import OpenModel, check_generates, open_model
from .quantize.calibrated import Method
from .quantize.from_source import source_schemes
from .quantize.rotation import RotatedCheckpoint
from .sources.download import Preview
from .sources.vocabulary import VOCABULARY_NAME, encode_kept
from .verify import REPORT_TOKENS, check_memory, measure_bundle, verify_bundle

_log = logging.getLogger(__name__)
VERIFY_STEP = "verify"
"""The step in which another process, ``edge-llm eval``, shows its own progress."""
_LAST_STEP = "hash and move into place"


def export_checkpoint(
    config: ExportConfig,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Manifest:
    """Write a bundle; it appears at ``config.output`` whole or not at all.

    Args:
        config: what to export and how.
        progress: called as the export proceeds.
        announce: called with a line for a person: what is downloaded, how long the export takes,
            or why the bundle is not measured.

    Raises:
        ConfigError: options contradict each other or the model.
        CheckpointError: the source cannot be exported.
        DependencyError: ``verify`` with a dialect that the ONNX Runtime of this machine cannot run.
        ResourceError: there is not enough disk space, or with ``verify`` not enough memory.
        GateError: ``verify`` found the bundle not good enough; what was at ``output`` stays.
    """
    source = ExportSource(**values_of(ExportSource, config))
    recipe = ExportRecipe(**values_of(ExportRecipe, config))
    target = ExportTarget(**values_of(ExportTarget, config))
    _check_here(recipe, target)
    progress, announce = progress or silent, announce or _mute
    foreseen: list[Forecast] = []

    def foresee(preview: Preview) -> None:
        found = forecast_of_preview(recipe, target, preview)
        for line in found.lines():
            announce(line)
        found.check_disk(target.output)
        foreseen.append(found)

    with open_model(source, progress, foresee) as model:
        return _Export(model, recipe, target, progress, announce).run(announced=bool(foreseen))


def forecast_checkpoint(config: ExportConfig, progress: Progress = silent) -> Forecast:
    """Forecast what `export_checkpoint` would take; only a hub's small files are fetched.

    Raises:
        CheckpointError, ConfigError, DependencyError: `export_checkpoint` would raise the same.
    """
    source = ExportSource(**values_of(ExportSource, config))
    if ":" in (hub_address(source.source) or ""):
        raise ConfigError(
            f"a forecast reads the small files of a hub, and {source.source} is one large file: "
            "download it, and give its path"
        )
    recipe = ExportRecipe(**values_of(ExportRecipe, config))
    target = ExportTarget(**values_of(ExportTarget, config))
    try:
        with open_model(source, progress, _enough) as model:
            return _Export(model, recipe, target, progress, _mute).expected
    except _EnoughError as enough:
        return forecast_of_preview(recipe, target, *enough.args)


class _EnoughError(Exception):
    """Ends a download before the weights, when only the small files were wanted."""


def _enough(preview: Preview) -> None:
    raise _EnoughError(preview)


def _check_here(recipe: ExportRecipe, target: ExportTarget) -> None:
    """Refuse now, and not after hours, a bundle that cannot be verified on this machine."""
    if target.verify:
        gate = load_gate(target.gate or "recipe", recipe.name)
        check_gate(gate, task=False, reference=True)
    dialect = target.dialect_with(recipe.kv_cache)
    if problem := _cannot_run_here(dialect, int8_cache=recipe.kv_cache == "int8"):
        if target.verify:
            raise DependencyError(f"--verify runs the bundle, but {problem}")
        _log.warning("%s", problem)


def _cannot_run_here(dialect: Dialect, *, int8_cache: bool) -> str | None:
    """Say why this machine's CPU cannot run a dialect; the bundle may be for another machine."""
    try:
        import onnxruntime
    except ImportError:
        return None  # without ONNX Runtime no bundle runs here, and none was asked to
    needed = io_spec.needed_onnxruntime(dialect, int8_cache=int8_cache)
    if onnxruntime_version(onnxruntime) >= needed:
        return None
    cache = " with an 8-bit KV cache" if int8_cache else ""
    return (
        f"dialect {dialect}{cache} needs onnxruntime >= {needed[0]}.{needed[1]} to run on a CPU, "
        f"found {onnxruntime.__version__}; for this machine export with --dialect portable"
    )


class _Export:
    def __init__(
        self,
        model: OpenModel,
        recipe: ExportRecipe,
        target: ExportTarget,
        progress: Progress,
        announce: Callable[[str], None],
    ) -> None:
        recipe = recipe.resolved(model.name, is_quantized=model.is_quantized)
        checkpoint = model.checkpoint
        self.opened, self.recipe, self.target = model, recipe, target
        self.dialect = target.dialect_with(recipe.kv_cache)
        self.announce = announce
        self.rotates = recipe.rotates(checkpoint.spec.task, drafts=model.head is not None)
        check_generates(
            model.name,
            checkpoint.spec.task,
            ("--verify", target.verify, "it measures the next token"),
            ("--adapters", recipe.adapters is not None, "requests for it choose no adapter"),
            (
                "--rotate, which --quant int8-w8a8 implies (add --no-rotate),",
                self.rotates and checkpoint.spec.task == "embed",
                "embeddings would be rotated, too",
            ),
        )
        if self.rotates:
            checkpoint = RotatedCheckpoint(checkpoint)
        self.checkpoint = checkpoint
        self.model = checkpoint.spec
        if recipe.quant == AS_IN_SOURCE:
            overrides = recipe.linears.overrides(self.model)
            self.schemes = {**source_schemes(checkpoint), **overrides}
        else:
            self.schemes = recipe.linears.schemes(self.model)
        self.quantized = any(scheme.kind != "float" for scheme in self.schemes.values())
        if target.verify and not self.quantized:
            raise ConfigError(
                f"--verify has nothing to measure with --quant {recipe.quant}: float weights are "
                "the reference; leave it out"
            )
        self.positions = io_spec.rope_positions(self.model)
        self.head = model.head
        if model.vision is None and recipe.vision_quant is not None:
            raise ConfigError(
                f"--vision-quant {recipe.vision_quant} is for models that read pictures, and "
                f"{model.name} has no vision encoder; leave it out"
            )
        template = checkpoint.text.chat_template
        checkpoint.text.check()
        capacity = target.kv_capacity
        if capacity is None:
            reasons = template is not None and template_reasons(template)
            capacity = default_kv_capacity(reasons=reasons, positions=self.positions)
        io_spec.check_capacity(capacity, self.positions)
        self.kv_capacity = capacity
        self.progress = progress
        wide = target.device.wide_input_scales
        self.decoder = DecoderFiles(
            recipe, wide, checkpoint, self.schemes, self.positions, progress, self.head
        )

    @property
    def expected(self) -> Forecast:
        """Forecast of this export."""
        head_bytes = 0 if self.head is None else self.head.num_bytes
        if self.opened.vision is not None:  # the encoder, and its copy in fp32 while it is measured
            head_bytes += 3 * self.opened.vision.weights
        return forecast(self.recipe, self.target, self.model, self.schemes, head_bytes)

    def run(self, *, announced: bool) -> Manifest:
        """Write the bundle.

        Args:
            announced: whether the forecast was announced before a download.
        """
        expected = self.expected
        what = "the bundle"
        if self.target.verify:
            try:
                self._check_memory()
            except ResourceError as error:
                raise ResourceError(
                    f"--verify has no room: {error}; free some memory, or leave it out"
                ) from error
            what += " with the float model of --verify"
        with BundleWriter(
            self.target.output,
            required_bytes=expected.needed_bytes,
            overwrite=self.target.overwrite,
            calibrates=calibrates(self.recipe, self.schemes),
            what=what,
        ) as writer:
            for line in () if announced else expected.lines():
                self.announce(line)
            if self.recipe.quant == "int8" and self.recipe.rotate is None and not self.rotates:
                reader = "its vectors" if self.head is None else "the head of --eagle3"
                reader = reader if self.recipe.adapters is None else "what adapters read"
                self.announce(f"not rotated, since {reader} must stay in the model's own basis")
            vision = None
            if self.opened.vision is not None:
                encoder = (self.checkpoint, self.opened.vision)
                vision = write_encoder(writer, self.recipe, *encoder, self.progress)
            decoder = self.decoder.write(writer, self.dialect, self.kv_capacity)
            head = None
            if self.head is not None:
                sizes = (self.positions, self.kv_capacity)
                head = write_head(writer, self.recipe, self.dialect, self.head, *sizes)
            self.write_embeddings(writer.path(io_spec.EMBEDDINGS_NAME))
            self.write_text(writer)
            legal = self.check_rules(writer.path(decoder.graphs.decoder))
            manifest = self.manifest(decoder, legal, head)
            if vision is not None:
                both = self.check_rules(writer.path(vision.graph))
                manifest = with_vision(manifest, vision, both)
            if self.target.verify:
                manifest = self.measured(writer, manifest, self.target.gate or "recipe")
            elif measures(self.target, self.model, self.schemes):
                manifest = self.report(writer, manifest)
            self.progress(_LAST_STEP, 0, 1)
            manifest = writer.commit(manifest)
        self.progress(_LAST_STEP, 1, 1)
        return manifest

    def report(self, writer: BundleWriter, manifest: Manifest) -> Manifest:
        """Measure what the quantization cost, if that can be done here; return the manifest."""
        try:
            self._check_memory()
            return self.measured(writer, manifest, None)
        except EdgeError as error:
            # Nobody asked for the figures, and hours of calibration may be in the bundle: go on.
            self.announce(
                f"what the quantization cost was not measured: {error}; measure it later with: "
                f"edge-llm eval {self.target.output} --against {self.opened.name}"
            )
            return manifest

    def measured(self, writer: BundleWriter, manifest: Manifest, gate: str | None) -> Manifest:
        """Measure the bundle against the model in float; return the manifest with the result.

        Args:
            writer: writer of the bundle.
            manifest: manifest of the bundle.
            gate: thresholds of ``--verify``; None measures on fewer tokens and refuses nothing.

        Raises:
            GateError: a threshold was missed.
        """
        with uncounted(self.progress, "hash"):
            staged = writer.stage(manifest)
        reference = self._reference(writer)
        with uncounted(self.progress, VERIFY_STEP):
            if gate is None:
                measure_bundle(staged, reference, self.positions, REPORT_TOKENS)
            else:
                verify_bundle(staged, reference, gate, self.positions, self.target.output)
        return read_manifest(staged)

    def _check_memory(self) -> None:
        check_memory(self.model, self.schemes, self.dialect, self.positions)

    def _reference(self, writer: BundleWriter) -> Path:
        """Export the open checkpoint in float, beside the target."""
        recipe = self.recipe.float_reference()
        schemes = recipe.linears.schemes(self.model)
        required_bytes = estimated_bytes(self.model, schemes, self.positions)
        check_free_space(writer.target.parent, required_bytes, "the float model")
        place, capacity = writer.scratch() / "reference", self.target.kv_capacity
        target = ExportTarget(place, dialect=self.dialect, kv_capacity=capacity)
        model = dataclasses.replace(self.opened, head=None, vision=None)
        progress = prefixed(self.progress, "reference: ")
        _Export(model, recipe, target, progress, _mute).run(announced=True)
        return target.output

    def write_embeddings(self, path: Path) -> None:
        table = self.checkpoint.tensor("model.embed_tokens.weight")

        def report(done: int) -> None:
            self.progress("embeddings", done, table.size, "values")

        report(0)
        write_safetensors(path, embedding_tensors(table, self.recipe.embeddings, report))

    def write_text(self, writer: BundleWriter) -> None:
        text = self.checkpoint.text
        writer.write_bytes("tokenizer.json", text.tokenizer_json)
        if text.chat_template is not None:
            writer.write_bytes("chat_template.jinja", text.chat_template.encode())
        if self.opened.reduced is not None:
            writer.write_bytes(VOCABULARY_NAME, encode_kept(self.opened.reduced.kept))
        # In ASCII, since its texts may be half a character, which UTF-8 cannot hold.
        generation = json.dumps(text.generation_config, indent=2)
        writer.write_bytes("generation_config.json", generation.encode())

    def check_rules(self, graph: Path) -> tuple[str, ...]:
        """Find the versions of TensorRT that take the graph.

        Raises:
            ConfigError: a version that the target needs does not take it.
        """
        verdicts = check_graph(graph.read_bytes(), graph.parent, VERSIONS)
        for verdict in verdicts:
            if verdict.version.name in self.target.device.versions and not verdict.legal:
                first = verdict.refusals[0]
                raise ConfigError(
                    f"--target {self.target.target}: {verdict.version} does not take this recipe: "
                    f"{first}; {first.instead}"
                )
        return tuple(verdict.version.name for verdict in verdicts if verdict.legal)

    def manifest(
        self, decoder: WrittenDecoder, legal: tuple[str, ...], head: DraftHead | None
    ) -> Manifest:
        linears = dict(decoder.linears)
        peaks = dict(decoder.peaks)
        int4 = any(scheme.kind == "int4" for scheme in self.schemes.values())
        method: Literal["source"] | Method = self.recipe.rounding if int4 else "rtn"
        clip: Literal["none"] | Clip = self.recipe.clip
        if self.recipe.quant == AS_IN_SOURCE:
            method = "source"
            # Rounded layers: the requantized, and float ones that --keep gives another scheme.
            rounded = any(
                info.from_source.treatment == "requantized"
                if info.from_source is not None
                else info.scheme.kind != "float"
                for info in linears.values()
            )
            clip = "mse" if rounded else "none"
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            producer=f"edge-llm {__version__}",
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            name=self.checkpoint.name,
            model=self.model,
            dialect=self.dialect,
            dtype=self.recipe.float_type,
            kv_capacity=self.kv_capacity,
            rope_positions=self.positions,
            quantization=Quantization(
                name=self.recipe.name,
                method=method if self.quantized else "none",
                clip=clip if self.quantized else "none",
                linears=linears,
                calibration=decoder.calibration,
                # The source's own input scales come without factors.
                smoothed=method != "source"
                and any(info.activation_scale is not None for info in linears.values()),
                rotated=self.rotates,
                embeddings=self.recipe.embeddings,
            ),
            sampling=self.checkpoint.text.sampling,
            tokens=self.checkpoint.text.tokens,
            source=self.checkpoint.source,
            graphs=decoder.graphs,
            files={},
            quality={"activation_peaks": peaks} if peaks else None,
            vocabulary=None if self.opened.reduced is None else self.opened.reduced.vocabulary,
            tensorrt=legal,
            kv_cache=decoder.kv_cache,
            head=head,
            embedding=self.checkpoint.embedding,
            reranking=self.checkpoint.reranking,
        )
        facts = count_facts(self.model, manifest_linears(manifest), self.positions)
        extras = {memory_facts.SECTION: msgspec.to_builtins(facts)}
        if decoder.kv_scales:
            extras[kv_scales.SECTION] = kv_scales.scales_section(decoder.kv_scales)
        if self.recipe.adapters is not None:
            extras[graph_inputs.SECTION] = graph_inputs.section(self.model, self.recipe.adapters)
        return _printable(msgspec.structs.replace(manifest, extras=extras))


_Part = TypeVar("_Part", bound=msgspec.Struct)


def _printable(part: _Part) -> _Part:
    """Replace characters that a manifest may not have in a struct's texts; a model's texts stay."""
    changes: dict[str, Any] = {}
    for name in part.__struct_fields__:
        value = getattr(part, name)
        if isinstance(value, str):
            changes[name] = printable(value)
        elif isinstance(value, msgspec.Struct) and not isinstance(value, Tokens | Reranking):
            changes[name] = _printable(value)
    return msgspec.structs.replace(part, **changes)


def _mute(line: str) -> None:
    """Announce nothing."""
