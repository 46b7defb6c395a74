"""Reads what a Jetson reports through sysfs: clocks, temperatures, power, throttling, memory.

It reads plain files only: no root, no ``tegrastats``, no subprocess. Every file is optional. A
missing or garbled value is None, or absent from a mapping. Nothing here raises, so the same call
works on a laptop, in a container and on every JetPack:

====================  ==============================================================================
GPU                   ``/sys/class/devfreq/17000000.gpu`` on Orin (``.ga10b`` on JetPack 5),
                      ``gpu-gpc-0`` on Thor; the load in permille is in ``device/load``
power                 hwmon ``ina3221``: ``in<i>_label``, ``in<i>_input`` (mV), ``curr<i>_input``
                      (mA); Thor has ``ina238`` beside it, with ``power1_input`` (uW)
throttling            hwmon ``soctherm_oc`` counts over-current events since boot; the thermal
                      cooling devices ``*-throttle-alert`` are in a state above 0 while heat holds
                      clocks down. ``hot-surface-alert`` warns of a hot case, from 70 degrees on,
                      and holds nothing down (NVIDIA's nvpmodel_indicator tells the two apart)
power mode            ``/var/lib/nvpmodel/status`` (``pmode:0002``), names in ``/etc/nvpmodel.conf``
Jetson Linux          ``/etc/nv_tegra_release``, else the version of the package nvidia-l4t-core
====================  ==============================================================================

On Orin the GPU's memory is the system's memory, so ``MemAvailable`` is what is left for both.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from edge.device.memory import read_available_memory_bytes, read_kib, read_mem_available_bytes

# Rails that see the module's whole input (Orin NX and Nano, Thor, TX2 and older), best first.
_INPUT_RAILS = ("VIN", "VDD_IN", "POM_5V_IN")
# AGX Orin has no such rail. These three are fed side by side; VDDQ_VDD2_1V8AO (the memory) is fed
# by the 5 V rail and must not be counted twice.
_AGX_ORIN_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
_GPU_NAMES = re.compile(r"(?:\.(?:gpu|ga10b|gv11b|gp10b|gpu0)|^gpu-gpc-\d+)$")
_ARM_CORE = ("CPU implementer", "CPU part", "CPU variant", "CPU revision")


class Snapshot(msgspec.Struct, frozen=True):
    """One look at the device; None or an absent key means that it could not be read.

    Attributes:
        module: e.g. ``NVIDIA Jetson AGX Orin Developer Kit``.
        l4t: version of Jetson Linux, e.g. ``36.4.3``.
        jetpack: version of the package ``nvidia-jetpack``.
        power_mode: name of the nvpmodel mode, e.g. ``MAXN``; its number where it has no name.
        gpu_load_ratio: 0 to 1, as the driver averages it.
        gpu_clock_hz, gpu_clock_max_hz, gpu_clock_min_hz: the clock now, and the limits set now.
        temperatures_celsius: temperatures by thermal zone, without ``-thermal``; zones that are
            off are absent, and a second zone of the same name is ``NAME-1``.
        power_watts: power by rail; a second rail of the same name is ``NAME-1``.
        module_power_watts: power of the whole module, not of the carrier board.
        throttled: whether a temperature limit holds clocks down now; None if nothing tells.
        throttled_by: the cooling devices that do, e.g. ``gpu-throttle-alert``.
        over_current_events: number since boot; each one cuts the clocks for a moment.
        memory_total_bytes, memory_available_bytes: system memory, which on Orin is the GPU's too.
        memory_room_bytes: memory that this process can have: the available bytes, or less where a
            control group limits it.
        process_rss_bytes: resident memory of this process.
    """

    module: str | None = None
    l4t: str | None = None
    jetpack: str | None = None
    power_mode: str | None = None
    gpu_load_ratio: float | None = None
    gpu_clock_hz: int | None = None
    gpu_clock_max_hz: int | None = None
    gpu_clock_min_hz: int | None = None
    temperatures_celsius: dict[str, float] = {}
    power_watts: dict[str, float] = {}
    module_power_watts: float | None = None
    throttled: bool | None = None
    throttled_by: tuple[str, ...] = ()
    over_current_events: int | None = None
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    memory_room_bytes: int | None = None
    process_rss_bytes: int | None = None


def read_snapshot(root: Path = Path("/")) -> Snapshot:
    """Look at everything once: some sixty small reads, a few milliseconds.

    Args:
        root: directory that holds ``sys``, ``proc``, ``etc`` and ``var``.
    """
    gpu = _find_gpu(root)
    load = _number(gpu / "device" / "load") if gpu else None
    rails = read_power_watts(root)
    alerts = _read_alerts(root)
    return Snapshot(
        module=read_module(root),
        l4t=read_l4t(root),
        jetpack=read_jetpack(root),
        power_mode=read_power_mode(root),
        gpu_load_ratio=None if load is None else min(max(load / 1000, 0.0), 1.0),
        gpu_clock_hz=_number(gpu / "cur_freq") if gpu else None,
        gpu_clock_max_hz=_number(gpu / "max_freq") if gpu else None,
        gpu_clock_min_hz=_number(gpu / "min_freq") if gpu else None,
        temperatures_celsius=_read_temperatures(root),
        power_watts=rails,
        module_power_watts=_module_power(rails),
        throttled=None if alerts is None else bool(alerts),
        throttled_by=alerts or (),
        over_current_events=_read_over_current_events(root),
        memory_total_bytes=read_kib(root / "proc/meminfo", "MemTotal"),
        memory_available_bytes=read_mem_available_bytes(root),
        memory_room_bytes=read_available_memory_bytes(root),
        process_rss_bytes=read_kib(root / "proc/self/status", "VmRSS"),
    )


def moving_clocks(snapshot: Snapshot) -> str | None:
    """Say that the GPU's clocks follow the load; None if they stand still or are not known."""
    low, high = snapshot.gpu_clock_min_hz, snapshot.gpu_clock_max_hz
    if low is None or high is None or low >= high:
        return None
    return (
        f"the GPU's clocks follow the load ({low / 1e6:.0f} to {high / 1e6:.0f} MHz), so TensorRT "
        "may take a slow kernel for a fast one while it builds; first: sudo jetson_clocks"
    )


