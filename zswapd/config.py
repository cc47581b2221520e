"""Configuration: defaults < TOML file < ZSWAPD_SECTION_KEY in the environment < --set section.key=value.

Every key is checked, whatever source it comes from; an error names the source, the key, the value and the remedy
(the remedy is the description of the field).
"""

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from zswapd import mountpoint
from zswapd.errors import ConfigError

DEFAULT_PATH = Path("/etc/zswapd/zswapd.toml")
ENV_PREFIX = "ZSWAPD_"
PAGE_SIZE = 4096
MAX_SIZE = 16 << 40
#: Where the locations of slot words end: the pool does not grow beyond.
MAX_POOL = 1 << 40

#: What is written to the backing disk at a time, at most: no budget is of use that does not allow it.
SEGMENT_BYTES = 256 << 10
_SIZE = re.compile(r"([0-9]{1,20})\s?(?:([KMGT])(?:iB)?)?", re.IGNORECASE)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE_FORM = "bytes, or a number with KiB, MiB, GiB or TiB; whole pages of 4096 bytes, above 0, at most"
_SIZE_HELP = f"{_SIZE_FORM} 16TiB"


def parse_size(value: object) -> int:
    """Bytes of `value`: an int, or a string such as "4096", "512MiB" or "1G" (K, M, G and T are binary too).

    Raises ValueError on anything else; a result of 0 is left to the caller to judge.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError("a size cannot be negative")
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a size")
    return int(match[1]) << _UNITS[(match[2] or "").upper()]


def format_size(size: int) -> str:
    """`size` bytes for people, such as 1.3 GiB."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def mem_total() -> int:
    """This machine's RAM in bytes (MemTotal of /proc/meminfo)."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _whole_pages(value: object, *, most: int = MAX_SIZE) -> int:
    size = parse_size(value)
    if not 0 < size <= most:
        raise ValueError(f"not above 0 and at most {most >> 40}TiB")
    if size % PAGE_SIZE:
        raise ValueError("not a whole number of 4096-byte pages")
    return size


_ZERO_OR_SIZE = BeforeValidator(lambda value: 0 if value == 0 and value is not False else _whole_pages(value))


def _share_or_size(value: object) -> int | str:
    if isinstance(value, str) and value.strip().endswith("%"):
        percent = value.strip()[:-1]
        if re.fullmatch("[0-9]{1,3}", percent) is None or not 1 <= int(percent) <= 100:
            raise ValueError("not a percentage from 1% to 100%")
        return f"{int(percent)}%"
    return _whole_pages(value, most=MAX_POOL)


def _absolute(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or ".." in value.split("/"):
        raise ValueError("not an absolute path without ..")
    if not value.isprintable():
        raise ValueError("a path with control characters")
    path = Path(value)
    # Path keeps a leading "//", which the kernel never shows: the path would not match its loop device.
    path = Path("/", *path.parts[1:])
    if path == Path("/"):
        raise ValueError("/ cannot be it")
    return path


def _parse_listen(value: str) -> tuple[str, int] | None:
    if value == "":
        return None
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})", value)
    if match is None:
        raise ValueError("not IP:port")
    host = ipaddress.IPv6Address(match[1]) if match[1] else ipaddress.IPv4Address(match[2])
    if not host.is_loopback:
        raise ValueError("not a loopback address: the metrics carry no authentication")
    if not 1 <= int(match[3]) <= 65535:
        raise ValueError("the port is out of range")
    return str(host), int(match[3])


def _listen(value: str) -> str:
    _parse_listen(value)
    return value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Swap(_Section):
    size: Annotated[int, BeforeValidator(_whole_pages), Field(description=_SIZE_HELP)] = 1 << 30
    mount_point: Annotated[
        Path, BeforeValidator(_absolute), Field(description="an absolute path without .., other than /")
    ] = Path("/run/zswapd/mnt")
    priority: Annotated[int, Field(ge=0, le=32767, description="an integer from 0 to 32767; higher is used first")] = (
        100
    )
    discard: Annotated[bool, Field(description="true or false")] = True
    data_path: Annotated[Literal["pager", "pyfuse3"], Field(description="pager or pyfuse3")] = "pager"


class Pool(_Section):
    allocator: Annotated[Literal["zsmalloc", "z3fold"], Field(description="zsmalloc or z3fold")] = "zsmalloc"
    mem_limit: Annotated[
        int | str,
        BeforeValidator(_share_or_size),
        Field(description=f"a share of RAM from 1% to 100%, or {_SIZE_FORM} 1TiB"),
    ] = "50%"

    @property
    def mem_limit_bytes(self) -> int:
        """The limit in bytes, whole pages; a percentage is of this machine's RAM (MemTotal), and 1 TiB at most."""
        if isinstance(self.mem_limit, int):
            return self.mem_limit
        return min(mem_total() * int(self.mem_limit.rstrip("%")) // 100 // PAGE_SIZE * PAGE_SIZE, MAX_POOL)


class Pager(_Section):
    workers: Annotated[int, Field(ge=1, le=16, description="an integer from 1 to 16")] = 8
    store: Annotated[Literal["compressed", "none"], Field(description="compressed or none")] = "compressed"
    spin_us: Annotated[int, Field(ge=0, le=1000, description="microseconds from 0 to 1000")] = 100


class Compression(_Section):
    algorithm: Annotated[Literal["lz4", "zstd"], Field(description="lz4 or zstd")] = "lz4"
    zstd_level: Annotated[int, Field(ge=1, le=22, description="an integer from 1 to 22")] = 3


class Writeback(_Section):
    """What is not the default needs a backing disk: see `_refuse_together`."""

    backing: Annotated[
        Path | None,
        BeforeValidator(lambda value: None if value == "" else _absolute(value)),
        Field(description='the absolute path, without .., of a block device or a file; "" for none'),
    ] = None
    size: Annotated[int, _ZERO_OR_SIZE, Field(description="0 for a block device; of a file 16MiB to 1TiB")] = 0
    encryption: Annotated[bool, Field(description="true or false")] = True
    incompressible: Annotated[Literal["keep", "writeback", "first"], Field(description="keep, writeback or first")] = (
        "writeback"
    )
    accept_threshold_percent: Annotated[int, Field(ge=1, le=100, description="an integer from 1 to 100")] = 90
    budget_per_hour: Annotated[int, _ZERO_OR_SIZE, Field(description=f"0 for no budget, or {_SIZE_HELP}")] = 0
    budget_per_day: Annotated[int, _ZERO_OR_SIZE, Field(description=f"0 for no budget, or {_SIZE_HELP}")] = 0
    idle_after: Annotated[int, Field(ge=0, le=30 * 86400, description="seconds, up to 30 days; 0 for never")] = 0
    pressure: Annotated[int, Field(ge=0, le=100, description="a percentage of time from 1 to 100; 0 for never")] = 10
    shrinkers: Annotated[int, Field(ge=1, le=8, description="an integer from 1 to 8")] = 2


class Recompression(_Section):
    cpu_percent: Annotated[int, Field(ge=0, le=100, description="percent of a processor, 0 to 100; 0 for never")] = 2
    idle_after: Annotated[int, Field(ge=1, le=86400, description="seconds, from 1 to a day")] = 60
    idle_level: Annotated[int, Field(ge=1, le=12, description="an integer from 1 to 12")] = 3
    cold_after: Annotated[int, Field(ge=1, le=30 * 86400, description="seconds, from 1 to 30 days")] = 600
    cold_level: Annotated[int, Field(ge=1, le=12, description="an integer from 1 to 12")] = 9
    dictionaries: Annotated[bool, Field(description="true or false")] = True
    duplicates: Annotated[bool, Field(description="true or false")] = True


class Metrics(_Section):
    listen: Annotated[
        str,
        AfterValidator(_listen),
        Field(
            description='a loopback IP and port (127.0.0.1:9839 or [::1]:9839, port 1 to 65535), or "" for no metrics'
        ),
    ] = "127.0.0.1:9839"

    @property
    def address(self) -> tuple[str, int] | None:
        """(host, port) to listen on; None: metrics are switched off."""
        return _parse_listen(self.listen)


class Daemon(_Section):
    on_sigterm: Annotated[Literal["detach", "refuse"], Field(description="detach or refuse")] = "detach"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="debug, info, warning or error")
    ] = "info"


