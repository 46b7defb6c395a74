"""Reads a kernel's machine code without a GPU: instructions per weight, loads, limits.

It gives a bound and not a time: it says that the Orin's lanes are quick enough for its memory, not
that the memory is kept busy. Only a device shows that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edge.backends.tensorrt.launch_rules import PART_LOGITS
from engines.kernels.variants import BY_NAME

# Jetson AGX Orin 64 GB at MAXN (NVIDIA, Jetson AGX Orin series, technical brief): 16
# multiprocessors of 4 x 32 lanes at 1.3 GHz; LPDDR5 of 204.8 GB/s.
_MULTIPROCESSORS = 16
LANES_PER_S = _MULTIPROCESSORS * 128 * 1.3e9
BYTES_PER_S = 204.8e9
# The Orin has 42.5e12 dense FP16 operations by 64 tensor cores: 512 per cycle of each. One
# HMMA.16816 is 2 * 16 * 8 * 16 of them, and its scheduler issues one instruction per cycle.
HMMA_CYCLES = 8
# CUDA C++ Programming Guide, technical specifications per compute capability, 8.7.
_REGISTERS, _WARPS, _PROGRAMS, _SHARED = 65_536, 48, 16, 164 * 1024
_REGISTER_UNIT = 256  # registers are given to a warp in units of this many
_SHARED_OF_SYSTEM = 1024  # bytes that CUDA itself takes per program
# Warps of a multiprocessor that hide latency are at least these: 256 threads are 8 warps.
LEAST_WARPS = 8
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{ )?(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")


@dataclass(frozen=True)
class Sass:
    """A kernel's machine code.

    Attributes:
        instructions: name and operands of each.
        loops: first and last instruction of each loop, the inner ones before the outer.
    """

    instructions: tuple[tuple[str, str], ...]
    loops: tuple[tuple[int, int], ...]

    def count(self, prefix: str, first: int = 0, last: int | None = None) -> int:
        """Count the instructions that begin with these letters."""
        end = len(self.instructions) if last is None else last + 1
        return sum(name.startswith(prefix) for name, _ in self.instructions[first:end])


def read_sass(text: str) -> Sass:
    """Read the output of ``nvdisasm -c``."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label, found = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(instructions)
        elif found:
            instructions.append((found[1], found[2]))
    loops = []
    for at, (name, operands) in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", operands) if name == "BRA" else None
        # A jump to itself fills the end of a program.
        if target and labels[target[0]] < at:
            loops.append((labels[target[0]], at))
    return Sass(tuple(instructions), tuple(sorted(loops, key=lambda loop: loop[1] - loop[0])))


def lanes_per_weight(name: str, sass: Sass) -> float:
    """Count a lane's instructions per weight of `w4_gemv`, over all of its loops.

    One turn of the outer loop is one line of 32 weights per column of a thread. An inner loop runs
    over the eight nibbles of a word, ``UNROLL`` at a time.
    """
    constants = BY_NAME[name].constants
    (*inner, outer) = sass.loops
    turns = 8 // int(constants["UNROLL"])
    total = outer[1] - outer[0] + 1
    total += sum((last - first + 1) * (turns - 1) for first, last in inner)
    return total / (32 * constants["PARTS"])


def budget(planes: int, group: int = 32) -> float:
    """Return a lane's instructions per weight that an Orin has time for while it reads one."""
    bytes_per_weight = 0.5 * planes + 2 / group
    return LANES_PER_S / (BYTES_PER_S / bytes_per_weight)


def issues_per_hmma(sass: Sass) -> float:
    """Count the last loop's instructions per tensor core instruction, that one included.

    If there are more than `HMMA_CYCLES`, the tensor cores wait.
    """
    first, last = sass.loops[-1]
    return (last - first + 1) / sass.count("HMMA.16816", first, last)


