"""Checks the software on the device: TensorRT, ONNX Runtime, memory, a bundle and its engines."""

from __future__ import annotations

import re
from pathlib import Path

from edge.backends.host_memory import LEAST_CAPACITY
from edge.bundle import io_spec
from edge.bundle.engine_file import (
    EngineInfo,
    check_engine,
    engine_rank,
    find_engines,
    read_engine_info,
)
from edge.bundle.engine_records import UnvouchedError
from edge.bundle.manifest import Manifest, read_manifest
from edge.bundle.trust import trusted_keys_file
from edge.bundle.verified_files import verify_files
from edge.device.memory import read_free_memory_bytes, read_kib
from edge.errors import BundleError, ConfigError, EdgeError, IntegrityError, install_command
from edge_lab.planner.memory import Deployment, plan_bundle_memory
from edge_make.engine_record import verify_plan
from edge_make.engine_verdict import how_to_mend, slow_parts

from .check import (
    DAMAGED,
    NO_MEMORY,
    UNAVAILABLE,
    WRONG_ENGINE,
    Check,
    MachineFacts,
    Status,
    version_numbers,
)

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_OVERHEAD_BYTES = 400 << 20  # CUDA context, libraries and activations; estimated
# Reported for Jetson Linux 36 from this release on, on small modules (llama.cpp pull request
# 23732): the driver refuses a large block, though page cache could be given up for it.
_REFUSES_BLOCKS, _NOT_REPORTED, _SMALL_BYTES = (36, 4, 7), (37,), 16 << 30


def check_confinement(facts: MachineFacts) -> Check:
    """Check that text from strangers is read by a process that can open nothing."""
    why = facts.machine.unconfined()
    if why is None:
        return Check("confinement", "ok", "strangers' templates and grammars can open nothing")
    cure = "in a container use the runtime's default seccomp profile; else open what you trust"
    return Check("confinement", "warn", "limits on time and memory only", why, cure)


def check_tensorrt(facts: MachineFacts) -> Check:
    """Check that TensorRT builds and loads an engine."""
    name = "TensorRT"
    if not facts.cuda.works:
        return Check(name, "skip", "no GPU that works")
    found = facts.tensorrt = facts.machine.tensorrt()
    if found.missing:
        cure = install_command("tensorrt")
        if facts.jetson:
            cure = (
                "sudo apt install tensorrt python3-libnvinfer, and make the environment with: "
                "python3 -m venv --system-site-packages"
            )
        return Check(name, "warn", "not installed", "engines cannot run", cure)
    if found.error is not None or found.version is None:
        cure = "reinstall it for this driver's CUDA version (on a Jetson: that of JetPack)"
        if "libnvdla_compiler" in (found.error or ""):
            # JetPack 6's libnvinfer is linked with it, and many boards do not have it.
            cure = (
                "sudo apt install nvidia-l4t-dla-compiler=$(dpkg-query -W -f '${Version}' "
                "nvidia-l4t-core) && sudo ldconfig; in a container, on the host"
            )
        return Check(
            name,
            "fail",
            f"{found.version or 'installed'}, but it does not work",
            found.error or "it has no version",
            cure,
            UNAVAILABLE,
        )
    needed = io_spec.DIALECTS["portable"].min_tensorrt
    if version_numbers(found.version) < needed:
        return Check(
            name,
            "fail",
            found.version,
            f"graphs with INT4 weights need TensorRT {needed[0]}.{needed[1]}",
            "update it (on a Jetson: JetPack 6.2 or 7.2)",
            UNAVAILABLE,
        )
    return Check(name, "ok", f"{found.version}, built and loaded a tiny engine")


