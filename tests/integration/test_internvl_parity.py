"""Tiny InternVL3s and InternVL3.5s answer as `transformers` does: rows of pictures and tokens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from edge import LLM, SamplingParams
from edge.bundle.manifest import read_manifest
from edge.vision.section import IMAGE_ROWS, PIXEL_VALUES, read_vision
from export.pipeline import ExportConfig, export_checkpoint
from tests.edge.vision import judge
from tests.makers.goldens import assert_close
from tests.makers.tiny_internvl import IMAGE, write_internvl_checkpoint

NEW_TOKENS = 12
WORDS = "hello the sea"
TILES = 2


@pytest.mark.parity
@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("decoder", ["qwen2", "qwen3"])
def test_live_parity_with_a_picture(
    tmp_path: Path, decoder: Literal["qwen2", "qwen3"], old_names: bool
):
    torch: Any = pytest.importorskip("torch", reason="live parity needs torch and transformers")
    transformers: Any = pytest.importorskip("transformers", reason="live parity needs transformers")
    # The encoder of the large models has no biases and a last LayerNorm.
    directory = write_internvl_checkpoint(
        tmp_path / "checkpoint",
        decoder,
        old_names=old_names,
        qkv_bias=not old_names,
        mean_pooling=not old_names,
    )
    bundle = tmp_path / "bundle"
    export_checkpoint(ExportConfig(str(directory), output=bundle, quant="fp16", dialect="portable"))
    section = read_vision(read_manifest(bundle))
    assert section is not None
    file = io.BytesIO()
    pixels = np.random.RandomState(3).randint(0, 255, (70, 130, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tiles = judge.pixel_values(file.getvalue(), section, TILES)
    assert len(tiles) == 3  # the picture's two halves and all of it
    content = [{"type": "image"}, {"type": "text", "text": WORDS}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    text = text.replace(IMAGE, judge.text(section, len(tiles), 0, 0))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        wanted_rows = model.model.get_image_features(torch.tensor(tiles)).pooler_output.numpy()
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.tensor(tiles),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )[0, ids.shape[1] :].tolist()
        shuffled = torch.tensor(np.ascontiguousarray(tiles[::-1]))
        logits, other = (
            model(input_ids=ids, pixel_values=each).logits[0, -1]
            for each in (torch.tensor(tiles), shuffled)
        )
    assert (logits - other).abs().max() > 0.01  # the picture matters

    session = onnxruntime.InferenceSession(bundle / "vision.cpu.onnx")
    rows = session.run([IMAGE_ROWS], {PIXEL_VALUES: tiles})[0]
    assert_close(rows.reshape(wanted_rows.shape), wanted_rows, atol=2e-6, what="rows")
    message = {
        "role": "user",
        "content": [
            {"type": "image", "image": file.getvalue()},
            {"type": "text", "text": WORDS},
        ],
    }
    with LLM(bundle, image_tiles=TILES) as llm:
        params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1)
        result = llm.generate([message], params)
    assert result.stats.prompt_tokens == ids.shape[1]
    assert [token.id for token in result.tokens] == answer[: len(result.tokens)]
    assert len(result.tokens) >= NEW_TOKENS - 1  # an end of the sequence is not among them
    wanted = torch.log_softmax(logits, -1)[answer[0]].item()
    assert result.tokens[0].logprob == pytest.approx(wanted, abs=1e-3)
