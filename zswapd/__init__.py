"""zswapd: compressed swap for Linux, served from userspace."""

from importlib.metadata import version

__version__ = version("zswapd")
