"""Plants a stranger's engine in a signed bundle, and checks whether any of it reaches TensorRT.

The stranger cannot sign the bundle, but can write into its directory. They put an ``engine.json``
there, and a plan with the right hash. It has GPU code of theirs (``python_kernels``), a large batch
and a date in the future, so that it would be preferred to the device's own engine. It is tried
unsigned, signed with the stranger's key, and with the device's own ``engine.json`` changed in
place. Without TensorRT the stand-in of the tests takes its place. The bundle is copied, and the
copy signed.

Usage: python3 -m lab attack-planted-engine BUNDLE

Exit code 0: nothing of the stranger's was used, and the device's own engine was, if it was left
unchanged. 1: something of the stranger's was used.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.backends.tensorrt.runner import TensorRTBackend
from edge.bundle import trust
from edge.bundle.engine_file import ENGINE_JSON, find_engines, open_plan, read_engine_info
from edge.device.gpu import find_gpu
from edge.errors import EdgeError
from edge_fleet.signing import sign_bundle
from tests.makers.keys import make_key
from tests.standins.cuda import FakeGpu
from tests.standins.tensorrt import install, write_engine

RECORDS = "EDGE_LLM_ENGINE_RECORDS"
SIZES: dict[str, Any] = {"max_prefill": 16}


def plant(bundle: Path, name: str, batch: int, created: str) -> Path:
    """Put an engine into a bundle, on a machine that records it for itself."""
    made: dict[str, Any] = {}
    if importlib.util.find_spec("tensorrt") is not None:
        gpu, version = find_gpu(), importlib.import_module("tensorrt").__version__
        made = {"version": version, "plan": f"plan of {name}".encode()}
        made |= {"compute_capability": gpu.compute_capability} if gpu else {}
    return write_engine(bundle, name=name, created=created, max_batch=batch, **SIZES, **made)


def give_kernels(directory: Path) -> None:
    """Give an engine GPU code that Python launches."""
    info = read_engine_info(directory)
    changed = msgspec.structs.replace(info, plugins="python", python_kernels=(b"stranger's code",))
    (directory / ENGINE_JSON).write_bytes(msgspec.json.encode(changed))


def open_bundle(bundle: Path, keys: Path) -> tuple[list[str], str]:
    """Open a bundle as a service does; return what reached TensorRT by engine, and why not.

    The stand-in checks no kernels, so it counts that they were handed over.
    """
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("tensorrt") is None:
            install(patch, FakeGpu())

        def opens(directory: Path, info: Any) -> Any:
            seen.append(f"plan of {directory.name}")
            return open_plan(directory, info)

        def registers(_module: Any, info: Any) -> None:
            seen.extend([f"kernels of {info.created}"] * bool(info.python_kernels))

        patch.setattr("edge.backends.tensorrt.engine.open_plan", opens)
        patch.setattr("edge.backends.tensorrt.plugins.register_kernels", registers)
        try:
            manifest = trust.open_manifest(bundle)
            TensorRTBackend(bundle, manifest, num_slots=4).close()  # as many as serve has
        except EdgeError as error:
            return seen, f"{type(error).__name__}: {error}"
    return seen, ""


def attack(bundle: Path, room: Path) -> bool:
    """Try each way; return whether nothing of the stranger's was used."""
    ours, theirs = make_key(), make_key()
    keys = room / "trusted-keys"
    keys.write_text(ours.public_text)
    keys.chmod(0o644)
    os.environ[trust.KEYS_VARIABLE] = str(keys)
    os.environ[RECORDS] = str(room / "records")
    sign_bundle(bundle, ours, "the vendor's")
    own = plant(bundle, "own", 1, "2026-01-01")
    held = True

    def judge(way: str, *, own_runs: bool) -> None:
        nonlocal held
        seen, why = open_bundle(bundle, keys)
        good = seen == ["plan of own"] if own_runs else not seen
        held &= good
        got = ", ".join(seen) or "nothing"
        print(f"{'held' if good else 'NOT HELD'}: {way}: TensorRT got {got}")
        if why:
            print(f"    {why}")

    judge("the device's own engine alone", own_runs=True)
    again = [sys.executable, "-m", "lab.attacks.planted_engine", "--plant", str(bundle)]
    subprocess.run(again, check=True, env={**os.environ, RECORDS: str(room / "elsewhere")})
    stranger = bundle / "engines" / "stranger"
    judge("a stranger's engine of 2099 beside it", own_runs=True)
    signature = theirs.sign((stranger / ENGINE_JSON).read_bytes(), "the stranger's")
    (stranger / f"{ENGINE_JSON}.minisig").write_bytes(signature)
    judge("the same, signed by the stranger", own_runs=True)
    shutil.rmtree(stranger)
    give_kernels(own)
    judge("kernels put into the device's own engine.json", own_runs=False)
    return held


def main() -> int:
    parser = argparse.ArgumentParser(
        "python3 -m lab attack-planted-engine", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("bundle", type=Path, help="any bundle; a copy is attacked")
    parser.add_argument("--plant", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plant:  # the stranger's machine
        give_kernels(plant(given.bundle, "stranger", 4, "2099-01-01"))
        return 0
    with tempfile.TemporaryDirectory() as room:
        copy = Path(room) / "bundle"
        shutil.copytree(given.bundle, copy, ignore=shutil.ignore_patterns("engines"))
        assert not find_engines(copy)
        return 0 if attack(copy, Path(room)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
