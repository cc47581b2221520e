import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import trio
from click.testing import CliRunner, Result

from tests.daemon import DEADLINE_SECONDS
from tests.writeback import writeback
from zswapd import attaching, backing, cli, ctl, detaching, doctor, status, swapdev, wear
from zswapd import writeback as command
from zswapd.config import Config
from zswapd.detaching import Remaining
from zswapd.engine import Written
from zswapd.errors import SwapError
from zswapd.pager import Upgraded
from zswapd.swapdev import Attachment

ATTACHED = Attachment("/dev/loop9", True, True, 1 << 30, 1 << 20, 100)


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("ZSWAPD_")]:
        monkeypatch.delenv(name)
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv("ZSWAPD_CONFIG", str(tmp_path / "empty.toml"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(ctl.cli, ["--set", "swap.mount_point=/run/zswapd-test/mnt", *arguments])


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["attach"], ["attach", "--unsafe"]])
def test_without_a_daemon_one_is_told_how_to_start_it(command: list[str]) -> None:
    result = run(*command)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("zswapctl: the daemon does not run: nothing is mounted at /run/zswapd-test/mnt\n")
    assert "zswapd run" in result.stderr


def test_detaching_nothing_says_so_and_succeeds() -> None:
    result = run("detach")
    assert (result.exit_code, result.stdout) == (0, "nothing is attached at /run/zswapd-test/mnt\n")
    assert json.loads(run("detach", "--json").stdout) == {"detached": None}


def test_a_bad_configuration_is_an_error_and_bad_usage_another() -> None:
    result = run("--set", "swap.size=0", "status")
    assert result.exit_code == 1
    assert result.stderr.startswith("zswapctl: --set: swap.size = 0: ")
    assert run("no-such-command").exit_code == 2
    assert run("attach", "--no-such-option").exit_code == 2


def test_attach_passes_the_configuration_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    async def attach(mount_point: Path, **options: Any) -> Attachment:
        seen.update(options, mount_point=mount_point)
        return ATTACHED

    monkeypatch.setattr(attaching, "attach", attach)
    result = run("--set", "swap.priority=7", "--set", "swap.discard=false", "attach", "--unsafe")
    assert seen == {
        "mount_point": Path("/run/zswapd-test/mnt"),
        "priority": 7,
        "discard": False,
        "unsafe": True,
        "forgetting": False,
    }
    assert result.stdout == "attached: /dev/loop9, 1.0 GiB of swap, priority 100\n"
    run("attach")
    assert seen["unsafe"] is False
    assert json.loads(run("attach", "--json").stdout)["loop_device"] == "/dev/loop9"


def test_force_on_a_dead_daemon_does_not_call_its_pages_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    async def detach(mount_point: Path, *, force: bool, progress: Any) -> Attachment:
        assert force
        return ATTACHED

    monkeypatch.setattr(detaching, "detach", detach)
    assert "what was in swap is lost" in run("detach", "--force").stdout


def test_progress_without_a_terminal_is_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    async def detach(mount_point: Path, *, force: bool, progress: Any) -> Attachment:
        assert not force
        for remaining in range(1000 << 10, -1, -(1 << 10)):
            progress(Remaining(remaining))
        return ATTACHED

    monkeypatch.setattr(detaching, "detach", detach)
    result = run("detach")
    assert result.stdout == "detached: /dev/loop9, 1.0 MiB back in memory\n"
    lines = result.stderr.splitlines()
    assert len(lines) == 11
    assert lines[0] == "reading pages back: 0%, left: 1000.0 KiB"
    assert lines[-1] == "reading pages back: 100%, left: 0 B"

    result = run("detach", "--json")
    assert json.loads(result.stdout)["detached"]["used_bytes"] == 1 << 20
    assert result.stderr == ""


