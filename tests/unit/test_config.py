import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zswapd import config
from zswapd.config import Config, format_size, load, mem_total, parse_size
from zswapd.errors import ConfigError
from zswapd.pager_socket import socket_path

EXAMPLE = Path(__file__).parents[2] / "config/zswapd.toml"
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@pytest.fixture(autouse=True)
def no_system_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "absent.toml")


def write(directory: Path, text: str) -> Path:
    path = directory / "zswapd.toml"
    path.write_text(text)
    return path


@given(st.integers(0, 1 << 60), st.sampled_from(list(UNITS)), st.booleans(), st.booleans())
def test_sizes_are_binary(number: int, unit: str, long: bool, lower: bool) -> None:
    text = f"{number}{unit}{'iB' if unit and long else ''}"
    assert parse_size(text.lower() if lower else text) == number * UNITS[unit]


@given(st.text())
def test_size_of_any_text_is_a_number_or_a_value_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError:
        assert not (text.isascii() and text.isdigit() and len(text) <= 20)


@pytest.mark.parametrize("bad", ["", "1GB", "-1", "1.5G", "GiB", "0x10", "1 2", "٣", -1, True, None, 1.0])
def test_not_a_size(bad: object) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(bad)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1.0 MiB"), (3 << 39, "1.5 TiB"), (1 << 60, "1048576.0 TiB")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


def test_example_file_is_the_defaults() -> None:
    assert load(EXAMPLE, [], {}) == load(None, [], {}) == Config()


def test_example_file_shows_every_key() -> None:
    shown = {line.split(" =")[0] for line in EXAMPLE.read_text().splitlines() if " = " in line and line[0] != "#"}
    assert shown == {key for section in Config.model_fields for key in getattr(Config(), section).model_dump()}


def test_later_sources_win(tmp_path: Path) -> None:
    path = write(tmp_path, '[swap]\nsize = "1MiB"\npriority = 1\ndiscard = false\n')
    environ = {"ZSWAPD_SWAP_SIZE": "2M", "ZSWAPD_SWAP_PRIORITY": "2", "PATH": "/bin"}
    swap = load(path, ["swap.size=3MiB"], environ).swap
    assert (swap.size, swap.priority, swap.discard) == (3 << 20, 2, False)


def test_the_file_comes_from_the_option_then_the_environment_then_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {}
    for priority, name in enumerate(("option", "environment", "system")):
        directory = tmp_path / name
        directory.mkdir()
        files[name] = write(directory, f"[swap]\npriority = {priority}\n")
    monkeypatch.setattr(config, "DEFAULT_PATH", files["system"])
    environ = {"ZSWAPD_CONFIG": str(files["environment"])}
    assert load(files["option"], [], environ).swap.priority == 0
    assert load(None, [], environ).swap.priority == 1
    assert load(None, [], {"ZSWAPD_CONFIG": ""}).swap.priority == 2


