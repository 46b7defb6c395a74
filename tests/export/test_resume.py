"""A calibrated export that was interrupted goes on, and nobody can tell from the bundle."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge.bundle.manifest import LinearInfo, Manifest, TensorScheme, read_manifest
from edge.bundle.verified_files import verify_files
from edge.errors import ResourceError
from edge.model.spec import Task
from edge_make.atomic_swap import check_free_space, remove
from edge_make.target import beside
from export import bundle as bundle_writer
from export.graph.data_file import StoredTensor
from export.graph.linear_nodes import StoredLinear
from export.pipeline import ExportConfig, export_checkpoint
from export.resume import STATE_NAME, Finished, Work, calibration_key, resumable_work
from export.sources.lora import LoraCheckpoint
from export.sources.opening import open_checkpoint
from tests.export.quantize.loud_checkpoint import loud_by_token, write_loud_checkpoint
from tests.makers.quantized_golden import QuantizedGolden, change_config
from tests.makers.tiny_adapters import write_adapter
from tests.makers.tiny_models import write_checkpoint

pytestmark = pytest.mark.xdist_group("resume")  # the whole exports are made once

ROOT = Path(__file__).parents[2]
LAYERS = 3
RECIPES: dict[str, dict[str, Any]] = {
    # One of the finished layers has ranges per token, see `source`.
    "int8-w8a8": {"quant": "int8-w8a8", "rotate": False, "keep": (("*.down", "w8a8"),)},
    "int4": {"quant": "int4", "group_size": 64, "method": "awq"},
    "int4-gptq": {"quant": "int4", "group_size": 32, "method": "awq+gptq"},
}
CALIBRATION: dict[str, Any] = {"calibration_tokens": 512, "kv_capacity": 64}
FAST = {**CALIBRATION, **RECIPES["int8-w8a8"]}
W8A8 = TensorScheme(kind="w8a8")
WEIGHT = StoredTensor("w", 3, (4, 4), "x.data", 0, 16)
STORED = StoredLinear(W8A8, WEIGHT, WEIGHT, None, WEIGHT, True, 4)
INFO = LinearInfo(scheme=W8A8, shape=(4, 4), num_bytes=16, activation_scale=1e-300)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return write_loud_checkpoint(folder / "Tiny-R1", "qwen2", layers=(1,), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**CALIBRATION, **RECIPES[request.param]}


@pytest.fixture(scope="module")
def whole(
    source: Path, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Manifest:
    """The export that nobody interrupted."""
    manifest = export(source, tmp_path_factory.mktemp("whole") / "bundle", recipe)
    down = manifest.quantization.linears["layers.1.down"]
    assert down.per_token == (down.scheme.kind == "w8a8")
    return manifest


@pytest.fixture(scope="module")
def fast(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return export(source, tmp_path_factory.mktemp("fast") / "bundle", FAST)


def export(source: Path, output: Path, options: dict[str, Any], progress: Any = None) -> Manifest:
    config = ExportConfig(source=str(source), output=output, **options)
    with loud_by_token():
        return export_checkpoint(config, progress)


def interrupt_after(sequences: int) -> Any:
    """A progress callback that ends the export when so many sequences passed a layer."""

    def progress(phase: str, done: int, *_: object) -> None:
        if phase == "calibrate" and done > sequences:
            raise KeyboardInterrupt

    return progress


def interrupt_in(step: str) -> Any:
    """A progress callback that ends the export in a step."""

    def progress(phase: str, *_: object) -> None:
        if phase.startswith(step):
            raise KeyboardInterrupt

    return progress


def work(output: Path) -> Path:
    return beside(output, "calibration")


def finished(output: Path) -> int:
    state: int = msgspec.json.decode((work(output) / STATE_NAME).read_bytes())["finished"]
    return state


def same_bundle(found: Manifest, expected: Manifest) -> bool:
    """All but the moment of the export."""
    fields = {"created": "", "self_sha256": ""}
    return msgspec.structs.replace(found, **fields) == msgspec.structs.replace(expected, **fields)


def test_before_the_first_layer_is_done_nothing_is_kept(
    source: Path, recipe: dict[str, Any], tmp_path: Path
):
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "bundle", recipe, interrupt_after(0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("done", range(1, LAYERS))
def test_interrupted_in_any_layer_it_gives_the_same_bytes(
    source: Path, recipe: dict[str, Any], whole: Manifest, tmp_path: Path, done: int
):
    output = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):  # in layer `done`, with 2 sequences a layer
        export(source, output, recipe, interrupt_after(2 * done))
    assert not output.exists()
    assert finished(output) == done
    passed: list[float] = []

    def record(phase: str, now: float, total: int, *_: str) -> None:
        assert phase != "calibrate" or total == 2 * LAYERS
        passed.extend([now] if phase == "calibrate" else [])
        if phase == "quantize" and "gptq" in recipe.get("method", ""):
            assert passed[-1] == 2 * LAYERS  # the calibration tells of all but the lm_head

    manifest = export(source, output, recipe, record)
    assert passed == sorted(set(passed))
    assert (passed[0], passed[-1]) == (2 * done, 2 * LAYERS)  # no layer twice
    assert same_bundle(manifest, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_interrupted_after_the_last_layer(
    source: Path, recipe: dict[str, Any], whole: Manifest, tmp_path: Path
):
    output = tmp_path / "bundle"

    def in_the_head(phase: str, done: float, total: float, *_: object) -> None:
        if phase == "quantize" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(source, output, recipe, in_the_head)
    assert finished(output) == LAYERS
    assert same_bundle(export(source, output, recipe), whole)


@pytest.mark.parametrize(("task", "blocks"), [("generate", LAYERS + 1), ("embed", LAYERS)])
def test_nothing_is_lost_until_the_bundle_is_in_place(
    task: Task, blocks: int, source: Path, tmp_path: Path
):
    output, recipe = tmp_path / "bundle", {**FAST, "kv_cache": "int8", "task": task}
    for step in ("KV cache: ", "embeddings", "hash"):
        with pytest.raises(KeyboardInterrupt):
            export(source, output, recipe, interrupt_in(step))
        assert [path.name for path in tmp_path.iterdir()] == [work(output).name]
        assert finished(output) == blocks
    passed: list[int] = []

    def record(phase: str, now: int, *_: object) -> None:
        passed.extend([now] if phase == "calibrate" else [])

    manifest = export(source, output, recipe, record)
    assert passed == [2 * LAYERS]  # none of them again
    assert same_bundle(manifest, export(source, tmp_path / "whole", recipe))
    assert not work(output).exists()


def test_a_kill_after_the_swap_leaves_a_bundle_that_the_next_export_does_not_touch(
    source: Path, fast: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its weights are the very files of the calibration, which were to be removed next."""
    output = tmp_path / "bundle"

    def die(directory: Path) -> None:
        if directory == work(output):
            raise KeyboardInterrupt
        remove(directory)

    with monkeypatch.context() as patch:
        patch.setattr(bundle_writer, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            export(source, output, FAST)
    assert finished(output) == LAYERS + 1
    with pytest.raises(KeyboardInterrupt):
        export(source, output, {**FAST, "overwrite": True}, interrupt_after(4))
    manifest = read_manifest(output)
    verify_files(output, manifest)
    assert same_bundle(manifest, fast)
    assert same_bundle(export(source, output, {**FAST, "overwrite": True}), fast)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_where_there_are_no_hard_links_the_files_are_moved(
    source: Path, fast: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    output = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):
        export(source, output, FAST, interrupt_after(4))
    manifest = export(source, output, FAST)
    verify_files(output, manifest)
    assert same_bundle(manifest, fast)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_layers_that_are_kept_are_no_room_that_is_missing(
    source: Path, fast: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a disk that the first export just fitted, the second goes on, or begins anew."""
    output = tmp_path / "bundle"
    needed: list[int] = []
    usage = namedtuple("usage", "total used free")

    def note(directory: Path, required: int, *what: str) -> None:
        needed.append(required)
        check_free_space(directory, required, *what)

    def free(_: Path) -> Any:
        taken = sum(path.stat().st_blocks * 512 for path in work(output).glob("*"))
        return usage(0, 0, needed[0] + (64 << 20) - taken)

    monkeypatch.setattr(bundle_writer, "check_free_space", note)
    with pytest.raises(KeyboardInterrupt):
        export(source, output, FAST, interrupt_after(4))
    # An export without calibration leaves them there, so they are no room for it.
    for place in (output, tmp_path / "elsewhere"):
        with pytest.raises(KeyboardInterrupt):
            export(source, place, {"quant": "int8"}, interrupt_in(""))
    assert needed[1] == needed[2]
    monkeypatch.setattr(shutil, "disk_usage", free)
    with pytest.raises(KeyboardInterrupt):
        export(source, output, {**FAST, "seed": 7}, interrupt_after(4))
    assert same_bundle(export(source, output, FAST), fast)


def test_a_disk_that_fills_up_names_what_is_kept(source: Path, tmp_path: Path):
    output = tmp_path / "bundle"

    def fill_up(phase: str, *_: object) -> None:
        if phase == "embeddings":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ResourceError, match=f"but for the layers in {work(output)}, is removed"):
        export(source, output, FAST, fill_up)
    assert finished(output) == LAYERS + 1


def test_everything_that_decides_a_byte_is_in_the_key(source: Path, tmp_path: Path):
    other_model = write_checkpoint(tmp_path / "model", "qwen2", num_hidden_layers=LAYERS, seed=9)
    adapter = write_adapter(tmp_path / "tuned", source, {"target_modules": ["q_proj"]})
    ids = np.arange(64, dtype=np.int64).reshape(2, 32)

    def key(
        ids: Any = ids,
        model: Path = source,
        lora: bool = False,
        wide: bool = False,
        **options: Any,
    ) -> str:
        config = ExportConfig(source=str(model), output=tmp_path, **{**FAST, **options})
        with open_checkpoint(str(model)) as checkpoint:
            wrapped = LoraCheckpoint(checkpoint, adapter) if lora else checkpoint
            return calibration_key(config, wrapped, ids, wide=wide)

    others = [
        key(ids[::-1]),
        key(ids.reshape(1, 64)),
        key(model=other_model),
        key(lora=True),
        key(wide=True),
        key(dtype="bf16"),
        key(keep=(("layers.1.*", "int8"),)),
        key(rotate=True),
        key(group_size=32),
        key(quant="int4", method="awq"),
        key(quant="int4", method="gptq"),
    ]
    assert len({key(), *others}) == 1 + len(others)
    # What only the graph, the token table or the check is made with does not matter.
    assert key() == key(
        dialect="portable", embeddings="int8", verify=True, kv_capacity=32, workers=3
    )


def test_another_reading_of_the_same_integers_begins_anew(tmp_path: Path):
    """GPTQ's two formats differ in config.json alone, which says what a zero point is."""
    golden = QuantizedGolden.load("gptq-asym-act-order")
    source, output = golden.write(tmp_path / "source"), tmp_path / "bundle"
    recipe = {**CALIBRATION, "quant": "int4", "method": "awq"}
    change_config(source, quantization_config={**golden.config, "checkpoint_format": "gptq_v2"})

    def in_the_head(phase: str, done: int, total: int, *_: object) -> None:
        if phase == "quantize" and done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(source, output, recipe, in_the_head)
    assert finished(output) == 1
    change_config(source, quantization_config=golden.config)
    assert export(source, output, recipe).files == export(source, tmp_path / "new", recipe).files


@pytest.mark.parametrize("recipe", ["int8-w8a8", "int4"], indirect=True)
def test_layers_side_by_side_give_the_same_bytes(
    source: Path, recipe: dict[str, Any], whole: Manifest, tmp_path: Path
):
    assert same_bundle(export(source, tmp_path / "bundle", {**recipe, "workers": 2}), whole)
    # More workers than layers, begun by one, interrupted in the last layer and gone on with.
    output = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        export(source, output, {**recipe, "workers": 2}, interrupt_after(2 * (LAYERS - 1)))
    assert 0 < finished(output) < LAYERS  # those that were rounded, in the order of the model
    assert same_bundle(export(source, output, {**recipe, "workers": 9}), whole)


def test_another_export_begins_anew(source: Path, tmp_path: Path):
    output = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):
        export(source, output, FAST, interrupt_after(4))
    other = {**FAST, "seed": 7}
    manifest = export(source, output, other)
    assert manifest.files == export(source, tmp_path / "fresh", other).files
    assert not work(output).exists()


def damage(folder: Path, how: str) -> None:
    state = folder / STATE_NAME
    (arrays,) = folder.glob("layer-*.npz")
    if how == "no state":
        state.unlink()
    elif how == "half a state":
        state.write_bytes(state.read_bytes()[:-10])
    elif how == "half the arrays":
        arrays.write_bytes(arrays.read_bytes()[:100])
    elif how == "no arrays":
        arrays.unlink()
    else:
        (folder / "decoder.onnx.data").write_bytes(b"short")


@pytest.mark.parametrize(
    "how", ["no state", "half a state", "half the arrays", "no arrays", "short data"]
)
def test_damaged_work_is_not_used(
    source: Path,
    fast: Manifest,
    tmp_path: Path,
    how: str,
    caplog: pytest.LogCaptureFixture,
):
    output = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):
        export(source, output, FAST, interrupt_after(4))
    damage(work(output), how)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert same_bundle(export(source, output, FAST), fast)
    assert ("beginning the calibration again" in caplog.text) == (how != "no state")
    assert "going on" not in caplog.text


