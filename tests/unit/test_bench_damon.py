"""DAMON is off while pages may be forgotten, and then as it was, whatever happened meanwhile."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

from zswapd.bench import command, damon
from zswapd.bench.damon import switched_off
from zswapd.errors import ZswapdError

KDAMONDS = "sys/kernel/mm/damon/admin/kdamonds"
RECLAIM = "sys/module/damon_reclaim/parameters/enabled"
BEFORE = {f"{KDAMONDS}/0/state": "on", f"{KDAMONDS}/1/state": "off", f"{KDAMONDS}/2/state": "on", RECLAIM: "Y"}
OFF = {path: "N" if value == "Y" else "off" for path, value in BEFORE.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path, value in BEFORE.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(f"{value}\n")
    return tmp_path


def states(root: Path) -> dict[str, str]:
    return {path: (root / path).read_text().strip() for path in BEFORE}


async def test_what_is_on_is_off_meanwhile_and_that_is_said(root: Path) -> None:
    said: list[str] = []
    async with switched_off(said.append, root):
        assert states(root) == OFF
        assert f"{KDAMONDS}/0/state was on: off until the end" in said[0]
        assert f"{RECLAIM} was Y: N until the end" in said[2]
    assert states(root) == BEFORE
    assert [line.rpartition(" is ")[2] for line in said[3:]] == ["Y again", "on again", "on again"]


async def test_without_damon_there_is_nothing_to_say(tmp_path: Path) -> None:
    said: list[str] = []
    async with switched_off(said.append, tmp_path):
        pass
    assert said == []


@pytest.mark.parametrize("failure", [ZswapdError("no"), KeyboardInterrupt(), SystemExit(3), OSError("no")])
async def test_it_is_on_again_after_every_failure(root: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)):
        async with switched_off(lambda what: None, root):
            raise failure
    assert states(root) == BEFORE


async def test_it_is_on_again_after_a_cancellation(root: Path) -> None:
    with trio.CancelScope() as scope:
        async with switched_off(lambda what: None, root):
            scope.cancel()
            await trio.sleep_forever()
    assert states(root) == BEFORE


def writing(monkeypatch: pytest.MonkeyPatch, refuse: Callable[[Path, str], None]) -> None:
    write = Path.write_text

    def write_text(path: Path, text: str) -> int:
        refuse(path, text)
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", write_text)


async def test_what_cannot_be_switched_off_is_refused_and_the_rest_is_on_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        if path == root / KDAMONDS / "2/state":
            raise PermissionError(errno.EPERM, "Operation not permitted")

    writing(monkeypatch, refuse)
    with pytest.raises(ZswapdError, match=r"cannot be switched off: .*/2/state: Operation not permitted") as caught:
        async with switched_off(lambda what: None, root):
            pytest.fail("pages would be forgotten")
    assert "leave the row null out" in caught.value.hint
    assert states(root) == BEFORE


async def test_one_that_cannot_be_switched_on_does_not_keep_the_others_off(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        if (path.name, text) == ("enabled", "Y"):
            raise PermissionError(errno.EPERM, "Operation not permitted")

    writing(monkeypatch, refuse)
    with pytest.raises(ZswapdError, match="cannot be switched Y") as caught:
        async with switched_off(lambda what: None, root):
            pass
    assert f"echo Y > {root / RECLAIM}" in caught.value.hint
    assert states(root) == {**BEFORE, RECLAIM: "N"}


async def test_a_busy_switch_is_tried_again_and_one_that_never_moves_is_given_up(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def refuse(path: Path, text: str) -> None:
        attempts.append(path)
        if len(attempts) < 4:
            raise OSError(errno.EBUSY, "Device or resource busy")

    writing(monkeypatch, refuse)
    async with switched_off(lambda what: None, root):
        assert states(root) == OFF
    assert states(root) == BEFORE
    assert len(attempts) == 3 + 2 * 3
    attempts.clear()
    monkeypatch.setattr(damon, "SECONDS", 0.1)
    writing(monkeypatch, lambda path, text: attempts.clear())
    with pytest.raises(ZswapdError, match=r"/0/state: not within 0.1 s"):
        async with switched_off(lambda what: None, root):
            pytest.fail("pages would be forgotten")
    assert states(root) == BEFORE


@pytest.mark.parametrize("rows", ["zswapd-lz4,null", "zswapd-lz4"])
def test_the_bench_looks_whether_pages_may_be_forgotten_when_it_is_off(
    root: Path, monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    asked = []

    def refuse_to_forget(own_group: Path, size_bytes: int) -> None:
        asked.append(states(root))

    async def build(pages: int, seed: int, report: object) -> None:
        raise ZswapdError("far enough")

    monkeypatch.setattr(command, "cannot_swap", lambda: "")
    monkeypatch.setattr(command, "lock_memory", lambda: None)
    monkeypatch.setattr(command, "leftovers", lambda directory: [])
    monkeypatch.setattr(command, "switched_off", lambda say: switched_off(say, root))
    monkeypatch.setattr(command, "refuse_to_forget", refuse_to_forget)
    monkeypatch.setattr(command, "build", build)
    result = CliRunner().invoke(command.bench, ["--rows", rows, "--size", "64MiB"])
    assert str(result.exception) == "far enough"
    assert asked == ([OFF] if "null" in rows else [])
    assert ("is on again" in result.output) == ("null" in rows)
    assert states(root) == BEFORE
