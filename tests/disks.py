"""Loop devices for the tests."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def looped(file: Path, *options: str) -> Iterator[Path]:
    losetup = subprocess.run(
        ["losetup", "--find", "--show", *options, file], check=True, capture_output=True, text=True
    )
    device = Path(losetup.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
