import os
import resource
from pathlib import Path

import pytest

from tests.writeback import writeback
from zswapd import backing, doctor, wear
from zswapd.config import SEGMENT_BYTES, load

CONFIG = load(None, ["swap.mount_point=/run/zswapd-test/mnt", "swap.priority=100"], {})
FILES = {
    "dev/fuse": "",
    "dev/loop-control": "",
    "proc/self/mounts": "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
    "proc/self/status": "Name:\tcat\nCapEff:\t000001ffffffffff\n",
    "proc/self/uid_map": "         0          0 4294967295\n",
    "proc/swaps": "Filename Type Size Used Priority\n",
    "proc/sys/kernel/osrelease": "6.9.4-test\n",
    "proc/sys/vm/compact_unevictable_allowed": "0\n",
    "proc/sys/vm/min_free_kbytes": "67584\n",
    "proc/sys/vm/overcommit_memory": "0\n",
    "proc/sys/vm/page-cluster": "0\n",
    "proc/sys/vm/swappiness": "60\n",
    "sys/devices/system/cpu/cpuidle/current_governor": "haltpoll\n",
    "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
    "sys/module/haltpoll/parameters/guest_halt_poll_ns": "200000\n",
    "sys/module/zswap/parameters/enabled": "N\n",
    "sys/power/state": "\n",
}


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing is wrong."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(doctor, "read_stats", lambda mount_point: {"version": "1", "pid": 7})
    for path, text in FILES.items():
        write(tmp_path, path, text)
    return tmp_path


def problems(machine: Path) -> dict[str, str]:
    checks = doctor.run(CONFIG, machine)
    assert all(check.remedy for check in checks if check.status != "ok")
    return {check.name: check.status for check in checks if check.status != "ok"}


def test_nothing_is_wrong(machine: Path) -> None:
    assert problems(machine) == {}


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("proc/self/status", "CapEff:\t000001ffffdfffff\n", {"privileges": "fail"}),
        ("proc/self/status", "CapEff:\t000001fffeffffff\n", {"protection": "warn"}),
        ("proc/self/uid_map", "0 100000 65536\n", {"privileges": "fail"}),
        (".dockerenv", "", {"privileges": "warn"}),
        ("proc/sys/kernel/osrelease", "6.8.12-amd64\n", {"kernel": "warn"}),
        ("proc/sys/kernel/osrelease", "6.9.3\n", {"kernel": "warn"}),
        ("proc/sys/kernel/osrelease", "6.12-rc1\n", {}),
        ("proc/sys/kernel/osrelease", "6.0.0\n", {"kernel": "fail"}),
        ("proc/sys/kernel/osrelease", "5.15.0\n", {"kernel": "fail"}),
        ("sys/fs/cgroup/cgroup.controllers", "cpu\n", {"memory cgroups": "warn"}),
        ("sys/module/zswap/parameters/enabled", "Y\n", {"kernel zswap": "fail"}),
        ("proc/sys/fs/fuse/max_request_timeout", "30\n", {"FUSE timeouts": "fail"}),
        ("proc/sys/vm/watermark_boost_factor", "15000\n", {"vm.watermark_boost_factor": "fail"}),
        ("proc/sys/vm/compact_unevictable_allowed", "1\n", {"vm.compact_unevictable_allowed": "warn"}),
        ("proc/sys/vm/min_free_kbytes", "2047\n", {"vm.min_free_kbytes": "fail"}),
        ("proc/sys/vm/min_free_kbytes", "2048\n", {}),
        ("proc/sys/vm/page-cluster", "3\n", {"vm.page-cluster": "warn"}),
        ("sys/module/haltpoll/parameters/guest_halt_poll_ns", "0\n", {"idle processors": "warn"}),
        ("sys/devices/system/cpu/cpuidle/current_governor", "menu\n", {}),
        ("proc/sys/vm/swappiness", "0\n", {"vm.swappiness": "warn"}),
        ("proc/sys/vm/overcommit_memory", "2\n", {"vm.overcommit_memory": "warn"}),
        ("sys/power/state", "freeze mem disk\n", {"suspend": "warn"}),
        ("proc/swaps", FILES["proc/swaps"] + "/dev/sda2 partition 9 0 100\n", {"swap areas": "warn"}),
        ("proc/swaps", FILES["proc/swaps"] + "/dev/sda2 partition 9 0 99\n", {}),
    ],
)
def test_what_is_wrong_is_found(machine: Path, path: str, text: str, problem: dict[str, str]) -> None:
    write(machine, path, text)
    assert problems(machine) == problem


@pytest.mark.parametrize(("path", "name"), [("dev/fuse", "FUSE"), ("dev/loop-control", "loop devices")])
def test_what_is_missing_is_found(machine: Path, path: str, name: str) -> None:
    (machine / path).unlink()
    assert problems(machine) == {name: "fail"}


def test_root_is_needed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert problems(machine) == {"root": "fail"}


def test_tools_are_needed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TOOLS", ("swapon", "no-such-tool"))
    [check] = [check for check in doctor.run(CONFIG, machine) if check.name == "tools"]
    assert (check.status, check.detail) == ("fail", "not found: no-such-tool")


def test_memory_must_be_lockable(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(machine, "proc/self/status", "CapEff:\t000001ffffffbfff\n")
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (8 << 20, 8 << 20))
    assert problems(machine) == {"memory lock": "fail"}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY,) * 2)
    assert problems(machine) == {}


