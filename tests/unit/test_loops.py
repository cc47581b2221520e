"""One file is one disk, whichever way it is reached."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.disks import looped
from zswapd import backing, backing_file
from zswapd.config import Writeback, load
from zswapd.errors import BackingError
from zswapd.loops import Loop

SIZE = 16 << 20


def settings(path: Path, size: int = 0) -> Writeback:
    return load(None, [f"writeback.backing={path}", f"writeback.size={size}"], {}).writeback


def test_two_loop_devices_over_one_file_are_one_disk(loop: Path, disk: Path) -> None:
    (disk / "other").symlink_to("image")
    with looped(disk / "other") as other:
        for one, two in ((loop, other), (other, loop)):
            with pytest.raises(BackingError, match=f"^{one} and {two} are over the same file") as caught:
                backing.look(settings(one))
            assert f"losetup --detach {two}" in caught.value.hint
    halves = ("--offset", str(SIZE)), ("--sizelimit", str(SIZE))
    with looped(disk / "image", *halves[0]) as second, pytest.raises(BackingError, match="over the same file"):
        backing.look(settings(second))
    subprocess.run(["losetup", "--detach", loop], check=True)
    try:
        with looped(disk / "image", *halves[0]) as second, looped(disk / "image", *halves[1]) as first:
            assert {backing.look(settings(half)).size_bytes for half in (first, second)} == {SIZE}
    finally:
        subprocess.run(["losetup", loop, disk / "image"], check=True)


def test_a_disk_under_a_loop_device_is_in_use(loop: Path) -> None:
    with looped(loop) as over, pytest.raises(BackingError, match=f"{loop} is in use: {over} is over it"):
        backing.look(settings(loop))
    backing.look(settings(loop))


async def test_a_file_and_a_loop_device_over_it_are_one_disk(loop: Path, disk: Path) -> None:
    lock = await backing_file.make(disk / "x", SIZE, lambda written: None)
    try:
        with looped(disk / "x") as over:
            with pytest.raises(BackingError, match=f"{disk}/x is in use: {over} is over it"):
                backing.look(settings(disk / "x", SIZE))
            with pytest.raises(BackingError, match=f"{over} is over {disk}/x, which a pager uses"):
                backing.look(settings(over))
        backing.look(settings(disk / "x", SIZE))
    finally:
        os.close(lock)


@pytest.mark.parametrize(
    ("one", "two", "overlap"),
    [
        ((0, 0), (0, 0), True),
        ((0, 0), (8, 0), True),
        ((8, 0), (0, 8), False),
        ((8, 0), (0, 9), True),
        ((0, 4), (4, 4), False),
        ((2, 4), (0, 8), True),
    ],
)
def test_parts_of_a_file_overlap_or_not(one: tuple[int, int], two: tuple[int, int], overlap: bool) -> None:
    first, second = (Loop("loop", 1, 2, 0, *part) for part in (one, two))
    assert first.overlaps(second) == second.overlaps(first) == overlap
    assert not first.overlaps(Loop("loop", 1, 3, 0, *two))
    assert not first.overlaps(Loop("loop", 2, 2, 0, *two))
