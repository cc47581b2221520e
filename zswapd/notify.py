"""What systemd is told of a service, and asks of it (sd_notify(3), sd_watchdog_enabled(3))."""

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Tells systemd, where it is systemd that started us. Does not wait for long; an error is logged."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(1)
            # A leading @ stands for the zero byte of an abstract address.
            connection.connect("\0" + address[1:] if address.startswith("@") else address)
            connection.send(state.encode())
    except OSError as error:
        log.warning("cannot tell systemd how we are (NOTIFY_SOCKET): %s", error.strerror or error)


def watchdog_seconds(environ: Mapping[str, str] = os.environ) -> float | None:
    """After so long without a WATCHDOG=1 systemd ends us (WatchdogSec); None: it does not look."""
    usec = environ.get("WATCHDOG_USEC", "")
    if not usec.isdecimal() or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(usec) / 1e6 or None
