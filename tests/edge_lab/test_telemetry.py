"""The sysfs reader on the layouts of JetPack 6 and 7, and the energy meter on a fake clock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_lab import telemetry
from edge_lab.telemetry import EnergyMeter, Snapshot, read_cpu_name, read_snapshot
from tests.edge.device import jetson_trees as trees


def test_agx_orin_with_jetpack_6(tmp_path: Path):
    snapshot = read_snapshot(trees.agx_orin_jetpack6(tmp_path))
    assert snapshot == Snapshot(
        module="NVIDIA Jetson AGX Orin Developer Kit",
        l4t="36.4.3",
        jetpack="6.2+b77",
        power_mode="MAXN",
        gpu_load_ratio=0.987,
        gpu_clock_hz=1_300_500_000,
        gpu_clock_max_hz=1_300_500_000,
        gpu_clock_min_hz=306_000_000,
        temperatures_celsius={"cpu": 51.5, "gpu": 48.125, "tj": 52.0},
        power_watts={
            "VDD_GPU_SOC": 16.0,
            "VDD_CPU_CV": 2.0,
            "VIN_SYS_5V0": 5.0,
            "VDDQ_VDD2_1V8AO": 1.5,
        },
        module_power_watts=23.0,  # without the memory, which is in VIN_SYS_5V0
        throttled=False,
        throttled_by=(),
        over_current_events=5,
        memory_total_bytes=64350472 * 1024,
        memory_available_bytes=51200000 * 1024,
        memory_room_bytes=51200000 * 1024,
        process_rss_bytes=123456 * 1024,
    )


def test_agx_orin_with_jetpack_7(tmp_path: Path):
    snapshot = read_snapshot(trees.agx_orin_jetpack7(tmp_path))
    assert snapshot.l4t == "39.2.0"  # of the package
    assert snapshot.jetpack is None
    assert snapshot.power_mode == "50W"
    assert snapshot.gpu_load_ratio is None
    assert snapshot.gpu_clock_hz == 612_000_000
    assert snapshot.module_power_watts == pytest.approx(15.5)
    assert (snapshot.throttled, snapshot.throttled_by) == (True, ("gpu-throttle-alert",))
    assert snapshot.over_current_events is None


def test_modules_with_a_rail_for_their_input(tmp_path: Path):
    nano = read_snapshot(trees.orin_nano_jetpack6(tmp_path / "nano"))
    assert nano.module_power_watts == nano.power_watts["VDD_IN"] == 15.0
    thor = read_snapshot(trees.thor_jetpack7(tmp_path / "thor"))
    assert thor.module_power_watts == thor.power_watts["VIN"] == 45.0
    assert thor.power_watts["VDD_GPU"] == pytest.approx(19.7)
    assert thor.gpu_clock_hz == 1_575_000_000
    assert thor.throttled is None  # nothing says


def test_rails_that_are_not_the_whole_module_are_not_called_so(tmp_path: Path):
    trees.write_tree(tmp_path, trees.ina3221("sys/class/hwmon/hwmon0", {"VDD_CPU_CV": (5000, 1)}))
    snapshot = read_snapshot(tmp_path)
    assert snapshot.power_watts == {"VDD_CPU_CV": 0.005}
    assert snapshot.module_power_watts is None


def test_zones_and_rails_of_one_name_are_all_there(tmp_path: Path):
    for number, millidegrees in enumerate((101_000, 30_000, 40_000)):
        zone = f"sys/class/thermal/thermal_zone{number}"
        trees.write_tree(tmp_path, {f"{zone}/type": "acpitz\n", f"{zone}/temp": str(millidegrees)})
        rails = trees.ina3221(f"sys/class/hwmon/hwmon{number}", {"VDD_IN": (5000, number + 1)})
        trees.write_tree(tmp_path, rails)
    snapshot = read_snapshot(tmp_path)
    assert snapshot.temperatures_celsius == {"acpitz": 101, "acpitz-1": 30, "acpitz-2": 40}
    assert snapshot.power_watts == {"VDD_IN": 0.005, "VDD_IN-1": 0.01, "VDD_IN-2": 0.015}
    assert snapshot.module_power_watts == 0.005


def test_an_empty_root_is_all_unknown(tmp_path: Path):
    assert read_snapshot(tmp_path) == Snapshot()
    assert read_snapshot(tmp_path / "missing") == Snapshot()


def test_this_machine_has_memory():
    snapshot = read_snapshot()
    assert snapshot.memory_total_bytes is not None
    assert snapshot.memory_available_bytes is not None
    assert 0 < snapshot.memory_available_bytes < snapshot.memory_total_bytes
    assert snapshot.process_rss_bytes is not None
    assert 1 << 20 < snapshot.process_rss_bytes < snapshot.memory_total_bytes


def test_a_mode_without_a_name_is_its_number(tmp_path: Path):
    trees.agx_orin_jetpack6(tmp_path)
    (tmp_path / "var/lib/nvpmodel/status").write_text("pmode:0012")
    assert telemetry.read_power_mode(tmp_path) == "12"
    (tmp_path / "etc/nvpmodel.conf").unlink()
    assert telemetry.read_power_mode(tmp_path) == "12"
    (tmp_path / "var/lib/nvpmodel/status").write_text("fmode:0001")
    assert telemetry.read_power_mode(tmp_path) is None


@pytest.mark.parametrize("version", ["unknown", "-1", ""])
def test_a_release_that_is_no_version_is_unknown(version: str, tmp_path: Path):
    trees.write_tree(
        tmp_path,
        {
            "etc/nv_tegra_release": "# made by hand",
            "var/lib/dpkg/status": trees.dpkg({"nvidia-l4t-core": version}),
        },
    )
    assert telemetry.read_l4t(tmp_path) is None


def test_a_new_package_database_is_read_again(tmp_path: Path):
    status = tmp_path / "var/lib/dpkg/status"
    for number, version in enumerate(("6.1", "6.2")):
        trees.write_tree(tmp_path, {str(status): trees.dpkg({"nvidia-jetpack": version})})
        os.utime(status, (number, number))
        assert telemetry.read_jetpack(tmp_path) == version


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.mark.parametrize("tree", [trees.agx_orin_jetpack6, trees.agx_orin_jetpack7])
def test_a_missing_file_costs_its_own_field_only(tree: Callable[[Path], Path], tmp_path: Path):
    whole = msgspec.to_builtins(read_snapshot(tree(tmp_path / "0")))
    most = {"sys/class/hwmon/hwmon3/curr1_input": {"power_watts", "module_power_watts"}}
    for number, path in enumerate(files_of(tmp_path / "0"), 1):
        name = str(path.relative_to(tmp_path / "0"))
        root = tree(tmp_path / str(number))
        (root / name).unlink()
        found = msgspec.to_builtins(read_snapshot(root))
        changed = {key for key in whole if whole[key] != found[key]}
        assert len(changed) <= (4 if name == "proc/self/status" else 3), name
        if name in most:
            assert changed == most[name]


JUNK = [b"", b"\xff\xfe\0\0", b"-\n", b"1e999\n", b"9" * 4000, "٣٤".encode(), b"0x10", b"nan\n"]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_garbled_files_never_raise(data: st.DataObject, tmp_path_factory: Any):
    root = trees.agx_orin_jetpack6(tmp_path_factory.mktemp("garbled"))
    files = files_of(root)
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, unique=True)):
        path.write_bytes(data.draw(st.sampled_from(JUNK) | st.binary(max_size=40)))
    snapshot = read_snapshot(root)
    msgspec.json.encode(snapshot)
    ratio = snapshot.gpu_load_ratio
    assert ratio is None or 0 <= ratio <= 1


def test_junk_is_no_reading(tmp_path: Path):
    root = trees.agx_orin_jetpack6(tmp_path)
    for junk in JUNK:
        for name in ("load", "devfreq/17000000.gpu/cur_freq"):
            (root / "sys/devices/platform/bus@0/17000000.gpu" / name).write_bytes(junk)
        snapshot = read_snapshot(root)
        assert (snapshot.gpu_load_ratio, snapshot.gpu_clock_hz) == (None, None), junk


def test_a_directory_in_place_of_a_file_is_no_reading(tmp_path: Path):
    root = trees.agx_orin_jetpack6(tmp_path)
    (root / "proc/meminfo").unlink()
    (root / "proc/meminfo").mkdir()
    assert read_snapshot(root).memory_total_bytes is None


class Bench:
    """A clock that ticks when it is read, and a power that follows it; no real time passes."""

    def __init__(self, watts: Callable[[float], float | None], steps: int, step_s: float) -> None:
        self.watts = watts
        self.now = 100.0
        self.step_s = step_s
        self.left = steps
        self.ended = threading.Event()

    def wait(self, stop: threading.Event, timeout_s: float) -> bool:
        """Like the thread's wait, but on the fake clock; then until the span is over."""
        assert timeout_s == self.step_s
        if self.left == 0:
            self.ended.set()
            return stop.wait(10)
        self.left -= 1
        self.now += timeout_s
        return False

    def meter(self) -> EnergyMeter:
        return EnergyMeter(
            lambda: self.watts(self.now - 100.0),
            self.step_s,
            clock=lambda: self.now,
            wait=self.wait,
        )

    def measure(self, rest_s: float = 0.0) -> EnergyMeter:
        meter = self.meter()
        with meter:
            assert self.ended.wait(10)
            assert meter.joules is None  # not before the end
            self.now += rest_s
        return meter


