"""Commands of the system, such as losetup and swapon: the only place that runs privileged ones."""

import os
from subprocess import CompletedProcess

import trio

from zswapd.errors import SwapError

SBIN = ":/usr/sbin:/sbin"  # cron's PATH lacks them


async def run(*command: str, check: bool = True) -> CompletedProcess[bytes]:
    # A process group of its own: Ctrl-C reaches us alone, and we decide.
    path = os.environ.get("PATH", "/usr/bin:/bin") + SBIN
    try:
        result = await trio.run_process(
            command,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            deliver_cancel=_terminate,
            env={**os.environ, "PATH": path, "LC_ALL": "C"},
            process_group=0,
        )
    except FileNotFoundError:
        raise SwapError(f"{command[0]} is not installed", "install util-linux (Debian: and mount)") from None
    except OSError as error:
        raise SwapError(
            f"{command[0]} cannot be run: {error.strerror}", "free what the system lacks, then try again"
        ) from None
    if check and result.returncode:
        reason = result.stderr.decode(errors="replace").strip()
        raise SwapError(f"{' '.join(command)} failed: {reason or f'status {result.returncode}'}")
    return result


async def _terminate(process: trio.Process) -> None:
    process.terminate()  # run_process then waits for its end, however long the kernel takes


def require_root() -> None:
    if os.geteuid() != 0:
        raise SwapError("only root may attach or detach swap", "run it with sudo")