def check_onnxruntime(facts: MachineFacts) -> Check:
    """Check that ONNX Runtime runs a graph, on the GPU if there is one."""
    name = "ONNX Runtime"
    found = facts.machine.onnxruntime(_CUDA if facts.cuda.works else _CPU)
    without_cuda = facts.cuda.works and _CUDA not in found.providers
    if without_cuda and not found.missing and found.error is None:
        found = facts.machine.onnxruntime(_CPU)
    facts.onnxruntime = found
    if found.missing:
        cure = install_command("cpu")
        if facts.tensorrt.version:
            return Check(name, "warn", "not installed", "only TensorRT engines can run", cure)
        return Check(
            name, "fail", "not installed", "neither it nor TensorRT is here", cure, UNAVAILABLE
        )
    if found.error is not None or found.version is None:
        return Check(
            name,
            "fail",
            f"{found.version or 'installed'}, but it does not work",
            found.error or "it has no version",
            "install onnxruntime-gpu for this driver's CUDA version with its CUDA and cuDNN "
            "libraries, or use --backend ort-cpu"
            if facts.cuda.works
            else "reinstall onnxruntime",
            UNAVAILABLE,
        )
    oldest = min(dialect.min_onnxruntime for dialect in io_spec.DIALECTS.values())
    if version_numbers(found.version) < oldest:
        cause = f"{oldest[0]}.{oldest[1]} is the oldest that works"
        return Check(name, "fail", found.version, cause, "update it", UNAVAILABLE)
    ran = "the CPU" if without_cuda or not facts.cuda.works else "the GPU"
    detail = f"{found.version}, ran a tiny graph on {ran}"
    if without_cuda and not facts.tensorrt.version:
        return Check(
            name,
            "warn",
            detail,
            "it was built without CUDA, and TensorRT is not here: the GPU stays unused",
            f"pip uninstall onnxruntime, then {install_command('cuda')}",
        )
    return Check(name, "ok", detail)


def check_bundle(bundle: Path, facts: MachineFacts) -> tuple[Check, Manifest | None]:
    """Check that the files of a bundle are whole; the manifest is None if it cannot be read."""
    name = "bundle"
    try:
        manifest = read_manifest(bundle)
        verify_files(bundle, manifest)
    except EdgeError as error:
        return Check(
            name, "fail", str(bundle), str(error), "copy or export it again", DAMAGED
        ), None
    total = sum(file.num_bytes for file in manifest.files.values())
    detail = f"{manifest.name}, {manifest.dialect}: {len(manifest.files)} files whole, {total:,} B"
    version = facts.onnxruntime.version
    needed = io_spec.DIALECTS[manifest.dialect].min_onnxruntime
    if version and version_numbers(version) < needed:
        return Check(
            name,
            "warn",
            detail,
            f"dialect {manifest.dialect} needs ONNX Runtime {needed[0]}.{needed[1]}, found "
            f"{version}; only an engine can run it",
            "update onnxruntime, or export with --dialect portable",
        ), manifest
    return Check(name, "ok", detail), manifest


def check_memory(facts: MachineFacts, manifest: Manifest | None) -> Check:
    """Check that there is enough memory for the bundle."""
    name, free = "memory", facts.snapshot.memory_room_bytes
    unified = facts.cuda.integrated or not facts.cuda.works
    if not unified:
        free = facts.cuda.memory_free_bytes
    if free is None:
        return Check(name, "warn", "unknown", "/proc/meminfo cannot be read", "mount /proc")
    detail = f"{free / 1e9:.1f} GB free" + ("" if unified else " on the GPU")
    at_once = read_free_memory_bytes(facts.machine.root) if facts.jetson else None
    if at_once is not None:
        detail += f", {at_once / 1e9:.1f} of them without giving up page cache"
        detail += _contiguous(facts)
    if manifest is None:
        return Check(name, "ok", detail)
    # Count the weights, one slot of the cache, and what the libraries take. Without an engine the
    # cache is as small as memory asks for.
    capacity, smaller = min(LEAST_CAPACITY, manifest.kv_capacity), ""
    if facts.engine is not None:
        capacity = facts.engine.kv_capacity
        smaller = "build an engine with a smaller --kv-capacity, "
    if facts.cuda.works:
        file = manifest.files.get(f"{manifest.graphs.decoder}.data")
        weights = file.num_bytes if file else 0
        cache = io_spec.kv_bytes_per_token(manifest.model, manifest.dtype, manifest.int8_layers)
        cache *= capacity
        libraries = _OVERHEAD_BYTES
    else:
        plan = plan_bundle_memory(
            manifest,
            Deployment(
                "ort-cpu",
                kv_capacity=capacity,
                dialect=manifest.dialect,
                int8_layers=manifest.int8_layers,
            ),
        )
        weights, cache = plan.weights_bytes, plan.cache
        libraries = plan.process_bytes - weights - cache
    needed = weights + cache + libraries
    linears = manifest.quantization.linears.items()
    lm_head = max((each.num_bytes for name, each in linears if "lm_head" in name), default=0)
    block = max(cache, lm_head)
    detail += f", the bundle needs about {needed / 1e9:.1f} GB for one sequence"
    if free >= needed and (at_once is None or at_once >= block or not _refuses_blocks(facts)):
        return Check(name, "ok", detail)
    if free >= needed:
        return Check(
            name,
            "warn",
            detail,
            f"the largest block, of {block / 1e6:,.0f} MB, is more than what is free at once, and "
            f"Jetson Linux {facts.snapshot.l4t} is reported to refuse such blocks (NvMap)",
            "sync && echo 1 | sudo tee /proc/sys/vm/drop_caches, if the bundle does not open",
        )
    return Check(
        name,
        "fail",
        detail,
        f"weights {weights / 1e9:.2f} GB, KV cache of {capacity} tokens {cache / 1e9:.2f} GB, "
        f"libraries about {libraries / 1e9:.1f} GB",
        f"end other programs (a desktop takes 1 to 2 GB), {smaller}or export with fewer bits",
        NO_MEMORY,
    )


