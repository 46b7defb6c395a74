"""Checks the device: board, device nodes, driver, GPU, power and clocks."""

from __future__ import annotations

from collections.abc import Iterator

from edge.device.nodes import RENDER_NODES
from edge_lab.telemetry import Snapshot

from .check import NO_MEMORY, NO_PERMISSION, UNAVAILABLE, Check, MachineFacts, version_numbers

_OLDEST_L4T = 36  # JetPack 6; older ones have TensorRT 8
_OLDEST_DRIVER = 12000  # CUDA 12, which TensorRT 10 and onnxruntime-gpu are built with

# CUresult (cuda.h): what cuInit may answer, with its cause and cure.
_INIT_CODES: dict[int, tuple[str, str]] = {
    3: ("the driver is not initialized yet", "wait, or load the GPU's kernel module"),
    34: (
        "libcuda.so.1 is the stub of the CUDA toolkit, not the driver",
        "take the directory 'stubs' out of LD_LIBRARY_PATH",
    ),
    35: (
        "the driver is older than the CUDA libraries",
        "update the driver (on a Jetson: JetPack), or install libraries for its CUDA version",
    ),
    46: ("another process holds the GPU exclusively", "end it, or set the compute mode to default"),
    100: (
        "the driver sees no GPU",
        "on a Jetson: the user must be in the groups video and render; in a container: start it "
        "with --runtime nvidia; else look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    ),
    801: (
        "the driver cannot work in this environment",
        "on a Jetson: the user must be in the groups video and render; in a container or service, "
        "do not hide /sys and /proc/device-tree; start a container with --runtime nvidia",
    ),
    802: ("the driver is still starting", "wait; in a service use --wait-gpu 30"),
    803: (
        "driver library and kernel module are of different versions",
        "reboot after an update of the driver; in a container use an image for the host's JetPack, "
        "and take cuda-compat out of LD_LIBRARY_PATH",
    ),
    804: (
        "forward compatibility (cuda-compat) does not exist for this GPU",
        "take cuda-compat out of LD_LIBRARY_PATH",
    ),
    999: (
        "the driver failed without a reason",
        "on a Jetson mostly a device node that this user may not open (groups video and render); "
        "else look at dmesg, reload the kernel module or reboot",
    ),
}


def check_system(facts: MachineFacts) -> Check:
    """Check the board and its Jetson Linux."""
    name, snapshot = "system", facts.snapshot
    if not facts.jetson:
        return Check(name, "ok", f"{facts.machine.architecture()}, not a Jetson")
    board = snapshot.module or "a Jetson whose name is hidden here"
    detail = f"{board}, Jetson Linux {snapshot.l4t or 'unknown'}"
    if snapshot.jetpack:
        detail += f", JetPack {snapshot.jetpack}"
    if snapshot.l4t is None:
        return Check(
            name,
            "warn",
            detail,
            "neither /etc/nv_tegra_release nor the package nvidia-l4t-core is here",
            "in a container mount /etc/nv_tegra_release read-only",
        )
    if version_numbers(snapshot.l4t)[0] < _OLDEST_L4T:
        return Check(
            name,
            "fail",
            detail,
            "JetPack before 6 has TensorRT 8, which cannot read the graphs",
            "flash JetPack 6.2 or 7.2",
            UNAVAILABLE,
        )
    return Check(name, "ok", detail)


def check_device_nodes(facts: MachineFacts) -> Check:
    """Check that this process may open the device nodes that the driver opens."""
    name, nodes = "device nodes", facts.nodes
    if not facts.gpu_expected:
        return Check(name, "skip", "no NVIDIA GPU here")
    if facts.cuda.works:  # a missing or closed node is then not needed, as in WSL
        return Check(name, "ok", f"{sum(node.usable for node in nodes.values())} open to this user")
    missing = _missing_nodes(facts)
    if missing:
        cure = "load the driver's kernel module; look at dmesg"
        if facts.machine.in_container():
            cure = "start the container with --runtime nvidia (or --device nvidia.com/gpu=all)"
        return Check(
            name,
            "fail",
            f"{' and '.join(missing)} missing",
            "the driver made no device node, or it was not passed on to this container or service",
            cure,
            UNAVAILABLE,
        )
    denied = {path: node for path, node in nodes.items() if not node.usable}
    if not denied:
        return Check(name, "ok", f"{len(nodes)} of them, all open to this user")
    gids = sorted({node.gid for node in denied.values()})
    added = " ".join(f"--group-add {gid}" for gid in gids)
    groups = sorted({node.group for node in denied.values()})
    lacking = [group for group in groups if group not in facts.machine.groups()]
    cause = f"user {facts.machine.user()} may not read and write them"
    if lacking:
        cause += f", and is not in {' and '.join(lacking)}"
    cure = (
        f"sudo usermod -aG {','.join(lacking or groups)} {facts.machine.user()}, then log in "
        f"again; in a container: {added}; in a service: SupplementaryGroups={' '.join(groups)} and "
        "DeviceAllow for each node"
    )
    if not facts.jetson and denied.keys() <= set(RENDER_NODES):
        return Check(name, "warn", f"{', '.join(denied)} closed to this user", cause, cure)
    return Check(
        name, "fail", f"{', '.join(denied)} closed to this user", cause, cure, NO_PERMISSION
    )


def _missing_nodes(facts: MachineFacts) -> list[str]:
    nodes = facts.nodes
    if not facts.jetson:
        return [path for path in ("/dev/nvidiactl", "/dev/nvidia0") if path not in nodes]
    missing = [] if "/dev/nvmap" in nodes else ["/dev/nvmap"]
    if "/dev/nvhost-gpu" not in nodes and "/dev/nvgpu/igpu0/ctrl" not in nodes:
        missing.append("/dev/nvhost-gpu or /dev/nvgpu/igpu0/ctrl")
    return missing


def check_driver(facts: MachineFacts) -> Check:
    """Check that ``libcuda.so.1`` loads and is new enough."""
    name, cuda = "driver", facts.cuda
    if not facts.gpu_expected:
        return Check(name, "skip", "no NVIDIA driver, which is fine without an NVIDIA GPU")
    if cuda.failure:
        return Check(
            name,
            "fail",
            "it could not be asked",
            f"a process that used it ended: {cuda.failure}",
            "look at dmesg; reinstall the driver or reboot",
            UNAVAILABLE,
        )
    if cuda.library_error:
        return Check(
            name,
            "fail",
            "libcuda.so.1 does not load",
            cuda.library_error,
            "install the driver (on a Jetson: the package nvidia-l4t-cuda); start a container with "
            "--runtime nvidia",
            UNAVAILABLE,
        )
    if cuda.driver_version is None:
        return Check(name, "warn", "libcuda.so.1 loads, but does not say its version")
    version = f"{cuda.driver_version // 1000}.{cuda.driver_version % 1000 // 10}"
    if cuda.driver_version < _OLDEST_DRIVER:
        return Check(
            name,
            "fail",
            f"CUDA {version}",
            "TensorRT 10 and onnxruntime-gpu need a driver for CUDA 12 or newer",
            "update the driver (on a Jetson: JetPack 6.2 or 7.2)",
            UNAVAILABLE,
        )
    return Check(name, "ok", f"for CUDA {version}")


def check_init(facts: MachineFacts) -> Check:
    """Check that the driver starts."""
    name, code = "cuInit", facts.cuda.init_code
    if not facts.gpu_expected:
        return Check(name, "skip", "no NVIDIA GPU here")
    if code is None:
        return Check(name, "skip", "the driver did not load")
    if code == 0:
        return Check(name, "ok", "the driver starts")
    cause, cure = _INIT_CODES.get(
        code, ("the driver does not start", "look up CUresult in cuda.h, and look at dmesg")
    )
    return Check(name, "fail", f"error {code}", cause, cure, UNAVAILABLE)


def check_gpu(facts: MachineFacts) -> Check:
    """Check that a context can be made on a GPU."""
    name, cuda = "GPU", facts.cuda
    if cuda.init_code != 0:
        return Check(name, "skip", "no driver that works")
    if not cuda.num_devices or cuda.compute_capability is None:
        return Check(
            name,
            "fail",
            "the driver works, but shows no GPU",
            "CUDA_VISIBLE_DEVICES hides it, or it was not passed on to this container",
            "unset CUDA_VISIBLE_DEVICES; start a container with --runtime nvidia",
            UNAVAILABLE,
        )
    detail = f"{cuda.name}, compute capability {cuda.compute_capability}"
    if not cuda.works:
        return Check(
            name,
            "fail",
            detail,
            f"no CUDA context can be made on it (error {cuda.context_code}; 2 is out of memory)",
            "end what fills its memory; after a crash reboot",
            NO_MEMORY if cuda.context_code == 2 else UNAVAILABLE,
        )
    if version_numbers(cuda.compute_capability) < (7, 5):
        return Check(
            name,
            "warn",
            detail,
            "TensorRT 10 needs compute capability 7.5",
            "use --backend ort-cuda or ort-cpu",
        )
    return Check(name, "ok", detail)


def check_power(facts: MachineFacts) -> Check:
    """Check power mode, clocks, heat and power supply."""
    name, snapshot = "power and clocks", facts.snapshot
    if not facts.jetson:
        return Check(name, "skip", "not a Jetson")
    detail = f"mode {snapshot.power_mode or 'unknown'}"
    if snapshot.gpu_clock_hz and snapshot.gpu_clock_max_hz:
        detail += (
            f", GPU {snapshot.gpu_clock_hz / 1e6:.0f} of {snapshot.gpu_clock_max_hz / 1e6:.0f} MHz"
        )
    if snapshot.module_power_watts is not None:
        detail += f", {snapshot.module_power_watts:.1f} W"
    found = list(_power_warnings(snapshot, facts.machine.power_modes()))
    if not found:
        return Check(name, "ok", detail)
    causes, cures = zip(*found, strict=True)
    return Check(name, "warn", detail, "; ".join(causes), "; ".join(dict.fromkeys(cures)))


def _power_warnings(snapshot: Snapshot, modes: dict[int, str]) -> Iterator[tuple[str, str]]:
    if snapshot.throttled:
        alerts = ", ".join(snapshot.throttled_by)
        yield f"it is too hot and throttled ({alerts})", "improve the cooling"
    if snapshot.over_current_events:
        yield (
            f"{snapshot.over_current_events} over-current events since boot cut the clocks",
            "use a stronger power supply, or a smaller power mode",
        )
    fastest = [(number, mode) for number, mode in modes.items() if mode.startswith("MAXN")]
    mode = snapshot.power_mode
    if mode is not None and fastest and not mode.startswith("MAXN"):
        number, best = fastest[-1]
        yield f"mode {mode} caps clocks below {best}", f"sudo nvpmodel -m {number}"
    low, high = snapshot.gpu_clock_min_hz, snapshot.gpu_clock_max_hz
    if low is not None and high is not None and low < high:
        yield "the clocks follow the load, so measurements vary", "sudo jetson_clocks"