def test_constant_power():
    meter = Bench(lambda _: 20.0, steps=10, step_s=0.5).measure(rest_s=0.25)
    assert meter.joules == pytest.approx(20 * 5.25)
    assert meter.mean_watts == pytest.approx(20)
    assert meter.samples == 12
    assert meter.duration_s == pytest.approx(5.25)


def test_a_ramp_is_integrated_exactly():
    meter = Bench(lambda t: 3 * t, steps=7, step_s=1.0).measure(rest_s=0.5)
    assert meter.joules == pytest.approx(3 * 7.5**2 / 2)


def test_gaps_are_bridged_by_their_neighbours():
    meter = Bench(lambda t: None if 1.5 < t < 4.5 else 2 * t, steps=6, step_s=1.0).measure()
    assert meter.joules == pytest.approx(36)
    assert meter.duration_s == pytest.approx(6)


def test_a_span_shorter_than_the_interval_has_both_its_edges():
    meter = Bench(lambda t: 10 + t, steps=0, step_s=60.0).measure(rest_s=2.0)
    assert meter.samples == 2
    assert meter.joules == pytest.approx(22)


def test_without_a_sensor_there_is_no_figure():
    meter = Bench(lambda _: None, steps=3, step_s=1.0).measure()
    assert (meter.joules, meter.mean_watts, meter.samples) == (None, None, 0)


def test_a_meter_can_be_used_again():
    bench = Bench(lambda _: 5.0, steps=2, step_s=1.0)
    meter = bench.meter()
    for _ in range(2):
        bench.left = 2
        bench.ended.clear()
        with meter:
            assert bench.ended.wait(10)
            with pytest.raises(RuntimeError, match="running already"):
                meter.start()
        assert meter.joules == pytest.approx(10)
        meter.stop()
        assert meter.joules == pytest.approx(10)


def test_the_thread_ends_with_the_span_even_after_an_error():
    with pytest.raises(KeyError), EnergyMeter(lambda: 1.0, 0.001) as meter:  # real clock
        raise KeyError
    assert meter.joules is not None
    assert "energy-meter" not in {thread.name for thread in threading.enumerate()}


def test_the_interval_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        EnergyMeter(interval_s=0)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t: fma\n", "Some CPU @ 2 GHz"),
        (
            "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n\n"
            "processor\t: 1\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n",
            "CPU implementer 0x41, CPU part 0xd42",
        ),
        ("", "unknown CPU"),
        (None, "unknown CPU"),
    ],
)
def test_the_cpu_is_named(tmp_path: Path, text: str | None, name: str):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert read_cpu_name(tmp_path / "cpuinfo") == name
