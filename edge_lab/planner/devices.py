"""Lists Orin modules: memory, bandwidth and the GPU's arithmetic, per power mode.

Sources: memory, bandwidth, SMs, clocks and TOPS are those of NVIDIA's data sheets (Jetson AGX Orin
DS-10662-001, Orin NX DS-10712-001, Orin Nano DS-11105-001) and of the "Super" modes of JetPack 6.2;
the clocks of the lower modes are from the nvpmodel tables of the Jetson Linux Developer Guide,
chapter "Platform Power and Performance"; those of Orin Nano's 25W, in which JetPack 6.2 boots,
are what ``jetson_clocks --show`` prints there. AGX Orin 32 below MAXN is NVIDIA's
``nvpmodel_p3701_0004.conf``, Orin NX 16 in 10W to 40W its ``nvpmodel_p3767_0000_super.conf``, both
in the repository LineageOS/android_device_nvidia_concord: a bit of the TPC mask takes two SMs away,
and a cap on EMC is a memory clock.

The advertised TOPS count sparse INT8 and the DLAs. Neither serves a language model, so arithmetic
is computed from the GPU alone: an Orin SM does 4,096 dense INT8 operations per clock, half as many
in FP16, and twice as many by sparsity. A test adds the DLAs and the sparsity and finds the
advertised figure again.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from edge.errors import ConfigError

ORIN_COMPUTE_CAPABILITY = "8.7"
_INT8_OPS_PER_SM_CLOCK = 4096


@dataclass(frozen=True)
class PowerMode:
    """Clocks of a module.

    Attributes:
        name: name of the nvpmodel mode.
        num_sms: streaming multiprocessors that are on.
        gpu_clock_hz: highest clock of the GPU.
        bytes_per_s: bandwidth of the memory, from the data sheet.
        knows_arithmetic: whether SMs and clock are facts; for a CPU they are a round number.
    """

    name: str
    num_sms: int
    gpu_clock_hz: float
    bytes_per_s: float
    knows_arithmetic: bool = True

    def is_called(self, name: str) -> bool:
        """Tell whether nvpmodel means this: AGX Orin's ``30W`` is ``MODE_30W`` in JetPack 6."""
        return name.lower().removeprefix("mode_") == self.name.lower()

    @property
    def int8_ops(self) -> float:
        """Dense INT8 operations per second of the GPU's tensor cores."""
        return self.num_sms * self.gpu_clock_hz * _INT8_OPS_PER_SM_CLOCK

    @property
    def fp16_flops(self) -> float:
        """Dense FP16 operations per second of the GPU's tensor cores."""
        return self.int8_ops / 2


@dataclass(frozen=True)
class Module:
    """One Orin module.

    Attributes:
        name: name that ``--device`` takes.
        memory_bytes: memory of the module; CPU and GPU share it.
        modes: fastest first; the first is the default.
        tops: advertised TOPS in the first mode: sparse INT8, DLAs included.
        dla_tops: the DLAs' part of ``tops``.
    """

    name: str
    memory_bytes: int
    modes: tuple[PowerMode, ...]
    tops: float
    dla_tops: float

    def mode(self, name: str | None) -> PowerMode:
        """Return a power mode by its name or by nvpmodel's; None is the fastest.

        Raises:
            ConfigError: the module has no such mode, or the table does not.
        """
        for mode in self.modes:
            if name is None or mode.is_called(name):
                return mode
        known = ", ".join(mode.name for mode in self.modes)
        raise ConfigError(f"--power-mode {name} is not known for {self.name}; known: {known}")


_GB = 1 << 30
_AGX_GBPS, _NX_GBPS, _NANO_GBPS = 204.8e9, 102.4e9, 68.3e9

