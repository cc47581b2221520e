"""Why pages do not come, as /proc and /sys of a machine that is made up tell it."""

import os
from pathlib import Path

import pytest

from zswapd import stuck

STATUS = {"pid": 42, "device": os.makedev(0, 61)}


def thread(root: Path, tid: int, name: str, state: str) -> None:
    directory = root / f"proc/42/task/{tid}"
    directory.mkdir(parents=True)
    (directory / "stat").write_text(f"{tid} ({name}) {state} 1 42 42 0\n")


@pytest.mark.parametrize(
    ("threads", "said"),
    [
        ({}, "the pager, pid 42, is gone, and no other has taken over yet"),
        ({"pager": "Z"}, "the pager, pid 42, is gone, and no other has taken over yet"),
        ({"pager": "T", "worker 1": "t"}, "the pager, pid 42, is stopped (SIGSTOP, or a debugger)"),
        ({"pager": "S", "worker 1": "T"}, "none of the threads of the pager, pid 42, waits in the kernel"),
        (
            {"pager": "S", "worker) 1": "D", "worker 0": "D", "worker 2": "R"},
            "of the pager, pid 42, these threads wait in the kernel: worker 0, worker) 1",
        ),
    ],
)
def test_threads_tell(tmp_path: Path, threads: dict[str, str], said: str) -> None:
    for number, (name, state) in enumerate(threads.items()):
        thread(tmp_path, 42 + number, name, state)
    assert stuck.pages(STATUS, tmp_path) == said
    waiting = tmp_path / "sys/fs/fuse/connections/61/waiting"
    waiting.parent.mkdir(parents=True)
    waiting.write_text("3\n")
    assert stuck.pages(STATUS, tmp_path) == f"{said}; 3 requests to it are not answered"


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("1 0 8 0 2 0 16 0 3 9 9\n", (3, 3)),
        ("1 0 8 0 2 0 16 0 3 9 9 4 0 0 0\n", (3, 7)),
        ("1 0 8 0 2 0 16 0 3 9 9 4 0 0 0 5 0\n", (3, 12)),
    ],
)
def test_requests_of_a_disk(tmp_path: Path, text: str, counts: tuple[int, int]) -> None:
    path = tmp_path / "sys/dev/block/8:1/stat"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert stuck.requests(os.makedev(8, 1), tmp_path) == counts
    with pytest.raises(OSError, match="No such file"):
        stuck.requests(os.makedev(8, 2), tmp_path)
