"""Forecasts what an export takes, before it starts: the download, the disk, the time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edge.bundle import io_spec
from edge.bundle.linears import linear_layers
from edge.bundle.manifest import TensorScheme
from edge.bundle.schemes import GROUP_SIZES, stored_bytes
from edge.model.spec import ModelSpec
from edge_make.atomic_swap import check_free_space, human

from .config import AS_IN_SOURCE, ExportRecipe, ExportTarget
from .decoder_files import cache_tokens, calibrates
from .estimate import LONG_S, describe_s, export_s
from .graph.embedding_table import EmbeddingType
from .recipes import RECIPES
from .sources.download import Download, Preview
from .sources.quantization_config import QuantizationConfig
from .verify import REPORT_TOKENS, VERIFY_TOKENS


@dataclass(frozen=True)
class Forecast:
    """Estimate of what an export takes.

    Attributes:
        recipe: name of what is done to the weights, such as ``int4, awq+gptq``.
        seconds: time on two cores, after the download.
        measured: whether ``seconds`` includes a measurement of what the quantization cost.
        sooner: options that take less time and lose more, and their seconds.
        bundle_bytes: upper bound of the bundle's size.
        working_bytes: further room that the export needs until it ends.
        reference_bytes: size of the float model that the bundle is measured against; without
            ``--verify`` it is left out if the disk has no room for it.
        download: the weights to fetch first; None for a source on this machine.
    """

    recipe: str
    seconds: float
    measured: bool
    sooner: Mapping[str, float]
    bundle_bytes: int
    working_bytes: int
    reference_bytes: int
    download: Download | None = None

    @property
    def needed_bytes(self) -> int:
        """Bytes that the bundle's disk must have free."""
        return self.bundle_bytes + self.working_bytes

    def lines(self) -> list[str]:
        """Write it for a person: the download, if there is one, and the disk; then the time."""
        time = f"{self.recipe}: expect {describe_s(self.seconds)} on two cores"
        if self.measured:
            time += ", measuring included"
        if self.sooner:
            named = ", ".join(f"{name} ({describe_s(s)})" for name, s in self.sooner.items())
            time += f"; sooner, but loses more: {named}"
        return [self._disk(), time]

    def as_dict(self) -> dict[str, object]:
        """Return the same facts for ``--json``."""
        fetched = 0 if self.download is None else self.download.num_bytes
        peak = self.needed_bytes + self.reference_bytes
        return {
            "recipe": self.recipe,
            "export_s": round(self.seconds),
            "download_bytes": fetched,
            "bundle_bytes": self.bundle_bytes,
            "peak_bytes": None if fetched is None else fetched + peak,
        }

    def check_disk(self, target: Path) -> None:
        """Refuse a disk that is too full, before anything is downloaded.

        Args:
            target: where the bundle will be; neither it nor its parents need to exist.

        Raises:
            ResourceError: it is too full; the message has the free and the needed bytes.
        """
        assert self.download is not None
        fetched = self.download.num_bytes
        if not fetched:
            return  # an export may resume here; the writer checks the disk then
        bundles, cache = _existing(target.absolute().parent), _existing(self.download.directory)
        what = f"the download ({human(fetched)})"
        if bundles.stat().st_dev == cache.stat().st_dev:
            what += f" with the bundle ({human(self.needed_bytes)})"
            check_free_space(cache, fetched + self.needed_bytes, what)
            return
        check_free_space(cache, fetched, what)
        check_free_space(bundles, self.needed_bytes)

    def _disk(self) -> str:
        peak, kept = self.needed_bytes + self.reference_bytes, self.bundle_bytes
        bundle = f"the bundle takes about {human(kept)}"
        if peak > kept:
            bundle += f", {human(peak)} while it is made"
        if self.download is None:
            return bundle
        fetched = self.download.num_bytes
        if fetched is None:
            return f"the size of the download is not known; {bundle}"
        if not fetched:
            return f"already downloaded; {bundle}"
        both, after = human(peak + fetched), human(kept + fetched)
        return (
            f"{human(fetched)} to download to {self.download.directory}; {bundle}; with the "
            f"download {both} of disk at the peak, {after} after"
        )


