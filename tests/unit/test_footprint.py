import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zswapd import config, daemon
from zswapd.config import Config, load
from zswapd.errors import ConfigError
from zswapd.footprint import DESCRIPTOR_BYTES, LRU_BYTES, SLOT_BYTES, refuse_huge, tables_bytes

GIB = 1 << 30


@pytest.fixture
def signals() -> Iterator[None]:
    """As they were: the daemon keeps them."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_system_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "absent.toml")


def test_tables_grow_with_the_swap_file_and_with_the_pool() -> None:
    slots = GIB // 4096
    assert tables_bytes(GIB, 0) == slots * SLOT_BYTES
    assert tables_bytes(GIB, GIB) == slots * (SLOT_BYTES + DESCRIPTOR_BYTES)
    # A pool that is never full has no descriptors for the rest.
    assert tables_bytes(GIB, 99 * GIB) == tables_bytes(GIB, 2 * GIB)


@given(st.integers(1, 1 << 32), st.integers(1, 1 << 28), st.integers(6, 22), st.booleans())
def test_what_is_refused_fits_once_it_is_made_as_small_as_is_said(
    slots: int, limit: int, log_ram_mib: int, writeback: bool
) -> None:
    def settings(size: str) -> Config:
        backing = "/dev/x" if writeback else ""
        overrides = [f"swap.size={size}", f"pool.mem_limit={limit * 4096}", f"writeback.backing={backing}"]
        return load(None, overrides, {})

    ram = 1 << 20 + log_ram_mib
    slot = SLOT_BYTES + (LRU_BYTES if writeback else 0)
    if 2 * tables_bytes(slots * 4096, limit * 4096, slot=slot) <= ram:
        refuse_huge(settings(str(slots * 4096)), ram)
        return
    with pytest.raises(ConfigError, match=r"^swap.size = .* more than half") as caught:
        refuse_huge(settings(str(slots * 4096)), ram)
    refuse_huge(settings(caught.value.hint.split()[2]), ram)


async def test_neither_data_path_begins_to_make_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Touching the tables would take all memory."""
    monkeypatch.setattr("zswapd.footprint.mem_total", lambda: GIB)
    for path in ("pager", "pyfuse3"):
        overrides = ["swap.size=16TiB", f"swap.mount_point={tmp_path}", f"swap.data_path={path}"]
        with pytest.raises(ConfigError, match=r"tables.* 40\.\d GiB of the 1\.0 GiB"):
            await daemon.run(load(None, overrides, {}))
