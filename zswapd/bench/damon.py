"""DAMON, by which the kernel reclaims memory that nobody has asked it to: off while pages may be forgotten.

It swaps out what any process has not touched for a while, to whatever swap there is (see floor.py).
"""

import errno
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from zswapd.errors import ZswapdError

SECONDS = 60  # it ends between two of its samples, some seconds apart


@dataclass(frozen=True)
class Switch:
    """A file that tells whether DAMON is at work, and switches it."""

    path: Path
    on: str
    off: str

    @property
    def is_on(self) -> bool:
        return self.path.read_text().strip() == self.on


def switches(root: Path = Path("/")) -> Iterator[Switch]:
    """Those that this kernel has."""
    for state in sorted(root.glob("sys/kernel/mm/damon/admin/kdamonds/*/state")):
        yield Switch(state, "on", "off")
    reclaim = root / "sys/module/damon_reclaim/parameters/enabled"
    if reclaim.exists():
        yield Switch(reclaim, "Y", "N")


@asynccontextmanager
async def switched_off(say: Callable[[str], None], root: Path = Path("/")) -> AsyncIterator[None]:
    """Switches off what is on, and on again at the end, however that comes about; `say` is told of both.

    Each takes a minute at most. Raises ZswapdError where one cannot be switched: those before it are as they were, and
    at the end the message says how to switch it on.
    """
    changed: list[Switch] = []
    try:
        for switch in switches(root):
            if switch.is_on:
                changed.append(switch)
                await _turn(switch, switch.off)
                say(f"{switch.path} was {switch.on}: {switch.off} until the end")
        yield
    finally:
        with trio.CancelScope(shield=True):
            failures = [failure for switch in reversed(changed) if (failure := await _restored(switch, say))]
        if failures:
            raise failures[0]


async def _restored(switch: Switch, say: Callable[[str], None]) -> ZswapdError | None:
    try:
        await _turn(switch, switch.on)
    except ZswapdError as failure:
        return failure
    say(f"{switch.path} is {switch.on} again")
    return None


async def _turn(switch: Switch, value: str) -> None:
    reason = f"not within {SECONDS} s"
    with trio.move_on_after(SECONDS):
        try:
            while switch.is_on != (value == switch.on):
                try:
                    # In a thread: it waits for DAMON's own.
                    await trio.to_thread.run_sync(switch.path.write_text, value, abandon_on_cancel=True)
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                    await trio.sleep(0.05)
            return
        except OSError as error:
            reason = str(error.strerror)
    remedy = f"see that it is on: echo {switch.on} > {switch.path}"
    if value == switch.off:
        remedy = f"leave the row null out, and {remedy}"
    raise ZswapdError(f"DAMON cannot be switched {value}: {switch.path}: {reason}", remedy)
