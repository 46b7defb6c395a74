"""The vision encoder on the stand-in for TensorRT: its rows, its memory, and its failures."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge import LLM, SamplingParams
from edge.bundle.engine_file import read_engine_info
from edge.bundle.manifest import read_manifest
from edge.errors import BackendError, BundleError, IntegrityError
from edge.vision.encoder import OrtEncoder
from edge.vision.engine_encoder import EngineEncoder
from edge.vision.plan import vision_plan
from edge.vision.rows import PictureTable
from edge.vision.section import read_vision
from engines.build_plan import plan_build
from engines.builder.encoder import compile_encoder
from engines.builder.store import EngineStore
from engines.compiler.compat import TensorRT
from engines.config import BuildConfig
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import emptied, install, make_module, write_engine

from .test_prompt import ask, draw

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def engine_bundle(vision_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("engine") / "bundle"
    shutil.copytree(vision_bundle, bundle)
    directory = write_engine(bundle, max_prefill=32)
    version = read_engine_info(directory).tensorrt_version
    rt = TensorRT(make_module(FakeGpu(), version), "tensorrt", version)
    build = plan_build(BuildConfig(bundle=bundle, max_prefill=32), read_manifest(bundle))
    encoder = compile_encoder(build, rt, "8.7")
    assert encoder is not None
    assert not encoder.problems
    store = EngineStore(bundle, directory.name)
    store._write_info(store._add_encoder(read_engine_info(directory), encoder))
    return bundle


@pytest.fixture(params=[True, False], ids=["integrated", "discrete"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu(integrated=request.param)
    install(monkeypatch, gpu)
    return gpu


def test_its_rows_are_those_of_the_graph(engine_bundle: Path, gpu: FakeGpu) -> None:
    manifest = read_manifest(engine_bundle)
    section = read_vision(manifest)
    assert section is not None
    reference = OrtEncoder(engine_bundle, manifest, section, None, 1)
    rng = np.random.RandomState(1)
    with emptied(gpu), LLM(engine_bundle, backend="tensorrt") as llm:
        table = llm.embeddings
        assert isinstance(table, PictureTable)
        encoder = table._encoder
        assert isinstance(encoder, EngineEncoder)
        for _ in range(3):
            pixels = rng.uniform(-1, 1, (3, section.tile_px, section.tile_px)).astype(np.float32)
            found, wanted = encoder.encode(pixels), reference.encode(pixels)
            assert found.shape == wanted.shape
            assert np.allclose(found, wanted, rtol=0.02, atol=0.02 * np.abs(wanted).max())
        answers = [llm.generate(ask(draw(seed), "What?"), GREEDY) for seed in (1, 2, 1)]
        tokens = [[token.id for token in answer.tokens] for answer in answers]
        assert tokens[0] == tokens[2] != tokens[1]
    with pytest.raises(BackendError, match="is closed"):
        encoder.encode(np.zeros((3, section.tile_px, section.tile_px), np.float32))


def test_a_run_that_is_refused_ends_one_request(engine_bundle: Path, gpu: FakeGpu) -> None:
    with LLM(engine_bundle, backend="tensorrt") as llm:
        table = llm.embeddings
        assert isinstance(table, PictureTable)
        encoder = table._encoder
        assert isinstance(encoder, EngineEncoder)
        context, encoder._context = encoder._context, _Refusing()
        with pytest.raises(BackendError, match=r"refused execute_async_v3.*vision encoder"):
            llm.generate(ask(draw(1), "What?"), GREEDY)
        assert len(llm.generate(ask("What?"), GREEDY).tokens) == 8
        encoder._context = context
        assert len(llm.generate(ask(draw(1), "What?"), GREEDY).tokens) == 8


class _Refusing:
    def execute_async_v3(self, _handle: int) -> bool:
        return False


@pytest.mark.parametrize("damage", ["missing", "changed", "other"])
def test_a_plan_that_does_not_fit_is_refused(
    engine_bundle: Path, gpu: FakeGpu, tmp_path: Path, damage: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(engine_bundle, bundle)
    (directory,) = (bundle / "engines").iterdir()
    info = read_engine_info(directory)
    plan = directory / vision_plan(directory, info).plan
    if damage == "missing":
        write_engine(bundle, max_prefill=32)
        with pytest.raises(BundleError, match="has no vision encoder"):
            LLM(bundle, backend="tensorrt")
    elif damage == "changed":
        plan.write_bytes(plan.read_bytes()[:-1] + b"x")
        with pytest.raises(IntegrityError):
            LLM(bundle, backend="tensorrt")
    else:  # the decoder's under the encoder's name
        extras = {"vision": {**info.extras["vision"], "plan": info.plan}}
        extras["vision"] |= {"plan_bytes": info.plan_bytes, "plan_sha256": info.plan_sha256}
        EngineStore(bundle, directory.name)._write_info(
            msgspec.structs.replace(info, extras=extras)
        )
        with pytest.raises(BackendError, match="the encoder's plan in"):
            LLM(bundle, backend="tensorrt")
