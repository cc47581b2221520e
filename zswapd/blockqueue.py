"""How the block layer treats the loop device's requests while it is swap."""

from contextlib import suppress
from pathlib import Path

_AS_SWAP_AND_ELSE = {
    # Throttling of background writes (0: off, -1: the kernel's default). It holds reclaim's writes back while reads
    # take longer than 2 ms: meant for disks, it halves the speed at which pages go out to memory.
    "wbt_lat_usec": ("0", "-1"),
    # Where a request is completed: on the very CPU that made it (2), not one near it (1). On the pager's, a thread
    # would first have to run there to wake the task that waits for the page, and again interrupt its CPU for that.
    "rq_affinity": ("2", "1"),
}


def set_for_swap(device: str) -> None:
    """Settings for a loop device that is about to be swap, where the kernel has them: a few µs a page."""
    for name, (as_swap, _) in _AS_SWAP_AND_ELSE.items():
        _set(device, name, as_swap)


def restore(device: str) -> None:
    """The kernel's defaults, for whoever uses this loop device next."""
    for name, (_, default) in _AS_SWAP_AND_ELSE.items():
        _set(device, name, default)


def _set(device: str, name: str, value: str) -> None:
    with suppress(OSError):
        Path(f"/sys/block/{Path(device).name}/queue/{name}").write_text(value)
