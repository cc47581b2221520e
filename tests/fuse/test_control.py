"""The control files and the statistics, through the mounted file system."""

import errno
import os
import re
import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.daemon import CONTROLS, DEADLINE_SECONDS, HOST, Daemon, wait_until
from tests.errnos import raises_errno
from tests.pages import PAGE, noise
from tests.writeback import COUNTS, RECOMPRESSION

SIZE = 64 << 20

# Commands


def test_comp_algorithm(daemon: Daemon, swapfile: int) -> None:
    assert daemon.read("comp_algorithm") == "[lz4] zstd\n"
    text = (b"some text " * PAGE)[:PAGE]
    os.pwrite(swapfile, text, 0)
    daemon.write("comp_algorithm", "zstd level=9\n")
    assert daemon.read("comp_algorithm") == "lz4 [zstd]\n"
    assert daemon.stats()["zstd_level"] == 9
    os.pwrite(swapfile, text, PAGE)
    pages = daemon.stats()["pages"]
    assert (pages["lz4"], pages["zstd"]) == (1, 1)
    assert os.pread(swapfile, 2 * PAGE, 0) == 2 * text
    daemon.write("comp_algorithm", "zstd")
    assert daemon.stats()["zstd_level"] == 9


@pytest.mark.parametrize(
    ("command", "limit"), [("1048576\n", 1 << 20), ("8K", 8192), ("2M", 2 << 20), ("1GiB", 1 << 30)]
)
def test_mem_limit(daemon: Daemon, swapfile: int, command: str, limit: int) -> None:
    daemon.write("mem_limit", command)
    assert daemon.read("mem_limit") == f"{limit}\n"
    assert daemon.stats()["pool_limit_bytes"] == limit


@pytest.mark.parametrize(
    ("name", "command"),
    [
        *(
            ("mem_limit", bad)
            for bad in ("x", "-1", "1.5M", "\n", "1M 2M", "0x10", str(2**64), "9" * 20, "9" * 20 + "T")
        ),
        *(("mem_limit", bad) for bad in (b"\xff\xfe", b"1\0", "9" * 5000, "0", "4095", "1025G")),
        *(
            ("comp_algorithm", bad)
            for bad in ("lzo", "\n", "zstd level=0", "zstd level=23", "zstd level=x", "lz4 level=1")
        ),
        *(
            ("comp_algorithm", bad)
            for bad in (f"zstd level={2**64}", "zstd level=", "zstd speed=1", "ZSTD", "lz4 zstd")
        ),
        *(("idle", bad) for bad in ("\n", "none", "0", "-1", "1.5", str(2**32), "all 1")),
        *(("writeback", bad) for bad in ("\n", "everything", "page", "page_index=", "page_index=-1", "1" * 12, "ALL")),
        *((name, bad) for name in ("compact", "reset") for bad in ("0", "2", "\n", "yes", "11")),
    ],
)
def test_bad_commands_change_nothing(daemon: Daemon, swapfile: int, name: str, command: str | bytes) -> None:
    os.pwrite(swapfile, noise(1), 0)
    with raises_errno(errno.EINVAL):
        daemon.write(name, command)
    stats = daemon.stats()
    assert (stats["algorithm"], stats["pool_limit_bytes"], stats["pages"]["incompressible"]) == ("lz4", 1 << 30, 1)


@pytest.mark.parametrize("name", CONTROLS)
def test_read_only_is_not_written_and_write_only_is_not_read(daemon: Daemon, name: str) -> None:
    """Root passes every mode: the daemon itself refuses."""
    wrong = {0o444: os.O_WRONLY, 0o200: os.O_RDONLY}.get(CONTROLS[name])
    if wrong is None:
        os.close(os.open(daemon.mount_point / name, os.O_RDWR))
        return
    for flags in (wrong, os.O_RDWR):
        with raises_errno(errno.EACCES):
            os.close(os.open(daemon.mount_point / name, flags))


@pytest.mark.parametrize(
    ("name", "command"),
    [("idle", "all"), ("idle", "60"), ("writeback", "all"), ("writeback", "idle"), ("writeback", "7")],
)
def test_without_a_backing_disk_nothing_is_written_back(daemon: Daemon, name: str, command: str) -> None:
    with raises_errno(errno.ENODEV):
        daemon.write(name, command)
    daemon.wait_for_log(f"control file {name}: ")
    assert daemon.read("backing_dev") == daemon.read("writeback_limit") == "none\n"
    assert daemon.read("bd_stat").split() == ["0", "0", "0"]


