"""The mounted file system, asked by the kernel: its names, the swap file, damaged memory, and what is refused."""

import ctypes
import errno
import mmap
import os
import random
import re
import stat
import struct
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.daemon import CONTROLS, Daemon, state_file, wait_until
from tests.errnos import raises_errno
from tests.machine import lacks
from tests.pages import PAGE, noise

SIZE = 64 << 20
#: What the kernel punches at once, and how many of them are used at a time.
CLUSTER_PAGES, CLUSTERS = 512, 3
#: linux/falloc.h
KEEP_SIZE, PUNCH_HOLE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


# Names


def test_names_and_modes(daemon: Daemon) -> None:
    names = {entry.name: entry.stat() for entry in os.scandir(daemon.mount_point)}
    assert {name: stat.S_IMODE(entry.st_mode) for name, entry in names.items()} == {"swapfile": 0o600, **CONTROLS}
    assert all(stat.S_ISREG(entry.st_mode) and entry.st_nlink == 1 for entry in names.values())
    assert {name: entry.st_size for name, entry in names.items() if entry.st_size} == {"swapfile": SIZE}
    assert len({entry.st_ino for entry in names.values()}) == len(names)
    assert all(os.stat(daemon.mount_point / name).st_ino == entry.st_ino for name, entry in names.items())
    assert stat.S_IMODE(daemon.mount_point.stat().st_mode) == 0o755


def test_statfs(daemon: Daemon) -> None:
    answer = os.statvfs(daemon.mount_point)
    assert (answer.f_frsize * answer.f_blocks, answer.f_bfree, answer.f_ffree) == (SIZE, 0, 0)
    assert answer.f_files == len(CONTROLS) + 2


FORBIDDEN: dict[str, Callable[[Path], object]] = {
    "truncate": lambda mount: os.truncate(mount / "swapfile", 0),
    "extend": lambda mount: os.truncate(mount / "swapfile", 2 * SIZE),
    "chmod": lambda mount: os.chmod(mount / "swapfile", 0o666),
    "chown": lambda mount: os.chown(mount / "swapfile", 12345, 12345),
    "unlink": lambda mount: os.unlink(mount / "swapfile"),
    "rename": lambda mount: os.rename(mount / "swapfile", mount / "other"),
    "link": lambda mount: os.link(mount / "swapfile", mount / "other"),
    "create": lambda mount: os.close(os.open(mount / "other", os.O_CREAT | os.O_WRONLY)),
    "mkdir": lambda mount: os.mkdir(mount / "other"),
    "symlink": lambda mount: os.symlink("target", mount / "other"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_can_be_made_taken_away_or_resized(daemon: Daemon, what: str) -> None:
    before = sorted(os.listdir(daemon.mount_point))
    with raises_errno(errno.EPERM):
        FORBIDDEN[what](daemon.mount_point)
    assert sorted(os.listdir(daemon.mount_point)) == before
    entry = daemon.swapfile.stat()
    assert (entry.st_size, stat.S_IMODE(entry.st_mode), entry.st_uid) == (SIZE, 0o600, os.geteuid())


def test_what_is_not_there(daemon: Daemon) -> None:
    with raises_errno(errno.ENOENT):
        os.stat(daemon.mount_point / "other")
    with raises_errno(errno.ENOTDIR):
        os.stat(daemon.swapfile / "other")


def test_holes_are_punched_where_the_data_path_can(swapfile: int, daemon: Daemon, data_path: str) -> None:
    os.pwrite(swapfile, noise(1) + noise(2), 0)
    punch = ["fallocate", "--punch-hole", "--offset", "0", "--length", str(PAGE), str(daemon.swapfile)]
    punched = subprocess.run(punch, capture_output=True, check=False).returncode == 0
    assert punched == (data_path == "pager")
    assert os.pread(swapfile, 2 * PAGE, 0) == (bytes(PAGE) if punched else noise(1)) + noise(2)
    assert daemon.stats()["pages"]["incompressible"] == (1 if punched else 2)


def test_the_swap_file_cannot_be_truncated(swapfile: int, daemon: Daemon) -> None:
    os.pwrite(swapfile, noise(1), 0)
    with raises_errno(errno.EPERM):
        os.close(os.open(daemon.swapfile, os.O_RDWR | os.O_TRUNC))
    assert os.pread(swapfile, PAGE, 0) == noise(1)


# The swap file

ranges = st.tuples(st.integers(0, 16 * PAGE), st.integers(1, 5 * PAGE))
steps = st.lists(st.tuples(st.sampled_from(["write", "read", "zero"]), ranges, st.integers(0, 2**32)), max_size=25)


@settings(max_examples=100, deadline=None)
@given(steps=steps, shift=st.sampled_from([0, SIZE - 21 * PAGE]))
def test_it_reads_as_it_was_written(daemon: Daemon, steps: list[tuple[str, tuple[int, int], int]], shift: int) -> None:
    """Odd offsets and lengths, at both ends of the file, against a model."""
    daemon.reset()
    model = bytearray(21 * PAGE)
    with daemon.opened() as fd:
        for step, (offset, length), seed in steps:
            end = offset + length
            if step != "read":
                data = bytes(length) if step == "zero" else random.Random(seed).randbytes(length)
                assert os.pwrite(fd, data, shift + offset) == length
                model[offset:end] = data
            assert os.pread(fd, length, shift + offset) == model[offset:end]
        assert os.pread(fd, len(model), shift) == model


def test_one_large_request(swapfile: int) -> None:
    """More than the kernel puts into one FUSE request."""
    data = random.Random(1).randbytes(5 << 20)
    assert os.pwrite(swapfile, data, 100) == len(data)
    assert os.pread(swapfile, len(data), 100) == data


def test_direct_io(daemon: Daemon, swapfile: int) -> None:
    """As a loop device does it: O_DIRECT from aligned memory, straight from one file to the other."""
    content = b"".join(noise(page) for page in range(64))
    with mmap.mmap(-1, 64 * PAGE) as buffer, daemon.opened(os.O_DIRECT) as direct:
        buffer[:] = content
        assert os.pwrite(direct, buffer, 7 * PAGE) == len(content)
        # Nothing in between: the other descriptor sees it at once, and the other way round.
        assert os.pread(swapfile, len(content), 7 * PAGE) == content
        os.pwrite(swapfile, noise("new"), 8 * PAGE)
        assert os.preadv(direct, [buffer], 7 * PAGE) == len(content)
        assert buffer[PAGE : 2 * PAGE] == noise("new")


def test_concurrent_readers_and_writers(daemon: Daemon, swapfile: int) -> None:
    """All on the same few pages, whose contents name themselves: a torn or misplaced page would show."""

    def content(page: int, seed: int) -> bytes:
        return page.to_bytes(2) + seed.to_bytes(2) + random.Random(seed).randbytes(PAGE - 4)

    def work(thread: int) -> int:
        choice, seen = random.Random(thread), 0
        with daemon.opened() as fd:
            for _ in range(500):
                page = choice.randrange(8)
                if choice.randrange(2):
                    os.pwrite(fd, content(page, choice.randrange(2**16)), page * PAGE)
                elif (read := os.pread(fd, PAGE, page * PAGE)) != bytes(PAGE):
                    assert read == content(page, int.from_bytes(read[2:4]))
                    seen += 1
        return seen

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(work, range(8))) > 500


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (SIZE - PAGE, 2 * PAGE), (1 << 62, 1)])
def test_writes_past_the_end(daemon: Daemon, swapfile: int, offset: int, length: int) -> None:
    os.pwrite(swapfile, noise(1), SIZE - PAGE)
    with raises_errno(errno.EFBIG):
        os.pwrite(swapfile, bytes(length), offset)
    assert os.pread(swapfile, 2 * PAGE, SIZE - PAGE) == noise(1)
    assert os.pread(swapfile, 1, offset + length) == b""
    assert os.fstat(swapfile).st_size == SIZE