def read_cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """Name the CPU's model, as ``/proc/cpuinfo`` does; on Arm by the numbers of its cores."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return "unknown CPU"
    fields = [(key.strip(), value.strip()) for key, _, value in (x.partition(":") for x in lines)]
    for key, value in fields:
        if key == "model name" and value:
            return value
    parts = sorted({f"{key} {value}" for key, value in fields if key in _ARM_CORE})
    return ", ".join(parts) or "unknown CPU"


def read_module(root: Path = Path("/")) -> str | None:
    """Return the device tree's name of the board."""
    return _text(root / "proc/device-tree/model")


def read_l4t(root: Path = Path("/")) -> str | None:
    """Return the version of Jetson Linux, e.g. ``36.4.3``."""
    text = _text(root / "etc/nv_tegra_release") or ""
    match = re.search(r"R(\d+) .*?REVISION: ([\d.]+)", text)
    if match:
        return f"{match[1]}.{match[2]}"
    version = _package_version(root, "nvidia-l4t-core") or ""
    match = re.match(r"\d+(\.\d+)+", version)  # 36.4.3-20250107174145
    return match[0] if match else None


def read_target() -> str | None:
    """Return the ``--target`` of an export that this machine is; None if it is none of them."""
    release = (read_l4t() or "").partition(".")[0]
    return {"36": "jetpack6", "38": "jetpack7", "39": "jetpack7"}.get(release)


def read_jetpack(root: Path = Path("/")) -> str | None:
    """Return the version of the package ``nvidia-jetpack``, which is not always installed."""
    return _package_version(root, "nvidia-jetpack")