def forecast(
    recipe: ExportRecipe,
    target: ExportTarget,
    model: ModelSpec,
    schemes: Mapping[str, TensorScheme],
    head_bytes: int = 0,
) -> Forecast:
    """Estimate what an export takes, from the model's dimensions alone.

    Args:
        recipe: how the numbers are stored, after `ExportRecipe.resolved`.
        target: whether the bundle is measured.
        model: the dimensions.
        schemes: the scheme of every linear layer, by name.
        head_bytes: bytes of an EAGLE-3 head that goes into the bundle.
    """
    positions, measured = io_spec.rope_positions(model), measures(target, model, schemes)
    keeps = recipe.quant == AS_IN_SOURCE
    working = 0
    if calibrates(recipe, schemes):
        models = 2 if "gptq" in recipe.rounding else 1  # the float and the rounded one
        tokens = recipe.most_calibration_tokens
        working = 2 * 4 * models * tokens * model.hidden_size  # states, old and new
    working += 2 * head_bytes  # integers and their scales twice, or floats
    reference = 0
    if measured:
        floats = recipe.float_reference().linears.schemes(model)
        reference = estimated_bytes(model, floats, positions)
    if target.verify:
        working, reference = working + reference, 0
    tokens = VERIFY_TOKENS if target.verify else REPORT_TOKENS

    def seconds(other: ExportRecipe, is_measured: bool) -> float:
        return export_s(
            *(model, schemes, other.rounding, tokens if is_measured else 0, cache_tokens(other)),
            tokens=other.most_calibration_tokens,
        )

    rounds = not keeps and any(scheme.kind == "int4" for scheme in schemes.values())
    expected = seconds(recipe, measured)
    sooner: dict[str, float] = {}
    if rounds and recipe.method is None and recipe.named == "default" and expected > LONG_S:
        if (recipe.calibration, recipe.calibration_tokens, recipe.seed) == (None, None, None):
            is_measured = measured and (target.verify or RECIPES["fast"].measures)
            sooner["--fast"] = seconds(replace(recipe, named="fast"), is_measured)
        sooner["--method awq"] = seconds(replace(recipe, method="awq"), measured)
    return Forecast(
        recipe=f"{recipe.name}, {recipe.rounding}" if rounds else recipe.name,
        seconds=expected,
        measured=measured,
        sooner=sooner,
        bundle_bytes=estimated_bytes(model, schemes, positions, recipe.embeddings, offsets=keeps),
        working_bytes=working,
        reference_bytes=reference,
    )


def forecast_of_preview(recipe: ExportRecipe, target: ExportTarget, preview: Preview) -> Forecast:
    """Estimate what an export takes from a hub's small files, before the weights are fetched.

    An adapter and a reduced vocabulary are not known yet, so it estimates the whole model.

    Args:
        recipe: how the numbers are stored.
        target: whether the bundle is measured.
        preview: the small files.

    Raises:
        ConfigError: the options contradict the checkpoint.
    """
    quantization = preview.quantization
    recipe = recipe.resolved(preview.source, is_quantized=quantization is not None)
    if recipe.quant == AS_IN_SOURCE and quantization is not None:
        overrides = recipe.linears.overrides(preview.spec)
        schemes = {**_likely_schemes(preview.spec, quantization), **overrides}
    else:
        schemes = recipe.linears.schemes(preview.spec)
    return replace(forecast(recipe, target, preview.spec, schemes), download=preview.download)


def measures(target: ExportTarget, model: ModelSpec, schemes: Mapping[str, TensorScheme]) -> bool:
    """Return whether the bundle is measured at the end, for ``verify`` or for the report."""
    quantized = any(scheme.kind != "float" for scheme in schemes.values())
    return target.verify or (target.report and quantized and model.task == "generate")


def estimated_bytes(
    model: ModelSpec,
    schemes: Mapping[str, TensorScheme],
    positions: int,
    embeddings: EmbeddingType = "fp16",
    *,
    offsets: bool = False,
) -> int:
    """Estimate an upper bound of a bundle's size, for the check of free disk space.

    With ``offsets`` each group of integers may have an offset, as a source's may (`quantize.kept`).
    """
    row_bytes = 2 * model.hidden_size if embeddings == "fp16" else model.hidden_size + 4
    total = model.vocab_size * row_bytes
    turned = sum(model.rope_dims(table) for table in range(len(model.ropes)))
    total += positions * turned * (2 + 4)  # cos and sin, for both graphs
    for layer in linear_layers(model):
        scheme = schemes[layer.name]
        weight, scales = stored_bytes(layer.shape, scheme)
        scales *= 3  # in fp16 or bf16, and in fp32 for the CPU twin
        total += weight + scales
        if offsets:
            total += scales // (2 if scheme.planes else 1)
    return total + (64 << 20)  # norms, biases, graphs, tokenizer, alignment


def _likely_schemes(model: ModelSpec, quantization: QuantizationConfig) -> dict[str, TensorScheme]:
    """Guess the schemes of a quantized checkpoint's layers from its config's main format.

    Only its tensors tell exactly (`quantize.from_source.source_schemes`).
    """
    main, schemes = quantization.main, {}
    for layer in linear_layers(model):
        formats = [quantization.format_of(name.removesuffix(".weight")) for name in layer.weights]
        size = math.gcd(main.group_size or layer.shape[0], layer.shape[0], max(GROUP_SIZES))
        if not main.is_integer or None in formats or size not in GROUP_SIZES:
            schemes[layer.name] = TensorScheme("float")
        elif main.bits <= 4:
            schemes[layer.name] = TensorScheme("int4", size)
        else:
            schemes[layer.name] = TensorScheme("int8", size, planes=True)
    return schemes


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    path = path.expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