def write_errno(fd: int, data: bytes, offset: int) -> int:
    try:
        os.pwrite(fd, data, offset)
    except OSError as error:
        return error.errno or 0
    return 0


def test_a_full_pool_refuses_and_keeps_the_others(daemon: Daemon, swapfile: int) -> None:
    before = daemon.stats()["rejected_stores"]["pool_full"]
    daemon.write("mem_limit", "256K")
    errors = {page: write_errno(swapfile, noise(page), page * PAGE) for page in range(128)}
    assert set(errors.values()) == {0, errno.ENOSPC}
    stored = [page for page, number in errors.items() if number == 0]
    lost = [page for page, number in errors.items() if number != 0]
    assert len(stored) > 32
    assert len(lost) > 32
    for page in stored:
        assert os.pread(swapfile, PAGE, page * PAGE) == noise(page)
    for page in lost[:5]:
        with raises_errno(errno.EIO):
            os.pread(swapfile, PAGE, page * PAGE)
    stats = daemon.stats()
    assert stats["rejected_stores"]["pool_full"] - before == stats["pages"]["lost"] == len(lost)
    assert stats["pool_bytes"] <= 256 << 10
    # With room again, everything can be written again.
    daemon.write("mem_limit", "1M")
    for page in lost:
        os.pwrite(swapfile, noise(page), page * PAGE)
    assert all(os.pread(swapfile, PAGE, page * PAGE) == noise(page) for page in range(128))


def punch(fd: int, offset: int, length: int) -> None:
    """fallocate(2), which Python does not have."""
    if _libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def objects(daemon: Daemon) -> int:
    """That are in the pool."""
    return sum(entry["objects"] for entry in daemon.stats()["classes"])


