"""`zswapd`: runs the daemon in the foreground."""

import logging
import os
import sys
from functools import partial
from pathlib import Path

import click
import trio

from zswapd import __version__, daemon, launch
from zswapd.config import Config, load
from zswapd.errors import ZswapdError

_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Compressed swap for Linux, served from userspace. zswapctl attaches it, detaches it and shows how it does."""


_config = click.option("--config", type=click.Path(path_type=Path), help="Configuration file (TOML).")
_set = click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one setting.")


@cli.command()
@_config
@_set
@click.option("--external-pager", is_flag=True, help="Find the pager that zswapd pager has started, and leave it.")
def run(config: Path | None, overrides: tuple[str, ...], external_pager: bool) -> None:
    """Serve the swap file until SIGTERM."""
    trio.run(partial(daemon.run, _begin(config, overrides), apart=external_pager))


@cli.command()
@_config
@_set
def pager(config: Path | None, overrides: tuple[str, ...]) -> None:
    """Become the pager, apart from what the other commands do: for systemd."""
    launch.become_keeper(_begin(config, overrides))


def _begin(config: Path | None, overrides: tuple[str, ...]) -> Config:
    settings = load(config, overrides, os.environ)
    _log_to_stderr(settings.daemon.log_level)
    return settings


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler()
    if "JOURNAL_STREAM" in os.environ:
        # systemd reads the priority from the prefix (sd-daemon(3)), and knows time and name.
        handler.setFormatter(_JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s zswapd %(levelname)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def main() -> None:
    """Entry point: errors that people can mend go to stderr as one message, with their exit status."""
    try:
        cli()
    except ZswapdError as error:
        print(f"zswapd: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