MODULES: dict[str, Module] = {
    module.name: module
    for module in (
        Module(
            "agx-orin-64",
            64 * _GB,
            (
                PowerMode("MAXN", 16, 1300e6, _AGX_GBPS),
                PowerMode("50W", 16, 828.75e6, _AGX_GBPS),
                PowerMode("30W", 8, 624.75e6, _AGX_GBPS),
                PowerMode("15W", 6, 420.75e6, 136.5e9),
            ),
            tops=275,
            dla_tops=105,
        ),
        Module(
            "agx-orin-32",
            32 * _GB,
            (
                PowerMode("MAXN", 14, 930e6, _AGX_GBPS),
                PowerMode("40W", 14, 816e6, _AGX_GBPS),
                PowerMode("30W", 8, 612e6, _AGX_GBPS),
                PowerMode("15W", 6, 408e6, 136.5e9),
            ),
            tops=200,
            dla_tops=92,
        ),
        Module(
            "orin-nx-16",
            16 * _GB,
            (
                PowerMode("MAXN_SUPER", 8, 1173e6, _NX_GBPS),
                PowerMode("40W", 8, 1173e6, _NX_GBPS),
                PowerMode("MAXN", 8, 918e6, _NX_GBPS),
                PowerMode("25W", 8, 408e6, _NX_GBPS),
                PowerMode("15W", 4, 612e6, _NX_GBPS),
                PowerMode("10W", 4, 612e6, 68.3e9),
            ),
            tops=157,
            dla_tops=80,
        ),
        Module(
            "orin-nx-8",
            8 * _GB,
            (
                PowerMode("MAXN_SUPER", 8, 1173e6, _NX_GBPS),
                PowerMode("MAXN", 8, 765e6, _NX_GBPS),
            ),
            tops=117,
            dla_tops=40,
        ),
        Module(
            "orin-nano-8",
            8 * _GB,
            (
                PowerMode("MAXN_SUPER", 8, 1020e6, _NX_GBPS),
                PowerMode("25W", 8, 918e6, _NX_GBPS),
                PowerMode("15W", 8, 625e6, _NANO_GBPS),
            ),
            tops=67,
            dla_tops=0,
        ),
        Module(
            "orin-nano-4",
            4 * _GB,
            (
                PowerMode("MAXN_SUPER", 4, 1020e6, _NX_GBPS / 2),
                PowerMode("10W", 4, 625e6, _NANO_GBPS / 2),
            ),
            tops=34,
            dla_tops=0,
        ),
    )
}
DEFAULT_DEVICE = "agx-orin-64"
_WORDS = re.compile(r"[^a-z0-9]+")
_IDLE_WORDS = {"", "nvidia", "jetson", "developer", "devkit", "dev", "kit", "module", "super"}
_IDLE_WORDS |= {"gb", "engineering", "reference"}


def find_module(name: str) -> Module:
    """Find a module by its name or by words of it, as a device tree or a shop writes them.

    ``Jetson Orin Nano 8GB`` is orin-nano-8. Without its memory it is the largest of its family, and
    ``orin`` alone the default.

    Raises:
        ConfigError: there is none of that name, or it could be of more than one family.
    """
    words = set(_WORDS.split(re.sub(r"([0-9])gb?(?![a-z0-9])", r"\1", name.lower()))) - _IDLE_WORDS
    if words == {"orin"}:
        return MODULES[DEFAULT_DEVICE]
    found = [module for module in MODULES.values() if words <= {*module.name.split("-"), "orin"}]
    if not words or not found:
        near = difflib.get_close_matches(name.lower(), MODULES, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(MODULES)}, cpu"
        raise ConfigError(f"--device {name} is unknown; {hint}")
    if len({module.name.rpartition("-")[0] for module in found}) > 1:
        names = " or ".join(module.name for module in found)
        raise ConfigError(f"--device {name} could be {names}; give one of these names")
    return found[0]


def identify(model_name: str | None, memory_bytes: int | None) -> Module | None:
    """Find the module that this machine is, from its device tree's name and its memory.

    Args:
        model_name: e.g. ``NVIDIA Jetson AGX Orin Developer Kit``; None on other machines.
        memory_bytes: memory as the kernel reports it; a little less than the module has.

    Returns:
        The module; None if the name is not that of an Orin, or the memory is not known.
    """
    if model_name is None or memory_bytes is None or "Orin" not in model_name:
        return None
    family = "agx-orin" if "AGX" in model_name else "orin-nx" if "NX" in model_name else "orin-nano"
    fitting = [
        module
        for module in MODULES.values()
        if module.name.startswith(family) and module.memory_bytes >= memory_bytes
    ]
    # The kernel and the carve-outs take up to an eighth, so a smaller module never looks larger.
    return min(fitting, key=lambda module: module.memory_bytes, default=None)
