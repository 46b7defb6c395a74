"""Defines the bundle's ``manifest.json``: the model, how it was quantized, every file's hash.

Every struct is frozen and refuses unknown keys. So a typo or a newer schema is an error that names
the key instead of a silent default. The manifest also guards itself: ``self_sha256`` is the SHA-256
of the file's own bytes with that value replaced by 64 zeros.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edge.errors import BundleError, IntegrityError
from edge.files import MALFORMED, read_file
from edge.model.parts import Rows, Size
from edge.model.spec import MAX_LAYERS, ModelSpec

from .manifest_checks import check_fit, head_files

SCHEMA_VERSION = 9
"""Counts versions of the schema. 2 added `SamplingDefaults.assumed`; 3 `Manifest.tensorrt` and
`TensorScheme.planes`; 4 `Source.quantization`, and ``from_source``, ``offsets`` and ``reordered``
of `LinearInfo`; 5 `Manifest.kv_cache` and `Manifest.head`; 6 `ModelSpec.task`,
`Manifest.embedding` and `Manifest.reranking`; 7 ``per_token`` and ``rotation_block`` of
`LinearInfo`; 8 `Manifest.extras`; 9 `ModelSpec.layers`."""
_READABLE_VERSIONS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
_LAYERS_SINCE = 9
MANIFEST_NAME = "manifest.json"
ENGINES_DIR = "engines"
NO_HASH = "0" * 64
MAX_MANIFEST_BYTES = 1 << 24  # a layer takes about 1 KB
SELF_HASH = re.compile(rb'"self_sha256": "([0-9a-f]{64})"\n\}\n\Z')
_FILE_NAME = re.compile(r"(?!manifest\.json)[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\Z")

Dialect = Literal["native", "portable"]
FloatType = Literal["fp16", "bf16", "fp32"]
SchemeKind = Literal["float", "int8", "int4", "w8a8"]
Treatment = Literal["kept", "requantized", "dequantized"]

# Ranges: far beyond existing models, and small enough that nothing computed from them is large.
# They are checked when a manifest is decoded, so also before one is written.
_LayerInput = Annotated[int, msgspec.Meta(ge=0, le=MAX_LAYERS)]
_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 22)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
_Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
# A terminal shows it, so it may have no control characters, and none that reverse the writing.
_UNPRINTABLE = "\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
Line = Annotated[str, msgspec.Meta(max_length=1000, pattern=rf"^[^{_UNPRINTABLE}]*\Z")]
_TokenText = Annotated[str, msgspec.Meta(max_length=1000)]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every struct of the manifest."""


class TensorScheme(_Struct, frozen=True):
    """How one weight matrix is stored.

    Attributes:
        kind: ``float`` (the graph's own type), ``int8`` or ``int4`` (weights only), or ``w8a8``
            (weights and inputs in INT8); all integers are symmetric.
        group_size: weights along the reduction axis that share a scale; 0 means one scale per
            output channel.
        planes: whether INT8 weights are stored as two INT4 ones (`edge.bundle.schemes`). Bundles
            of schema versions 1 and 2 have none.
    """

    kind: SchemeKind
    group_size: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    planes: bool = False

    def __str__(self) -> str:
        if self.kind in ("float", "w8a8"):
            return self.kind
        size = f"g{self.group_size}" if self.group_size else "channel"
        return f"{self.kind}-{size}-planes" if self.planes else f"{self.kind}-{size}"


class FromSource(_Struct, frozen=True):
    """How the exporter treated the integers of a layer in a quantized checkpoint.

    Attributes:
        treatment: ``kept`` code for code, ``requantized``, or ``dequantized`` to the graph's float
            type.
        groups: groups of weights that share a scale in the bundle; 0 if dequantized.
        changed_groups: number of those groups that were rounded anew.
        relative_error: root of the summed squared difference from the dequantized source over that
            of its weights; 0.0 if every weight is the source's.
        note: why it was not kept, or what else differs from the source, for a person, or None.
    """

    treatment: Treatment
    groups: Count = 0
    changed_groups: Count = 0
    relative_error: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0
    note: Line | None = None