def read_power_mode(root: Path = Path("/")) -> str | None:
    """Return the name of the active nvpmodel mode; its number if the configuration has no name."""
    match = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status") or "")
    if match is None:
        return None
    mode = int(match[1])
    return read_power_modes(root).get(mode, str(mode))


def read_power_modes(root: Path = Path("/")) -> dict[int, str]:
    """Return the names of the nvpmodel modes of this board, by their numbers."""
    text = _text(root / "etc/nvpmodel.conf") or ""
    found = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", text, re.MULTILINE)
    return {int(number): name for number, name in found}


def read_module_power_watts(root: Path = Path("/")) -> float | None:
    """Return the power of the whole module now; None if no sensor tells."""
    return _module_power(read_power_watts(root))


class EnergyMeter:
    """Measures energy over a span of time: a thread samples the power, trapezoids integrate it.

    ::

        with EnergyMeter() as meter:
            llm.generate(prompt)
        print(meter.joules, meter.mean_watts)

    The first and the last sample are taken at the edges of the span, so a span shorter than the
    interval has a figure too. If any sample is missing, its neighbours bridge the gap.

    Args:
        read_power_watts: returns watts, or None where there is no reading.
        interval_s: seconds between samples; the sensors average over some milliseconds themselves.
        clock: a monotonic clock in seconds.
        wait: waits this many seconds, or until the event is set; returns True if it is set.

    Attributes:
        joules: energy of the span; None before its end, or with less than two readings.
        mean_watts: mean power between the first and the last reading; None where ``joules`` is.
        samples: number of readings taken.
        duration_s: time between the first and the last reading.
    """

    def __init__(
        self,
        read_power_watts: Callable[[], float | None] = read_module_power_watts,
        interval_s: float = 0.1,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        if not interval_s > 0:
            raise ValueError(f"interval_s ({interval_s}) must be positive")
        self._read = read_power_watts
        self._interval_s = interval_s
        self._clock = clock
        self._wait = wait
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._last: tuple[float, float] | None = None
        self._sum_joules = 0.0
        self.joules: float | None = None
        self.mean_watts: float | None = None
        self.samples = 0
        self.duration_s = 0.0

    def start(self) -> None:
        """Begin a span; the figures of an earlier one are lost."""
        if self._thread is not None:
            raise RuntimeError("the meter is running already")
        self._stop.clear()
        self._last, self._sum_joules = None, 0.0
        self.joules = self.mean_watts = None
        self.samples, self.duration_s = 0, 0.0
        self._sample()
        self._thread = threading.Thread(target=self._run, name="energy-meter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the span; calling it twice is harmless."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._sample()
        if self.samples > 1:
            self.joules = self._sum_joules
            self.mean_watts = self._sum_joules / self.duration_s if self.duration_s > 0 else None

    def __enter__(self) -> EnergyMeter:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._wait(self._stop, self._interval_s):
            self._sample()

    def _sample(self) -> None:
        watts, now = self._read(), self._clock()
        if watts is None:
            return
        if self._last is not None:
            then, before = self._last
            self._sum_joules += (before + watts) / 2 * (now - then)
            self.duration_s += now - then
        self._last = now, watts
        self.samples += 1


def _text(path: Path) -> str | None:
    """Read a small file, stripped (the device tree ends strings with NUL); None if unreadable."""
    try:
        return path.read_text("utf-8", "replace").strip().strip("\0").strip()
    except OSError:  # missing, forbidden, or a sensor that is switched off (EAGAIN, EINVAL)
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    # ASCII digits only: `int` would take other scripts' digits and underscores.
    return int(text) if text and re.fullmatch(r"-?[0-9]{1,18}", text) else None


def _directories(parent: Path, prefix: str = "") -> Iterator[Path]:
    """List the directories in ``parent``, by number where their names end in one."""
    try:
        found = [path for path in parent.iterdir() if path.name.startswith(prefix)]
    except OSError:
        return
    yield from sorted(found, key=lambda path: (len(path.name), path.name))


def _find_gpu(root: Path) -> Path | None:
    for path in _directories(root / "sys/class/devfreq"):
        node = _text(path / "device" / "of_node" / "name")
        if _GPU_NAMES.search(path.name) or node in ("gpu", "ga10b", "gv11b", "gp10b"):
            return path
    return None


def _hwmon(root: Path, name: str) -> Iterator[Path]:
    for path in _directories(root / "sys/class/hwmon", "hwmon"):
        if _text(path / "name") == name:
            yield path


def read_power_watts(root: Path = Path("/")) -> dict[str, float]:
    """Return the power now by rail; empty if no sensor tells."""
    rails: dict[str, float] = {}
    for path in _hwmon(root, "ina3221"):
        for channel in (1, 2, 3):  # the others are sums of shunt voltages
            label = _text(path / f"in{channel}_label")
            millivolts = _number(path / f"in{channel}_input")
            milliamperes = _number(path / f"curr{channel}_input")
            if not label or label == "NC" or millivolts is None or milliamperes is None:
                continue
            _add(rails, label, millivolts * milliamperes / 1e6)
    for path in _hwmon(root, "ina238"):
        microwatts = _number(path / "power1_input")
        if microwatts is not None:
            _add(rails, _text(path / "in1_label") or "VIN", microwatts / 1e6)
    return rails


def _add(values: dict[str, float], name: str, value: float) -> None:
    """Add a value; a second one of the same name is called ``NAME-1``."""
    names = (name, *(f"{name}-{number}" for number in range(1, len(values) + 1)))
    values[next(free for free in names if free not in values)] = value


def _module_power(rails: dict[str, float]) -> float | None:
    for name in _INPUT_RAILS:
        if name in rails:
            return rails[name]
    if all(name in rails for name in _AGX_ORIN_RAILS):
        return sum(rails[name] for name in _AGX_ORIN_RAILS)
    return None


def _read_temperatures(root: Path) -> dict[str, float]:
    zones: dict[str, float] = {}
    for path in _directories(root / "sys/class/thermal", "thermal_zone"):
        name, millidegrees = _text(path / "type"), _number(path / "temp")
        # A sensor that is switched off reads as -256 degrees.
        if name and millidegrees is not None and millidegrees > -200_000:
            _add(zones, re.sub(r"[-_](?:thermal|therm)$", "", name), millidegrees / 1000)
    return zones


def _read_alerts(root: Path) -> tuple[str, ...] | None:
    """List active ``*-throttle-alert`` cooling devices; None where the kernel has none of them."""
    known, active = False, []
    for path in _directories(root / "sys/class/thermal", "cooling_device"):
        name, state = _text(path / "type"), _number(path / "cur_state")
        if name and name.endswith("-throttle-alert") and state is not None:
            known = True
            if state > 0:
                active.append(name)
    return tuple(active) if known else None


def _read_over_current_events(root: Path) -> int | None:
    counts = [
        count
        for path in _hwmon(root, "soctherm_oc")
        for number in (1, 2, 3)  # under voltage, average and instantaneous over current
        if (count := _number(path / f"oc{number}_event_cnt")) is not None
    ]
    return sum(counts) if counts else None


def _package_version(root: Path, package: str) -> str | None:
    path = root / "var/lib/dpkg/status"
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return None
    return _package_versions(path, stamp).get(package)


@functools.lru_cache(maxsize=4)
def _package_versions(path: Path, _stamp: int) -> dict[str, str]:
    """Return versions of NVIDIA's packages; the file is large, so it is read once per change."""
    found: dict[str, str] = {}
    package = ""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("Package: "):
                    package = line.removeprefix("Package: ").strip()
                elif line.startswith("Version: ") and package in _PACKAGES:
                    found[package] = line.removeprefix("Version: ").strip()
    except OSError:
        return {}
    return found


_PACKAGES = ("nvidia-jetpack", "nvidia-l4t-core")
