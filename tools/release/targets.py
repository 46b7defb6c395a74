"""Names of a release, and the machines that it is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

DISTRIBUTION = "jetson-edge-llm"
SUMS = "SHA256SUMS"
OWN_LOCK = "requirements/edge-llm.txt"
"""The lock of the release's own wheel; ``scripts/install-service`` knows a release by it."""


class ReleaseError(Exception):
    """A release cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Target:
    """Machines that one lock file is for.

    Attributes:
        lock: its name, and that of the folder of wheels.
        title: name for people.
        machine: value of ``platform.machine()``.
        glibc_minor: wheels for glibc 2.17 up to this one run there.
        pythons: Python versions that they may have.
    """

    lock: str
    title: str
    machine: str
    glibc_minor: int
    pythons: tuple[str, ...]

    def platforms(self) -> Iterator[str]:
        """Yield pip's platform tags, the newest glibc first."""
        for minor in range(self.glibc_minor, 16, -1):
            yield f"manylinux_2_{minor}_{self.machine}"
        yield f"manylinux2014_{self.machine}"

    def pip_arguments(self, python: str) -> list[str]:
        """Return arguments that make pip choose as it would on such a machine."""
        chosen = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
        for platform in self.platforms():
            chosen += ["--platform", platform]
        return chosen


TARGETS = (
    Target("laptop", "Linux on x86-64", "x86_64", 35, ("3.10", "3.11", "3.12", "3.13")),
    Target("jetpack6", "JetPack 6.1 and 6.2", "aarch64", 35, ("3.10",)),
    Target("jetpack7", "JetPack 7.2", "aarch64", 39, ("3.12",)),
)
