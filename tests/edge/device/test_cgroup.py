"""Memory limits of control groups: of both versions, on fake trees and in a real group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge.device.cgroup import read_cpu_quota, read_room_bytes
from edge.device.memory import read_available_memory_bytes
from edge_lab.telemetry import read_snapshot
from tests.control_groups import limited_group

MIB = 1 << 20
V1_NONE = 9223372036854771712


class Tree:
    """A root with ``proc`` and ``sys``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.put("proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")

    def put(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def process(self, cgroup: str, *mounts: str) -> None:
        self.put("proc/self/cgroup", cgroup)
        self.put("proc/self/mountinfo", "\n".join(mounts))

    def v2(self, group: str, *, top: str = "sys/fs/cgroup", **files: object) -> None:
        for name, value in files.items():
            self.put(f"{top}/{group}/memory.{name}", value)

    def v1(self, group: str, limit: int, usage: int, inactive: int = 0) -> None:
        at = f"sys/fs/cgroup/memory/{group}"
        self.put(f"{at}/memory.limit_in_bytes", limit)
        self.put(f"{at}/memory.usage_in_bytes", usage)
        self.put(f"{at}/memory.stat", f"cache 1\ntotal_inactive_file {inactive}")


V2_MOUNT = "30 23 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
PIDS_MOUNT = "39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_machine_without_groups(tree: Tree):
    assert read_room_bytes(tree.root) is None
    assert read_available_memory_bytes(tree.root) == 4 << 30


def test_the_smallest_of_the_chain_counts(tree: Tree):
    tree.process("0::/system.slice/edge.service", V2_MOUNT)
    tree.v2("", current=0)
    tree.v2("system.slice", max=700 * MIB, high="max", current=300 * MIB, stat="inactive_file 0")
    tree.v2("system.slice/edge.service", max=900 * MIB, high="max", current=100 * MIB)
    assert read_room_bytes(tree.root) == 400 * MIB
    assert read_available_memory_bytes(tree.root) == 400 * MIB
    tree.v2("system.slice/edge.service", high=300 * MIB)
    assert read_room_bytes(tree.root) == 200 * MIB
    assert read_room_bytes(tree.root, is_hard=True) == 400 * MIB
    tree.v2("system.slice", max="max")
    assert read_room_bytes(tree.root, is_hard=True) == 800 * MIB
    tree.v2("system.slice/edge.service", max="max")
    assert read_room_bytes(tree.root, is_hard=True) is None
    tree.v2("other.slice", max=1, high=1, current=1)  # not ours
    assert read_room_bytes(tree.root) == 200 * MIB


def test_file_pages_that_nobody_uses_are_free(tree: Tree):
    tree.process("0::/a", V2_MOUNT)
    stat = f"anon 5\nactive_file {70 * MIB}\ninactive_file {50 * MIB}\nslab 3"
    tree.v2("a", max=200 * MIB, high="max", current=180 * MIB, stat=stat)
    assert read_room_bytes(tree.root) == 70 * MIB
    tree.v2("a", current=300 * MIB, stat="inactive_file 0")  # beyond a limit that was lowered
    assert read_room_bytes(tree.root) == 0


def test_without_a_limit_the_system_counts(tree: Tree):
    tree.process("0::/a", V2_MOUNT)
    tree.v2("a", max="max", high="max", current=180 * MIB)
    assert read_room_bytes(tree.root) is None
    tree.v2("a", max=100 << 30)
    assert read_available_memory_bytes(tree.root) == 4 << 30
    snapshot = read_snapshot(tree.root)
    assert snapshot.memory_room_bytes == snapshot.memory_available_bytes == 4 << 30
    tree.v2("a", max=200 * MIB)
    snapshot = read_snapshot(tree.root)
    assert snapshot.memory_room_bytes == 20 * MIB
    assert snapshot.memory_available_bytes == 4 << 30  # the system's


def test_version_1_and_its_parents(tree: Tree):
    cgroup = "8:pids:/x\n4:cpu,memory:/docker/abc\n0::/"
    tree.process(cgroup, PIDS_MOUNT, V1_MOUNT)
    tree.v1("", V1_NONE, 5 << 30)
    tree.v1("docker", 600 * MIB, 500 * MIB, 50 * MIB)
    tree.v1("docker/abc", 400 * MIB, 100 * MIB)
    assert read_room_bytes(tree.root) == 150 * MIB
    tree.v1("docker", V1_NONE, 500 * MIB)
    assert read_room_bytes(tree.root) == read_room_bytes(tree.root, is_hard=True) == 300 * MIB


def test_memory_may_be_in_version_1_beside_version_2(tree: Tree):
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    tree.process("4:memory:/a\n0::/b", V1_MOUNT, unified)
    tree.put("sys/fs/cgroup/unified/b/cgroup.procs", "1")  # no controller of memory
    tree.v1("a", 200 * MIB, 50 * MIB)
    assert read_room_bytes(tree.root) == 150 * MIB


def test_the_least_quota_of_cpu_time_counts_in_both_versions(tree: Tree):
    tree.process("0::/a/b", V2_MOUNT)
    assert read_cpu_quota(tree.root) is None
    tree.put("sys/fs/cgroup/a/cpu.max", "150000 100000")
    tree.put("sys/fs/cgroup/a/b/cpu.max", "max 100000")
    assert read_cpu_quota(tree.root) == 1.5
    tree.process("6:cpu,cpuacct:/a\n0::/", V1_MOUNT.replace("memory", "cpu"))
    at = "sys/fs/cgroup/cpu/a/cpu.cfs"
    tree.put(f"{at}_period_us", 50_000)
    tree.put(f"{at}_quota_us", -1)
    assert read_cpu_quota(tree.root) is None
    tree.put(f"{at}_quota_us", 100_000)
    assert read_cpu_quota(tree.root) == 2


@pytest.mark.parametrize(
    ("cgroup", "part"),
    [("0::/docker/abc", "/docker/abc"), ("0::/", "/"), ("0::/../other", "/"), ("0::/x", "/y")],
    ids=["whole path", "namespace", "outside", "elsewhere"],
)
def test_a_container_sees_its_own_group_as_the_top(tree: Tree, cgroup: str, part: str):
    tree.process(cgroup, V2_MOUNT.replace("0:27 / ", f"0:27 {part} "))
    tree.v2("", max=300 * MIB, high="max", current=100 * MIB)
    tree.v2("x", max=1, current=1)
    assert read_room_bytes(tree.root) == 200 * MIB


def test_a_mount_with_a_space_in_its_name(tree: Tree):
    tree.process("0::/a", V2_MOUNT.replace("/sys/fs/cgroup", r"/my\040groups"))
    tree.v2("a", top="my groups", max=300, high="max", current=100)
    assert read_room_bytes(tree.root) == 200


@pytest.mark.parametrize("text", ["", "nonsense", "-5", "1e9", "0x10", "9" * 40, "١٢٣"])
def test_a_limit_that_is_no_number_is_ignored(tree: Tree, text: str):
    tree.process("0::/a\nnonsense\n:", V2_MOUNT, "too few", "a b c d e - cgroup2")
    tree.v2("a", max=text, current=100)
    assert read_room_bytes(tree.root) is None
    tree.v2("a", max=300, current=text)
    assert read_room_bytes(tree.root) is None
    tree.v2("a", max=300, current=100, stat=f"inactive_file {text}\nnonsense")
    assert read_room_bytes(tree.root) == 200


def test_a_real_group():
    code = "from edge.device.memory import read_available_memory_bytes as read; print(read())"
    with limited_group(300 * MIB) as group:
        command = group.command(sys.executable, "-c", code)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 150 * MIB < int(done.stdout) < 300 * MIB
