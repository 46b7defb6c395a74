"""A published EAGLE-3 head: what is read and refused, and that the graphs compute what it does."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edge.backends.ort.cpu import OrtBackend
from edge.backends.step import step_after
from edge.bundle import io_spec
from edge.bundle.embeddings import EMBEDDINGS_NAME, EmbeddingTable
from edge.bundle.manifest import SCHEMA_VERSION, decode_manifest, head_manifest, read_manifest
from edge.bundle.verified_files import verify_files
from edge.errors import BundleError, CheckpointError, ConfigError
from edge.model.cache import cache_tensors
from edge_make.manifest_bytes import encode_manifest
from engines.config import BuildShapes
from engines.graph.adapt import prepare_graph
from export.pipeline import ExportConfig, export_checkpoint
from tests.conftest import RUNNABLE, TINY_KV_CAPACITY, Bundles, Checkpoints, require_kernels
from tests.makers.tiny_heads import DRAFT_VOCAB, HIDDEN, LAYERS, VOCAB, TinyHead, make_head

NUM_TOKENS = 11


class HeadBundles(Protocol):
    def __call__(
        self, head: TinyHead, dialect: str = RUNNABLE, quant: str = "fp16", kind: Any = "qwen2"
    ) -> Path: ...


@pytest.fixture
def export(tiny_checkpoints: Checkpoints, tmp_path: Path) -> HeadBundles:
    def run(
        head: TinyHead, dialect: str = RUNNABLE, quant: str = "fp16", kind: Any = "qwen2"
    ) -> Path:
        config = ExportConfig(
            source=str(tiny_checkpoints(kind)),
            output=tmp_path / "bundle",
            quant=quant,  # type: ignore[arg-type]
            dialect=dialect,  # type: ignore[arg-type]
            method="rtn" if quant == "int4" else None,
            kv_capacity=TINY_KV_CAPACITY,
            eagle3=head.write(tmp_path / "head"),
        )
        export_checkpoint(config)
        return config.output

    return run


def tokens(seed: int = 0, count: int = NUM_TOKENS) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 300, count)


def run_target(
    bundle: Path, ids: NDArray[np.int64], chunk: int, **options: Any
) -> NDArray[np.float32]:
    """The hidden states of a text, read in chunks, with logits of each chunk's last token only."""
    backend = OrtBackend(
        bundle, read_manifest(bundle), num_threads=1, hidden_states=True, **options
    )
    table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
    found = []
    for start in range(0, len(ids), chunk):
        part = ids[None, start : start + chunk]
        last = np.array([[part.shape[1] - 1]])
        backend.forward(step_after([0], [start], table[part], last))
        assert backend.hidden_states is not None
        found.append(backend.hidden_states[0].copy())
    backend.close()
    table.close()
    return np.concatenate(found)


def streams(bundle: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """The inputs of the layers that the tiny heads read, from the tensors of the CPU's graph."""
    manifest = read_manifest(bundle)
    proto = onnx.load(bundle / manifest.graphs.cpu, load_external_data=True)
    names = [io_spec.layer_output(i - 1) for i in LAYERS if i]
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    session = _session(proto)
    with_table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
    embeds = with_table[ids[None]].astype(np.float32)
    with_table.close()
    found = session.run(names, _feeds(manifest, embeds))
    return np.concatenate([embeds[0], *(value[0] for value in found)], axis=-1)


def _session(proto: onnx.ModelProto) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])


def _feeds(manifest: Any, embeds: NDArray[np.float32]) -> dict[str, Any]:
    model, count = manifest.model, embeds.shape[1]
    part = model.attentions()[0]
    cache = np.zeros((1, part.kv_heads, manifest.kv_capacity, part.dim), np.float32)
    dialect = io_spec.DIALECTS[manifest.dialect]
    feeds: dict[str, Any] = {
        io_spec.INPUTS_EMBEDS: embeds,
        io_spec.POSITION_IDS: np.arange(count)[None],
        dialect.cursor: np.zeros(1, np.int64),
        io_spec.KV_POSITIONS: np.arange(dialect.rows_read([0], count)),
        io_spec.LOGITS_INDICES: np.array([[count - 1]]),
    }
    return feeds | {io_spec.PAST_PREFIX + name: cache for name in cache_tensors(model, "fp32")}


