"""Running programs bounded in time, and work that a signal or another task ends in good order."""

import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess

import trio

from zswapd.errors import ZswapdError


class Interrupted(ZswapdError):
    """A signal ended the work; everything was undone."""


async def run(
    *command: str,
    name: str = "",
    seconds: float = 60,
    grace: float = 5,
    last_resort: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] = os.environ,
) -> CompletedProcess[bytes]:
    """Run a program to its end, in a process group of its own so that Ctrl-C reaches us alone.

    After `seconds`, or when cancelled, it is terminated, then killed; if even that does not end it, it waits in the
    kernel for a device, and `last_resort` has to end that wait. Raises ZswapdError when it fails, calling it `name`.
    """

    async def end(process: trio.Process) -> None:
        process.terminate()
        await trio.sleep(grace)
        process.kill()
        await trio.sleep(grace)
        last_resort()

    name = name or " ".join(command)
    path = environment.get("PATH", os.defpath) + ":/usr/sbin:/sbin"  # cron's lacks sbin
    with trio.move_on_after(seconds) as limit:
        try:
            result = await trio.run_process(
                command,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                deliver_cancel=end,
                env={**environment, "PATH": path, "LC_ALL": "C"},
                process_group=0,
            )
        except FileNotFoundError:
            raise ZswapdError(f"{command[0]} is not installed") from None
    if limit.cancelled_caught:
        raise ZswapdError(f"{name}: did not end within {seconds:.0f} s")
    if result.returncode:
        reason = (result.stderr or result.stdout).decode(errors="replace").strip()
        raise ZswapdError(f"{name}: {reason or f'status {result.returncode}'}")
    return result


async def settle(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until `condition()` holds; False when it does not within `seconds`."""
    with trio.move_on_after(seconds):
        while not condition():
            await trio.sleep(0.02)
        return True
    return condition()


def write(path: Path, text: str) -> None:
    """Write a control file, which has to exist."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


async def alongside(background: Callable[[], Awaitable[None]], work: Callable[[], Awaitable[None]]) -> None:
    """Do both until one ends, then cancel the other. Raises what `work` raises, as it is."""
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await background()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            await work()
        except (Exception, SystemExit) as error:  # SystemExit: nobody reads our output any more
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def until_signal(work: Callable[[], Awaitable[None]]) -> None:
    """Do `work`; SIGINT, SIGTERM or SIGHUP cancels it, waits until it has undone everything, and raises Interrupted.

    Further signals change nothing: undoing goes on.
    """
    received: list[str] = []
    scope = trio.CancelScope()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:

        async def watch() -> None:
            async for number in signals:
                received.append(signal.Signals(number).name)
                scope.cancel()

        async def cancellable() -> None:
            with scope:
                await work()

        await alongside(watch, cancellable)
    if received:
        raise Interrupted(f"interrupted by {received[0]}")
