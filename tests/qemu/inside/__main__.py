"""Runs $SCENARIOS (kills.under_pressure,limits.swap_max), one after the other, and says what became of each.

The first one that fails ends it: what it has left is not fit for another.
"""

import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback

#: Of one scenario, on the slowest machine.
DEADLINE_SECONDS = 1500


def on_alarm(*_: object) -> None:
    raise TimeoutError(f"not within {DEADLINE_SECONDS} s")


def run(name: str) -> bool:
    module, _, function = name.partition(".")
    print(f"scenario {name}: begins", flush=True)
    start = time.monotonic()
    signal.alarm(DEADLINE_SECONDS)
    try:
        getattr(importlib.import_module(f"tests.qemu.inside.{module}"), function)()
    except BaseException:
        signal.alarm(0)
        traceback.print_exc()
        print(f"scenario {name}: failed after {time.monotonic() - start:.0f} s", flush=True)
        return False
    signal.alarm(0)
    print(f"scenario {name}: passed after {time.monotonic() - start:.0f} s", flush=True)
    return True


def main() -> None:
    sys.stderr = sys.stdout
    faulthandler.enable(sys.stdout)
    signal.signal(signal.SIGALRM, on_alarm)
    subprocess.run(["mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"], check=True)
    subprocess.run(["sysctl", "-qp", "/usr/lib/sysctl.d/60-zswapd.conf"], check=True)
    sys.exit(0 if all(map(run, os.environ["SCENARIOS"].split(","))) else 1)


main()