@pytest.mark.parametrize("dialect", ["native", "portable"])
@pytest.mark.parametrize("before", [False, True])
def test_the_graphs_compute_what_the_head_does(export: HeadBundles, dialect: str, before: bool):
    """Read in chunks, with and without ONNX Runtime's own attention, against plain NumPy."""
    require_kernels(dialect)
    head = make_head(norm_before_residual=before)
    bundle = export(head, dialect)
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest)
    ids = tokens()
    hidden = run_target(bundle, ids, chunk=4)
    joined = streams(bundle, ids) @ head.weight("fc.weight").T
    np.testing.assert_allclose(hidden, joined, rtol=2e-3, atol=2e-3)

    own = head_manifest(manifest)
    assert own is not None
    table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
    # A hidden state stands beside the token after its own.
    inputs = np.concatenate([table[ids[1:]].astype(np.float32), hidden[:-1]], axis=-1)
    table.close()
    expected, states = head.run(inputs[:, :HIDDEN], inputs[:, HIDDEN:])
    for fuse in (True, False):
        backend = OrtBackend(bundle, own, num_threads=1, fuse_attention=fuse, hidden_states=True)
        for start, stop in ((0, 5), (5, 6), (6, len(inputs))):
            wanted = np.arange(stop - start)[None]
            logits = backend.forward(step_after([0], [start], inputs[None, start:stop], wanted))
            np.testing.assert_allclose(logits[0], expected[start:stop], rtol=5e-3, atol=5e-3)
            found = backend.hidden_states
            assert found is not None
            np.testing.assert_allclose(found[0], states[start:stop], rtol=5e-3, atol=5e-3)
        backend.close()


def test_hidden_states_of_sequences_that_run_apart_find_their_rows(export: HeadBundles):
    bundle = export(make_head())
    backend = OrtBackend(
        bundle, read_manifest(bundle), num_threads=1, num_slots=5, hidden_states=True
    )
    table = EmbeddingTable(bundle / EMBEDDINGS_NAME)
    ids = np.stack([tokens(seed, 3) for seed in range(3)])
    slots = [4, 0, 2]
    wanted = np.full((3, 1), 2)
    backend.forward(step_after(slots, [0, 0, 0], table[ids], wanted))
    assert backend.hidden_states is not None
    found = backend.hidden_states.copy()
    table.close()
    backend.close()
    for row, alone in zip(ids, found, strict=True):
        np.testing.assert_allclose(run_target(bundle, row, 3), alone, rtol=1e-4, atol=1e-4)


def test_integer_weights_of_a_head_are_close_to_its_own(export: HeadBundles):
    head = make_head()
    bundle = export(head, quant="int4")
    manifest = read_manifest(bundle)
    own = head_manifest(manifest)
    assert own is not None
    assert {linear.scheme.kind for linear in own.quantization.linears.values()} == {"int8"}
    rng = np.random.RandomState(1)
    inputs = rng.standard_normal((6, 2 * HIDDEN)).astype(np.float32)
    expected, _ = head.run(inputs[:, :HIDDEN], inputs[:, HIDDEN:])
    backend = OrtBackend(bundle, own, num_threads=1, int8_activations=False)
    logits = backend.forward(step_after([0], [0], inputs[None], np.arange(6)[None]))[0]
    assert backend.hidden_states is None  # nobody asked for it
    backend.close()
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.999


def test_the_manifest_says_what_there_is(export: HeadBundles, tiny_bundles: Bundles):
    head = make_head()
    bundle = export(head)
    manifest = read_manifest(bundle)
    assert manifest.schema_version == SCHEMA_VERSION
    assert manifest.head is not None
    assert manifest.head.layers == LAYERS
    assert manifest.head.model.vocab_size == DRAFT_VOCAB
    assert manifest.head.vocabulary is not None
    ids = json.loads((bundle / manifest.head.vocabulary).read_text())
    assert ids == (head.tensors["d2t"] + np.arange(DRAFT_VOCAB)).tolist()
    assert {*manifest.files} >= {"eagle3.onnx", "eagle3.onnx.data", "eagle3.cpu.onnx"}
    # A bundle without a head knows nothing of this.
    plain = tiny_bundles("qwen2")
    content = json.loads((plain / "manifest.json").read_bytes())
    assert content["schema_version"] == SCHEMA_VERSION
    assert content["head"] is None
    graph = onnx.load(plain / "decoder.onnx", load_external_data=False).graph
    assert [value.name for value in graph.output if "hidden" in value.name] == []
    weights = (plain / "decoder.onnx.data").read_bytes()
    assert (bundle / "decoder.onnx.data").read_bytes()[: len(weights)] == weights


