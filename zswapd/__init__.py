"""zswapd: compressed swap for Linux, served from userspace."""


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: that takes time, and programs first see to Ctrl-C (entry.py)."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("zswapd")