def test_what_is_left_says_what_is_on_the_disk() -> None:
    assert str(Remaining(5 << 20)) == "5.0 MiB"
    assert str(Remaining(5 << 20, pages_on_disk=512)) == "5.0 MiB, at most 2.0 MiB of it on the backing disk"
    # The kernel has freed some of them.
    assert str(Remaining(1 << 20, pages_on_disk=512)) == "1.0 MiB, at most 1.0 MiB of it on the backing disk"
    assert str(Remaining(1 << 20, writebacks=2, cleanings=1)) == "1.0 MiB (2 segments being written, 1 cleaned)"


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (None, "the swap is detached"),
        (ATTACHED, "1.0 MiB stay in /dev/loop9, everything goes on serving"),
        (replace(ATTACHED, is_swap=False), "every page is back in memory; detach again to free /dev/loop9"),
    ],
)
def test_an_interruption_says_how_things_were_left(
    left: Attachment | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def detach(mount_point: Path, *, force: bool, progress: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep_forever()

    monkeypatch.setattr(detaching, "detach", detach)
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: left)
    assert text in run("detach").stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_in_good_order(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    tidied = []

    async def detach(mount_point: Path, *, force: bool, progress: Any) -> None:
        os.kill(os.getpid(), number)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
                tidied.append(mount_point)

    monkeypatch.setattr(detaching, "detach", detach)
    before = signal.getsignal(number)
    result = run("detach")
    assert result.exit_code == 1
    assert "zswapctl: interrupted: " in result.stderr
    assert tidied == [Path("/run/zswapd-test/mnt")]
    assert signal.getsignal(number) == before


def test_a_second_signal_ends_the_program_at_once() -> None:
    program = """
import trio
from zswapd import ctl

async def operation():
    print("started", flush=True)
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()

ctl._run(operation, lambda: "")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout
            assert child.stderr
            assert child.stdout.readline() == "started\n"
            child.send_signal(signal.SIGINT)
            assert child.stderr.readline().startswith("stopping as soon as the kernel can")
            child.send_signal(signal.SIGINT)
            assert child.wait(DEADLINE_SECONDS) == -signal.SIGINT
        finally:
            child.kill()


def test_nothing_that_takes_long_is_imported_before_ctrl_c_is_seen_to() -> None:
    code = "import sys; before = set(sys.modules); import zswapd.entry; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(result.stdout.split())
    assert "zswapd.entry" in imported
    assert not imported & {"importlib.metadata", "click", "trio"}


@pytest.mark.parametrize("group", [cli.cli, ctl.cli])
def test_both_programs_have_help(group: click.Group) -> None:
    for option in ("-h", "--help"):
        result = CliRunner().invoke(group, [option])
        assert (result.exit_code, result.stdout.split()[0]) == (0, "Usage:")


def test_an_error_is_shown_with_its_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    async def detach(mount_point: Path, *, force: bool, progress: Any) -> None:
        raise SwapError("what", "remedy")

    monkeypatch.setattr(detaching, "detach", detach)
    result = run("detach")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "zswapctl: what\nremedy\n")


def test_status_joins_the_daemon_s_word_with_the_kernel_s(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"pid": 5, "allocator": "zsmalloc", "classes": [], "writeback": writeback()}
    monkeypatch.setattr(status, "read_stats", lambda mount_point: stats)
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: ATTACHED)
    shown = json.loads(run("status", "--json").stdout)
    assert shown["pid"] == 5
    assert shown["attachment"]["loop_device"] == "/dev/loop9"
    assert json.loads(run("status", "--classes", "--json").stdout) == []
    assert "full" in run("status", "--classes").stdout


@pytest.mark.parametrize(("worst", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_fails_only_for_failures(worst: Any, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [doctor.Check("a", "ok", "fine"), doctor.Check("b", worst, "detail [red]", "remedy")]
    monkeypatch.setattr(doctor, "run", lambda config: found)
    result = run("doctor")
    assert result.exit_code == code
    assert "detail [red]" in result.stdout
    assert "remedy" in result.stdout
    result = run("doctor", "--json")
    assert result.exit_code == code
    assert [check["status"] for check in json.loads(result.stdout)] == ["ok", worst]


def test_status_says_that_the_backing_file_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "being_written", lambda settings: "it is writing the backing file first, 34%")
    result = run("status")
    assert result.exit_code == 1
    assert result.stderr.endswith("\nit is writing the backing file first, 34%\n")


def test_status_shows_what_is_left_of_the_whole_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    granted = {"pid": 5, "writeback": writeback(state="ok", budget_bytes=5)}
    monkeypatch.setattr(status, "read_stats", lambda mount_point: granted)
    monkeypatch.setattr(swapdev, "discover", lambda mount_point: None)
    monkeypatch.setattr(wear, "left_of", lambda settings, unused: unused * 2)
    assert json.loads(run("status", "--json").stdout)["writeback"]["budget_bytes"] == 10


@pytest.mark.parametrize("arguments", [("page",), ("all", "7"), ("everything",), ("huge", "--older", "3"), ()])
def test_writeback_takes_what_goes_together(arguments: tuple[str, ...]) -> None:
    assert run("writeback", *arguments).exit_code == 2


def test_writeback_needs_a_pager() -> None:
    result = run("writeback", "all")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no pager serves /run/zswapd-test/mnt" in result.stderr


class WritingPager:
    """Says how far it is, and what became of it."""

    def __init__(self, outcome: Written | OSError, *, state: str = "ok", keeps: bool = False) -> None:
        self.outcome = outcome
        self.state = state
        self.keeps = keeps
        self.told: list[str] = []

    def stats(self) -> Any:
        disk = writeback(state=self.state, pages_written=1234, written_bytes=5 << 20)
        return {"pages": {"incompressible": 77}, "writeback": disk}

    def keeps_incompressible(self) -> bool:
        return self.keeps

    def mark_idle(self, older: int) -> None:
        self.told.append(f"idle {older}")

    def write_back(self, order: str) -> Written:
        self.told.append(order)
        if isinstance(self.outcome, OSError):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    ("outcome", "code", "text"),
    [
        (Written(1234, 3 << 20, "done"), 0, "written back: 1,234 pages, 3.0 MiB of the pool freed\n"),
        (Written(1234, 0, "full"), 2, "ended early: the backing disk is full\n"),
        (Written(1234, 0, "failed"), 2, "ended early: the backing disk cannot be written\n"),
        (Written(1234, 0, "budget"), 2, "ended early: the budget is used up (1.0 MiB per day)\n"),
        (OSError(errno.ENODEV, "no"), 1, "there is no backing disk (writeback.backing)\n"),
        (OSError(errno.EBUSY, "another writeback is under way"), 1, "another writeback is under way\ntry again"),
    ],
)
def test_writeback_says_how_it_ended(
    monkeypatch: pytest.MonkeyPatch, outcome: Written | OSError, code: int, text: str
) -> None:
    pager = WritingPager(outcome)
    monkeypatch.setattr(command, "Pager", lambda mount_point: pager)
    keys = ("--set", "writeback.backing=/dev/x", "--set", "writeback.budget_per_day=1MiB")
    result = run(*keys, "writeback", "idle", "--older", "60")
    assert (result.exit_code, text in result.stdout + result.stderr) == (code, True)
    assert pager.told == ["idle 60", "idle"]
    if isinstance(outcome, Written):
        shown = run(*keys, "writeback", "page", "7", "--json")
        assert json.loads(shown.stdout)["ended"] == outcome.ended
        assert pager.told[-1] == "page 7"


class Upgrading:
    """In the place of a pager that is found."""

    error: OSError | None = None

    def __init__(self, mount_point: Path) -> None:
        assert mount_point == Path("/run/zswapd-test/mnt")

    def upgrade(self) -> Upgraded:
        if self.error:
            raise self.error
        return Upgraded(7, 8, 0.0123)


def test_an_upgrade_says_who_serves_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctl, "Pager", Upgrading)
    assert run("upgrade").stdout == "upgraded: pager pid 8 for 7, after 12.3 ms without\n"
    assert json.loads(run("upgrade", "--json").stdout) == {"old_pid": 7, "new_pid": 8, "pause_seconds": 0.0123}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(errno.ENOENT, "none"), "no pager serves /run/zswapd-test/mnt\nstart it"),
        (
            BrokenPipeError(errno.EPIPE, "gone"),
            "not upgraded, the old version goes on: its keeper is gone\nstop zswapd",
        ),
        (
            OSError(errno.EINVAL, "state version 4"),
            "not upgraded, the old version goes on: state version 4\n"
            "see its log; or bring every page back first: zswapctl stop, then start zswapd again",
        ),
        (TimeoutError(errno.ETIMEDOUT, "too long"), "the upgrade has begun, and is not done: too long"),
    ],
)
def test_an_upgrade_that_fails_says_what_is_left(monkeypatch: pytest.MonkeyPatch, error: OSError, text: str) -> None:
    monkeypatch.setattr(ctl, "Pager", Upgrading)
    monkeypatch.setattr(Upgrading, "error", error)
    result = run("upgrade")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"zswapctl: {text}")


@pytest.mark.parametrize(("ended", "text"), [(True, "stopped: nothing is attached or mounted"), (False, "no pager")])
def test_stop_says_whether_there_was_a_pager(monkeypatch: pytest.MonkeyPatch, ended: bool, text: str) -> None:
    async def end_pager(config: Config) -> bool:
        return ended

    monkeypatch.setattr(ctl, "end_pager", end_pager)
    result = run("stop")
    assert (result.exit_code, result.stdout.startswith(text)) == (0, True)


def test_a_writeback_that_a_takeover_cut_off_is_not_done_twice_but_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "another pager has taken over" in str(command._explained(InterruptedError(errno.EINTR, "gone")))


@pytest.mark.parametrize(
    ("state", "outcome", "code", "text"),
    [
        ("failed", Written(0, 0, "done"), 0, "the backing disk is written to again\n"),
        ("ok", Written(0, 0, "done"), 0, "the backing disk had not failed\n"),
        (
            "failed",
            OSError(errno.EIO, "it cannot"),
            1,
            "nothing is written to the backing disk yet: it cannot\nsee dmesg",
        ),
        ("failed", OSError(errno.ENOSPC, "the budget"), 1, "nothing is written to the backing disk yet: the budget\n"),
        ("none", OSError(errno.ENODEV, "none"), 1, "there is no backing disk"),
    ],
)
def test_a_disk_is_tried_when_told_and_what_came_of_it_said(
    monkeypatch: pytest.MonkeyPatch, state: str, outcome: Written | OSError, code: int, text: str
) -> None:
    pager = WritingPager(outcome, state=state)
    monkeypatch.setattr(command, "Pager", lambda mount_point: pager)
    result = run("writeback", "resume")
    assert (result.exit_code, text in result.stdout + result.stderr) == (code, True)
    assert pager.told == ["resume"]
    if code == 0:
        assert json.loads(run("writeback", "resume", "--json").stdout) == {"had_failed": state == "failed"}


@pytest.mark.parametrize(("keeps", "what", "said"), [(True, "all", True), (True, "huge", False), (False, "all", False)])
def test_what_stays_since_it_does_not_compress_is_said(
    monkeypatch: pytest.MonkeyPatch, keeps: bool, what: str, said: bool
) -> None:
    pager = WritingPager(Written(5, 5, "done"), keeps=keeps)
    monkeypatch.setattr(command, "Pager", lambda mount_point: pager)
    shown = run("writeback", what).stdout
    assert ("77 pages that do not compress stay in the pool (writeback.incompressible is keep)" in shown) == said


def test_a_budget_of_another_configuration_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Pager", lambda mount_point: WritingPager(Written(5, 5, "budget")))
    shown = run("writeback", "all").stderr
    assert "the budget is used up (writeback_limit, or another configuration's)\n" in shown