def test_reset(daemon: Daemon, swapfile: int) -> None:
    os.pwrite(swapfile, noise(1), 0)
    with raises_errno(errno.EBUSY):
        daemon.write("reset", "1")
    assert os.pread(swapfile, PAGE, 0) == noise(1)


def test_reset_drops_every_page(daemon: Daemon) -> None:
    with daemon.opened() as fd:
        for page in range(10):
            os.pwrite(fd, noise(page), page * PAGE)
    assert daemon.stats()["original_bytes"] >= 10 * PAGE
    daemon.reset()
    stats = daemon.stats()
    assert sum(stats["pages"].values()) == stats["original_bytes"] == stats["pool_bytes"] == 0
    assert daemon.swapfile.open("rb").read(10 * PAGE) == bytes(10 * PAGE)


def test_compact(daemon: Daemon, swapfile: int) -> None:
    pages = 600
    for n in range(pages):
        os.pwrite(swapfile, noise(n), n * PAGE)
    for n in range(pages):
        if n % 4:
            os.pwrite(swapfile, bytes(PAGE), n * PAGE)
    before = daemon.stats()["pool_bytes"]
    daemon.write("compact", "1\n")
    # A pager does it behind.
    needed = pages // 4 * PAGE
    wait_until(lambda: daemon.stats()["pool_bytes"] < needed * 5 / 4, "the pool is compact")
    # It may not be at its end.
    wait_until(lambda: int(daemon.read("mm_stat").split()[6]) == daemon.stats()["pages_compacted"], "no more is moved")
    stats = daemon.stats()
    assert stats["pages_compacted"] * PAGE >= before - stats["pool_bytes"] > 0
    for n in range(pages):
        assert os.pread(swapfile, PAGE, n * PAGE) == (bytes(PAGE) if n % 4 else noise(n))


def test_the_other_allocator(make_daemon: Callable[..., Daemon], data_path: str) -> None:
    daemon = make_daemon(swap__data_path=data_path, pool__allocator="z3fold").start()
    pages = [noise(0), *((f"page {n} ".encode() * PAGE)[:PAGE] for n in range(1, 7))]
    with daemon.opened() as fd:
        for n, page in enumerate(pages):
            os.pwrite(fd, page, n * PAGE)
        stats = daemon.stats()
        # Three to a page, but for one that is not compressed.
        assert (stats["allocator"], stats["pool_bytes"]) == ("z3fold", 4 * PAGE)
        assert stats["classes"] == []
        assert [os.pread(fd, PAGE, n * PAGE) for n in range(7)] == pages
    assert "z3fold" in daemon.ctl("status").stdout
    assert "z3fold has no size classes" in daemon.ctl("status", "--classes").stdout


def test_shell_redirection_works(daemon: Daemon) -> None:
    """echo >, which opens with O_TRUNC, and >>."""
    for mode in ("w", "a"):
        with (daemon.mount_point / "mem_limit").open(mode) as file:
            file.write("1G\n")
    assert daemon.read("mem_limit") == f"{1 << 30}\n"


# Statistics

HISTOGRAM = {"bounds_seconds": list, "counts": list, "sum_seconds": float}
SCHEMA = {
    "version": str,
    "pid": int,
    "swap_size_bytes": int,
    "page_size_bytes": int,
    "algorithm": str,
    "allocator": str,
    "zstd_level": int,
    "pages": dict.fromkeys(
        ("lz4", "zstd", "zstd_dictionary", "same_filled", "incompressible", "duplicate", "on_disk", "lost"), int
    ),
    "original_bytes": int,
    "compressed_bytes": int,
    "pool_bytes": int,
    "pool_peak_bytes": int,
    "pool_reserve_bytes": int,
    "pool_limit_bytes": int,
    "metadata_bytes": int,
    "loads": int,
    "stores": int,
    "discards": int,
    "pages_compacted": int,
    "movers_awaited": int,
    "ballast_bytes": int,
    "page_operations": int,
    "takeovers": int,
    "objects_verified": int,
    "objects_found_bad": int,
    "takeover_seconds": float,
    "rejected_stores": dict.fromkeys(("pool_full", "no_memory", "out_of_range", "no_writeback"), int),
    "errors": dict.fromkeys(("lost", "corrupt", "disk"), int),
    "load_latency": HISTOGRAM,
    "store_latency": HISTOGRAM,
    "mover_waits": HISTOGRAM,
    "classes": list,
    "recompression": {
        key: dict.fromkeys(value, int) if isinstance(value, dict) else type(value)
        for key, value in RECOMPRESSION.items()
    },
    "writeback": {key: HISTOGRAM if key.endswith("_latency") else type(value) for key, value in COUNTS.items()},
}
CLASS = {
    **dict.fromkeys(("size_bytes", "pages_per_zspage", "objects_per_zspage", "zspages", "objects", "waste_bytes"), int),
    "zspages_by_fullness": list,
}


