"""A swap file in use by several processes at once, each of which knows what its pages hold (scribbler.py)."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.daemon import DEADLINE_SECONDS, ENVIRONMENT, Daemon, wait_until
from tests.pages import PAGE
from tests.takeover import status

_ROOT = Path(__file__).parents[2]
_SCRIBBLERS = 3


@contextmanager
def scribbling(daemon: Daemon, failures: Path | None = None) -> Iterator[Callable[[], None]]:
    """Processes that use all of the swap file. What is given ends them, and looks at what they have found: no wrong
    page and, unless `failures` is a file in which to say them, none of those.
    """
    pages = (64 << 20) // PAGE // _SCRIBBLERS
    command = [sys.executable, "-m", "tests.fuse.scribbler", str(daemon.swapfile)]
    pipe = subprocess.PIPE
    said = failures.open("w") if failures else None
    processes = [
        subprocess.Popen(
            [*command, str(n * pages), str(pages), str(n)],
            stdin=pipe,
            stdout=pipe,
            stderr=said,
            text=True,
            env=ENVIRONMENT,
            cwd=_ROOT,
        )
        for n in range(_SCRIBBLERS)
    ]

    def end() -> None:
        failed = 0
        for process in processes:
            output, _ = process.communicate(timeout=DEADLINE_SECONDS)
            result = json.loads(output)
            assert process.returncode == 0
            assert result["wrong"] == 0, result
            assert result["operations"] > pages // 32
            failed += result["failed"]
            print(result)
        assert failures or failed == 0

    try:
        wait_until(lambda: status(daemon)["opens"] == _SCRIBBLERS, "all of them have it open")
        yield end
    finally:
        for process in processes:
            process.kill()
            process.wait()
        if said:
            said.close()
