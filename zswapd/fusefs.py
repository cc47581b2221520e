"""The file system: a root directory with the swap file and the control files. The only user of pyfuse3.

Where a pager serves the pages, it hands on what is not for the swap file, and SwapFs answers that. On the portable
path pyfuse3 serves the mount itself, and PageFs's handlers carry the pages too: correct, but a Python handler may
need memory to answer the request that is to free memory.
"""

import errno
import itertools
import logging
import os
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FUSEError, InodeT

from zswapd.control import ControlFile, control_files
from zswapd.engine import EmbeddedEngine, Engine
from zswapd.errors import DaemonError
from zswapd.inuse import in_use, refuse_in_use
from zswapd.pager import Pager

log = logging.getLogger(__name__)

T = TypeVar("T")

SWAPFILE = "swapfile"
_SWAP_INODE = InodeT(pyfuse3.ROOT_INODE + 1)
# Names, sizes and modes never change while mounted.
_CACHE_SECONDS = 3600.0
_RELAY_SECONDS = 10
# Anyone may open what anyone may read, and each opening keeps its contents. As many more are root's alone.
_MAX_OPENS = 256
_MAX_COMMAND = 256


def _is_news(record: logging.LogRecord) -> bool:
    """Not a reply that nobody waits for: who has asked was interrupted, or the pager has ended over his command."""
    gone = (os.strerror(number) for number in (errno.ENOENT, errno.EPIPE, errno.ENOTCONN, errno.ECONNRESET))
    return "fuse_reply_* failed" not in record.msg or not set(gone).intersection(record.args or ())


logging.getLogger("pyfuse3").addFilter(_is_news)


class SwapFs(pyfuse3.Operations):
    """The directory and the control files. Requests on the swap file's contents never come here."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._size = engine.stats()["swap_size_bytes"]
        self._controls = control_files(engine)
        self._names = (SWAPFILE, *self._controls)
        self._mounted_ns = time.time_ns()
        self._handles = map(FileHandleT, itertools.count(1))
        #: Control files by handle, with their contents as of the opening.
        self._control_opens: dict[FileHandleT, tuple[ControlFile, bytes]] = {}

    # Names

    async def lookup(self, parent_inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        if parent_inode != pyfuse3.ROOT_INODE:
            raise FUSEError(errno.ENOTDIR)
        if name in (b".", b".."):
            return self._attributes(pyfuse3.ROOT_INODE)
        try:
            return self._attributes(InodeT(_SWAP_INODE + self._names.index(os.fsdecode(name))))
        except ValueError:
            raise FUSEError(errno.ENOENT) from None

    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        if inode != pyfuse3.ROOT_INODE:
            raise FUSEError(errno.ENOTDIR)
        return FileHandleT(0)

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for position, name in enumerate(self._names[start_id:], start_id):
            entry = self._attributes(InodeT(_SWAP_INODE + position))
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, position + 1):
                return

    async def _refuse(self, *_: object) -> NoReturn:
        """The files are what they are, as in procfs and sysfs: none is made, removed or renamed."""
        raise FUSEError(errno.EPERM)

    create = mknod = mkdir = symlink = link = unlink = rmdir = rename = _refuse  # type: ignore[assignment]

    # Attributes

    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return self._attributes(inode)

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        current = self._attributes(inode)
        # A control file, whose size is always 0, may be truncated.
        resized = fields.update_size and attr.st_size != current.st_size
        if resized or fields.update_mode or fields.update_uid or fields.update_gid:
            raise FUSEError(errno.EPERM)
        return current

    def _attributes(self, inode: InodeT) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._mounted_ns
        entry.st_blksize = 4096
        entry.entry_timeout = entry.attr_timeout = _CACHE_SECONDS
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFDIR | 0o755
            entry.st_nlink = 2
        elif inode == _SWAP_INODE:
            entry.st_mode = stat.S_IFREG | 0o600
            entry.st_size = self._size
            entry.st_blocks = self._size // 512
        else:
            entry.st_mode = stat.S_IFREG | self._control(inode).mode
            entry.st_size = 0
        return entry

    def _control(self, inode: InodeT) -> ControlFile:
        position = inode - _SWAP_INODE
        if not 0 < position < len(self._names):
            raise FUSEError(errno.ENOENT)
        return self._controls[self._names[position]]

    # Contents

    async def open(self, inode: InodeT, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        if len(self._control_opens) >= (_MAX_OPENS if ctx.uid else 2 * _MAX_OPENS):
            raise FUSEError(errno.EMFILE)
        fh = next(self._handles)
        self._control_opens[fh] = self._open_control(self._control(inode), flags & os.O_ACCMODE)
        return FileInfo(fh=fh, direct_io=True)

    def _open_control(self, control: ControlFile, access: int) -> tuple[ControlFile, bytes]:
        reads, writes = access != os.O_WRONLY, access != os.O_RDONLY
        if (reads and control.read is None) or (writes and control.write is None):
            raise FUSEError(errno.EACCES)
        return control, _answer(control.read).encode() if reads and control.read else b""

    async def release(self, fh: FileHandleT) -> None:
        self._control_opens.pop(fh, None)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        _, contents = self._opened(fh)
        return contents[off : off + size]

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        control, _ = self._opened(fh)
        if len(buf) > _MAX_COMMAND:
            raise FUSEError(errno.EINVAL)

        def command() -> None:
            _answer(lambda: control.write and control.write(buf.decode().strip()))

        if control.slow:
            # Abandoned when the daemon ends: the pager does it, or ends with it.
            await trio.to_thread.run_sync(command, abandon_on_cancel=True)
        else:
            command()
        return len(buf)

    def _opened(self, fh: FileHandleT) -> tuple[ControlFile, bytes]:
        try:
            return self._control_opens[fh]
        except KeyError:
            # Opened before the daemon was started anew.
            raise FUSEError(errno.ESTALE) from None

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Nothing to do: a page is stored when its write is answered."""

    async def flush(self, fh: FileHandleT) -> None:
        """Nothing to do, as for fsync."""

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = self._size // 4096
        data.f_bfree = data.f_bavail = 0
        data.f_files = len(self._names) + 1
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data


