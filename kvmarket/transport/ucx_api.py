"""The part of UCX's C interface that kvmarket calls, through ctypes: active messages, RMA, endpoint queries.

`ucxx` makes the context, worker, listener and endpoints and exposes their handles as integers; what it does not offer
in Python (scatter/gather lists, one-sided reads, lanes) is called here on those handles. Nothing in this module knows
kvmarket's messages. Structures and constants: ucp/api/ucp.h and ucp_def.h of UCX 1.19 and later; every structure starts
with a mask of the fields that are set, so later versions only append.
"""

from __future__ import annotations

import ctypes as c
from functools import lru_cache

UCS_OK = 0
UCS_INPROGRESS = 1
UCS_ERR_BUSY = -15
UCS_ERR_CANCELED = -16
_UCS_ERR_LAST = -100

DATATYPE_IOV = 2
OP_FIELD_DATATYPE = 1 << 3
OP_FIELD_FLAGS = 1 << 4
OP_FIELD_MEMORY_TYPE = 1 << 6
OP_FIELD_MEMH = 1 << 8
OP_NO_IMMEDIATE = 1 << 16
MEMORY_HOST = 0

AM_SEND_REPLY = 1 << 0
AM_SEND_EAGER = 1 << 1
AM_SEND_RNDV = 1 << 2
AM_SEND_COPY_HEADER = 1 << 3
AM_WHOLE_MESSAGE = 1 << 0
AM_RECV_FIELD_REPLY_EP = 1 << 0
AM_RECV_DATA = 1 << 16
AM_RECV_RNDV = 1 << 17
_AM_HANDLER_FIELDS = 0b1111

_MEM_MAP_ADDRESS, _MEM_MAP_LENGTH = 1 << 0, 1 << 1
_EP_ATTR_TRANSPORTS = 1 << 3
_ENTITY_NAME_MAX = 32
_SOCKADDR_STORAGE = 128
LANES_MAX = 64


def pin(thing: object) -> None:
    """Keep a Python object from being destroyed until `unpin`, whoever drops it, a forked child included."""
    c.pythonapi.Py_IncRef(c.py_object(thing))


def unpin(thing: object) -> None:
    """Undo `pin`."""
    c.pythonapi.Py_DecRef(c.py_object(thing))


class RequestParam(c.Structure):
    """``ucp_request_param_t``."""

    _fields_ = (
        ("op_attr_mask", c.c_uint32),
        ("flags", c.c_uint32),
        ("request", c.c_void_p),
        ("callback", c.c_void_p),
        ("datatype", c.c_uint64),
        ("user_data", c.c_void_p),
        ("reply_buffer", c.c_void_p),
        ("memory_type", c.c_uint32),
        ("recv_info", c.c_void_p),
        ("memh", c.c_void_p),
    )


class AmRecvParam(c.Structure):
    """``ucp_am_recv_param_t``."""

    _fields_ = (("recv_attr", c.c_uint64), ("reply_ep", c.c_void_p))


AmCallback = c.CFUNCTYPE(c.c_int, c.c_void_p, c.c_void_p, c.c_size_t, c.c_void_p, c.c_size_t, c.POINTER(AmRecvParam))
"""``ucp_am_recv_callback_t``: (argument, header, header length, data, length, parameters) -> status."""


class _AmHandlerParam(c.Structure):
    _fields_ = (
        ("field_mask", c.c_uint64),
        ("id", c.c_uint),
        ("flags", c.c_uint32),
        ("cb", AmCallback),
        ("arg", c.c_void_p),
    )


class _MemMapParams(c.Structure):
    _fields_ = (
        ("field_mask", c.c_uint64),
        ("address", c.c_void_p),
        ("length", c.c_size_t),
        ("flags", c.c_uint),
        ("prot", c.c_uint),
        ("memory_type", c.c_uint),
        ("exported_memh_buffer", c.c_void_p),
    )


class _TransportEntry(c.Structure):
    _fields_ = (("transport_name", c.c_char_p), ("device_name", c.c_char_p))


class _Transports(c.Structure):
    _fields_ = (("entries", c.c_void_p), ("num_entries", c.c_uint), ("entry_size", c.c_size_t))


