"""Calibration: which tokens, and that the taps see what the whole float model computes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.bundle.manifest import read_manifest
from edge.errors import ConfigError
from edge.text.chat_template import ChatTemplate, encode_chat
from edge.text.reasoning import ReasoningSplitter
from edge.text.tokenizer import Tokenizer
from export.pipeline import ExportConfig, export_checkpoint
from export.quantize import calibration
from export.quantize.calibration import LayerRunner
from export.sources.checkpoint import Checkpoint
from export.sources.documents import calibration_batches, encode_document, read_calibration_text
from export.sources.opening import open_checkpoint
from tests.conftest import Checkpoints
from tests.export.quantize.layers import run_layers
from tests.export.quantize.made_layers import without_rope
from tests.makers.goldens import Golden
from tests.makers.tiny_models import BOS_ID, CONTROL_IDS, EOS_ID, KINDS, Kind

# -------------------------------------------------------------------------------- activations


def fused(checkpoint: Checkpoint, layer: int, *parts: str) -> Any:
    return np.concatenate(
        [checkpoint.tensor(f"model.layers.{layer}.{part}_proj.weight") for part in parts]
    ).astype(np.float64)


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight.astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_taps_are_those_of_the_whole_float_model(kind: Kind, tiny_checkpoints: Checkpoints):
    """The logits are transformers'; each tap follows from the others and the weights."""
    golden = Golden.load(kind)
    with open_checkpoint(str(tiny_checkpoints(kind))) as checkpoint:
        spec = checkpoint.spec
        table = checkpoint.tensor("model.embed_tokens.weight").astype(np.float64)
        hidden = table[golden.ids[:-1]]
        *layers, last = run_layers(checkpoint, golden.ids[None, :-1])
        for i, layer in enumerate(layers):
            x = layer.inputs
            block = f"model.layers.{i}"
            for short, norm in (("qkv", "input"), ("gate_up", "post_attention")):
                weight = checkpoint.tensor(f"{block}.{norm}_layernorm.weight")
                expected = rms_norm(hidden, weight, spec.rms_norm_eps)
                np.testing.assert_allclose(x[short], expected, rtol=1e-4, atol=1e-5)
                if short == "qkv":
                    hidden = hidden + x["o"] @ fused(checkpoint, i, "self_attn.o").T
            gate = x["gate_up"] @ fused(checkpoint, i, "mlp.gate").T
            up = x["gate_up"] @ fused(checkpoint, i, "mlp.up").T
            np.testing.assert_allclose(
                x["down"], gate / (1 + np.exp(-gate)) * up, rtol=1e-3, atol=1e-5
            )
            np.testing.assert_array_equal(
                layer.peaks[f"layers.{i}.gated"], np.abs(x["down"]).max(axis=0)
            )
            hidden = hidden + x["down"] @ fused(checkpoint, i, "mlp.down").T
            peak = layer.peaks[f"layers.{i}.mlp_residual"].max()
            assert peak == np.abs(layer.hidden).max()
            assert peak == pytest.approx(np.abs(hidden).max(), rel=1e-4)
        head = table if spec.tied_embeddings else checkpoint.tensor("lm_head.weight")
        logits = last.inputs["lm_head"] @ head.astype(np.float32).T
    np.testing.assert_allclose(logits, golden.logits, atol=1e-3)


