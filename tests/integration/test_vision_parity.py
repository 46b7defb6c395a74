"""Tiny SmolVLMs answer as `transformers` does: rows of pictures, merged rows, logits, tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from edge.bundle import io_spec
from edge.bundle.manifest import Manifest
from edge.vision.section import IMAGE_ROWS, PIXEL_VALUES
from export.pipeline import ExportConfig, export_checkpoint
from tests.makers.goldens import assert_close
from tests.makers.tiny_vision import (
    AROUND,
    CONTROL_IDS,
    IMAGE,
    ROWS_PER_TILE,
    WHOLE,
    ModelType,
    write_vision_checkpoint,
)

Array = NDArray[np.float32]
NEW_TOKENS = 12


def _prompt(tiles: int) -> list[int]:
    """A text with a picture of so many tiles between its words."""
    around, image = CONTROL_IDS[AROUND], CONTROL_IDS[IMAGE]
    ids = [CONTROL_IDS["<|im_start|>"], 40, 260, 97]
    for tile in range(tiles):
        mark = CONTROL_IDS[WHOLE] if tile == tiles - 1 else CONTROL_IDS["<row_1_col_1>"] + tile
        ids += [around, mark, *[image] * ROWS_PER_TILE]
    return [*ids, around, 280, 33, 71, 300]


def _merged(bundle: Path, ids: list[int], rows: Array) -> Array:
    """Rows of the token table, and of the picture where its placeholders are."""
    table = load_file(bundle / io_spec.EMBEDDINGS_NAME)[io_spec.EMBEDDINGS_TENSOR]
    embeds: Array = table[ids].astype(np.float32)
    embeds[np.array(ids) == CONTROL_IDS[IMAGE]] = rows.reshape(-1, rows.shape[-1])
    return embeds


def _logits(bundle: Path, manifest: Manifest, embeds: Array) -> Array:
    """Logits after every row, by the decoder's CPU graph with an empty cache."""
    session = onnxruntime.InferenceSession(bundle / manifest.graphs.cpu)
    count, model = len(embeds), manifest.model
    shape = (1, model.attentions()[0].kv_heads, manifest.kv_capacity, model.attentions()[0].dim)
    past = {
        each.name: np.zeros(shape, np.float32)
        for each in session.get_inputs()
        if each.name.startswith(io_spec.PAST_PREFIX)
    }
    inputs = {
        io_spec.INPUTS_EMBEDS: embeds[None],
        io_spec.POSITION_IDS: np.arange(count)[None],
        io_spec.PAST_LENGTHS: np.zeros(1, np.int64),
        io_spec.KV_POSITIONS: np.zeros(1, np.int64),
        io_spec.LOGITS_INDICES: np.arange(count)[None],
    }
    logits: Array = session.run([io_spec.LOGITS], inputs | past)[0][0]
    return logits


@pytest.mark.parity
@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("tied", [False, True])
def test_live_parity_with_a_picture(tmp_path: Path, model_type: ModelType, tied: bool):
    torch: Any = pytest.importorskip("torch", reason="live parity needs torch and transformers")
    transformers: Any = pytest.importorskip("transformers", reason="live parity needs transformers")
    drop = ("lm_head.weight",) if tied else ()
    directory = write_vision_checkpoint(
        tmp_path / "checkpoint", model_type=model_type, tie_word_embeddings=tied, drop=drop
    )
    bundle = tmp_path / "bundle"
    manifest = export_checkpoint(
        ExportConfig(str(directory), output=bundle, quant="fp16", dialect="portable")
    )
    pixels = np.random.RandomState(1).uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)
    ids = _prompt(len(pixels))

    auto = transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    stacked = torch.tensor(pixels)[None]
    seen: list[Any] = []

    def see(_module: Any, _inputs: Any, named: dict[str, Any]) -> None:
        seen.append(named["inputs_embeds"][0].numpy())

    hook = model.model.text_model.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        wanted_rows = torch.cat(list(model.model.get_image_features(stacked).pooler_output)).numpy()
        tokens = torch.tensor([ids])
        wanted_logits = model(input_ids=tokens, pixel_values=stacked).logits[0].numpy()
        hook.remove()
        answer = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=stacked,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )[0, len(ids) :].tolist()

    session = onnxruntime.InferenceSession(bundle / "vision.cpu.onnx")
    rows = session.run([IMAGE_ROWS], {PIXEL_VALUES: pixels})[0]
    assert_close(rows.reshape(wanted_rows.shape), wanted_rows, atol=2e-6, what="rows")
    merged = _merged(bundle, ids, rows)
    assert_close(merged, seen[0], atol=2e-6, what="merged rows")
    assert_close(_logits(bundle, manifest, merged), wanted_logits, atol=2e-4, what="logits")

    own: list[int] = []
    for _ in range(NEW_TOKENS):
        own.append(int(_logits(bundle, manifest, _merged(bundle, ids + own, rows))[-1].argmax()))
    assert own == answer
    # The picture matters: with its rows in another order the model answers otherwise.
    other = _merged(bundle, ids, np.ascontiguousarray(rows[::-1]))
    assert np.abs(_logits(bundle, manifest, other)[-1] - wanted_logits[-1]).max() > 0.05