class _EpAttr(c.Structure):
    _fields_ = (
        ("field_mask", c.c_uint64),
        ("name", c.c_char * _ENTITY_NAME_MAX),
        ("local_sockaddr", c.c_uint64 * (_SOCKADDR_STORAGE // 8)),
        ("remote_sockaddr", c.c_uint64 * (_SOCKADDR_STORAGE // 8)),
        ("transports", _Transports),
        ("user_data", c.c_void_p),
    )


_POINTER = c.c_void_p
_PARAM = c.POINTER(RequestParam)
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ucp_worker_progress": (c.c_uint, (_POINTER,)),
    "ucp_worker_arm": (c.c_int, (_POINTER,)),
    "ucp_worker_set_am_recv_handler": (c.c_int, (_POINTER, c.POINTER(_AmHandlerParam))),
    "ucp_am_send_nbx": (
        _POINTER,
        (_POINTER, c.c_uint, c.c_char_p, c.c_size_t, _POINTER, c.c_size_t, _PARAM),
    ),
    "ucp_am_recv_data_nbx": (_POINTER, (_POINTER, _POINTER, _POINTER, c.c_size_t, _PARAM)),
    "ucp_am_data_release": (None, (_POINTER, _POINTER)),
    "ucp_get_nbx": (_POINTER, (_POINTER, _POINTER, c.c_size_t, c.c_uint64, _POINTER, _PARAM)),
    "ucp_request_check_status": (c.c_int, (_POINTER,)),
    "ucp_request_cancel": (None, (_POINTER, _POINTER)),
    "ucp_request_free": (None, (_POINTER,)),
    "ucp_mem_map": (c.c_int, (_POINTER, c.POINTER(_MemMapParams), c.POINTER(_POINTER))),
    "ucp_mem_unmap": (c.c_int, (_POINTER, _POINTER)),
    "ucp_rkey_pack": (c.c_int, (_POINTER, _POINTER, c.POINTER(_POINTER), c.POINTER(c.c_size_t))),
    "ucp_rkey_buffer_release": (None, (_POINTER,)),
    "ucp_ep_rkey_unpack": (c.c_int, (_POINTER, c.c_char_p, c.POINTER(_POINTER))),
    "ucp_rkey_destroy": (None, (_POINTER,)),
    "ucp_ep_query": (c.c_int, (_POINTER, c.POINTER(_EpAttr))),
    "ucp_get_version_string": (c.c_char_p, ()),
}


@lru_cache(maxsize=1)
def libucp() -> c.CDLL:
    """Return libucp with typed functions: the very library that ucxx uses, which must be imported before."""
    library = c.CDLL("libucp.so.0")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@lru_cache(maxsize=1)
def _libucs() -> c.CDLL:
    library = c.CDLL("libucs.so.0")
    library.ucs_status_string.restype, library.ucs_status_string.argtypes = c.c_char_p, (c.c_int,)
    return library


class UcxError(Exception):
    """A UCX call failed; `status` is its ucs_status_t. Never leaves the transport."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: {status_text(status)}")
        self.status = status


def status_text(status: int) -> str:
    """Return UCX's words for a status code."""
    text: bytes = _libucs().ucs_status_string(status)
    return text.decode()


def check(what: str, status: int) -> None:
    """Raise `UcxError` unless `status` is UCS_OK."""
    if status != UCS_OK:
        raise UcxError(what, status)


def pointer_status(pointer: int | None) -> int | None:
    """Return the status that a ``ucs_status_ptr_t`` stands for, or None when it is a request to wait for."""
    if not pointer:
        return UCS_OK
    signed = c.c_int64(pointer).value
    return signed if _UCS_ERR_LAST <= signed < 0 else None


def set_am_handler(worker: int, message_id: int, callback: c._FuncPointer) -> None:
    """Call `callback` (an `AmCallback`, kept alive by the caller) for each active message of that id."""
    param = _AmHandlerParam(_AM_HANDLER_FIELDS, message_id, AM_WHOLE_MESSAGE, callback, None)
    check("ucp_worker_set_am_recv_handler", libucp().ucp_worker_set_am_recv_handler(worker, c.byref(param)))


def map_memory(context: int, address: int, nbytes: int) -> int:
    """Register [address, address + nbytes) for one-sided access and return its handle."""
    handle = c.c_void_p()
    param = _MemMapParams(_MEM_MAP_ADDRESS | _MEM_MAP_LENGTH, address, nbytes, 0, 0, 0, None)
    check("ucp_mem_map", libucp().ucp_mem_map(context, c.byref(param), c.byref(handle)))
    return handle.value or 0


def pack_rkey(context: int, memory: int) -> bytes:
    """Return what a peer needs to read registered memory."""
    buffer, size = c.c_void_p(), c.c_size_t()
    library = libucp()
    check("ucp_rkey_pack", library.ucp_rkey_pack(context, memory, c.byref(buffer), c.byref(size)))
    try:
        return c.string_at(buffer.value or 0, size.value)
    finally:
        library.ucp_rkey_buffer_release(buffer)


def unpack_rkey(endpoint: int, packed: bytes) -> int:
    """Return a handle of a peer's packed key, usable on this endpoint; destroy it before the endpoint closes."""
    handle = c.c_void_p()
    check("ucp_ep_rkey_unpack", libucp().ucp_ep_rkey_unpack(endpoint, packed, c.byref(handle)))
    return handle.value or 0


def lanes(endpoint: int) -> tuple[tuple[str, str], ...]:
    """Ask an endpoint which (transport, device) pairs it uses, in UCX's order."""
    entries = (_TransportEntry * LANES_MAX)()
    attributes = _EpAttr(field_mask=_EP_ATTR_TRANSPORTS)
    attributes.transports = _Transports(c.addressof(entries), LANES_MAX, c.sizeof(_TransportEntry))
    check("ucp_ep_query", libucp().ucp_ep_query(endpoint, c.byref(attributes)))
    count = min(attributes.transports.num_entries, LANES_MAX)
    return tuple(
        ((entry.transport_name or b"").decode(), (entry.device_name or b"").decode()) for entry in entries[:count]
    )


def version() -> str:
    """Return the version of the UCX that is loaded."""
    text: bytes = libucp().ucp_get_version_string()
    return text.decode()
