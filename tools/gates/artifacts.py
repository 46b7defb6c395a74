"""Hashes tiny exports and engines of the stand-in, so that a move is seen to change no byte.

usage: python3 -m tools artifacts -o HASHES.json           before the change
       python3 -m tools artifacts --against HASHES.json    after it; exit code 1 if a byte differs

Exported are three families in both dialects by every recipe, with an 8-bit cache and with adapters;
a bundle with a draft head, two that read pictures, one that embeds and one that judges. Engines are
built of each decoder with TensorRT's kernels, with our own and for four sequences. Times and what
follows from them are left out of manifests and records. What is refused is kept as its message.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.bundle.engine_records import RECORDS_VARIABLE
from edge.bundle.manifest import ENGINES_DIR
from edge.device.gpu import Gpu
from edge.errors import EdgeError
from engines.builder.build import build_engine
from engines.builder.target import Target
from engines.compiler.compat import TensorRT
from engines.config import BuildConfig
from export.pipeline import ExportConfig, export_checkpoint
from tests.makers.tiny_heads import make_head
from tests.makers.tiny_internvl import write_internvl_checkpoint
from tests.makers.tiny_models import KINDS, write_checkpoint
from tests.makers.tiny_pooling import write_embedder, write_judge
from tests.makers.tiny_vision import write_vision_checkpoint
from tests.standins.cuda import FakeGpu
from tests.standins.plugin import PLUGINS
from tests.standins.tensorrt import install, make_module
from tools.command import say

FOLDER = Path(tempfile.gettempdir()) / "edge-llm-artifacts"
"""Always the same, since a plan of the stand-in has the path of its weights."""
TIMES = ("created", "self_sha256", "build_s", "peak_memory_bytes")
RECORDS = ("manifest.json", "engine.json")
DIALECTS = ("native", "portable")
CAPACITY = 128
VERSION = "10.16.2.10"
RTN: dict[str, Any] = {"quant": "int4", "method": "rtn"}
RECIPES: dict[str, dict[str, Any]] = {
    "fp16": {"quant": "fp16"},
    "bf16": {"quant": "bf16"},
    "int8": {"quant": "int8", "group_size": 32},
    "int8-w8a8": {"quant": "int8-w8a8", "calibration_tokens": 256},
    "int4": {"quant": "int4", "calibration_tokens": 256},
    "int4-rtn": {**RTN, "group_size": 32},
    "int8-cache": {**RTN, "kv_cache": "int8"},
    "adapters": {**RTN, "adapters": 4},
}
BUILDS: dict[str, dict[str, Any]] = {
    "tensorrt": {},
    "own": {"kernels": "own"},
    "four": {"max_batch": 4, "kv_buckets": (64, 128)},
}

Hashes = dict[str, str]


def main() -> int:
    """Hash, and write or compare."""
    parser = argparse.ArgumentParser("python3 -m tools artifacts", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="file to write")
    parser.add_argument("--against", type=Path, help="file of an earlier run")
    options = parser.parse_args()
    if (options.output is None) == (options.against is None):
        parser.error("give -o FILE, or --against FILE")
    found = collect()
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
        return 0
    before: Hashes = json.loads(options.against.read_text("utf-8"))
    differ = [name for name in sorted({*before, *found}) if before.get(name) != found.get(name)]
    for name in differ:
        print(f"{name}: {before.get(name, 'new')} -> {found.get(name, 'gone')}")
    print(f"{len(found)} artifacts, {len(differ)} differ from {options.against}")
    return int(bool(differ))


def collect() -> Hashes:
    """Make everything and return hashes by name; what is refused has its message instead."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    found: Hashes = {}
    try:
        for name, source, options in exports():
            say(name)
            bundle = FOLDER / "bundles" / name
            try:
                export_checkpoint(ExportConfig(source=str(source), output=bundle, **options))
            except EdgeError as error:
                found[f"export/{name}"] = _message(error)
                continue
            found |= hash_files(f"export/{name}", bundle)
            for way, choice in BUILDS.items() if options["kv_capacity"] == CAPACITY else ():
                found |= build(f"build/{name}/{way}", bundle, choice)
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    return found


def exports() -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Write checkpoints, and yield names, sources and options of their exports."""
    sources = FOLDER / "sources"
    for kind in KINDS:
        source = write_checkpoint(sources / kind, kind)
        for dialect in DIALECTS:
            for name, recipe in RECIPES.items():
                options = {**recipe, "dialect": dialect, "kv_capacity": CAPACITY}
                yield f"{kind}-{dialect}-{name}", source, options
    head = make_head().write(sources / "head")
    drafts = {**RTN, "eagle3": head, "kv_capacity": CAPACITY}
    yield "draft-head", sources / KINDS[0], drafts
    smolvlm = write_vision_checkpoint(sources / "smolvlm")
    for dialect in DIALECTS:
        yield f"smolvlm-{dialect}", smolvlm, {**RTN, "dialect": dialect, "kv_capacity": 512}
    internvl = write_internvl_checkpoint(sources / "internvl")
    yield "internvl", internvl, {"quant": "int8", "kv_capacity": 1024}
    yield "embedder", write_embedder(sources / "embedder"), {"quant": "int8", "kv_capacity": 250}
    judge = {"quant": "int8", "kv_capacity": 250, "task": "rerank"}
    yield "judge", write_judge(sources / "judge"), judge


def build(name: str, bundle: Path, choice: dict[str, Any]) -> Hashes:
    """Build an engine by the stand-in for an Orin's TensorRT, and remove it again."""
    gpu = FakeGpu()
    gpu.push()  # TensorRT takes the primary context
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(gpu.pop)
        patch.setenv(RECORDS_VARIABLE, str(FOLDER / "records"))
        install(patch, gpu)
        patch.setattr(PLUGINS, "known", {})
        patch.setitem(sys.modules, "tensorrt.plugin", PLUGINS.module())
        rt = TensorRT(make_module(gpu, VERSION), "tensorrt", VERSION)
        config = BuildConfig(bundle, max_prefill=32, **choice)
        stack.callback(shutil.rmtree, bundle / ENGINES_DIR, ignore_errors=True)
        try:
            result = build_engine(config, target=Target(rt, Gpu("Orin", "8.7"), "8.7"))
        except EdgeError as error:
            return {name: _message(error)}
        return hash_files(name, result.directory)


def hash_files(name: str, folder: Path) -> Hashes:
    """Return the SHA-256 of each file, of records without their times."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name in RECORDS:
            data = json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
        if path.suffix not in (".lock", ".log"):
            found[f"{name}/{path.relative_to(folder)}"] = hashlib.sha256(data).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(each) for key, each in value.items() if key not in TIMES}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def _message(error: EdgeError) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