@pytest.mark.parametrize(
    "override",
    [
        "swap.size=0",
        "swap.size=-4096",
        "swap.size=4097",
        "swap.size=17TiB",
        "swap.size=true",
        "swap.size=much",
        "swap.mount_point=relative",
        "swap.mount_point=/a/../b",
        "swap.mount_point=/",
        "swap.mount_point=//",
        "swap.mount_point=/a\nb",
        "swap.mount_point=7",
        "swap.priority=-1",
        "swap.priority=32768",
        "swap.priority=true",
        "swap.priority=high",
        "swap.discard=1",
        "swap.discard=yes",
        "pool.mem_limit=0%",
        "pool.mem_limit=101%",
        "pool.mem_limit=1.5%",
        "pool.mem_limit=%",
        "pool.mem_limit=0",
        "pool.mem_limit=1025GiB",
        "pool.allocator=zbud",
        "compression.algorithm=lzo",
        "compression.algorithm=1",
        "compression.zstd_level=0",
        "compression.zstd_level=23",
        "writeback.backing=relative",
        "writeback.backing=/a/../b",
        "writeback.size=1",
        "writeback.size=false",
        "writeback.encryption=on",
        "writeback.incompressible=never",
        "writeback.accept_threshold_percent=0",
        "writeback.accept_threshold_percent=101",
        "writeback.budget_per_hour=much",
        "writeback.budget_per_day=-1",
        "writeback.idle_after=-1",
        "writeback.pressure=101",
        "writeback.shrinkers=0",
        "writeback.shrinkers=9",
        "metrics.listen=0.0.0.0:9839",
        "metrics.listen=[::]:9839",
        "metrics.listen=localhost:9839",
        "metrics.listen=127.0.0.1",
        "metrics.listen=127.0.0.1:0",
        "metrics.listen=127.0.0.1:65536",
        "metrics.listen=::1:9839",
        "metrics.listen=127.0.0.256:1",
        "metrics.listen=9839",
        "daemon.on_sigterm=ignore",
        "daemon.log_level=INFO",
    ],
)
def test_bad_values_are_refused_with_key_and_remedy(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        load(None, [override], {})
    assert caught.value.message.startswith(f"--set: {key} = ")
    assert caught.value.hint.startswith(f"{key} takes ")


@pytest.mark.parametrize(
    "text", ["[swap]\nsize = true\n", "[swap]\nsize = 4096.0\n", "[swap]\npriority = '1'\n", "[swap]\ndiscard = 1\n"]
)
def test_file_values_keep_their_types(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=str(path)):
        load(path, [], {})


def test_errors_name_the_source_that_won(tmp_path: Path) -> None:
    path = write(tmp_path, "[swap]\npriority = 70000\n")
    with pytest.raises(ConfigError, match=rf"{path}: swap.priority = 70000: "):
        load(path, [], {})
    with pytest.raises(ConfigError, match=r"environment variable ZSWAPD_SWAP_PRIORITY: swap.priority = 80000: "):
        load(path, [], {"ZSWAPD_SWAP_PRIORITY": "80000"})
    assert load(path, ["swap.priority=5"], {}).swap.priority == 5


def test_unknown_names_get_the_nearest_known_one(tmp_path: Path) -> None:
    for text, nearest in (("[swapp]\n", "swap"), ("[swap]\nsise = 1\n", "swap.size"), ("size = 1\n", "")):
        with pytest.raises(ConfigError, match="unknown name") as caught:
            load(write(tmp_path, text), [], {})
        assert caught.value.hint == f"did you mean {nearest}?" or (not nearest and "known: " in caught.value.hint)
    with pytest.raises(ConfigError, match="ZSWAPD_POOL_MEMLIMIT") as caught:
        load(None, [], {"ZSWAPD_POOL_MEMLIMIT": "1"})
    assert caught.value.hint == "did you mean ZSWAPD_POOL_MEM_LIMIT?"
    with pytest.raises(ConfigError, match=r"unknown name pool.limit"):
        load(None, ["pool.limit=1"], {})
    with pytest.raises(ConfigError, match="no value"):
        load(None, ["pool.mem_limit"], {})


def test_malformed_toml_shows_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid TOML") as caught:
        load(write(tmp_path, "[swap]\nsize = 1GiB\n"), [], {})
    assert "size = 1GiB" in caught.value.hint


def test_a_section_must_be_a_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="swap = 3: not a table"):
        load(write(tmp_path, "swap = 3\n"), [], {})