def test_layers_without_rope_see_no_positions(tiny_checkpoints: Checkpoints):
    """The last token sees a set of earlier ones there, whose order counts elsewhere."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((1, 12, 64)).astype(np.float32)
    mixed = np.concatenate([hidden[:, 10::-1], hidden[:, 11:]], axis=1)
    with open_checkpoint(str(tiny_checkpoints("qwen2"))) as checkpoint:
        runner = LayerRunner(without_rope(checkpoint), np.ones((1, 12), np.int64))
        moved = []
        for layer in (0, 1):
            one, other = (runner.run(layer, each).inputs["o"][-1] for each in (hidden, mixed))
            moved.append(np.abs(one - other).max() / np.abs(one).max())
    assert moved[0] > 1e-2
    assert moved[1] < 1e-5


def test_sequences_do_not_see_each_other(tiny_checkpoints: Checkpoints):
    ids = Golden.load("qwen2").ids[:64].reshape(2, 32)
    with open_checkpoint(str(tiny_checkpoints("qwen2"))) as checkpoint:
        both = [layer.inputs for layer in run_layers(checkpoint, ids)]
        second = [layer.inputs for layer in run_layers(checkpoint, ids[1:])]
    for one, other in zip(both, second, strict=True):
        for name, values in other.items():
            np.testing.assert_allclose(one[name][32:], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", [{"quant": "int4", "method": "awq"}, {"quant": "int8"}])
def test_a_value_near_the_end_of_fp16_is_named_once(
    recipe: dict[str, Any],
    tiny_checkpoints: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def warnings(**options: Any) -> list[str]:
        source, output = str(tiny_checkpoints("qwen2")), tmp_path / "b"
        caplog.clear()
        export_checkpoint(ExportConfig(source, output, overwrite=True, **recipe, **options))
        return [each.getMessage() for each in caplog.records if "in calibration" in each.msg]

    cache: dict[str, Any] = {
        "kv_cache": "int8",
        "dialect": "portable",
        "kv_capacity": 64,
        "calibration_tokens": 512,
    }
    with caplog.at_level(logging.WARNING):
        assert not warnings(**cache)
        quality = read_manifest(tmp_path / "b").quality
        assert quality is not None
        peaks = quality["activation_peaks"]
        largest = max(peaks, key=lambda name: peaks[name])
        monkeypatch.setattr(calibration, "_FP16_NEAR", peaks[largest])
        (line,) = warnings(**cache)
        assert line.startswith(f"{largest} reaches ")
        assert line.endswith("export with --dtype bf16")
        assert not warnings(**cache, dtype="bf16")
        # The token table is in FP16 all the same, and no other type of the graph would help.
        monkeypatch.setattr(calibration, "_FP16_NEAR", 0.0)
        (line,) = warnings(**cache, dtype="bf16")
        assert line.startswith("the embeddings reach ")
        assert "export with" not in line


# --------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def tools(tiny_checkpoints: Checkpoints) -> tuple[Tokenizer, ChatTemplate]:
    with open_checkpoint(str(tiny_checkpoints("qwen2"))) as checkpoint:
        text = checkpoint.text
        assert text.chat_template is not None
        tokenizer = Tokenizer.from_bytes(text.tokenizer_json, text.tokens)
        return tokenizer, ChatTemplate(text.chat_template, text.tokens)


def test_the_built_in_text_is_in_the_models_own_format(tools: Any):
    text = read_calibration_text(None)
    assert text.name == "built-in"
    ids = calibration_batches(tools[0], tools[1], text, 16384, 128)
    assert ids.shape == (128, 128)
    assert (ids[:, 0] == BOS_ID).all()
    joined = ids[:, 1:].reshape(-1).tolist()
    think, end = CONTROL_IDS["<think>"], CONTROL_IDS["</think>"]
    marks = [i for i in joined if i in (think, end, EOS_ID, CONTROL_IDS["<｜User｜>"])]
    at = marks.index(think)
    assert marks[at : at + 3] == [think, end, EOS_ID]
    assert marks.count(think) > 10


@pytest.mark.parametrize("seed", range(4))
def test_a_part_of_the_text_has_of_each_kind_what_the_whole_has(
    seed: int, tools: Any, tmp_path: Path
):
    """Ten documents of each of ten kinds, as they follow each other in a file."""
    path = tmp_path / "kinds.jsonl"
    lines = [json.dumps({"text": f"kind {kind} {kind}"}) for kind in range(10) for _ in range(10)]
    path.write_text("\n".join(lines))
    text = read_calibration_text(path)
    whole = len([i for n in range(100) for i in text.encode(tools[0], tools[1], n)])
    for share in (3, 5):
        ids = calibration_batches(tools[0], tools[1], text, whole // share, 16, seed)
        words = tools[0].decode(ids[:, 1:].reshape(-1).tolist()).split()
        counts = [words.count(str(kind)) / 2 for kind in range(10)]
        assert sum(counts) > 80 / share
        assert max(counts) - min(counts) <= 2


def test_the_seed_decides_the_order(tools: Any):
    text = read_calibration_text(None)
    one, again, other = (
        calibration_batches(tools[0], tools[1], text, 4096, 256, seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.5


def test_a_short_text_gives_fewer_sequences(tools: Any, tmp_path: Path):
    path = tmp_path / "short.txt"
    path.write_text("the hello world " * 200)
    ids = calibration_batches(tools[0], tools[1], read_calibration_text(path), 100_000, 32)
    assert 1 < len(ids) < 100
    assert tools[0].decode(ids[0, 1:6]).startswith("the hello world")


def test_files_of_messages_and_of_text(tools: Any, tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "hello"}]
    answer = {"role": "assistant", "content": "world", "reasoning": "what the"}
    lines = [{"messages": [*messages, answer]}, {"messages": messages}, {"text": "</think>"}]
    path.write_text("\n".join(json.dumps(line) for line in lines * 20))
    ids = calibration_batches(tools[0], tools[1], read_calibration_text(path), 256, 64)
    text = tools[0].decode(ids.reshape(-1))
    assert "<｜User｜>hello<｜Assistant｜><think>\nwhat the\n</think>\n\nworld" in text
    # Once for each answer: a control token that is merely typed stays plain text.
    counts = [(ids == CONTROL_IDS[token]).sum() for token in ("<think>", "</think>")]
    assert abs(int(counts[0]) - int(counts[1])) <= 1


@pytest.mark.parametrize("reasoning", [None, "", "Lead?"])
@pytest.mark.parametrize("content", ["A charge.", None])
def test_an_answer_closes_the_reasoning_that_the_template_opens(
    tools: Any, reasoning: str | None, content: str | None
):
    chat = [{"role": "user", "content": "hello"}]
    answer = {"role": "assistant", "content": content, "reasoning": reasoning}
    prompt = encode_chat(tools[0], tools[1], chat)
    ids = encode_document(tools[0], tools[1], {"messages": [*chat, answer]})
    assert ids[: len(prompt)] == prompt
    assert ids[-1] == EOS_ID
    splitter = ReasoningSplitter(opened=True)
    parts = [splitter.push(tools[0].decode(ids[len(prompt) : -1])), splitter.flush()]
    assert tuple(map("".join, zip(*parts, strict=True))) == (reasoning or "", content or "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', "line 2 must be"),
        ("a.jsonl", b"hello", "line 1 is not JSON"),
        ("a.jsonl", b'{"messages": "hello"}', "line 1 must be"),
    ],
)
def test_files_that_are_no_text_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--calibration .*{message}"):
        read_calibration_text(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_calibration_text(tmp_path / "missing")


def test_too_few_tokens_are_refused(tools: Any, tmp_path: Path):
    text = read_calibration_text(None)
    with pytest.raises(ConfigError, match="--calibration-tokens 100 is less than one sequence"):
        calibration_batches(tools[0], tools[1], text, 100, 128)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"a\.txt has \d tokens"):
        calibration_batches(tools[0], tools[1], read_calibration_text(tmp_path / "a.txt"), 200, 128)


# ------------------------------------------------------------------------------------- export


def test_the_manifest_says_how_it_was_calibrated(tmp_path: Path, tiny_checkpoints: Checkpoints):
    bundles = [tmp_path / "one", tmp_path / "other"]
    for bundle in bundles:
        export_checkpoint(
            ExportConfig(
                source=str(tiny_checkpoints("qwen3")),
                output=bundle,
                group_size=32,
                method="awq+gptq",
                calibration_tokens=512,
                seed=3,
            )
        )
    manifest, again = (read_manifest(bundle) for bundle in bundles)
    assert manifest.files == again.files  # the same seed, the same bytes
    assert manifest.quantization.method == "awq+gptq"
    record = manifest.quantization.calibration
    assert record is not None
    assert (record.text, record.num_tokens, record.seq_len, record.seed) == (
        "built-in, mixed",
        512,
        256,
        3,
    )
    mixed = Path("export/sources/calibration_text/mixed.jsonl")
    assert record.sha256 == read_calibration_text(mixed).sha256
    assert manifest.quality is not None
    assert len(manifest.quality["activation_peaks"]) == 2 * 7 + 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quant": "int8-w8a8"}, "built-in, mixed"),
        ({"method": "gptq", "group_size": 32}, "built-in, mixed"),
        ({"method": "awq", "group_size": 32}, "built-in"),
        ({"method": "awq", "group_size": 32, "keep": (("*.o", "w8a8"),)}, "built-in, mixed"),
    ],
)
def test_methods_that_fit_to_their_text_get_chinese_and_code(
    options: dict[str, Any], text: str, tmp_path: Path, tiny_checkpoints: Checkpoints
):
    source = str(tiny_checkpoints("qwen3"))
    export_checkpoint(ExportConfig(source, tmp_path / "b", calibration_tokens=256, **options))
    record = read_manifest(tmp_path / "b").quantization.calibration
    assert record is not None
    assert record.text == text


def test_calibration_without_a_use_is_refused(tmp_path: Path, tiny_checkpoints: Checkpoints):
    source = str(tiny_checkpoints("qwen3"))
    for options in ({"calibration": Path("a")}, {"calibration_tokens": 5}, {"seed": 1}):
        with pytest.raises(ConfigError, match="with --method rtn; use --method awq"):
            ExportConfig(source=source, output=tmp_path / "b", method="rtn", **options)
        with pytest.raises(ConfigError, match="with --quant int8, which needs no calibration; l"):
            ExportConfig(source=source, output=tmp_path / "b", quant="int8", **options)
        ExportConfig(source=source, output=tmp_path / "b", **options)  # INT4 calibrates by itself
    with pytest.raises(ConfigError, match="--clip absmax has no effect with --method awq"):
        ExportConfig(source=source, output=tmp_path / "b", method="awq", clip="absmax")
    with pytest.raises(ConfigError, match="--method gptq has no effect: no layer is INT4"):
        ExportConfig(source=source, output=tmp_path / "b", quant="int8", method="gptq")
    keep = (("*", "int8"),)
    config = ExportConfig(source=source, output=tmp_path / "b", method="gptq", keep=keep)
    with pytest.raises(ConfigError, match="no layer is INT4"):
        export_checkpoint(config)
    assert not list(tmp_path.iterdir())
