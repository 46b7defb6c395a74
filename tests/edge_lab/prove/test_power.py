"""Power modes: which need no reboot, and that the one that was found comes back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge.errors import ConfigError, DependencyError
from edge_lab.prove import power
from edge_lab.telemetry import read_power_mode
from tests.edge.device.jetson_trees import write_tree

# As NVIDIA's file for the Orin NX has it: a bit of the mask takes two multiprocessors away.
CONF = """
< PARAM TYPE=FILE NAME=TPC_POWER_GATING >
TPC_PG_MASK /sys/devices/platform/gpu.0/tpc_pg_mask
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
TPC_POWER_GATING TPC_PG_MASK 240
GPU MAX_FREQ -1
< POWER_MODEL ID=1 NAME=10W >
TPC_POWER_GATING TPC_PG_MASK 252
GPU MAX_FREQ 612000000
< POWER_MODEL ID=2 NAME=15W >
TPC_POWER_GATING TPC_PG_MASK 240
GPU MAX_FREQ 612000000
< POWER_MODEL ID=3 NAME=25W >
TPC_POWER_GATING TPC_PG_MASK 240
< PM_CONFIG DEFAULT=2 >
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {"etc/nvpmodel.conf": CONF, "var/lib/nvpmodel/status": "pmode:0000"}
    return write_tree(tmp_path / "root", files)


@pytest.fixture
def nvpmodel(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nvpmodel as it is: a mode that needs a reboot asks, and without an answer nothing changes."""
    calls = tmp_path / "calls"
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvpmodel").write_text(
        f"""#!/bin/sh
echo "$*" >>{calls}
if [ "$2" = 1 ]; then
    echo "NVPM WARN: Reboot required for changing to this power mode: 1"
    read -r answer || {{ echo "NVPM ERROR: no answer" >&2; exit 255; }}
fi
printf 'pmode:%04d' "$2" >{root}/var/lib/nvpmodel/status
"""
    )
    (programs / "nvpmodel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return calls


def test_modes_that_switch_off_other_parts_of_the_gpu_are_left_out(root: Path):
    assert power.modes_without_reboot(root) == {2: "15W", 3: "25W"}
    (root / "var/lib/nvpmodel/status").write_text("pmode:0001")
    assert power.modes_without_reboot(root) == {}


def test_without_nvpmodel_there_are_no_modes(tmp_path: Path):
    with pytest.raises(DependencyError, match="--power-modes needs nvpmodel"):
        power.modes_without_reboot(tmp_path)


def test_a_mode_that_nvpmodel_did_not_set_is_not_taken_for_set(root: Path, nvpmodel: Path):
    assert power.set_mode([], 2, root) is None
    assert power.set_mode([], 1, root) == "NVPM WARN: Reboot required for changing to this " + (
        "power mode: 1"
    )
    assert power.modes_without_reboot(root).keys() == {0, 3}  # it is in mode 2 still
    assert nvpmodel.read_text().splitlines() == ["-m 2", "-m 1"]


def test_the_mode_that_was_found_comes_back_whatever_happens(
    root: Path, nvpmodel: Path, tmp_path: Path
):
    note, said = tmp_path / "note", list[str]()

    def interrupted() -> None:
        with power.mode_restored(note, [], said.append, root):
            assert note.read_text() == "0"
            assert power.set_mode([], 3, root) is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_power_mode(root) == "MAXN"
    assert not note.exists()
    assert said == []


def test_the_next_run_restores_the_mode_of_a_killed_one(root: Path, nvpmodel: Path, tmp_path: Path):
    note = tmp_path / "note"
    note.write_text("0")
    (root / "var/lib/nvpmodel/status").write_text("pmode:0003")
    with power.mode_restored(note, [], print, root):
        assert read_power_mode(root) == "MAXN"
        assert note.read_text() == "0"  # and not the mode that the killed run had set


def test_a_mode_that_cannot_be_restored_is_reported_and_kept_in_the_note(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    note, said = tmp_path / "note", list[str]()
    note.write_text("2")
    power.restore(note, [], said.append, root)
    assert note.exists()
    assert len(said) == 1
    assert "run: sudo nvpmodel -m 2" in said[0]


def test_other_users_than_root_need_sudo_without_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    sudo = tmp_path / "sudo"
    for code in (1, 0):
        sudo.write_text(f"#!/bin/sh\nexit {code}\n")
        sudo.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        if code:
            with pytest.raises(ConfigError, match="run sudo -v first"):
                power.check_rights()
    assert power.check_rights() == ["sudo", "-n"]