def test_an_engine_is_built_from_the_graph_of_a_bundle_without_a_head(
    export: HeadBundles, tiny_bundles: Bundles
):
    shapes = BuildShapes(1, 64, TINY_KV_CAPACITY, (TINY_KV_CAPACITY,))
    graphs = [
        prepare_graph((bundle / "decoder.onnx").read_bytes(), shapes, "slice")
        for bundle in (export(make_head()), tiny_bundles("qwen2"))
    ]
    assert graphs[0] == graphs[1]


def test_all_tokens_of_the_model_need_no_list(export: HeadBundles):
    manifest = read_manifest(export(make_head(draft_vocab=VOCAB)))
    assert manifest.head is not None
    assert manifest.head.vocabulary is None


def test_names_and_config_of_vllm_are_understood(export: HeadBundles):
    head = make_head()
    renamed = {
        f"model.{name}".replace("midlayer", "layers.0") if "." in name else name: tensor
        for name, tensor in head.tensors.items()
    }
    inner = {key: value for key, value in head.config.items() if key != "eagle_config"}
    config = {
        "architectures": ["Eagle3Speculator"],
        "transformer_layer_config": inner,
        "draft_vocab_size": DRAFT_VOCAB,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [1, 0, 1],  # the layers whose outputs are meant
    }
    manifest = read_manifest(export(TinyHead(config, renamed)))
    assert manifest.head is not None
    assert manifest.head.layers == (2, 1, 2)


def _without(name: str) -> Callable[[TinyHead], TinyHead]:
    def change(head: TinyHead) -> TinyHead:
        left = {key: value for key, value in head.tensors.items() if key != name}
        return replace(head, tensors=left)

    return change


def _with(name: str, value: Any) -> Callable[[TinyHead], TinyHead]:
    return lambda head: replace(head, tensors={**head.tensors, name: value(head)})


def _config(**changes: Any) -> Callable[[TinyHead], TinyHead]:
    return lambda head: replace(head, config={**head.config, **changes})


def _offset(head: TinyHead, place: int, value: int) -> NDArray[np.int64]:
    changed: NDArray[np.int64] = head.tensors["d2t"].copy()
    changed[place] += value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_config(hidden_size=128), r"hidden_size is 128, the model's is 64"),
        (_config(target_hidden_size=96), r"target_hidden_size is 96, the model's is 64"),
        (_config(num_hidden_layers=2), r"num_hidden_layers is 2; heads of one layer"),
        (_config(architectures=["Qwen3Eagle3Model"]), r"an EAGLE-3 head has one of Llama"),
        (_config(draft_vocab_size=400), r"draft_vocab_size is 400, the model has 320 tokens"),
        (_config(intermediate_size=64), r"gate_proj.weight has shape \[96, 64\].*\[64, 64\]"),
        (_config(num_key_value_heads=4), r"k_proj.weight has shape \[32, 128\].*another model"),
        (_config(attention_bias=True), r"attention_bias is true"),
        (_config(norm_before_residual="no"), r"norm_before_residual must be true or false"),
        (_config(architectures=["Eagle3Speculator"]), r"has no norm_before_residual, .* write"),
        (_config(eagle_config=None), r"a model of 2 layers has no usual ones"),
        (
            _config(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}),
            r"is \[0, 1, 3\], the model has 2 layers",
        ),
        (
            _config(eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1]}),
            r"expected three layers",
        ),
        (_without("fc.weight"), r"has no tensor fc.weight, expected \[64, 192\]"),
        (_without("lm_head.weight"), r"has no tensor lm_head.weight"),
        (_without("midlayer.hidden_norm.weight"), r"has no tensor midlayer.hidden_norm.weight"),
        (_without("d2t"), r"guesses 96 tokens of 320: which ones is not known"),
        (_with("d2t", lambda head: _offset(head, -1, 400)), r"d2t leads to token \d+"),
        (_with("d2t", lambda head: _offset(head, 0, -400)), r"d2t leads to token -\d+"),
        (
            _with("d2t", lambda head: 7 - np.arange(DRAFT_VOCAB)),
            r"d2t leads to the same token twice",
        ),
        (_with("d2t", lambda head: np.zeros(9, np.int64)), r"d2t is I64 \[9\]"),
        (_with("d2t", lambda head: np.zeros(DRAFT_VOCAB, np.float32)), r"expected integers \[96\]"),
        (_with("t2d", lambda head: np.zeros(VOCAB, bool)), r"t2d names other tokens than d2t"),
        (_with("fc.bias", lambda head: np.zeros(HIDDEN, np.float32)), r"fc.bias is no part"),
        (
            _with("embed_tokens.weight", lambda head: np.ones((VOCAB, HIDDEN), np.float16)),
            r"embed_tokens.weight differs from the token table of qwen2 by \d+%",
        ),
        (
            _with("embed_tokens.weight", lambda head: np.ones((VOCAB, 8), np.float16)),
            r"embed_tokens.weight has shape \[320, 8\]",
        ),
        (_with("norm.weight", lambda head: np.zeros(HIDDEN, np.int64)), r"has type I64"),
        (
            _with("lm_head.weight", lambda head: np.full((DRAFT_VOCAB, HIDDEN), np.nan, "f2")),
            r"lm_head.weight .*(NaN|finite)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    export: HeadBundles, tmp_path: Path, change: Callable[[TinyHead], TinyHead], message: str
):
    with pytest.raises(CheckpointError, match=message):
        export(change(make_head()))
    assert not (tmp_path / "bundle").exists()


