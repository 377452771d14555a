"""The few questions about CUDA memory that only the driver API answers, asked through ctypes.

cupy covers the runtime API; it does not say which allocation a pointer is part of, nor whether that allocation can be
exported. The functions used here have kept their binary interface since CUDA 11.2.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from kvmarket.errors import TransportUnavailableError

_LIBRARY = "libcuda.so.1"
_SUCCESS = 0
# CUpointer_attribute of cuda.h
_BUFFER_ID, _LEGACY_IPC_CAPABLE, _MEMPOOL_HANDLE = 7, 10, 17


class CudaDriverError(Exception):
    """A driver call failed.

    Attributes:
        code: its CUresult.
    """

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name}")
        self.code = code


@dataclass(frozen=True, slots=True)
class AllocationInfo:
    """What the driver knows of the allocation around a pointer.

    Attributes:
        base: its first address.
        nbytes: its size.
        buffer_id: its number, unique for the life of the process.
        legacy_ipc: it can be exported by ``cudaIpcGetMemHandle``.
        mempool: it comes from a memory pool (``cudaMallocAsync``).
    """

    base: int
    nbytes: int
    buffer_id: int
    legacy_ipc: bool
    mempool: bool


class CudaDriver:
    """libcuda. Calls need a current context, but for `uuid`. Thread-safe."""

    def __init__(self, library: str = _LIBRARY) -> None:
        try:
            self._lib = ctypes.CDLL(library)
        except OSError as error:
            raise TransportUnavailableError(f"no CUDA driver on this machine: {error}", scheme="cuda_ipc") from error
        self._launch = self._lib.cuLaunchKernel
        self._launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]

    def uuid(self, device: int) -> bytes:
        """Return the 16 bytes that name a card in every process. Needs no context."""
        self._call("cuInit", ctypes.c_uint(0))
        handle, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
        self._call("cuDeviceGetUuid_v2", ctypes.byref(uuid), handle)
        return bytes(uuid)

    def allocation(self, pointer: int) -> AllocationInfo:
        """Describe the allocation that holds `pointer`. Raises `CudaDriverError` when it is not device memory."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(pointer))
        return AllocationInfo(
            base=base.value,
            nbytes=size.value,
            buffer_id=self._attribute(_BUFFER_ID, pointer),
            legacy_ipc=bool(self._attribute(_LEGACY_IPC_CAPABLE, pointer, ctypes.c_int)),
            mempool=bool(self._attribute(_MEMPOOL_HANDLE, pointer)),
        )

    def launch(self, function: int, blocks: int, threads: int, stream: int, arguments: ctypes.Array[Any]) -> None:
        """Launch a kernel; what the addresses in `arguments` hold may change afterwards."""
        code = self._launch(function, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, None)
        if code != _SUCCESS:
            self._raise("cuLaunchKernel", code)

    def _attribute(
        self, attribute: int, pointer: int, kind: type[ctypes.c_uint64 | ctypes.c_int] = ctypes.c_uint64
    ) -> int:
        value = kind()
        self._call("cuPointerGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_uint64(pointer))
        return value.value

    def _call(self, name: str, *args: object) -> None:
        code = getattr(self._lib, name)(*args)
        if code != _SUCCESS:
            self._raise(name, code)

    def _raise(self, name: str, code: int) -> None:
        text = ctypes.c_char_p()
        self._lib.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
        raise CudaDriverError(name, code, (text.value or b"unknown error").decode())