def test_a_pool_as_large_as_memory(machine: Path) -> None:
    config = load(None, ["pool.mem_limit=100%"], {})
    [check] = [check for check in doctor.run(config, machine) if check.name == "memory"]
    assert check.status == "warn"


def test_a_swap_file_whose_tables_memory_cannot_hold(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zswapd.footprint.mem_total", lambda: 1 << 30)
    config = load(None, ["swap.size=1TiB"], {})
    [check] = [check for check in doctor.run(config, machine) if check.name == "memory"]
    assert check.status == "fail"
    assert "swap.size" in check.detail


def test_a_daemon_that_does_not_run_is_no_failure(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert problems(machine) == {"daemon": "warn"}


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.1.0-18-amd64", (6, 1, 0)), ("6.9.4+deb13", (6, 9, 4)), ("7.12", (7, 12, 0)), ("odd", (0, 0, 0))],
)
def test_kernel_versions(release: str, version: tuple[int, int, int]) -> None:
    assert doctor.kernel_version(release) == version


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({}, "ok", "keeper pid 8, standby pid 9, 2 takeovers so far"),
        ({"standby": 0}, "warn", "no standby is ready"),
        ({"resend": 0}, "warn", "not sent again, and fails with an I/O error"),
        ({"keeper": 0, "standby": 0}, "fail", "the keeper is gone"),
    ],
)
def test_what_would_become_of_a_killed_pager(
    machine: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], status: str, text: str
) -> None:
    pager = {"pid": 7, "keeper": 8, "standby": 9, "resend": 1, **changes}
    running = {"version": "1", "pager": pager, "takeovers": 2}
    monkeypatch.setattr(doctor, "read_stats", lambda mount_point: running)
    [check] = [check for check in doctor.run(CONFIG, machine) if check.name == "takeover"]
    assert (check.status, text in check.detail, bool(check.remedy)) == (status, True, status != "ok")


@pytest.mark.parametrize(("zswapd", "status"), [({}, "ok"), ({"zswapd": 1}, "ok"), ({"zswapd": 0}, "warn")])
def test_a_pager_without_zswapd(
    machine: Path, monkeypatch: pytest.MonkeyPatch, zswapd: dict[str, int], status: str
) -> None:
    running = {"version": "1", "pager": {"pid": 7, "keeper": 8, "standby": 9, "resend": 1, **zswapd}, "takeovers": 2}
    monkeypatch.setattr(doctor, "read_stats", lambda mount_point: running)
    [check] = [check for check in doctor.run(CONFIG, machine) if check.name == "daemon"]
    assert (check.status, "no zswapd" in check.detail, bool(check.remedy)) == (status, status != "ok", status != "ok")


def disk_checks(root: Path, monkeypatch: pytest.MonkeyPatch, rotational: bool = False) -> list[doctor.Check]:
    keys = ("swap.mount_point=/run/zswapd-test/mnt", "writeback.backing=/dev/x", "writeback.budget_per_hour=1GiB")
    config = load(None, keys, {})
    disk = backing.Disk(Path("/dev/x"), False, 1 << 30, 7, rotational)
    monkeypatch.setattr(backing, "look", lambda settings, root: disk)
    monkeypatch.setattr(backing, "number_of", lambda path, root: (7, rotational))
    monkeypatch.setattr(backing, "is_on", lambda other, number, root: other == "/dev/same")
    monkeypatch.setenv("STATE_DIRECTORY", str(root / "state"))
    checks = [check for check in doctor.run(config, root) if check.name == "backing disk"]
    assert all(check.remedy for check in checks if check.status != "ok")
    return checks


def test_the_backing_disk_is_looked_at(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [check] = disk_checks(machine, monkeypatch)
    assert (check.status, check.detail) == ("ok", "/dev/x")
    [check] = disk_checks(machine, monkeypatch, rotational=True)
    assert (check.status, "rotating" in check.detail) == ("warn", True)
    write(machine, "proc/swaps", FILES["proc/swaps"] + "/dev/same partition 9 0 5\n/dev/other partition 9 0 5\n")
    [check] = disk_checks(machine, monkeypatch)
    assert (check.status, "the same disk as the swap area /dev/same" in check.detail) == ("warn", True)


def test_a_backing_disk_that_cannot_be_used_is_a_failure(machine: Path) -> None:
    config = load(None, ["writeback.backing=/dev/no-such-disk"], {})
    [check] = [check for check in doctor.run(config, machine) if check.name == "backing disk"]
    assert (check.status, "no such device" in check.detail) == ("fail", True)
    assert check.remedy


@pytest.mark.parametrize(
    ("counts", "status", "text"),
    [
        ({"state": "failed"}, "fail", "nothing more is written to it"),
        ({"state": "ok", "budget_bytes": SEGMENT_BYTES}, "ok", "/dev/x"),
        ({"state": "ok", "budget_bytes": SEGMENT_BYTES - 1}, "warn", "the budget is used up (1.0 GiB per hour)"),
    ],
)
def test_a_backing_disk_in_use_says_how_it_is(
    machine: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, object], status: str, text: str
) -> None:
    running = {"version": "1", "pid": 7, "writeback": writeback(**counts)}
    monkeypatch.setattr(doctor, "read_stats", lambda mount_point: running)
    monkeypatch.setattr(wear, "left_of", lambda settings, unused: unused)
    [check] = disk_checks(machine, monkeypatch)
    assert (check.status, text in check.detail) == (status, True)
