"""What can be a backing disk, and what not; and files of real file systems, made and found again."""

import fcntl
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.machine import lacks
from zswapd import backing, backing_file
from zswapd.backing import Mount
from zswapd.config import Writeback, load
from zswapd.errors import BackingError

MIB = 1 << 20
SIZE = 16 * MIB


def settings(path: Path | str, size: int = 0) -> Writeback:
    return load(None, [f"writeback.backing={path}", f"writeback.size={size}"], {}).writeback


def write(root: Path, path: str, text: str = "") -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


async def made(path: Path, size: int = SIZE) -> list[int]:
    """Makes it, and gives it free; returns the reports."""
    reports: list[int] = []
    os.close(await backing_file.make(path, size, reports.append))
    return reports


# File systems


@pytest.mark.parametrize("kind", ["ext4", "xfs", "ext3", "ext2"])
def test_what_writes_in_place_is_taken(kind: str) -> None:
    backing.refuse_file_system(Mount(kind, "/"), "/x")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        *((kind, "copies on write") for kind in ("btrfs", "bcachefs", "zfs", "overlay", "f2fs")),
        *((kind, "over a network") for kind in ("nfs", "nfs4", "cifs", "9p", "ceph", "virtiofs")),
        *((kind, "served by a process") for kind in ("fuse", "fuse.sshfs", "fuseblk")),
        *((kind, "in memory") for kind in ("tmpfs", "ramfs", "devtmpfs")),
        ("vfat", "not known to write in place"),
    ],
)
def test_what_does_not_is_refused_with_the_reason(kind: str, why: str) -> None:
    with pytest.raises(BackingError, match=rf"^/x is on {kind} \(at /mnt\), which .*{why}") as caught:
        backing.refuse_file_system(Mount(kind, "/mnt"), "/x")
    assert "ext4 or xfs" in caught.value.hint


def test_a_file_in_memory_is_refused() -> None:
    with pytest.raises(BackingError, match="in memory"):
        backing.look(settings("/dev/shm/x", SIZE))
    assert not Path("/dev/shm/x").exists()


def test_a_file_needs_a_size_and_a_directory(disk: Path) -> None:
    with pytest.raises(BackingError, match="a file needs a size") as caught:
        backing.look(settings(disk / "x"))
    assert "writeback.size" in caught.value.hint
    with pytest.raises(BackingError, match="too few"):
        backing.look(settings(disk / "x", SIZE - 4096))
    with pytest.raises(BackingError, match="No such file or directory") as caught:
        backing.look(settings(disk / "no/x", SIZE))
    assert f"mkdir -p {disk}/no" in caught.value.hint
    with pytest.raises(BackingError, match="neither a block device nor a file"):
        backing.look(settings(disk, SIZE))


def test_what_zswapd_has_not_made_is_left_alone(disk: Path) -> None:
    (disk / "x").write_bytes(b"precious")
    with pytest.raises(BackingError, match="not made") as caught:
        backing.look(settings(disk / "x", SIZE))
    assert "remove it" in caught.value.hint
    (disk / "y").touch()
    backing.look(settings(disk / "y", SIZE))
    (disk / "link").symlink_to("x")
    with pytest.raises(BackingError, match=f"{disk}/x is a file"):
        backing.look(settings(disk / "link", SIZE))
    assert (disk / "x").read_bytes() == b"precious"


async def test_another_name_for_the_file_is_refused(disk: Path) -> None:
    await made(disk / "x")
    (disk / "y").hardlink_to(disk / "x")
    with pytest.raises(BackingError, match="hard links"):
        backing.look(settings(disk / "x", SIZE))


async def test_too_little_space_is_said_before_anything_is_written(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    class Full:
        f_bavail, f_frsize = 3 * MIB // 4096, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(BackingError, match=r"needs 16.0 MiB more, 3.0 MiB are free") as caught:
        backing.look(settings(disk / "x", SIZE))
    assert "writeback.size" in caught.value.hint
    assert list(disk.iterdir()) == []
    monkeypatch.setattr(os, "statvfs", real)
    await made(disk / "x")
    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    backing.look(settings(disk / "x", SIZE + 2 * MIB))


def test_journaled_data_is_refused(disk: Path, tmp_path: Path) -> None:
    number = disk.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    write(tmp_path, f"sys/block/{name}/dev", name)
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / f"sys/dev/block/{name}").symlink_to(f"../../block/{name}")
    write(tmp_path, "proc/self/mountinfo", Path("/proc/self/mountinfo").read_text())
    write(tmp_path, f"proc/fs/ext4/{name}/options", "rw\ndata=ordered\n")
    backing.look(settings(disk / "x", SIZE), tmp_path)
    write(tmp_path, f"proc/fs/ext4/{name}/options", "rw\ndata=journal\n")
    with pytest.raises(BackingError, match="data=journal"):
        backing.look(settings(disk / "x", SIZE), tmp_path)


