"""What int8.c is called with: its structures, its functions and its memory."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_size_t, c_void_p

from ...errors import ModelUnavailable
from .native import library

VECTOR, PARTS, MAX_RANK = 16, 3, 256  # as in int8.c
LINEARS = 4
"""CLinears in a layer."""
ALIGNMENT, LARGE_PAGE = 64, 2 << 20


def round_up(number: int, to: int) -> int:
    """The next multiple."""
    return -(-number // to) * to


def whole_tiles(out: int) -> int:
    """Outputs in whole tiles, as int8.c stores them."""
    return round_up(out, 2 * VECTOR if out > VECTOR else VECTOR)


def too_large() -> ModelUnavailable:
    """What is raised where memory is short."""
    return ModelUnavailable(
        "There is too little memory for the model.", hint="Take a smaller one, or lower kv_cache_mb."
    )


class CLinear(Structure):
    """Matrices that share an input."""

    _fields_ = (
        *(("inputs", c_int), ("parts", c_int), ("outs", c_int * PARTS)),
        *(("weights", c_void_p * PARTS), ("bias", c_void_p)),
    )


class CLayer(Structure):
    """The weights of a layer."""

    _fields_ = (("linears", CLinear * LINEARS), ("norms", c_void_p * 2), ("head_norms", c_void_p * 2))


class CLoraLinear(Structure):
    """What an adapter adds to a CLinear."""

    _fields_ = (
        *(("ranks", c_int32 * PARTS), ("width", c_int32), ("places", c_int32 * (2 * PARTS))),
        *(("a", c_void_p), ("b", c_void_p * PARTS)),
    )


class CModel(Structure):
    """A model, its cache, its adapters and its threads."""

    _fields_ = (
        *((name, c_int) for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")),
        *((name, c_int) for name in ("context", "pages", "most_tokens", "slots")),
        *(("eps", c_float), ("cosines", c_void_p), ("sines", c_void_p), ("embeddings", c_void_p)),
        *(("last_norm", c_void_p), ("head", CLinear), ("layer", POINTER(CLayer))),
        *(("cache", c_void_p), ("adapters", POINTER(c_void_p)), ("pool", c_void_p)),
    )


class Memory:
    """Zeros that take no memory until they are written, in large pages where the system has them.

    Raises ModelUnavailable where there is too little.
    """

    def __init__(self, size: int) -> None:
        try:
            self._map = mmap.mmap(-1, size + LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            raise too_large() from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(c_int.from_buffer(self._map))
        self._free, self._end = round_up(start, LARGE_PAGE), start + size + LARGE_PAGE

    def take(self, size: int) -> int:
        """The address of the next `size` bytes."""
        address, self._free = self._free, self._free + round_up(size, ALIGNMENT)
        assert address + size <= self._end
        return address


def load_kernels() -> ctypes.CDLL:
    """int8.c, compiled, its functions declared. Raises ModelUnavailable where that cannot be."""
    lib = library()
    for name, result, arguments in (
        ("matrix_bytes", c_size_t, (c_int, c_int)),
        ("matrix_pack", c_int, (c_void_p, c_void_p, c_int, c_int)),
        ("lora_pack", c_size_t, (c_void_p,) * 6),
        ("pool_new", c_void_p, (c_int,)),
        ("pool_free", None, (c_void_p,)),
        ("step_new", c_void_p, (c_void_p,)),
        ("step_free", None, (c_void_p,)),
        ("step_forward", c_int, (*(c_void_p,) * 4, c_int, c_void_p, c_int, c_int, c_void_p, c_void_p, c_int, c_void_p)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