def test_a_model_whose_stream_is_scaled_takes_no_head(
    tiny_checkpoints: Checkpoints, tmp_path: Path
):
    head = make_head().write(tmp_path / "head")
    config = ExportConfig(
        source=str(tiny_checkpoints("granite")),
        output=tmp_path / "bundle",
        quant="fp16",
        eagle3=head,
    )
    with pytest.raises(CheckpointError, match="hidden states are scaled"):
        export_checkpoint(config)


def test_a_head_with_the_models_own_table_is_taken(export: HeadBundles, tiny_bundles: Bundles):
    table = EmbeddingTable(tiny_bundles("qwen2") / EMBEDDINGS_NAME)
    rows = table[np.arange(VOCAB)]
    table.close()
    assert read_manifest(export(_with("embed_tokens.weight", lambda _: rows)(make_head()))).head


def test_pickled_weights_are_never_opened(tiny_checkpoints: Checkpoints, tmp_path: Path):
    head = make_head().write(tmp_path / "head")
    (head / "model.safetensors").rename(head / "pytorch_model.bin")
    config = functools.partial(
        ExportConfig, str(tiny_checkpoints("qwen2")), tmp_path / "bundle", quant="fp16"
    )
    with pytest.raises(CheckpointError, match=r"only pytorch_model.bin: pickled weights can run"):
        export_checkpoint(config(eagle3=head))
    (head / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="give the directory of a published EAGLE-3 head"):
        export_checkpoint(config(eagle3=head))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int8-w8a8"}, "--no-rotate"),
        ({"quant": "int4", "rotate": True}, "--rotate"),
        ({"quant": "int4", "vocab_keep": Path("text")}, "--vocab-keep; leave one"),
    ],
)
def test_options_that_change_hidden_states_or_tokens_are_refused(
    options: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        ExportConfig("model", Path("out"), eagle3=Path("head"), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (0, 1, 3)}, "the head reads a layer that the model does not have"),
        ({"vocabulary": None}, "the head guesses some tokens and does not say which"),
        ({"vocabulary": "../tokens"}, "'../tokens', which is no name"),
    ],
)
def test_a_manifest_whose_head_does_not_fit_is_refused(
    export: HeadBundles, changes: dict[str, Any], message: str
):
    manifest = read_manifest(export(make_head()))
    assert manifest.head is not None
    head = msgspec.structs.replace(manifest.head, **changes)
    data = encode_manifest(msgspec.structs.replace(manifest, head=head))
    with pytest.raises(BundleError, match=message):
        decode_manifest(data)
