"""The pager as the daemon sees it: started, found again, and told what to do over its control socket.

The pager serves pages by itself. It outlives the daemon: one that finds a pager's socket beside the mount point goes
on where the last one ended.
"""

import contextlib
import logging
import os
import subprocess
import time
from pathlib import Path

from zswapd._native import Counters
from zswapd.config import Config
from zswapd.engine import EngineStats
from zswapd.errors import DaemonError
from zswapd.pager_socket import ask, socket_path

log = logging.getLogger(__name__)

#: Built beside the Python module, and installed with it.
PROGRAM = Path(__file__).with_name("zswapd-pager")
_START_SECONDS = 30


class Pager:
    """The pager of a mount point. A command waits for its answer, and raises OSError: see `pager_socket.ask`."""

    def __init__(self, mount_point: Path) -> None:
        """Finds the pager that serves `mount_point`. Raises OSError if there is none."""
        self.mount_point = mount_point
        self._path = socket_path(mount_point)
        _, fd = self._ask("counters")
        assert fd is not None, "the answer to counters"
        self._counters = Counters(fd)

    @classmethod
    def start(cls, config: Config) -> "Pager":
        """Starts a pager and finds it. Raises DaemonError; the pager has said why on stderr."""
        swap, compression = config.swap, config.compression
        arguments = {
            "mount-point": swap.mount_point,
            "control": socket_path(swap.mount_point),
            "size": swap.size,
            "allocator": config.pool.allocator,
            "mem-limit": config.pool.mem_limit_bytes,
            "algorithm": compression.algorithm,
            "zstd-level": compression.zstd_level,
            "workers": config.pager.workers,
            "spin-us": config.pager.spin_us,
            "store": config.pager.store,
        }
        command = [os.fspath(PROGRAM)]
        for name, value in arguments.items():
            command += [f"--{name}", str(value)]
        # A session of its own: what ends the daemon does not reach it.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return cls(swap.mount_point)
            time.sleep(0.01)
        raise DaemonError(f"the pager did not start (exit status {process.returncode})", "it says why above")

    def relay(self) -> int:
        """The descriptor over which the pager hands on what is not for the swap file. Cuts off who had it before."""
        _, fd = self._ask("relay")
        assert fd is not None, "the answer to relay"
        return fd

    def drain(self) -> dict[str, int]:
        """Ends the serving of pages: from now on the swap file cannot be opened, and no request on it is under way.

        Returns what is left in the pool: objects, and the pages that they take. Raises OSError (EBUSY) while the swap
        file is open: all goes on then.
        """
        return _numbers(self._ask("drain")[0])

    def stop(self) -> dict[str, int]:
        """Drops every page and ends the pager. Returns what was left in the pool all the same, as `drain` does: it
        leaked. Raises OSError (EBUSY) while the swap file is open."""
        return _numbers(self._ask("stop")[0])

    def status(self) -> dict[str, int]:
        """pid; device: the mount's st_dev; opens of the swap file; protected: 1 if the kernel let it lock memory, serve
        reclaim and outlive the OOM killer; forgets: 1 if it stores nothing; footprint: bytes of its memory beside the
        pool and its tables."""
        return _numbers(self._ask("status")[0])

    # What every engine does (engine.Engine)

    def stats(self) -> EngineStats:
        return self._counters.stats()

    def set_mem_limit(self, size_bytes: int) -> None:
        self._ask(f"mem-limit {size_bytes}")

    def set_compression(self, algorithm: str, zstd_level: int) -> None:
        self._ask(f"compression {algorithm} {zstd_level}")

    def compact(self) -> None:
        self._ask("compact")

    def reset(self) -> None:
        self._ask("reset")

    def _ask(self, command: str) -> tuple[str, int | None]:
        return ask(self._path, command)


def _numbers(text: str) -> dict[str, int]:
    return {name: int(value) for name, _, value in (word.partition("=") for word in text.split())}