class LinearInfo(_Struct, frozen=True):
    """One linear layer as stored.

    Attributes:
        scheme: how its weight is stored.
        shape: ``[in, out]``.
        num_bytes: bytes of the weight and its scales.
        activation_scale: scale of its input (``w8a8``), which is rounded to INT8 multiples of
            it; with ``per_token``, scale of the input divided by the largest magnitude.
        float_channels: input channels (``w8a8``) that are not rounded: their weights are stored
            again in the graph's float type, and are zero in the INT8 weight. Bundles from
            schema version 7 on have none.
        per_token: whether a token's input (``w8a8``) is divided by the largest magnitude in it
            before it is rounded, so that each token has its own range.
        rotation_block: number of input channels that a Hadamard matrix mixes first; 0 for none.
        offsets: whether the graph adds the sum of each group's inputs, times an offset per
            group and output. It replaces zero points (`export.graph.decoder`).
        reordered: whether the graph takes the input channels in another order.
        from_source: what was done with the source's integers; None if the source is float or
            the recipe quantized it anew.
    """

    scheme: TensorScheme
    shape: tuple[Rows, Rows]
    num_bytes: Count
    activation_scale: _Positive | None = None
    float_channels: Annotated[tuple[Count, ...], msgspec.Meta(max_length=4096)] = ()
    per_token: bool = False
    rotation_block: Annotated[int, msgspec.Meta(ge=0, le=1 << 10)] = 0
    offsets: bool = False
    reordered: bool = False
    from_source: FromSource | None = None


class Calibration(_Struct, frozen=True):
    """The text that a calibrated method saw.

    Attributes:
        text: ``built-in``, or the file's name (never a path).
        sha256: SHA-256 of the text's bytes.
        num_tokens: tokens seen, in sequences of ``seq_len``.
        seq_len: tokens of a sequence.
        seed: the seed of the order of the documents.
    """

    text: Line
    sha256: Sha256
    num_tokens: Count
    seq_len: Count
    seed: int


class Quantization(_Struct, frozen=True):
    """How the weights were quantized.

    Attributes:
        name: the recipe's name, e.g. ``int4``; ``source`` keeps the checkpoint's quantization.
        method: how the integers of INT4 layers were found; ``source`` if the checkpoint's own are
            kept.
        clip: ``absmax``, ``mse`` or ``none`` for a float bundle.
        linears: every linear layer by name (``layers.0.qkv``, ``layers.0.o``,
            ``layers.0.gate_up``, ``layers.0.down``, ``lm_head``).
        calibration: the text used for calibration; None if nothing was calibrated.
        smoothed: whether SmoothQuant's factors are folded into the weights of W8A8 layers.
        rotated: whether the residual stream and the values of the heads are rotated.
        embeddings: how the rows of the token table are stored; INT8 rows have one scale each.
    """

    name: Line
    method: Literal["none", "rtn", "awq", "gptq", "awq+gptq", "source"]
    clip: Literal["none", "absmax", "mse"]
    linears: Annotated[dict[str, LinearInfo], msgspec.Meta(max_length=1 << 13)]
    calibration: Calibration | None = None
    smoothed: bool = False
    rotated: bool = False
    embeddings: Literal["fp16", "int8"] = "fp16"


class KvCache(_Struct, frozen=True):
    """A cache of keys and values in 8 bits, except in layers that stay in float.

    The scales are constants of the graphs (`edge.bundle.kv_scales`): one per head and channel, for
    keys after RoPE and for values.

    Attributes:
        kind: how rows are stored.
        score_errors: each layer's expected error of an attention score in nats, as the root of its
            mean square for the worst head: how far rounding the keys moves the softmax's input.
        limit: the largest such error of a layer in 8 bits.
        float_layers: layers above the limit, whose rows stay in the graph's float type, ascending.
        calibration: the text with which the scales were found.
    """

    kind: Literal["int8"]
    score_errors: Annotated[
        tuple[Annotated[float, msgspec.Meta(ge=0, le=1e12)], ...],
        msgspec.Meta(max_length=MAX_LAYERS),
    ]
    limit: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    float_layers: Annotated[tuple[Count, ...], msgspec.Meta(max_length=1000)]
    calibration: Calibration