def _contiguous(facts: MachineFacts) -> str:
    """Say how much memory is reserved for contiguous blocks (CMA), which few drivers need."""
    meminfo = facts.machine.root / "proc/meminfo"
    total, free = (read_kib(meminfo, key) for key in ("CmaTotal", "CmaFree"))
    if total is None or free is None:
        return ""
    return f", CMA {free / 1e6:,.0f} of {total / 1e6:,.0f} MB free"


def _refuses_blocks(facts: MachineFacts) -> bool:
    numbers = tuple(map(int, re.findall(r"\d+", facts.snapshot.l4t or "")[:3]))
    is_small = (facts.snapshot.memory_total_bytes or 0) < _SMALL_BYTES
    return is_small and _REFUSES_BLOCKS <= numbers < _NOT_REPORTED


def check_engines(bundle: Path, manifest: Manifest, facts: MachineFacts) -> Check:
    """Check that there is an engine for this TensorRT and this GPU."""
    name, directories = "engines", find_engines(bundle)
    if not directories:
        status: Status = "warn" if facts.jetson and facts.tensorrt.version else "skip"
        return Check(
            name,
            status,
            "none built",
            "without one ONNX Runtime runs it",
            f"edge-llm build {bundle}",
        )
    fitting: dict[str, EngineInfo] = {}
    problems: list[str] = []
    unvouched: list[str] = []
    others = 0
    compare = facts.cuda.works and facts.tensorrt.version is not None
    for directory in directories:
        try:
            info = read_engine_info(directory, trusted_keys_file())
            verify_plan(directory, info)
            if compare and info.flavour != "tensorrt":
                others += 1  # another library loads it, which was not checked
                continue
            if compare:
                check_engine(
                    directory,
                    info,
                    manifest,
                    flavour="tensorrt",
                    tensorrt_version=facts.tensorrt.version or "",
                    compute_capability=facts.cuda.compute_capability or "",
                )
                bindings = facts.machine.cuda_bindings() if info.plugins == "python" else None
                if bindings is not None and bindings.error is not None:
                    raise BundleError(
                        f"{directory.name} has own kernels, which cuda-bindings launch for "
                        f"TensorRT < 10.13, and they do not work here: {bindings.error}; see "
                        "CUDA in Python"
                    )
        except IntegrityError as error:
            return Check(name, "fail", directory.name, str(error), "build it again", DAMAGED)
        except ConfigError as error:
            return Check(name, "fail", "trusted keys", str(error), "mend that file", WRONG_ENGINE)
        except BundleError as error:
            (unvouched if isinstance(error, UnvouchedError) else problems).append(str(error))
        else:
            fitting[directory.name] = info

    def usable(status: Status, detail: str) -> Check:
        if not unvouched:
            return Check(name, status, detail)
        detail += f"; {len(unvouched)} passed over, since nobody vouches for them"
        return Check(name, "warn", detail, unvouched[0], "build it here, or sign it")

    if not compare:
        detail = f"{len(fitting)} whole; no TensorRT and GPU here to compare them with"
        return usable("skip", detail)
    apart = f"{others} of TensorRT for RTX not compared"
    if not fitting and others:
        return usable("skip", f"{apart} ({len(problems)} others do not fit)")
    if not fitting:
        return Check(
            name,
            "fail",
            f"none of {len(directories)} fits this machine",
            (problems + unvouched)[0],
            "build one here",
            WRONG_ENGINE,
        )
    facts.engine = max(fitting.values(), key=lambda info: engine_rank(info, 1))
    detail = f"{', '.join(fitting)} fits ({len(problems)} others do not)"
    detail = f"{detail}; {apart}" if others else detail
    slow = slow_parts(facts.engine)
    if slow and not unvouched:
        return Check(name, "warn", detail, "; ".join(slow), how_to_mend(facts.engine))
    return usable("ok", detail)
