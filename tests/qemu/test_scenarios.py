"""Scenarios that need no systemd: tests/qemu/inside, several to a boot. Each is a test; README.md lists them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.qemu.guest import Guest, Outcome

DEADLINE_SECONDS = 3600
#: What the kernel says of a page that anybody has lost, not only a scenario's program; and where that may be.
LOST_PAGE = re.compile(r"Read-error on swap-device|I/O error, dev loop.*\(READ\)")
MAY_LOSE_PAGES = ("disks", "old")


@dataclass(frozen=True)
class Boot:
    """A guest with `memory` MiB, a kernel, and empty disks of so many MiB; and what runs in it, in that order."""

    memory: int
    kernel: str
    disks: tuple[int, ...]
    scenarios: tuple[str, ...]


BOOTS = {
    "quick": Boot(384, "6.12", (), ("kills.quick",)),
    "kills": Boot(384, "6.12", (), ("kills.under_pressure",)),
    "disks": Boot(384, "6.12", (64,), ("disks.full", "disks.fails_to_write", "disks.fails", "disks.slow")),
    "old": Boot(384, "6.1", (), ("kills.without_resend", "limits.all_memory")),
    "limits": Boot(
        384,
        "6.12",
        (160,),
        (
            "limits.swap_max",
            "limits.beside_zram",
            "limits.suspend",
            "limits.page_cache",
            "limits.no_memory_for_swapoff",
        ),
    ),
}


@pytest.fixture(scope="module")
def boot(
    request: pytest.FixtureRequest, image: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Outcome]:
    """What became of a boot, which runs those of its scenarios that are selected."""
    outcomes: dict[str, Outcome] = {}

    def run(name: str) -> Outcome:
        if name not in outcomes:
            boot = BOOTS[name]
            guest = Guest(boot.memory, image, boot.kernel)
            selected = {item.name for item in request.session.items}
            scenarios = [one for one in boot.scenarios if f"test_scenario[{name}-{one}]" in selected]
            disks = []
            for number, mebibytes in enumerate(boot.disks):
                disks.append(tmp_path_factory.mktemp(name) / f"disk{number}")
                with disks[-1].open("wb") as file:
                    file.truncate(mebibytes << 20)
            environment = {"SCENARIOS": ",".join(scenarios)}
            outcomes[name] = guest.run("inside.sh", environment, DEADLINE_SECONDS, watched="hog", disks=disks)
        return outcomes[name]

    return run


@pytest.mark.parametrize(
    ("name", "scenario"),
    [pytest.param(name, one, id=f"{name}-{one}") for name, boot in BOOTS.items() for one in boot.scenarios],
)
def test_scenario(boot: Callable[[str], Outcome], name: str, scenario: str) -> None:
    outcome = boot(name)
    _, begun, rest = outcome.output.partition(f"scenario {scenario}: begins\n")
    assert begun, "not reached: one before it failed"
    said, ended, _ = rest.partition(f"scenario {scenario}: passed")
    print(said)
    if not ended:
        print("the kernel:", outcome.kernel_log[-10000:], sep="\n")
    assert ended, "it failed, or was not through in time"
    assert not outcome.complaints()
    assert name in MAY_LOSE_PAGES or not LOST_PAGE.search(outcome.kernel_log)
    if outcome.output.count(": begins\n") == outcome.output.count(": passed after"):
        assert outcome.status == 0, "the guest was not switched off"