def test_a_punched_cluster_is_used_again_at_once(make_daemon: Callable[..., Daemon]) -> None:
    """While its old objects wait to be freed behind the answer: no page is lost and no count is wrong."""
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager").start()
    # Objects of all sizes.
    tails = [noise(page)[8 * page :] + bytes(8 * page) for page in range(CLUSTER_PAGES)]

    def content(cluster: int, round: int) -> bytes:
        return b"".join(struct.pack("<HHI", cluster, round, page) + tail[8:] for page, tail in enumerate(tails))

    def use(cluster: int) -> None:
        at, length = cluster * CLUSTER_PAGES * PAGE, CLUSTER_PAGES * PAGE
        for round in range(50):
            expected = content(cluster, round)
            punch(fd, at, length)
            # The last page first: a punch that comes late would come there last.
            os.pwrite(fd, expected[-PAGE:], at + length - PAGE)
            os.pwrite(fd, expected[:-PAGE], at)
            found = os.pread(fd, length, at)
            wrong = [
                page for page in range(0, length, PAGE) if found[page : page + PAGE] != expected[page : page + PAGE]
            ]
            assert not wrong, (cluster, round, len(wrong), wrong[0])

    with daemon.opened() as fd:
        with ThreadPoolExecutor(CLUSTERS) as threads:
            list(threads.map(use, range(CLUSTERS)))
        # The last to be punched may still be being freed.
        wait_until(lambda: objects(daemon) == CLUSTERS * CLUSTER_PAGES, "every old object is freed")
        stats = daemon.stats()
        assert stats["original_bytes"] == CLUSTERS * CLUSTER_PAGES * PAGE
        assert stats["discards"] == CLUSTERS * CLUSTER_PAGES * 49
        punch(fd, 0, CLUSTERS * CLUSTER_PAGES * PAGE)
        wait_until(lambda: daemon.stats()["pool_bytes"] == 0, "every object is freed")
    stats = daemon.stats()
    assert stats["compressed_bytes"] == sum(stats["pages"].values()) == 0
    assert sum(entry["objects"] + entry["zspages"] for entry in stats["classes"]) == 0
    assert daemon.stop() == 0


# Damage, to a daemon that is used for nothing else afterwards


@pytest.fixture
def victim(make_daemon: Callable[..., Daemon], data_path: str) -> Daemon:
    return make_daemon(swap__data_path=data_path).start()


def test_damaged_bytes_are_an_error_and_not_a_wrong_page(victim: Daemon) -> None:
    with victim.opened() as swapfile:
        for page in range(3):
            os.pwrite(swapfile, noise(page), page * PAGE)
        with state_file(victim) as state:
            # The arena's first pages: beyond them the file has only holes.
            at = state.find(noise(1), 0, PAGE + SIZE // PAGE * 8 + (4 << 20))
            assert at > 0
            state[at + 1000] ^= 1
        for _ in range(2):
            with raises_errno(errno.EIO):
                os.pread(swapfile, PAGE, PAGE)
        stats = victim.stats()
        # The first read finds the damage; from then on the page is known to be lost.
        assert stats["errors"] == {"corrupt": 1, "lost": 1, "disk": 0}
        assert stats["pages"]["lost"] == 1
        assert os.pread(swapfile, PAGE, 0) == noise(0)
        assert os.pread(swapfile, PAGE, 2 * PAGE) == noise(2)
        os.pwrite(swapfile, noise("healed"), PAGE)
        assert os.pread(swapfile, PAGE, PAGE) == noise("healed")
    victim.reset()
    assert victim.stop() == 0


def word(state: int, value: int) -> int:
    """A slot word that checks (native/core/src/slots.rs)."""
    plain = state << 57 | value
    check = 0
    for group in range(15):
        check ^= plain >> 4 * group & 0xF
    return check << 60 | plain


@pytest.mark.parametrize(
    "damage",
    [
        word(3, 0),  # the other slot's object
        word(3, 1 << 36),  # no object lives there
        word(3, (1 << 37) - 1),
        word(7, 0),  # no such state
        word(2, 0x11111111) ^ 4,  # flipped bits
        word(3, 0) ^ 1 << 57,
    ],
)
def test_a_damaged_slot_word_is_an_error(victim: Daemon, damage: int) -> None:
    """A location where no object lives, or another slot's object, or a state that does not exist."""
    with victim.opened() as swapfile:
        os.pwrite(swapfile, noise(0), 0)  # the first object of the pool
        os.pwrite(swapfile, noise(1), PAGE)
        with state_file(victim) as state:
            state[PAGE + 8 : PAGE + 16] = damage.to_bytes(8, "little")
        with raises_errno(errno.EIO):
            os.pread(swapfile, PAGE, PAGE)
        assert os.pread(swapfile, PAGE, 0) == noise(0)
        os.pwrite(swapfile, noise("healed"), PAGE)
        assert os.pread(swapfile, PAGE, PAGE) == noise("healed")
        assert os.pread(swapfile, PAGE, 0) == noise(0)
    victim.reset()
    assert victim.stop() == 0


def test_what_a_damaged_slot_word_has_named_is_told_at_the_end(make_daemon: Callable[..., Daemon]) -> None:
    if os.geteuid() != 0:
        lacks("root, which a pager needs to mount")
    daemon = make_daemon(swap__data_path="pager").start()
    with daemon.opened() as swapfile:
        os.pwrite(swapfile, noise(0) + noise(1), 0)
        with state_file(daemon) as state:
            state[PAGE : PAGE + 8] = (word(3, 0) ^ 1).to_bytes(8, "little")
    assert daemon.stop() == 0
    assert re.search(r"WARNING: 1 objects in \d+ pages of the pool belonged to no slot", daemon.log())