def test_a_file_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml", [], {})
    with pytest.raises(ConfigError, match="No such file"):
        load(None, [], {"ZSWAPD_CONFIG": str(tmp_path / "none.toml")})
    with pytest.raises(ConfigError, match="directory"):
        load(tmp_path, [], {})
    (tmp_path / "latin1.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(tmp_path / "latin1.toml", [], {})


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:9839", ("127.0.0.1", 9839)),
        ("127.9.9.9:1", ("127.9.9.9", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("", None),
    ],
)
def test_listen(listen: str, address: tuple[str, int] | None) -> None:
    assert load(None, [f"metrics.listen={listen}"], {}).metrics.address == address


def test_pool_limit_is_a_share_of_memory_or_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal"))
    assert mem_total() == total
    assert load(None, ["pool.mem_limit=100%"], {}).pool.mem_limit_bytes == total
    half = load(None, ["pool.mem_limit=50%"], {}).pool.mem_limit_bytes
    assert half % 4096 == 0
    assert total // 2 - 4096 < half <= total // 2
    assert load(None, ["pool.mem_limit=8MiB"], {}).pool.mem_limit_bytes == 8 << 20
    assert load(None, ["pool.mem_limit=1TiB"], {}).pool.mem_limit_bytes == 1 << 40
    monkeypatch.setattr(config, "mem_total", lambda: 3 << 40)
    assert load(None, ["pool.mem_limit=50%"], {}).pool.mem_limit_bytes == 1 << 40


def test_mount_point_is_written_as_the_kernel_does() -> None:
    assert load(None, ["swap.mount_point=//run//swap/./x/"], {}).swap.mount_point == Path("/run/swap/x")


def test_mount_point_is_without_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "direct").symlink_to("link/mnt")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("real/mnt", "link/mnt", "direct"):
        assert load(None, [f"swap.mount_point={tmp_path}/{name}"], {}).swap.mount_point == tmp_path / "real/mnt"
    # Whoever mounts there says what is wrong.
    assert load(None, [f"swap.mount_point={tmp_path}/loop/mnt"], {}).swap.mount_point == tmp_path / "loop/mnt"


def test_mount_point_leaves_room_for_the_socket_s_address(tmp_path: Path) -> None:
    longest = "/" + "é" * 50 + "x"
    assert load(None, [f"swap.mount_point={longest}"], {}).swap.mount_point == Path(longest)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe, pytest.raises(FileNotFoundError):
        probe.connect(str(socket_path(Path(longest))))
    (tmp_path / "link").symlink_to(f"{longest}x")
    for path in (f"{longest}x", str(tmp_path / "link")):
        with pytest.raises(
            ConfigError, match=r"^--set: swap.mount_point = .*: 103 bytes are too long: .* 102\n"
        ) as caught:
            load(None, [f"swap.mount_point={path}"], {})
        assert "shorter" in caught.value.hint


def test_an_error_is_one_or_two_lines() -> None:
    assert str(ConfigError("what")) == "what"
    assert str(ConfigError("what", "remedy")) == "what\nremedy"


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (["size=16MiB"], "--set: writeback.size = 16777216: nothing is written back without a disk", "backing"),
        (["budget_per_hour=1GiB"], "without a disk", "writeback.backing"),
        (["budget_per_day=1GiB"], "without a disk", "writeback.backing"),
        (["idle_after=60"], "without a disk", "writeback.backing"),
        (["backing=/run/zswapd/mnt/swapfile"], "in zswapd's own file system", "on a disk"),
        (["backing=/dev/x", "budget_per_hour=252KiB"], "less than a segment", "256KiB or more"),
        (["backing=/dev/x", "budget_per_day=4096"], "less than a segment", "256KiB or more"),
        (["backing=/dev/x", "budget_per_hour=2GiB", "budget_per_day=1GiB"], "more than budget_per_day", "lower it"),
    ],
)
def test_writeback_settings_must_go_together(overrides: list[str], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [f"writeback.{override}" for override in overrides], {})
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_writeback_needs_the_pager(tmp_path: Path) -> None:
    path = write(tmp_path, '[writeback]\nbacking = "/dev/x"\n')
    with pytest.raises(ConfigError, match=rf"{path}: writeback.backing = /dev/x: needs the pager"):
        load(path, ["swap.data_path=pyfuse3"], {})
    assert load(path, [], {}).writeback.backing == Path("/dev/x")


def test_a_day_may_have_less_than_24_hours_of_budget() -> None:
    budgets = ["writeback.budget_per_hour=1GiB", "writeback.budget_per_day=2GiB"]
    config = load(None, ["writeback.backing=/dev/x", *budgets], {}).writeback
    assert (config.budget_per_hour, config.budget_per_day) == (1 << 30, 2 << 30)