def resident_warps(record: Mapping[str, Any]) -> int:
    """Return how many of a multiprocessor's 48 warps a kernel can have on the Orin."""
    warps = record["threads"] // 32
    per_warp = -(-record["registers"] * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    programs = min(
        _REGISTERS // (per_warp * warps),
        _WARPS // warps,
        _PROGRAMS,
        _SHARED // (record["shared_bytes"] + _SHARED_OF_SYSTEM),
    )
    return int(programs * warps)


def find_problems(manifest: Mapping[str, Any], found: Mapping[str, Sass]) -> Iterator[str]:
    """Yield a sentence for each gate that is missed."""
    for name, sass in found.items():
        record = manifest["architectures"]["87"][name]
        if record["spilled_bytes"] or sass.count("LDL") or sass.count("STL"):
            yield f"sm_87 {name}: {record['spilled_bytes']} bytes are spilled"
        if name.startswith("w4_gemv"):
            yield from _gemv_problems(name, sass)
        if name.startswith("w4_gemm"):
            yield from _gemm_problems(name, sass)
        if name.startswith("attention_parts"):
            yield from _attention_problems(name, sass)
        if name == "top_k_parts":
            yield from _top_k_problems(name, sass, record)
        if resident_warps(record) < LEAST_WARPS and record["threads"] >= 128:
            yield f"sm_87 {name}: {resident_warps(record)} warps per multiprocessor"


def _gemv_problems(name: str, sass: Sass) -> Iterator[str]:
    constants = BY_NAME[name].constants
    outer = sass.loops[-1]
    wide = sum(operation.startswith("LDG.E.128") for operation, _ in sass.instructions)
    inside = sass.count("LDG.E.128", *outer)
    lines = constants["PARTS"] * constants["PLANES"]
    # Each line of weights is one load, in the loop and in none of its inner ones. All other loads
    # are narrower, so only these touch weights.
    repeated = sum(sass.count("LDG.E.128", *loop) for loop in sass.loops[:-1])
    if (wide, inside, repeated) != (lines, lines, 0):
        yield (
            f"sm_87 {name}: {wide} loads of 128 bits, {inside} in the loop and {repeated} in inner "
            f"ones, not {lines} in the loop only"
        )
    if constants["ROWS"] == 1 and lanes_per_weight(name, sass) > budget(int(constants["PLANES"])):
        yield (
            f"sm_87 {name}: {lanes_per_weight(name, sass):.1f} instructions per weight, and the "
            f"Orin's memory gives time for {budget(int(constants['PLANES'])):.1f}"
        )


def _gemm_problems(name: str, sass: Sass) -> Iterator[str]:
    # Each HMMA is 16 x 8 outputs of 16 weights, so a block of 32 has this many.
    constants = BY_NAME[name].constants
    tile = int(constants["ROWS"]) * int(constants["COLUMNS"]) * 32 // (16 * 8 * 16)
    yield from _tensor_problems(name, sass, tile)
    if not any(each.startswith("LDGSTS") and ".128" in each for each, _ in sass.instructions):
        yield f"sm_87 {name}: the inputs are not copied by 128 bits"


def _tensor_problems(name: str, sass: Sass, products: int) -> Iterator[str]:
    wanted = products // BY_NAME[name].warps
    found = sass.count("HMMA.16816", *sass.loops[-1])
    if found != wanted or found != sass.count("HMMA"):
        yield f"sm_87 {name}: {found} tensor instructions in the loop and not {wanted}, all of them"


def _attention_problems(name: str, sass: Sass) -> Iterator[str]:
    # Scores and mix of a block take the same number of products, each 16 x 8 outputs, 16 inputs.
    constants, (first, last) = BY_NAME[name].constants, sass.loops[-1]
    block = int(constants["ROWS"]) * int(constants["BLOCK"]) * int(constants["WIDTH"])
    yield from _tensor_problems(name, sass, 2 * block // (16 * 8 * 16))
    if not _wide_copies(sass) or sass.count("LDG.", first, last):
        yield f"sm_87 {name}: rows are read otherwise than by copies of 128 bits"


def _top_k_problems(name: str, sass: Sass, record: Mapping[str, Any]) -> Iterator[str]:
    if any(sass.count("LD", *loop) > sass.count("LDS", *loop) for loop in sass.loops):
        yield f"sm_87 {name}: the search reads memory"
    # All parts of 151,936 logits run at once, so that none waits for another.
    parts, programs = -(-151_936 // PART_LOGITS), resident_warps(record) * 32 // record["threads"]
    if programs * _MULTIPROCESSORS < parts:
        yield f"sm_87 {name}: {programs} programs per multiprocessor, not all of {parts} at once"


def lanes_per_logit(sass: Sass) -> float:
    """Count a lane's instructions per logit of `top_k_parts`, over all 16 turns of its search."""
    ((first, last),) = sass.loops
    each = PART_LOGITS // (BY_NAME["top_k_parts"].warps * 32)
    return (len(sass.instructions) + 15 * (last - first + 1)) / each


def _wide_copies(sass: Sass) -> bool:
    copies = Counter(name for name, _ in sass.instructions if name.startswith("LDGSTS"))
    return bool(copies) and all(".128" in name for name in copies)


def render(records: Mapping[str, Any], found: Mapping[str, Sass]) -> str:
    """Write a table for people about the Orin's machine code.

    A unit of work is a weight, an instruction of the tensor cores or a logit.
    """
    lines = [f"{'sm_87':<29}registers  spilled  shared  warps/48  code  per unit of work  budget"]
    for name, record in records.items():
        line = (
            f"{name:<30}{record['registers']:>8}{record['spilled_bytes']:>9}"
            f"{record['shared_bytes']:>8}{resident_warps(record):>10}"
            f"{len(found[name].instructions):>6}"
        )
        if name.startswith("w4_gemv"):
            planes = int(BY_NAME[name].constants["PLANES"])
            line += f"{lanes_per_weight(name, found[name]):>20.1f}{budget(planes):>8.1f}"
        if name.startswith(("w4_gemm", "attention_parts")):
            line += f"{issues_per_hmma(found[name]):>20.1f}{HMMA_CYCLES:>8.1f}"
        if name == "top_k_parts":
            line += f"{lanes_per_logit(found[name]):>20.1f}"
        lines.append(line)
    return "\n".join(lines)
