"""The errors that zswapd shows to people: what is wrong and where, and what to do about it."""


class ZswapdError(Exception):
    """`message` says what was wrong and where; `hint`, if there is one, says what to do.

    str() gives the message, with the hint on a line of its own.
    """

    #: What zswapd ends with.
    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ConfigError(ZswapdError):
    """The configuration cannot be used: nothing was started or changed."""


class SwapError(ZswapdError):
    """Attaching or detaching the swap failed; the message says what state was left."""


class DaemonError(ZswapdError):
    """The daemon does not run, or does not answer."""


class InUseError(DaemonError):
    """Another zswapd serves the mount point: nothing was started or changed."""

    #: As for bad usage.
    exit_status = 2


class LostSwapError(DaemonError):
    """The pager has died while a loop device was on its swap file: starting anew brings nothing back."""

    #: EX_UNAVAILABLE, on which systemd/zswapd.service does not start it again.
    exit_status = 69


class BackingError(ZswapdError):
    """The backing disk cannot be used. What is on it is as it was, but for a file that zswapd itself has made."""