class SamplingDefaults(_Struct, frozen=True):
    """The model's own generation config, for parameters that a caller leaves open.

    Attributes:
        assumed: the family whose published values these are, because the source states none; None
            if they are the source's own.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0, le=10)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)] = 0
    top_p: _Share = 1.0
    min_p: _Share = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.1, le=10)] = 1.0
    assumed: Line | None = None


class Tokens(_Struct, frozen=True):
    """Ids with a meaning outside the vocabulary.

    Attributes:
        bos: id and text of the begin-of-sequence token, or None if the model has none.
        bos_text: text of ``bos``, which the chat template writes as ``bos_token``.
        eos: every id that ends an answer.
        eos_text: text that the chat template writes as ``eos_token``.
        add_bos: whether plain text (not a chat) starts with ``bos``.
    """

    bos: _Id | None
    bos_text: _TokenText
    eos: Annotated[tuple[_Id, ...], msgspec.Meta(min_length=1, max_length=256)]
    eos_text: _TokenText
    add_bos: bool


class Adapter(_Struct, frozen=True):
    """A LoRA adapter that was merged into the weights.

    Attributes:
        name: the name of its directory (never a path).
        sha256: SHA-256 of ``adapter_model.safetensors``.
    """

    name: Line
    sha256: Sha256


class SourceQuantization(_Struct, frozen=True):
    """How a checkpoint was quantized by whoever made it.

    Attributes:
        method: ``quant_method`` of its config, e.g. ``gptq``.
        details: for a person, e.g. ``4 bits, groups of 128, symmetric``.
    """

    method: Line
    details: Line


class Source(_Struct, frozen=True):
    """Where the weights came from.

    Attributes:
        kind: an HF directory, a hub id or a GGUF file.
        location: the directory's or file's name, or the hub id (never an absolute path); a
            ModelScope id has the prefix ``modelscope:``.
        revision: commit of the hub repository, else None.
        sha256: SHA-256 of the GGUF file, or of the safetensors files' hashes in name order.
        licence: the licence that the source states.
        adapter: the adapter that was merged into the weights, or None.
        quantization: how the source's weights were quantized already, or None.
    """

    kind: Literal["directory", "hub", "gguf"]
    location: Line
    revision: Line | None = None
    sha256: Sha256 | None = None
    licence: Line | None = None
    adapter: Adapter | None = None
    quantization: SourceQuantization | None = None


class ReducedVocabulary(_Struct, frozen=True):
    """Tokens that were left out of the model; ids were renumbered in their old order.

    The bundle's ``vocabulary.json`` lists the old id of every new one.

    Attributes:
        original_size: rows of the source's token table.
        size: rows that were kept.
        file: name of the file that listed them (never a path).
        sha256: SHA-256 of that file.
        text_tokens_original: tokens of the file's text with the whole vocabulary; None for a list
            of ids.
        text_tokens: tokens of the same text with the reduced one.
    """

    original_size: Rows
    size: Rows
    file: Line
    sha256: Sha256
    text_tokens_original: Count | None = None
    text_tokens: Count | None = None


class FileInfo(_Struct, frozen=True):
    """Size and SHA-256 (lower-case hex) of one file of the bundle."""

    num_bytes: Count
    sha256: Sha256


class Graphs(_Struct, frozen=True):
    """The decoder's files, by the program that reads them.

    Attributes:
        decoder: the graph typed for an engine.
        cpu: its fp32-typed twin for ONNX Runtime on the CPU, which shares the weights of
            ``decoder`` and adds scales, norms and biases in fp32.
    """

    decoder: str = "decoder.onnx"
    cpu: str = "decoder.cpu.onnx"


class DraftHead(_Struct, frozen=True):
    """An EAGLE-3 head (arXiv 2503.01840): one decoder layer that guesses the model's next tokens.

    It reads the token table of the model, and hidden states that the model's graph puts out: the
    inputs of three of its layers, joined by the head's ``fc``.

    Attributes:
        name: name of the directory that it was read from (never a path).
        sha256: SHA-256 of its file of weights.
        model: the head's own decoder, of one layer; its vocabulary is the tokens that it can guess.
        layers: the layers of the model whose inputs are joined; the number of layers stands for the
            last one's output, before the final norm.
        norm_before_residual: whether the residual stream begins with the normalised hidden states.
        linears: its linear layers, as in `Quantization.linears`.
        vocabulary: the file that lists the model's id of each of its tokens; None if it guesses all
            of them.
        graphs: its files.
    """

    name: Line
    sha256: Sha256
    model: ModelSpec
    layers: tuple[_LayerInput, _LayerInput, _LayerInput]
    norm_before_residual: bool
    linears: Annotated[dict[str, LinearInfo], msgspec.Meta(max_length=16)]
    vocabulary: str | None
    graphs: Graphs


class Embedding(_Struct, frozen=True):
    """How texts become vectors: from the hidden state of their last token, after the final norm.

    Attributes:
        append: ids that follow each text; the last one's hidden state is the text's vector.
        normalize: whether vectors have length 1.
        prompts: texts to put before a text, by the name that a caller gives, e.g. ``query``.
        default_prompt: name of the prompt of a text for which none is named; None is no prompt.
        least_dimensions: the fewest leading dimensions that may stand for all (Matryoshka); None
            if the model was not trained for it.
    """

    append: Annotated[tuple[_Id, ...], msgspec.Meta(max_length=16)] = ()
    normalize: bool = True
    prompts: Annotated[
        dict[Line, Annotated[str, msgspec.Meta(max_length=10_000)]], msgspec.Meta(max_length=256)
    ] = {}
    default_prompt: Line | None = None
    least_dimensions: Size | None = None


class Reranking(_Struct, frozen=True):
    """How a query and a document become a prompt, which the model answers with yes or no.

    Attributes:
        yes, no: the ids of both answers; the graph has their logits, ``no`` first.
        prefix, suffix: texts before and after the pair; only they have control tokens.
        instruction: default instruction for judging, if a caller gives none.
    """

    yes: _Id
    no: _Id
    prefix: Annotated[str, msgspec.Meta(max_length=10_000)]
    suffix: Annotated[str, msgspec.Meta(max_length=10_000)]
    instruction: Annotated[str, msgspec.Meta(max_length=10_000)]


class Manifest(_Struct, frozen=True):
    """The content of ``manifest.json``.

    ``self_sha256`` stays the last field: `decode_manifest` looks for it at the end of the file.

    Attributes:
        head: the head that drafts tokens from the model's hidden states, or None.
        tensorrt: versions of TensorRT whose rules the graph keeps, by name, as the exporter knew
            them; None if nobody checked.
        kv_cache: how the cache is stored; None is the graph's float type.
        embedding: set for a model that embeds, else None.
        reranking: set for a model that judges documents, else None.
        extras: sections of optional packages by name; `edge.bundle.extras` decodes them.
    """

    schema_version: int
    producer: Line
    created: Line
    name: Line
    model: ModelSpec
    dialect: Dialect
    dtype: Literal["fp16", "bf16"]
    kv_capacity: Rows
    rope_positions: Rows
    quantization: Quantization
    sampling: SamplingDefaults
    tokens: Tokens
    source: Source
    graphs: Graphs
    files: Annotated[dict[str, FileInfo], msgspec.Meta(max_length=1000)]
    quality: dict[str, Any] | None = None
    vocabulary: ReducedVocabulary | None = None
    tensorrt: Annotated[tuple[Line, ...], msgspec.Meta(max_length=100)] | None = None
    kv_cache: KvCache | None = None
    head: DraftHead | None = None
    embedding: Embedding | None = None
    reranking: Reranking | None = None
    extras: Annotated[dict[Line, dict[str, Any]], msgspec.Meta(max_length=64)] = {}
    self_sha256: str = NO_HASH

    @property
    def int8_layers(self) -> tuple[int, ...]:
        """Return the layers whose cache rows are INT8, ascending; others use the float type."""
        if self.kv_cache is None:
            return ()
        kept = self.kv_cache.float_layers
        return tuple(layer for layer in range(self.model.num_layers) if layer not in kept)

    @property
    def embeds_width(self) -> int:
        """Return the width of ``inputs_embeds``, in numbers per token."""
        return self.model.hidden_size

    @property
    def hidden_width(self) -> int:
        """Return the width of ``hidden_states``, in numbers per token; 0 without that output."""
        return 0 if self.head is None else self.head.model.hidden_size


class HeadManifest(Manifest, frozen=True):
    """The manifest of a bundle's head alone, for code that runs a decoder; never written."""

    @property
    def embeds_width(self) -> int:
        """Return the width of a token's embedding and the hidden state of the token before it."""
        return 2 * self.model.hidden_size

    @property
    def hidden_width(self) -> int:
        """Return the width of the residual stream after the layer, from which a head continues."""
        return self.model.hidden_size