def test_data_after_the_last_finished_layer_is_cut_off(
    source: Path, fast: Manifest, tmp_path: Path
):
    output = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):
        export(source, output, FAST, interrupt_after(4))
    for path in work(output).glob("*.data"):
        with path.open("ab") as file:
            file.write(b"half a layer")
    assert same_bundle(export(source, output, FAST), fast)


def test_the_user_is_told_where_it_lies_and_that_it_goes_on(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    output = tmp_path / "bundle"
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        export(source, output, FAST, interrupt_after(4))
    assert f"calibrated layers are kept in {work(output)}" in caplog.text
    with caplog.at_level(logging.WARNING):
        export(source, output, FAST)
    assert "going on with an interrupted calibration: 2 layers are done" in caplog.text


def test_an_export_without_calibration_sweeps_it(source: Path, tmp_path: Path):
    output = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):
        export(source, output, FAST, interrupt_after(4))
    export(source, output, {"quant": "int8"})
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(tmp_path: Path):
    """Real processes, killed when one more layer is done each time."""
    model = write_checkpoint(tmp_path / "model", "qwen2", num_hidden_layers=LAYERS)
    arguments = ["--quant", "int8-w8a8", "--calibration-tokens", "512", "--no-verify"]
    (tmp_path / "place").mkdir()
    target = tmp_path / "place" / "bundle"
    kills = 0
    for layer in range(1, LAYERS):
        kills += run_and_kill(model, target, arguments, layer)
    assert kills >= 1  # one run may be too fast for a kill, both never were
    run_and_kill(model, target, arguments, LAYERS + 2)
    options = {"quant": "int8-w8a8", "calibration_tokens": 512}
    expected = export(model, tmp_path / "fresh", options)
    assert same_bundle(read_manifest(target), expected)
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def run_and_kill(source: Path, target: Path, arguments: list[str], layer: int) -> bool:
    """Export in a process; kill it when ``layer`` layers are done. Whether it was killed."""
    command = "from export.cli import export; export()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, str(source), "-o", str(target), "--force", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with process:
        while process.poll() is None:
            try:
                if finished(target) >= layer:
                    process.kill()
                    break
            except FileNotFoundError:
                pass
            time.sleep(0.001)
        process.wait(60)
        assert process.stderr is not None
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.read().decode()
        return process.returncode != 0