class PageFs(SwapFs):
    """The swap file's contents as well, from the embedded engine. A handler runs to its end without giving way."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        super().__init__(engine)
        self._pages = engine
        self._swapfile_handles: set[FileHandleT] = set()

    async def open(self, inode: InodeT, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        if inode != _SWAP_INODE:
            return await super().open(inode, flags, ctx)
        if flags & os.O_TRUNC:
            # The kernel would take the file to be empty from then on.
            raise FUSEError(errno.EPERM)
        fh = next(self._handles)
        self._swapfile_handles.add(fh)
        self._pages.opens += 1
        # Direct I/O: the page cache would hold a second copy of every page.
        return FileInfo(fh=fh, direct_io=True)

    async def release(self, fh: FileHandleT) -> None:
        if fh in self._swapfile_handles:
            self._swapfile_handles.remove(fh)
            self._pages.opens -= 1
        await super().release(fh)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        if fh in self._swapfile_handles:
            return _answer(lambda: self._pages.read(off, size))
        return await super().read(fh, off, size)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        if fh in self._swapfile_handles:
            _answer(lambda: self._pages.write(off, buf))
            return len(buf)
        return await super().write(fh, off, buf)


def _answer(request: Callable[[], T]) -> T:
    """Does what a request asks for. Every failure becomes an errno: an exception that left a handler would end the
    daemon, and take away the swap."""
    try:
        return request()
    except OSError as error:
        # Not logged: a full pool refuses pages by the thousand, and a log that nobody reads would hold them up.
        raise FUSEError(error.errno or errno.EIO) from None
    except (ValueError, OverflowError) as error:
        log.warning("a control file was given a bad value: %s", error)
        raise FUSEError(errno.EINVAL) from None
    except Exception:
        log.exception("a request failed in a way that it never should")
        raise FUSEError(errno.EIO) from None


def check_mount_point(mount_point: Path) -> None:
    """Raises DaemonError unless `mount_point` is an empty directory on which nothing is mounted.

    InUseError, if a pager is.
    """
    try:
        entries: Sequence[str] = os.listdir(mount_point)
    except FileNotFoundError:
        raise DaemonError(f"the mount point {mount_point} does not exist", f"make it: mkdir -p {mount_point}") from None
    except NotADirectoryError:
        raise DaemonError(
            f"the mount point {mount_point} is not a directory", "name another: swap.mount_point"
        ) from None
    except BlockingIOError:
        # A pager's answer as long as no zswapd serves: somebody has started it at the same moment.
        raise in_use(mount_point, None) from None
    except OSError as error:
        dead = error.errno == errno.ENOTCONN
        hint = f"a dead daemon left it mounted: umount {mount_point}" if dead else "name another: swap.mount_point"
        raise DaemonError(f"the mount point {mount_point} cannot be used: {error.strerror}", hint) from None
    if os.path.ismount(mount_point):
        raise DaemonError(f"something is mounted on the mount point {mount_point} already", f"umount {mount_point}")
    if entries:
        hint = "empty it, or name another: swap.mount_point"
        raise DaemonError(f"the mount point {mount_point} is not empty: it has {entries[0]!r}", hint)


def unmount_dead(mount_point: Path) -> None:
    """Takes away a file system whose server has died. One that is in use stays: check_mount_point tells."""
    try:
        os.listdir(mount_point)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            log.warning("%s is mounted, but its server has died: unmounting it", mount_point)
            subprocess.run(["umount", mount_point], stderr=subprocess.DEVNULL, check=False)


@asynccontextmanager
async def mounted(engine: EmbeddedEngine, mount_point: Path) -> AsyncIterator[None]:
    """Mounts the file system and serves it, pages and all, until the block ends; then unmounts it.

    Ending the block with the swap file open takes it away from who has it open: check `engine.opens` first. If
    somebody unmounts the file system meanwhile, the block is cancelled. Raises DaemonError.
    """
    check_mount_point(mount_point)
    options = {*pyfuse3.default_options, "fsname=zswapd"}
    if os.geteuid() == 0:
        # For monitoring by other users; the modes of the files say what they may do.
        options.add("allow_other")
    async with _served(PageFs(engine), str(mount_point), options, unmount=True):
        yield


async def connect(pager: Pager) -> int:
    """The relay's descriptor, for `relayed`: whoever has it is alone. Raises InUseError if another zswapd has it.

    Waits for it a little: a daemon that was killed just now may not have been missed yet.
    """
    with trio.move_on_after(_RELAY_SECONDS):
        while True:
            try:
                return pager.relay()
            except OSError as error:
                if error.errno != errno.EBUSY:
                    hint = "see its log, and dmesg"
                    raise DaemonError(f"the pager does not answer: {error.strerror}", hint) from None
            await trio.to_thread.run_sync(refuse_in_use, pager.mount_point)
            await trio.sleep(0.05)
    raise in_use(pager.mount_point, None)


@asynccontextmanager
async def relayed(pager: Pager, relay: int) -> AsyncIterator[None]:
    """Serves what a pager hands on, until the block ends. If the pager ends first, the block is cancelled."""
    # libfuse takes the descriptor over, and closes it.
    async with _served(SwapFs(pager), f"/dev/fd/{relay}", set(pyfuse3.default_options), unmount=False):
        yield


@asynccontextmanager
async def _served(fs: SwapFs, mount_point: str, options: set[str], *, unmount: bool) -> AsyncIterator[None]:
    try:
        pyfuse3.init(fs, mount_point, options)
    except RuntimeError as error:
        hint = "is /dev/fuse there (modprobe fuse), and may this user mount (root, or fusermount3)?"
        raise DaemonError(f"cannot mount on {mount_point}: {error}", hint) from None
    try:
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                try:
                    await pyfuse3.main()
                except* OSError:
                    # To libfuse, a pager that has hung up is an I/O error.
                    if unmount:
                        raise
                nursery.cancel_scope.cancel()

            nursery.start_soon(serve)
            yield
            # Unless it has ended by itself, as a pager that was told to stop does.
            if not nursery.cancel_scope.cancel_called:
                pyfuse3.terminate()
    finally:
        pyfuse3.close(unmount=unmount)