# Making the file


async def test_whoever_may_read_the_file_is_root_alone(disk: Path) -> None:
    await made(disk / "x")
    (disk / "x").chmod(0o644)
    await made(disk / "x")
    assert (disk / "x").stat().st_mode & 0o7777 == 0o600


async def test_every_block_of_the_file_is_on_the_disk(disk: Path) -> None:
    path = disk / "x"
    assert await made(path) == [0, SIZE]
    info = path.stat()
    assert (info.st_mode & 0o7777, info.st_size) == (0o600, SIZE)
    assert info.st_blocks * 512 >= SIZE
    assert backing_file.written_bytes(path) == SIZE
    assert path.read_bytes() == bytes(SIZE)
    # It is not written again.
    path.write_bytes(b"")  # truncates
    assert await made(path) == [0, SIZE]
    with path.open("r+b") as file:
        file.write(b"\xaa" * SIZE)
        os.fsync(file)
    assert await made(path) == [SIZE]
    assert path.read_bytes() == b"\xaa" * SIZE


async def test_a_size_that_has_changed_is_followed(disk: Path) -> None:
    path = disk / "x"
    await made(path)
    assert await made(path, 2 * SIZE) == [SIZE, 2 * SIZE]
    assert path.stat().st_size == backing_file.written_bytes(path) == 2 * SIZE
    assert await made(path, SIZE + 4096) == [SIZE + 4096]
    assert path.stat().st_size == SIZE + 4096


def fallocate(path: Path, what: str, offset: int) -> None:
    subprocess.run(["fallocate", what, "--offset", str(offset), "--length", "8192", path], check=True)


async def test_a_hole_is_filled(disk: Path) -> None:
    path = disk / "x"
    await made(path)
    fallocate(path, "--punch-hole", 5 * MIB)
    assert await made(path) == [5 * MIB, SIZE]
    # What is allocated and was never written takes the journal to be written.
    fallocate(path, "--zero-range", 7 * MIB)
    fd = os.open(path, os.O_RDONLY)
    assert backing_file._first_hole(fd, SIZE) == 7 * MIB
    os.close(fd)
    assert await made(path) == [7 * MIB, SIZE]


async def test_what_was_begun_is_gone_on_with(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing_file, "STEP_BYTES", 4 * MIB)
    path = disk / "x"
    with trio.CancelScope() as scope:

        def cancel_in_the_middle(written: int) -> None:
            if written == 8 * MIB:
                scope.cancel()

        await backing_file.make(path, SIZE, cancel_in_the_middle)
    assert scope.cancelled_caught
    assert backing_file.written_bytes(path) == 8 * MIB
    assert not backing_file.is_locked(path)
    assert await made(path) == [8 * MIB, 12 * MIB, SIZE]


def test_one_file_is_for_one_pager(disk: Path) -> None:
    path = disk / "x"
    fd = trio.run(backing_file.make, path, SIZE, lambda written: None)
    # As a pager inherits it.
    child = subprocess.Popen(["sleep", "600"], pass_fds=(fd,))
    os.close(fd)
    try:
        assert backing_file.is_locked(path)
        with pytest.raises(BackingError, match="in use by another pager"):
            trio.run(made, path)
    finally:
        child.kill()
        child.wait()
    assert not backing_file.is_locked(path)
    trio.run(made, path)


async def test_a_full_disk_is_an_error_with_a_remedy(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BackingError, match="cannot be written: No space left") as caught:
        await made(disk / "x")
    assert "writeback.size" in caught.value.hint
    assert not backing_file.is_locked(disk / "x")


async def test_no_direct_io_is_said(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BackingError, match="no direct I/O"):
        await made(disk / "x")


async def test_who_asks_is_told_how_far_it_is(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing_file, "STEP_BYTES", 4 * MIB)
    wanted = settings(disk / "x", SIZE)
    assert backing.being_written(wanted) is None
    seen: list[str | None] = []
    fd = await backing_file.make(disk / "x", SIZE, lambda written: seen.append(backing.being_written(wanted)))
    os.close(fd)
    assert seen[2] == "it is writing the backing file first, 50% of 16.0 MiB so far"
    assert seen[4] is None
    os.setxattr(disk / "x", backing_file.MARK, b"4096")
    assert backing.being_written(wanted) is None  # interrupted


