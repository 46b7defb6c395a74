"""Makes a block of device memory from pieces at consecutive virtual addresses.

The driver's virtual memory management (cuda.h, ``cuMemCreate``) needs no block of contiguous
physical memory. It is used through cuda-bindings; PyCUDA does not have it.
"""

from __future__ import annotations

from .bindings import Calls, OutOfMemoryError, release

PIECE_BYTES = 64 << 20
"""First size of a piece, and the largest block not worth pieces; 4 GB are 64 pieces."""


class Pieces:
    """Stands in for ``pycuda.driver.DeviceAllocation``: ``int()`` is its address, `free` frees it.

    Args:
        call: the calls of cuda-bindings; a context is current.
        ordinal: number of the GPU.
        num_bytes: size, rounded up to the driver's unit (``cuMemGetAllocationGranularity``).

    Raises:
        Calls.Error: memory does not suffice even in pieces of the least size, or this driver lacks
            the calls.
    """

    def __init__(self, call: Calls, ordinal: int, num_bytes: int) -> None:
        cuda, self._call = call.module, call
        self._pieces: list[int] = []
        kind = cuda.CUmemAllocationProp()
        kind.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        place = kind.location
        place.type, place.id = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, ordinal
        least = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        unit = call("cuMemGetAllocationGranularity", kind, least)
        self._num_bytes = -(-num_bytes // unit) * unit
        self._address = int(call("cuMemAddressReserve", self._num_bytes, 0, 0, 0))
        try:
            self._fill(kind, unit)
            access = cuda.CUmemAccessDesc()
            access.location.type, access.location.id = place.type, ordinal
            access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            call("cuMemSetAccess", self._address, self._num_bytes, [access], 1)
        except BaseException:
            self.free()
            raise

    def _fill(self, kind: object, unit: int) -> None:
        """Map memory to the range; pieces get smaller when none of their size is available."""
        size = max(unit, PIECE_BYTES // unit * unit)
        at, end = self._address, self._address + self._num_bytes
        while at < end:
            size = min(size, end - at)
            try:
                piece = self._call("cuMemCreate", size, kind, 0)
            except OutOfMemoryError:
                if size == unit:
                    raise
                size = max(unit, size // 2 // unit * unit)
                continue
            try:
                self._call("cuMemMap", at, size, 0, piece, 0)
                self._pieces.append(size)
            finally:
                release(self._call, "cuMemRelease", piece)  # the mapping keeps it alive
            at += size

    def __int__(self) -> int:
        return self._address

    def __len__(self) -> int:
        return len(self._pieces)

    def free(self) -> None:
        """Wait for the GPU, as ``cuMemFree`` does, and free it; on a lost GPU that fails."""
        release(self._call, "cuCtxSynchronize")
        at = self._address
        for size in self._pieces:
            release(self._call, "cuMemUnmap", at, size)
            at += size
        release(self._call, "cuMemAddressFree", self._address, self._num_bytes)