def shape(value: object, schema: object) -> object:
    """The types of `value` where `schema` has types."""
    if isinstance(schema, dict) and isinstance(value, dict):
        return {key: shape(inner, schema.get(key)) for key, inner in value.items()}
    return type(value)


def test_stats_json(daemon: Daemon, swapfile: int) -> None:
    os.pwrite(swapfile, noise(1) + b"\xaa" * PAGE + (b"text " * PAGE)[:PAGE], 0)
    os.pread(swapfile, 3 * PAGE, 0)
    stats = daemon.stats()
    assert shape(stats, SCHEMA) == SCHEMA
    assert all(shape(entry, CLASS) == CLASS for entry in stats["classes"])
    assert (stats["pid"], stats["swap_size_bytes"], stats["page_size_bytes"]) == (daemon.pid, SIZE, PAGE)
    pages = {"lz4": 1, "zstd": 0, "zstd_dictionary": 0, "same_filled": 1, "incompressible": 1}
    pages |= {"duplicate": 0, "on_disk": 0, "lost": 0}
    assert stats["pages"] == pages
    assert stats["original_bytes"] == 3 * PAGE
    assert PAGE < stats["compressed_bytes"] < 2 * PAGE
    classes = stats["classes"]
    assert sum(entry["objects"] for entry in classes) == 2
    assert sum(entry["zspages"] * entry["pages_per_zspage"] for entry in classes) * PAGE == stats["pool_bytes"]
    for entry in classes:
        assert sum(entry["zspages_by_fullness"]) == entry["zspages"]
        assert entry["waste_bytes"] % PAGE == -entry["objects"] * entry["size_bytes"] % PAGE
    for what in ("load", "store"):
        latency = stats[f"{what}_latency"]
        assert len(latency["counts"]) == len(latency["bounds_seconds"]) + 1
        assert sum(latency["counts"]) == stats[f"{what}s"]


def test_zram_columns(daemon: Daemon, swapfile: int) -> None:
    os.pwrite(swapfile, noise(1) + b"\xaa" * PAGE, 0)
    stats = daemon.stats()
    assert [int(column) for column in daemon.read("mm_stat").split()] == [
        stats["original_bytes"],
        stats["compressed_bytes"],
        stats["pool_bytes"],
        1 << 30,
        stats["pool_peak_bytes"],
        1,
        stats["pages_compacted"],
        1,
    ]
    assert re.fullmatch(r"( *\d+){4}\n", daemon.read("io_stat"))


def test_a_reading_is_of_one_moment(daemon: Daemon, swapfile: int) -> None:
    """What was opened stays as it was, in however many pieces it is read."""
    fd = os.open(daemon.mount_point / "stats.json", os.O_RDONLY)
    try:
        first = os.read(fd, 10)
        os.pwrite(swapfile, noise(1), 0)
        whole = os.pread(fd, 1 << 20, 0)
        assert whole.startswith(first)
        assert whole != (daemon.mount_point / "stats.json").read_bytes()
    finally:
        os.close(fd)


def test_scrape(daemon: Daemon, swapfile: int) -> None:
    os.pwrite(swapfile, noise(1), 0)
    with urllib.request.urlopen(f"http://{HOST}:{daemon.port}/metrics", timeout=DEADLINE_SECONDS) as response:
        families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
    stats = daemon.stats()
    assert families["zswapd_stores"].samples[0].value == stats["stores"] > 0
    assert families["zswapd_pool_bytes"].samples[0].value == stats["pool_bytes"] > 0
    assert families["process_open_fds"].samples[0].value > 0
