"""What makes an engine slow is said, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.bundle.engine_file import EngineInfo, RefusedRung, read_engine_info
from edge.bundle.manifest import read_manifest
from edge_make.engine_layers import parse_inspector
from edge_make.engine_verdict import describe_slowness, how_to_mend, slow_parts
from tests.conftest import Bundles
from tests.standins.inspector import inspector_json

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def info(tmp_path: Path) -> EngineInfo:
    (tmp_path / "engine.json").write_bytes((DATA / "engine-python-products.json").read_bytes())
    found = read_engine_info(tmp_path)
    return msgspec.structs.replace(found, kernels="tensorrt", builder="api", flavour="tensorrt")


def judged(info: EngineInfo, bundle: Path, **options: Any) -> EngineInfo:
    text = inspector_json(read_manifest(bundle), **options)
    table = parse_inspector([text], ["prefill", "decode"])
    return msgspec.structs.replace(info, compiled=table.summary())


def test_each_thing_that_is_slow_is_told_with_its_profiles(
    info: EngineInfo, tiny_bundles: Bundles
) -> None:
    bundle = tiny_bundles("qwen2", quant="int4")
    assert slow_parts(judged(info, bundle)) == ()
    assert describe_slowness(judged(info, bundle)) is None
    unpacking = judged(info, bundle, unpacked=("layers.0.down", "layers.1.down"))
    (told,) = slow_parts(unpacking)
    assert told.startswith("2 layers unpack their weights into floats in every step (prefill, dec")
    (told,) = slow_parts(judged(info, bundle, fused=False))
    assert told == "attention is several kernels, which write its scores (prefill, decode)"
    copying = judged(info, bundle, copies_cache=True)
    (told,) = slow_parts(copying)
    assert told == "1 layers copy the KV cache into another layout (prefill, decode)"
    assert [each.reformats for each in copying.compiled] == [2, 2]  # the other is the mask's
    everything = judged(info, bundle, unpacked=("lm_head",), fused=False, copies_cache=True)
    assert len(slow_parts(everything)) == 3
    sentence = describe_slowness(everything) or ""
    assert sentence.endswith("--kernels auto tries edge-llm's own kernels, too")
    assert all(part in sentence for part in slow_parts(everything))


def test_one_profile_alone_may_be_slow(info: EngineInfo, tiny_bundles: Bundles) -> None:
    both = judged(info, tiny_bundles("qwen2", quant="int4"), fused=False)
    fused = judged(info, tiny_bundles("qwen2", quant="int4"))
    mixed = msgspec.structs.replace(info, compiled=(fused.compiled[0], both.compiled[1]))
    (told,) = slow_parts(mixed)
    assert told.endswith("(decode)")


def test_own_attention_and_unknown_layers_are_not_slow(
    info: EngineInfo, tiny_bundles: Bundles
) -> None:
    own = ("layers.0.attention", "layers.1.attention")
    assert slow_parts(judged(info, tiny_bundles("qwen2", quant="int4"), own=own)) == ()
    assert slow_parts(msgspec.structs.replace(info, compiled=())) == ()


def test_advice_offers_only_what_helps_this_engine(info: EngineInfo) -> None:
    replace = msgspec.structs.replace
    assert "without --with trtexec" in how_to_mend(replace(info, builder="trtexec"))
    tried = RefusedRung("slice", None, "too old", "stored", "own")
    assert "what came of" in how_to_mend(replace(info, refused=(tried,)))
    for other in (replace(info, kernels="own"), replace(info, flavour="tensorrt-rtx")):
        assert "own kernels" not in how_to_mend(other)
        assert "--layers" in how_to_mend(other)
