"""Keeping the benchmark itself out of the swap that it measures."""

import ctypes
import mmap

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4


def lock_memory() -> None:
    """Lock this process's memory, present and future, as it is touched; children do not inherit it.

    Else proactive reclaim could swap out the corpus, or the very code that ends a device that is stuck. Needs root:
    the limit of others is so small that later allocations would fail.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) != 0:
        raise OSError(ctypes.get_errno(), "mlockall")


def unlock(mapping: mmap.mmap) -> None:
    """Let the kernel swap this mapping after all."""
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    if libc.munlock(ctypes.c_void_p(address), ctypes.c_size_t(len(mapping))) != 0:
        raise OSError(ctypes.get_errno(), "munlock")