def head_manifest(manifest: Manifest) -> HeadManifest | None:
    """Describe a bundle's head as a decoder of its own; None if the bundle has none."""
    head = manifest.head
    if head is None:
        return None
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    is_float = all(linear.scheme.kind == "float" for linear in head.linears.values())
    quantization = msgspec.structs.replace(
        manifest.quantization,
        name=manifest.dtype if is_float else "int8",
        method="none" if is_float else "rtn",
        linears=head.linears,
    )
    own = {
        "name": f"{manifest.name}: head {head.name}",
        "model": head.model,
        "graphs": head.graphs,
        "quantization": quantization,
        "vocabulary": None,
        "kv_cache": None,
        "head": None,
    }
    return HeadManifest(**{**fields, **own})


def fingerprint(manifest: Manifest) -> str:
    """Name a manifest, and so a bundle, in a few characters, e.g. ``fp_0123456789ab``."""
    return f"fp_{hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()[:12]}"


def is_file_name(name: str) -> bool:
    """Check that a file of a bundle may have this name.

    It must be plain ASCII of at most 200 bytes, without a slash and not hidden. Names that begin
    with `MANIFEST_NAME` are reserved for the manifest, its signature and their temporary files.
    """
    return _FILE_NAME.match(name) is not None and name != ENGINES_DIR


