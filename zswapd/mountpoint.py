"""The mount point's name: as the kernel shows it, and short enough for the pager's socket beside it."""

import os
from pathlib import Path

from zswapd.pager_socket import socket_path

#: sockaddr_un.sun_path (linux/un.h), without the zero byte at its end.
_ADDRESS_BYTES = 107
_LINKS = 40  # as many symbolic links as the kernel follows


def resolve(mount_point: Path) -> Path:
    """Without symbolic links. Does not touch the mount: a lookup of it could wait for the daemon."""
    path = mount_point
    for _ in range(_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        try:
            path = path.parent / os.readlink(path)
        except OSError:  # not a symbolic link
            break
    return path


def refuse_long(mount_point: Path) -> None:
    """Raises ValueError if the path of the pager's socket could not be an address."""
    length, path = len(os.fsencode(mount_point)), socket_path(mount_point)
    most = _ADDRESS_BYTES - (len(os.fsencode(path)) - length)
    if length > most:
        raise ValueError(f"{length} bytes are too long: a socket lies beside it, and sockets allow {most}")