@contextlib.contextmanager
def interrupted_work(folder: Path, key: str, targets: list[Path]) -> Iterator[Work]:
    """Work that is interrupted when the block ends."""
    with contextlib.suppress(KeyboardInterrupt), resumable_work(folder, key, targets) as work:
        yield work
        raise KeyboardInterrupt


def test_the_state_keeps_every_number(tmp_path: Path):
    """Infinities too: an overflow in calibration is a finding, not a broken file."""
    folder, targets = tmp_path / "work", [tmp_path / "x.data"]
    finished = Finished(
        blocks=1,
        linears={"layers.0.o": [STORED, STORED]},
        infos={"layers.0.o": INFO},
        factors={"layers.0.o": np.arange(4, dtype=np.float32)},
        peaks={"a": float("inf"), "b": 0.1, "c": float("nan")},
        hidden=np.ones((1, 2, 4), np.float32),
    )
    with interrupted_work(folder, "key", targets) as work:
        assert work.finished == Finished()
        work.files[0].add("w", 1, (4,), np.arange(4, dtype=np.float32))
        work.save(finished)
        work.files[0].add("half a layer", 1, (4,), np.arange(4, dtype=np.float32))
    with interrupted_work(folder, "key", targets) as work:
        again = work.finished
    assert (again.blocks, again.linears, again.infos) == (1, finished.linears, finished.infos)
    assert repr(again.peaks) == repr(finished.peaks)
    assert again.hidden is not None
    np.testing.assert_array_equal(again.factors["layers.0.o"], np.arange(4))
    np.testing.assert_array_equal(again.hidden, np.ones((1, 2, 4)))
    assert not targets[0].exists()
    with resumable_work(folder, "key", targets) as work:
        assert work.finished.blocks == 1
    assert targets[0].read_bytes() == np.arange(4, dtype=np.float32).tobytes()
    assert targets[0].samefile(folder / "x.data")  # so neither takes room for itself


def test_a_state_of_another_key_is_swept(tmp_path: Path):
    folder, targets = tmp_path / "work", [tmp_path / "x.data"]
    finished = Finished(blocks=1, hidden=np.ones((1, 2, 4), np.float32))
    with interrupted_work(folder, "key", targets) as work:
        work.save(finished)
    with interrupted_work(folder, "another", targets) as work:
        assert work.finished == Finished()
        assert [path.name for path in folder.iterdir()] == ["x.data"]
    assert not folder.exists()