def decode_manifest(data: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """Parse and validate the bytes of a manifest.

    Args:
        data: content of ``manifest.json``.
        where: path for error messages.

    Raises:
        BundleError: it is not JSON, or has another schema version, an unknown or missing key, a
            wrong type, or a file name that points out of the bundle.
        IntegrityError: the self-hash does not match.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
    except MALFORMED as error:
        raise BundleError(
            f"{where} is not a manifest of edge-llm ({error}); export the bundle again"
        ) from error
    if version not in _READABLE_VERSIONS:
        raise BundleError(
            f"{where} has schema version {version}, this edge-llm reads "
            f"{_READABLE_VERSIONS[0]} to {_READABLE_VERSIONS[-1]}; "
            "export the bundle again or install the edge-llm that wrote it"
        )
    match = SELF_HASH.search(data)
    if match is None:
        raise IntegrityError(f"{where} has no valid self_sha256; copy or export the bundle again")
    blanked = data[: match.start(1)] + NO_HASH.encode() + data[match.end(1) :]
    if hashlib.sha256(blanked).hexdigest() != match.group(1).decode():
        raise IntegrityError(
            f"{where} was changed after the export (its self_sha256 does not match); "
            "copy or export the bundle again"
        )
    try:
        manifest = _decode(data, version)
    except MALFORMED as error:
        raise BundleError(
            f"{where} does not fit schema {version}: {error}; export the bundle again"
        ) from error
    check_fit(manifest, where)
    named = [] if manifest.head is None else head_files(manifest.head)
    for name in [*manifest.files, *named]:
        if not is_file_name(name):
            raise BundleError(
                f"{where} lists {name!r}, which is no name for a file of a bundle; "
                "export the bundle again"
            )
    return manifest


def _decode(data: bytes, version: int) -> Manifest:
    """Decode a manifest; one from before `ModelSpec.layers` has a dense model's numbers instead."""
    if version >= _LAYERS_SINCE:
        return msgspec.json.decode(data, type=Manifest)
    from .older_manifest import with_layers

    return msgspec.convert(with_layers(msgspec.json.decode(data)), Manifest)


def printable(text: str) -> str:
    """Replace characters that a name may not have: a terminal obeys them, or UTF-8 has none.

    Python reads bytes of a file's name that are not UTF-8 as lone surrogates.
    """
    return re.sub(rf"[{_UNPRINTABLE}\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)[:1000]


class _Version(msgspec.Struct):
    schema_version: int


def read_manifest(bundle: Path) -> Manifest:
    """Read ``manifest.json`` of a bundle directory; files are hashed by `verified_files`.

    It does not check the signature: code that opens a bundle for use calls
    `edge.bundle.trust.open_manifest`.

    Raises:
        BundleError: the directory or the manifest is missing or invalid.
    """
    return decode_manifest(read_manifest_bytes(bundle), str(bundle / MANIFEST_NAME))


def read_manifest_bytes(bundle: Path) -> bytes:
    """Read the bytes of ``manifest.json``, unchecked.

    Raises:
        BundleError: the directory or the file is missing or cannot be read.
    """
    try:
        return read_file(bundle / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise BundleError(
            f"no bundle at {bundle}: cannot read {MANIFEST_NAME} ({error.strerror}); "
            "make one with: edge-llm export SOURCE -o BUNDLE"
        ) from error
