"""The table of modules against the advertised figures."""

from __future__ import annotations

import pytest

from edge.errors import ConfigError
from edge_lab.planner.devices import MODULES, Module, find_module, identify
from edge_lab.planner.memory import usable_bytes

GIB = 1 << 30


@pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
def test_tops_are_those_of_the_data_sheet(module: Module):
    """SMs, clock, sparsity and DLAs make the advertised number."""
    sparse = 2 * module.modes[0].int8_ops / 1e12
    assert sparse + module.dla_tops == pytest.approx(module.tops, rel=0.02)


@pytest.mark.parametrize(
    ("name", "mode", "tops"),
    [("orin-nx-16", "MAXN", 60), ("orin-nx-8", "MAXN", 50), ("orin-nano-8", "15W", 40)],
)
def test_tops_before_the_super_modes(name: str, mode: str, tops: float):
    """Of the GPU alone: 100 and 70 less 40 and 20 of the DLAs; the Nano has none."""
    sparse = 2 * MODULES[name].mode(mode).int8_ops / 1e12
    assert sparse == pytest.approx(tops, rel=0.03)


@pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
def test_modes_are_ordered_and_found_by_name(module: Module):
    assert module.mode(None) is module.modes[0]
    for faster, slower in zip(module.modes, module.modes[1:], strict=False):
        # Orin NX's 40W has the GPU of MAXN_SUPER, and its 10W that of 15W.
        assert faster.fp16_flops >= slower.fp16_flops
        assert faster.bytes_per_s >= slower.bytes_per_s
    for mode in module.modes:
        assert module.mode(mode.name.lower()) is mode
    with pytest.raises(ConfigError, match="99W is not known"):
        module.mode("99W")


def test_the_mode_that_orin_nano_boots_in_is_known():
    mode = MODULES["orin-nano-8"].mode("25W")
    assert (mode.num_sms, mode.gpu_clock_hz, mode.bytes_per_s) == (8, 918e6, 102.4e9)


@pytest.mark.parametrize(
    ("board", "total_gib", "name"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", 61.3, "agx-orin-64"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 29.8, "agx-orin-32"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15.3, "orin-nx-16"),
        ("NVIDIA Jetson Orin NX", 7.4, "orin-nx-8"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7.4, "orin-nano-8"),
        ("NVIDIA Jetson Orin Nano", 3.4, "orin-nano-4"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 122.0, None),
        ("Raspberry Pi 5 Model B", 7.9, None),
        (None, 16.0, None),
    ],
)
def test_a_board_is_identified(board: str | None, total_gib: float, name: str | None):
    module = identify(board, int(total_gib * GIB))
    assert (None if module is None else module.name) == name


def test_without_memory_nothing_is_identified():
    assert identify("NVIDIA Jetson AGX Orin Developer Kit", None) is None


def test_the_plan_leaves_memory_to_programs():
    for module in MODULES.values():
        assert 0.6 * module.memory_bytes < usable_bytes(module.memory_bytes) < module.memory_bytes


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((name, name) for name in MODULES),
        ("orin", "agx-orin-64"),
        ("AGX", "agx-orin-64"),
        ("jetson_agx_orin_32GB", "agx-orin-32"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "agx-orin-64"),
        ("orin-nano", "orin-nano-8"),
        ("jetson-orin-nano", "orin-nano-8"),
        ("Jetson Orin Nano 4 GB", "orin-nano-4"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "orin-nano-8"),
        ("nx", "orin-nx-16"),
        ("orin-nx-8g", "orin-nx-8"),
    ],
)
def test_a_module_has_many_names(name: str, meant: str):
    assert find_module(name) is MODULES[meant]


def test_a_name_of_no_module_or_several_says_which_there_are():
    with pytest.raises(ConfigError, match="8gb could be orin-nx-8 or orin-nano-8"):
        find_module("8gb")
    with pytest.raises(ConfigError, match="orin-nanno is unknown; did you mean orin-nano-8"):
        find_module("orin-nanno")
    for name in ("tx2", "", "jetson", "agx-xavier", "orin-nx-4"):
        with pytest.raises(ConfigError, match=rf"--device {name} is unknown; "):
            find_module(name)
