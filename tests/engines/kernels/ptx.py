"""Runs the PTX of the package on NumPy arrays, all threads of a program in step.

Only the instructions that the shipped kernels have are known; another one is an error. Threads go
in step, so a missing barrier is not found. A copy past the registers arrives when it is waited for,
and not before. Every access must be aligned and lie in the memory that is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.kernels.launch import Launch
from engines.kernels.package import Ptx

BASE = 0x7F00_0000_0000
"""Address of the first byte of global memory."""
_PAGE = 4096
_NOT_THERE = 0xA5
Word = NDArray[np.uint64]  # a register of all threads


def _halves(value: Word) -> NDArray[np.float16]:
    return value.astype(np.uint16).view(np.float16)


def _floats(value: Word) -> NDArray[np.float32]:
    return value.astype(np.uint32).view(np.float32)


def _bits(value: NDArray[Any]) -> Word:
    unsigned: Any = {2: np.uint16, 4: np.uint32, 8: np.uint64}[value.dtype.itemsize]
    words: Word = np.ascontiguousarray(value).view(unsigned).astype(np.uint64)
    return words


def _field(value: Word, first: Word, length: Word, *, signed: bool) -> Word:
    found: Word = (_u(value) >> first) & ((np.uint64(1) << length) - np.uint64(1))
    if signed:
        found = found - (found >> (length - np.uint64(1)) << length)
    return found


def _s(value: Word) -> NDArray[np.int64]:
    return value.astype(np.uint32).view(np.int32).astype(np.int64)


def _s16(value: Word) -> NDArray[np.int64]:
    return value.astype(np.uint16).view(np.int16).astype(np.int64)


def _permute(first: Word, second: Word, selector: Word) -> Word:
    """``prmt`` in its default mode: four of eight bytes."""
    both, found = _u(first) | _u(second) << np.uint64(32), np.zeros_like(first)
    for byte in range(4):
        chosen = selector >> np.uint64(4 * byte) & np.uint64(15)
        assert (chosen < 8).all(), "a sign is wanted"
        found |= (both >> chosen * np.uint64(8) & np.uint64(0xFF)) << np.uint64(8 * byte)
    return found


def _u(value: Word) -> Word:
    low: Word = value & np.uint64(0xFFFFFFFF)
    return low


def _fused(a: Word, b: Word, c: Word) -> Word:
    exact = _floats(a).astype(np.float64) * _floats(b) + _floats(c)
    return _bits(exact.astype(np.float32))


# Results are cut to the width of the register that they go to.
ARITHMETIC: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add.s32", "add.s64"), lambda a, b: a + b),
    **dict.fromkeys(("sub.s32", "sub.s64"), lambda a, b: a - b),
    "neg.s32": lambda a: -_s(a),
    "not.b32": lambda a: ~a,
    **dict.fromkeys(("or.b16", "or.b32", "or.b64"), lambda a, b: a | b),
    **dict.fromkeys(("and.b16", "and.b32", "and.pred"), lambda a, b: a & b),
    **dict.fromkeys(("xor.b32", "xor.pred"), lambda a, b: a ^ b),
    **dict.fromkeys(("shl.b16", "shl.b32", "shl.b64"), lambda a, b: a << b),
    "shr.u16": lambda a, b: (a & np.uint64(0xFFFF)) >> b,
    "prmt.b32": _permute,
    "shr.s32": lambda a, b: _s(a) >> np.minimum(b, np.uint64(31)).astype(np.int64),
    "shr.u32": lambda a, b: _u(a) >> b,
    **dict.fromkeys(("mul.lo.s32", "mul.lo.s64"), lambda a, b: a * b),
    **dict.fromkeys(("mad.lo.s32", "mad.lo.s64"), lambda a, b, c: a * b + c),
    "mul.wide.s32": lambda a, b: _s(a) * _s(b),
    "mul.wide.u32": lambda a, b: _u(a) * _u(b),
    "mad.wide.s32": lambda a, b, c: (_s(a) * _s(b)).view(np.uint64) + c,
    "mad.wide.u32": lambda a, b, c: _u(a) * _u(b) + c,
    "min.s32": lambda a, b: np.minimum(_s(a), _s(b)),
    "max.s32": lambda a, b: np.maximum(_s(a), _s(b)),
    # Of numbers that are not negative.
    "div.s32": lambda a, b: _s(a) // _s(b),
    "rem.s32": lambda a, b: _s(a) % _s(b),
    "bfe.u32": lambda a, b, c: _field(a, b, c, signed=False),
    "bfe.s32": lambda a, b, c: _field(a, b, c, signed=True),
    **dict.fromkeys(
        ("selp.b32", "selp.b64", "selp.f32"), lambda a, b, c: np.where(c.astype(bool), a, b)
    ),
    **dict.fromkeys(("cvt.u16.u32", "cvt.u32.u16", "cvt.u64.u32", "cvt.u32.u64"), lambda a: a),
    "cvt.s32.s16": _s16,
    "cvt.s64.s32": _s,
    "cvt.f32.f16": lambda a: _bits(_halves(a).astype(np.float32)),
    "cvt.rn.f16.f32": lambda a: _bits(_floats(a).astype(np.float16)),
    "cvt.rn.f16x2.f32": lambda a, b: (
        _bits(_floats(a).astype(np.float16)) << np.uint64(16) | _bits(_floats(b).astype(np.float16))
    ),
    "add.f16": lambda a, b: _bits(_halves(a) + _halves(b)),
    "add.f32": lambda a, b: _bits(_floats(a) + _floats(b)),
    "sub.f32": lambda a, b: _bits(_floats(a) - _floats(b)),
    "mul.f32": lambda a, b: _bits(_floats(a) * _floats(b)),
    "max.f32": lambda a, b: _bits(np.fmax(_floats(a), _floats(b))),
    "div.full.f32": lambda a, b: _bits(_floats(a) / _floats(b)),
    **dict.fromkeys(("ex2.approx.f32", "ex2.approx.ftz.f32"), lambda a: _bits(np.exp2(_floats(a)))),
    "fma.rn.f32": _fused,
    "setp.lt.s16": lambda a, b: _s16(a) < _s16(b),
    "setp.lt.s32": lambda a, b: _s(a) < _s(b),
    "setp.le.s32": lambda a, b: _s(a) <= _s(b),
    "setp.gt.s32": lambda a, b: _s(a) > _s(b),
    "setp.ge.s32": lambda a, b: _s(a) >= _s(b),
    "setp.gt.u32": lambda a, b: _u(a) > _u(b),
    "setp.eq.f16": lambda a, b: _halves(a) == _halves(b),
    "setp.nan.f32": lambda a, b: np.isnan(_floats(a)) | np.isnan(_floats(b)),
    "setp.lt.s64": lambda a, b: a.view(np.int64) < b.view(np.int64),
    "setp.lt.u64": lambda a, b: a < b,
    "setp.eq.f32": lambda a, b: _floats(a) == _floats(b),
    "setp.eq.b32": lambda a, b: _u(a) == _u(b),
    "setp.ne.b32": lambda a, b: _u(a) != _u(b),
    "setp.ne.b64": lambda a, b: a != b,
}


class Machine:
    """One kernel with its memory.

    Args:
        ptx: the kernel.
        memory: global memory, bytes from `BASE` on.
        parameters: of the kernel, addresses and numbers.
    """

    def __init__(self, ptx: Ptx, memory: NDArray[np.uint8], parameters: list[int]) -> None:
        self._threads, self._parameters = ptx.threads, parameters
        self._global, self._shared = memory, np.zeros(ptx.shared_bytes, np.uint8)
        self._code: list[tuple[str, str, list[str]]] = []
        self._labels: dict[str, int] = {}
        for line in ptx.text.split("{", 1)[1].splitlines():
            for part in line.strip().split(";"):
                label = re.match(r"(\$\w+):", part)
                found = re.match(r"\s*(@!?%p\d+)?\s*([a-z][\w.:]*)\s*(.*)", part)
                if label:
                    self._labels[label[1]] = len(self._code)
                elif found:
                    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[3])
                    self._code.append((found[1] or "", found[2], operands))

    def run(self, program: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Run one program."""
        self._shared[:] = _NOT_THERE
        tid = np.arange(self._threads, dtype=np.uint64)
        self._special = {"%tid.x": tid, "global_smem": self._same(0)}
        for axis, mine, all_ in zip("xyz", program, grid, strict=True):
            self._special[f"%ctaid.{axis}"] = self._same(mine)
            self._special[f"%nctaid.{axis}"] = self._same(all_)
        self._registers: dict[str, Word] = {}
        self._copies: list[list[Any]] = [[]]
        at = 0
        while True:
            guard, name, operands = self._code[at]
            at += 1
            taken = self._guard(guard)
            if name == "ret":
                assert taken.all()
                return
            if name in ("bra", "bra.uni"):
                assert taken.all() or not taken.any(), "threads part ways"
                at = self._labels[operands[0]] if taken.any() else at
                continue
            self._step(name, operands, taken)

    def _same(self, value: int) -> Word:
        return np.full(self._threads, value & 0xFFFF_FFFF_FFFF_FFFF, np.uint64)

    def _guard(self, guard: str) -> NDArray[np.bool_]:
        if not guard:
            return np.ones(self._threads, bool)
        value = self._registers[guard.lstrip("@!")].astype(bool)
        return ~value if "!" in guard else value

    def _get(self, operand: str) -> Word:
        if operand in self._special:
            return self._special[operand]
        if operand.startswith("%"):
            return self._registers[operand]
        # 0f: the bits of a float.
        return self._same(int(re.sub("^0f", "0x", operand).rstrip("U"), 0))

    def _put(self, register: str, value: Any, taken: NDArray[np.bool_]) -> None:
        value = np.asarray(value)
        wide = value.view(np.uint64) if value.dtype == np.int64 else value.astype(np.uint64)
        kind = register[1:3]
        width = {"rs": 16, "rd": 64}.get(kind, 32)
        if width < 64:
            wide = wide & np.uint64((1 << width) - 1)
        if not taken.all():
            wide = np.where(taken, wide, self._registers[register])
        self._registers[register] = wide

    def _step(self, name: str, operands: list[str], taken: NDArray[np.bool_]) -> None:
        first, *rest = operands or [""]
        if name in ARITHMETIC:
            self._put(first, ARITHMETIC[name](*map(self._get, rest)), taken)
        elif name.startswith("mov."):
            self._move(first, rest[0], taken)
        elif name.startswith("ld.param."):
            number = re.search(r"_param_(\d+)\]", rest[0])
            assert number is not None
            self._put(first, self._same(self._parameters[int(number[1])]), taken)
        elif name.startswith(("ld.global.", "ld.shared.")):
            self._load(name, _list(first), rest[0], taken)
        elif name.startswith(("st.global.", "st.shared.", "st.shared::cta.")):
            self._store(name.replace("::cta", ""), first, _list(rest[0]), taken)
        elif name.startswith("cp.async.c") and "global" in name:
            self._copy(first, rest, taken)
        elif name == "cp.async.commit_group":
            self._copies.append([])
        elif name == "cp.async.wait_group":
            while len(self._copies) - 1 > int(first, 0):
                for places, values in self._copies.pop(0):
                    self._shared[places] = values
        elif name.startswith("ldmatrix.sync.aligned.m8n8.x4."):
            self._load_matrices(_list(first), rest[0], turned=".trans." in name)
        elif name == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32":
            self._multiply(*map(_list, operands))
        elif name == "shfl.sync.bfly.b32":
            value, distance = self._get(rest[0]), int(rest[1], 0)
            self._put(first, value[np.arange(self._threads) ^ distance], taken)
        elif name == "shfl.sync.idx.b32":
            value, lane = self._get(rest[0]), self._get(rest[1]).astype(np.int64) % 32
            self._put(first, value[np.arange(self._threads) // 32 * 32 + lane], taken)
        elif name == "shfl.sync.up.b32":
            value, thread = self._get(rest[0]), np.arange(self._threads)
            assert int(rest[2], 0) == 0  # no lane of the warp is too low
            below = thread - self._get(rest[1]).astype(np.int64)
            self._put(first, value[np.where(below // 32 == thread // 32, below, thread)], taken)
        elif name in ("redux.sync.max.s32", "redux.sync.add.s32"):
            lanes = _s(self._get(rest[0])).reshape(-1, 32)
            found = lanes.max(1) if "max" in name else lanes.sum(1)
            self._put(first, np.repeat(found, 32), taken)
        else:
            assert name == "bar.sync", f"{name} is not known"

    def _move(self, target: str, source: str, taken: NDArray[np.bool_]) -> None:
        """Also of a word to its two halves, and back."""
        if target.startswith("{"):
            for at, half in enumerate(_list(target)):
                self._put(half, self._get(source) >> np.uint64(16 * at), taken)
        elif source.startswith("{"):
            low, high = map(self._get, _list(source))
            self._put(target, low | high << np.uint64(16), taken)
        else:
            self._put(target, self._get(source), taken)

    def _places(
        self, operand: str, num_bytes: int, taken: NDArray[np.bool_], space: str
    ) -> NDArray[np.int64]:
        """Places of the bytes of an access [threads, num_bytes] in its memory."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        start = (self._get(base) + np.uint64(int(offset or 0))).view(np.int64)
        start = start - (BASE if space == "global" else 0)
        start = np.where(taken, start, 0)
        memory = self._global if space == "global" else self._shared
        assert (start % num_bytes == 0).all(), "not aligned"
        assert ((start >= 0) & (start + num_bytes <= memory.size)).all(), "outside of memory"
        return start[:, None] + np.arange(num_bytes)

    def _load(self, name: str, registers: list[str], place: str, taken: NDArray[np.bool_]) -> None:
        space, each = name.split(".")[1], 2 if name.endswith("b16") else 4
        memory = self._global if space == "global" else self._shared
        found = memory[self._places(place, each * len(registers), taken, space)]
        values = found.view(np.uint16 if each == 2 else np.uint32)
        for at, register in enumerate(registers):
            self._put(register, values[:, at], taken)

    def _store(self, name: str, place: str, registers: list[str], taken: NDArray[np.bool_]) -> None:
        space, each = name.split(".")[1], np.uint16 if name.endswith("b16") else np.uint32
        values = np.stack([self._get(register).astype(each) for register in registers], 1)
        places = self._places(place, values[0].nbytes, taken, space)
        memory = self._global if space == "global" else self._shared
        memory[places[taken]] = values.view(np.uint8)[taken]

    def _copy(self, target: str, rest: list[str], taken: NDArray[np.bool_]) -> None:
        num_bytes, size = int(rest[1], 0), self._get(rest[2])
        there = size > 0
        assert taken.all()
        assert (size[there] == num_bytes).all()
        values = self._global[self._places(rest[0], num_bytes, there, "global")]
        values[~there] = 0
        places = self._places(target, num_bytes, taken, "shared")
        self._shared[places] = _NOT_THERE
        self._copies[-1].append((places, values))

    def _load_matrices(self, registers: list[str], place: str, *, turned: bool) -> None:
        everyone = np.ones(self._threads, bool)
        rows = self._places(place, 16, everyone, "shared").reshape(-1, 4, 8, 16)
        for at, register in enumerate(registers):
            halves = self._shared[rows[:, at]].view(np.uint16)  # [warps, 8, 8]
            if turned:
                halves = np.ascontiguousarray(halves.transpose(0, 2, 1))
            self._put(register, halves.view(np.uint32).reshape(-1), everyone)

    def _multiply(self, d: list[str], a: list[str], b: list[str], c: list[str]) -> None:
        """As "Matrix fragments for mma.m16n8k16" of the PTX manual has it, in a sum of FP64."""

        def fragment(register: str, dtype: Any, values: int) -> NDArray[Any]:
            words = np.ascontiguousarray(self._get(register).astype(np.uint32))
            found: NDArray[Any] = words.view(dtype).reshape(-1, 8, 4 * values)
            return found  # warps, groups of 4 lanes

        left = [fragment(each, np.float16, 2) for each in a]
        top = np.concatenate((left[0], left[2]), 2)
        bottom = np.concatenate((left[1], left[3]), 2)
        x = np.concatenate((top, bottom), 1).astype(np.float64)
        w = np.concatenate([fragment(each, np.float16, 2) for each in b], 2).astype(np.float64)
        product = x @ w.transpose(0, 2, 1)  # [warps, 16, 8]
        everyone = np.ones(self._threads, bool)
        sums = [fragment(each, np.float32, 1) for each in c]
        for at, register in enumerate(d):
            # Registers 0 and 1 are neighbours in a row, 2 and 3 eight rows below.
            part = product[:, 8 * (at // 2) : 8 * (at // 2) + 8, at % 2 :: 2]
            value = (part + sums[at]).astype(np.float32)
            self._put(register, _bits(value).reshape(-1), everyone)


def _list(operand: str) -> list[str]:
    return [each.strip() for each in operand.strip("{} ").split(",")]


def run(
    ptx: Ptx,
    launch: Launch,
    arrays: dict[str, NDArray[Any]],
    outputs: tuple[str, ...] = ("y",),
) -> None:
    """Run all programs of a launch; arrays are changed where they lie.

    Args:
        ptx: the kernel.
        launch: its grid and arguments.
        arrays: by the names in the arguments.
        outputs: those that may be written.
    """
    addresses, end = {}, _PAGE
    for name, array in arrays.items():
        addresses[name] = end
        end += -(-(array.nbytes + 1) // _PAGE) * _PAGE
    memory = np.full(end, 0x7E, np.uint8)  # two of them are no number
    for name, array in arrays.items():
        memory[addresses[name] :][: array.nbytes] = (
            np.ascontiguousarray(array).view(np.uint8).ravel()
        )
    before = memory.copy()
    parameters = [
        BASE + addresses[value] if isinstance(value, str) else value for value in launch.arguments
    ]
    machine = Machine(ptx, memory, parameters)
    for z, y, x in np.ndindex(launch.grid[::-1]):
        machine.run((x, y, z), launch.grid)
    for name, array in arrays.items():
        place = slice(addresses[name], addresses[name] + array.nbytes)
        array[...] = memory[place].view(array.dtype).reshape(array.shape)
        if name in outputs:
            memory[place] = before[place]
    assert (memory == before).all(), "something else than an output was written"
