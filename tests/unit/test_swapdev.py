from pathlib import Path

import trio

from tests.swaparea import MOUNT_POINT, SWAPS, add_loop, machine, write
from zswapd import swapdev
from zswapd.swapdev import Attachment, SwapArea, discover, is_mounted, parse_swaps


def test_swaps_are_parsed_in_bytes_with_escapes() -> None:
    text = SWAPS + "/dev/loop0    partition\t262140\t\t100\t\t-2\n/swap\\040file\\134x   file  8 4 32767\n"
    assert parse_swaps(text) == [
        SwapArea("/dev/loop0", 262140 << 10, 100 << 10, -2),
        SwapArea("/swap file\\x", 8 << 10, 4 << 10, 32767),
    ]
    assert parse_swaps(SWAPS) == []


def test_discover_finds_our_loop_device_alone(tmp_path: Path) -> None:
    write(tmp_path, "proc/swaps", SWAPS + "/dev/loop1 partition 100 4 5\n/dev/loop7 partition 200 8 6\n")
    add_loop(tmp_path, "loop1", "/run/zswapd-other/mnt/swapfile")
    (tmp_path / "sys/block/loop2").mkdir()  # free
    assert discover(MOUNT_POINT, tmp_path) is None

    add_loop(tmp_path, "loop3", f"{MOUNT_POINT}/swapfile", dio=0)
    half = discover(MOUNT_POINT, tmp_path)
    assert half == Attachment("/dev/loop3", False, False, 8192 * 512, 0, 0)

    add_loop(tmp_path, "loop7", f"{MOUNT_POINT}/swapfile")
    assert discover(MOUNT_POINT, tmp_path) == Attachment("/dev/loop7", True, True, 8192 * 512, 8 << 10, 6)


def test_only_a_fuse_mount_is_a_daemon(tmp_path: Path) -> None:
    line = "36 35 98:0 / {} rw,noatime shared:1 - {} source rw\n"
    other = line.format("/run/zswapd-test", "fuse") + line.format(MOUNT_POINT, "ext4")
    write(tmp_path, "proc/self/mountinfo", other)
    assert not is_mounted(MOUNT_POINT, tmp_path)
    write(tmp_path, "proc/self/mountinfo", other + line.format("/a\\040b", "fuse.zswapd"))
    assert is_mounted(Path("/a b"), tmp_path)


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    machine(tmp_path, 1 << 30)
    (tmp_path / "proc/swaps").write_bytes(SWAPS.encode() + b"/dev/\xff file 8 4 1\n")
    assert swapdev.read_swaps(tmp_path)[0].path == "/dev/\udcff"


def test_who_attaches_or_detaches_is_seen_and_not_disturbed(tmp_path: Path) -> None:
    mount_point = tmp_path / "mnt"

    async def watch() -> None:
        assert not swapdev.is_changing(mount_point)
        async with swapdev.exclusive(mount_point):
            assert swapdev.is_changing(mount_point)
        assert not swapdev.is_changing(mount_point)

    trio.run(watch)