class Config(_Section):
    """The whole configuration. Immutable."""

    swap: Swap = Swap()
    pool: Pool = Pool()
    pager: Pager = Pager()
    compression: Compression = Compression()
    recompression: Recompression = Recompression()
    writeback: Writeback = Writeback()
    metrics: Metrics = Metrics()
    daemon: Daemon = Daemon()


_SECTIONS: dict[str, type[BaseModel]] = {
    "swap": Swap,
    "pool": Pool,
    "pager": Pager,
    "compression": Compression,
    "recompression": Recompression,
    "writeback": Writeback,
    "metrics": Metrics,
    "daemon": Daemon,
}
_KEYS = [f"{section}.{key}" for section, model in _SECTIONS.items() for key in model.model_fields]
_ENV_KEYS = {ENV_PREFIX + key.replace(".", "_").upper(): key for key in _KEYS}


def load(path: Path | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Config:
    """The configuration from the file, `environ` and `overrides` (each "section.key=value").

    The file is `path`, else $ZSWAPD_CONFIG, else /etc/zswapd/zswapd.toml if that exists. Symbolic links to the mount
    point are followed, once and for all. Reads disk, but not the mount. Raises ConfigError.
    """
    values: dict[str, object] = {}  # by "section.key"; later sources win
    source: dict[str, str] = {}
    for origin, key, value in [
        *_from_file(path, environ),
        *_from_environ(environ),
        *_from_overrides(overrides),
    ]:
        values[key], source[key] = value, origin

    tree: dict[str, dict[str, object]] = {section: {} for section in _SECTIONS}
    for key, value in values.items():
        section, name = key.split(".")
        tree[section][name] = value
    try:
        config = _resolved(Config.model_validate(tree), source.get("swap.mount_point", "default"))
    except ValidationError as error:
        first = error.errors()[0]
        section, name = str(first["loc"][0]), str(first["loc"][1])
        key = f"{section}.{name}"
        reason = first["msg"].removeprefix("Value error, ")
        takes = _SECTIONS[section].model_fields[name].description
        raise ConfigError(f"{source[key]}: {key} = {values[key]!r}: {reason}", f"{key} takes {takes}") from None
    _refuse_together(config, source)
    return config


def _refuse_together(config: Config, source: Mapping[str, str]) -> None:
    """Raises ConfigError where values are good each by itself, but not together."""

    def refuse(name: str, why: str, hint: str) -> NoReturn:
        key = f"writeback.{name}"
        value = getattr(config.writeback, name)
        raise ConfigError(f"{source.get(key, 'defaults')}: {key} = {value}: {why}", hint)

    given = config.writeback
    if given.backing is None:
        for name in ("size", "budget_per_hour", "budget_per_day", "idle_after"):
            if getattr(given, name):
                refuse(name, "nothing is written back without a disk", "name it: writeback.backing")
        return
    if given.backing.is_relative_to(config.swap.mount_point):
        refuse("backing", "in zswapd's own file system", "name a block device, or a file on a disk")
    if config.swap.data_path != "pager":
        hint = 'set swap.data_path = "pager", or writeback.backing = ""'
        refuse("backing", 'needs the pager, and swap.data_path is "pyfuse3"', hint)
    for name in ("budget_per_hour", "budget_per_day"):
        if 0 < getattr(given, name) < SEGMENT_BYTES:
            refuse(
                name, "less than a segment, so that nothing is ever written", f"{SEGMENT_BYTES >> 10}KiB or more, or 0"
            )
    if 0 < given.budget_per_day < given.budget_per_hour:
        refuse("budget_per_hour", f"more than budget_per_day = {given.budget_per_day}", "lower it, or raise the other")


def _resolved(config: Config, origin: str) -> Config:
    """With the mount point's real name: the kernel knows no other, and the pager's socket lies beside it."""
    mount_point = mountpoint.resolve(config.swap.mount_point)
    try:
        mountpoint.refuse_long(mount_point)
    except ValueError as error:
        hint = "swap.mount_point takes a shorter path, such as /run/zswapd/mnt"
        raise ConfigError(f"{origin}: swap.mount_point = {os.fspath(mount_point)!r}: {error}", hint) from None
    return config.model_copy(update={"swap": config.swap.model_copy(update={"mount_point": mount_point})})


_Layer = Iterable[tuple[str, str, object]]  # (source, "section.key", value)


def _from_file(path: Path | None, environ: Mapping[str, str]) -> _Layer:
    if path is None and environ.get(f"{ENV_PREFIX}CONFIG"):
        path = Path(environ[f"{ENV_PREFIX}CONFIG"])
    if path is None:
        if not DEFAULT_PATH.exists():
            return
        path = DEFAULT_PATH

    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the configuration: {error.strerror}",
            "give an existing file with --config or $ZSWAPD_CONFIG, or leave both away for the defaults",
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text", "TOML is UTF-8: convert the file") from None
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"line (\d+)", str(error))
        lines = text.splitlines()
        line = lines[int(where[1]) - 1].strip() if where and int(where[1]) <= len(lines) else ""
        raise ConfigError(f"{path}: not valid TOML: {error}", f"the line is: {line}" if line else "") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None

    for section, table in tables.items():
        if section not in _SECTIONS:
            raise _unknown(str(path), section, _SECTIONS)
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} = {table!r}: not a table", f"write [{section}] on a line of its own")
        for name, value in table.items():
            if f"{section}.{name}" not in _KEYS:
                raise _unknown(str(path), f"{section}.{name}", _KEYS)
            yield str(path), f"{section}.{name}", value


def _from_environ(environ: Mapping[str, str]) -> _Layer:
    for variable, text in environ.items():
        if variable.startswith(ENV_PREFIX) and variable != f"{ENV_PREFIX}CONFIG":
            if variable not in _ENV_KEYS:
                raise _unknown("environment variable", variable, _ENV_KEYS)
            yield f"environment variable {variable}", _ENV_KEYS[variable], _scalar(text)


def _from_overrides(overrides: Sequence[str]) -> _Layer:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: no value", "write --set section.key=value")
        if key not in _KEYS:
            raise _unknown("--set", key, _KEYS)
        yield "--set", key, _scalar(text)


def _scalar(text: str) -> bool | int | str:
    """What the text of an environment variable or of --set means: true, false, an integer, else a string."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch("-?[0-9]{1,20}", text) else text


def _unknown(source: str, name: str, known: Iterable[str]) -> ConfigError:
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
    return ConfigError(f"{source}: unknown name {name}", hint)
