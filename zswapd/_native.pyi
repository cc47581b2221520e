"""The Rust core (native/python). Errors: ValueError for a bad argument, else OSError with its errno."""

from zswapd.engine import EngineStats

class Engine:
    """A swap file of fixed size over a compressed pool in memory. Thread-safe; gives up the GIL while it works."""

    def __init__(self, *, size_bytes: int, allocator: str, mem_limit: int, algorithm: str, zstd_level: int) -> None:
        """An empty swap file. `size_bytes`: whole pages, up to 16 TiB; `mem_limit`: bytes that the pool may take."""

    def read(self, offset: int, length: int) -> bytes:
        """Reads; less than `length` only at the end of the file. EIO if a page of the range is lost or corrupt."""

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """Writes all of `data`. EFBIG outside the file, nothing written then. ENOSPC if the pool is full: the pages
        that found no room read EIO from then on, the others are written."""

    def discard(self, offset: int, length: int) -> None:
        """Punches a hole, which reads zeros when this returns. EFBIG outside the file."""

    def compact(self) -> None:
        """Moves stored objects together, and gives back the memory that they no longer need."""

    def reset(self) -> None:
        """Drops every page."""

    def set_compression(self, algorithm: str, zstd_level: int) -> None:
        """Changes what new pages are compressed with; stored pages stay as they are, and readable."""

    def set_mem_limit(self, size_bytes: int) -> None:
        """Changes the bytes that the pool may take. Below what it takes, stores fail until enough is freed."""

    def stats(self) -> EngineStats:
        """A reading of all counters. Waits for no page; takes each size class's lock for a moment."""

class Counters:
    """The counters that a pager publishes, mapped read-only."""

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor. ValueError if another version of zswapd writes these counters."""

    def stats(self) -> EngineStats:
        """A reading; waits for nothing."""

def compress_page(page: bytes, algorithm: str, zstd_level: int) -> tuple[str, bytes]:
    """Encodes one page as the store does: the codec ("incompressible", "lz4", "zstd") and the payload."""

def lock_memory() -> None:
    """Locks all memory of the process, present and future, as it is touched (mlockall). EPERM, ENOMEM."""

def become_io_flusher() -> None:
    """Tells the kernel that this thread and those it starts serve I/O for reclaim (PR_SET_IO_FLUSHER). EPERM."""