# Block devices


def test_a_free_block_device_is_taken_whole(loop: Path) -> None:
    disk = backing.look(settings(loop))
    assert (disk.path, disk.is_file, disk.size_bytes) == (loop, False, 2 * SIZE)
    with pytest.raises(BackingError, match="block device: all of it is used"):
        backing.look(settings(loop, SIZE))


def test_a_block_device_that_is_too_small_is_refused(loop: Path, disk: Path) -> None:
    os.truncate(disk / "image", SIZE - 4096)
    subprocess.run(["losetup", "--set-capacity", loop], check=True)
    with pytest.raises(BackingError, match=f"{loop}: {SIZE - 4096} bytes are too few"):
        backing.look(settings(loop))


def test_a_block_device_that_somebody_has_is_refused(loop: Path) -> None:
    fd = os.open(loop, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(BackingError, match="cannot be opened: somebody has it open exclusively"):
            backing.look(settings(loop))
    finally:
        os.close(fd)
    backing.look(settings(loop))


@pytest.mark.parametrize(("make", "what"), [("mkfs.ext4 -q", "ext4"), ("mkswap", "swap")])
def test_a_block_device_that_holds_something_is_refused_until_it_is_wiped(loop: Path, make: str, what: str) -> None:
    subprocess.run([*make.split(), loop], check=True, capture_output=True)
    with pytest.raises(BackingError, match=f"{loop} holds {what}") as caught:
        backing.look(settings(loop))
    remedy = caught.value.hint.rpartition(": ")[2]
    assert remedy == f"wipefs --all {loop}"
    subprocess.run(remedy.split(), check=True, capture_output=True)
    backing.look(settings(loop))


def test_a_partition_table_is_something(loop: Path) -> None:
    table = bytes(510) + b"\x55\xaa"
    table = table[:446] + bytes([0, 0, 2, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 0, 16, 0, 0]) + table[462:]
    loop.write_bytes(table)
    with pytest.raises(BackingError, match="holds dos"):
        backing.look(settings(loop))


def test_a_read_only_device_is_refused(loop: Path) -> None:
    subprocess.run(["blockdev", "--setro", loop], check=True)
    try:
        with pytest.raises(BackingError, match=f"^{loop} is read-only"):
            backing.look(settings(loop))
    finally:
        # It outlives the loop device.
        subprocess.run(["blockdev", "--setrw", loop], check=True)


def test_a_loop_device_over_memory_is_memory() -> None:
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        lacks("root and loop devices")
    image = Path("/dev/shm", f"zswapd-test-{os.getpid()}")
    image.touch()
    os.truncate(image, SIZE)
    device = ""
    try:
        losetup = ["losetup", "--find", "--show", str(image)]
        device = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
        with pytest.raises(BackingError, match=rf"{device}, a loop device over {image}, is on tmpfs"):
            backing.look(settings(device))
    finally:
        if device:
            subprocess.run(["losetup", "--detach", device], check=True)
        image.unlink()


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(BackingError, match="no such device"):
        backing.look(settings("/dev/no-such-disk"))


def add_device(root: Path, name: str, number: str, rotational: int = 0, parent: str = "") -> int:
    directory = f"sys/devices/{parent}{name}"
    write(root, f"{directory}/dev", f"{number}\n")
    if parent:
        write(root, f"{directory}/partition", "1\n")
    else:
        write(root, f"{directory}/queue/rotational", f"{rotational}\n")
    link = root / f"sys/dev/block/{number}"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(root / directory)
    return os.makedev(*map(int, number.split(":")))


def test_devices_are_followed_down_to_the_disk(tmp_path: Path) -> None:
    add_device(tmp_path, "sda", "8:0", rotational=1)
    sda1 = add_device(tmp_path, "sda1", "8:1", parent="sda/")
    nbd = add_device(tmp_path, "nbd0", "43:0")
    mapped = add_device(tmp_path, "dm-0", "253:0")
    sdb = add_device(tmp_path, "sdb", "8:16")
    slaves = tmp_path / "sys/devices/dm-0/slaves"
    slaves.mkdir()
    (slaves / "sda1").symlink_to(tmp_path / "sys/devices/sda/sda1")
    assert backing.is_rotational(sda1, tmp_path)
    assert backing.is_rotational(mapped, tmp_path)
    assert not backing.is_rotational(sdb, tmp_path)
    backing.refuse_stack(mapped, "/dev/dm-0", tmp_path)
    with pytest.raises(BackingError, match=r"over a network \(nbd0\)"):
        backing.refuse_stack(nbd, "/dev/nbd0", tmp_path)
    (slaves / "nbd0").symlink_to(tmp_path / "sys/devices/nbd0")
    with pytest.raises(BackingError, match=r"/dev/dm-0 is reached over a network \(nbd0\)"):
        backing.refuse_stack(mapped, "/dev/dm-0", tmp_path)
    zram = add_device(tmp_path, "zram0", "252:0")
    with pytest.raises(BackingError, match="in memory"):
        backing.refuse_stack(zram, "/dev/zram0", tmp_path)


@pytest.mark.parametrize(
    ("directory", "files", "why"),
    [
        ("platform/host3/session1/target3:0:0/3:0:0:0/block/sdb", {}, r"over a network \(sdb, iSCSI\)"),
        ("nvme-fabrics/ctl/nvme0/nvme0n1", {"../transport": "tcp"}, r"\(nvme0n1, NVMe over tcp\)"),
        ("nvme-subsystem/nvme-subsys0/nvme0n1", {"../nvme1/transport": "rdma"}, "NVMe over rdma"),
        ("pci0/nvme0/nvme0n1", {"../transport": "pcie"}, None),
        ("virtual/block/dm-1", {"dm/uuid": "LVM-abc-tpool"}, r"thinly provisioned \(dm-1\)"),
        ("virtual/block/dm-1", {"dm/uuid": "LVM-abc-cow"}, "a snapshot"),
        ("virtual/block/dm-1", {"dm/uuid": "CRYPT-LUKS2-abc-x"}, None),
    ],
)
def test_a_network_and_what_takes_space_are_told_by_sysfs(
    tmp_path: Path, directory: str, files: dict[str, str], why: str | None
) -> None:
    device = tmp_path / "sys/devices" / directory
    device.mkdir(parents=True)
    for name, text in files.items():
        write(tmp_path, os.path.normpath(f"sys/devices/{directory}/{name}"), f"{text}\n")
    write(tmp_path, f"sys/devices/{directory}/dev", "259:0\n")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/259:0").symlink_to(device)
    if why is None:
        backing.refuse_stack(os.makedev(259, 0), "/dev/x", tmp_path)
    else:
        with pytest.raises(BackingError, match=why):
            backing.refuse_stack(os.makedev(259, 0), "/dev/x", tmp_path)


def test_a_loop_device_that_takes_memory_or_space_is_remarked_on(loop: Path, disk: Path) -> None:
    name = loop.name
    assert any(
        f"{name} is over {disk}/image, which has holes" in remark for remark in backing.look(settings(loop)).remarks
    )
    (disk / "image").write_bytes(bytes(2 * SIZE))
    for direct, expected in (("off", 1), ("on", 0)):
        subprocess.run(["losetup", f"--direct-io={direct}", loop], check=True)
        remarks = [remark for remark in backing.look(settings(loop)).remarks if name in remark]
        assert len(remarks) == expected, remarks
        assert all("no direct I/O" in remark for remark in remarks)


def test_who_has_a_device_is_named(tmp_path: Path) -> None:
    sda = add_device(tmp_path, "sda", "8:0")
    add_device(tmp_path, "sda1", "8:1", parent="sda/")
    path = Path("/dev/sda")
    write(tmp_path, "proc/self/mountinfo", "1 1 0:5 / /proc rw - proc proc rw\n")
    write(tmp_path, "proc/swaps", "Filename Type Size Used Priority\n")
    assert backing.who_has(path, sda, tmp_path) is None
    write(tmp_path, "sys/devices/sda/sda1/holders/dm-0/dev", "253:0\n")
    assert backing.who_has(path, sda, tmp_path) == "sda1 is part of dm-0"
    write(tmp_path, "proc/swaps", "Filename Type Size Used Priority\n/dev/sda1 partition 9 0 1\n")
    assert backing.who_has(path, sda, tmp_path) == "/dev/sda1 is a swap area"
    write(tmp_path, "proc/self/mountinfo", "1 1 8:1 / /home rw - ext4 /dev/sda1 rw\n")
    assert backing.who_has(path, sda, tmp_path) == "mounted on /home"


async def test_prepare_gives_back_the_lock_of_a_file_and_none_of_a_device(disk: Path, loop: Path) -> None:
    said: list[str] = []
    assert await backing.prepare(load(None, [], {}).writeback, said.append) is None
    assert await backing.prepare(settings(loop), said.append) is None
    assert said == []
    lock = await backing.prepare(settings(disk / "x", SIZE), said.append)
    assert lock is not None
    assert said == [f"writing the backing file {disk}/x: 0%"]
    with (disk / "x").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
