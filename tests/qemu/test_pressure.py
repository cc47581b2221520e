"""Zswapd as the only swap of a machine that runs out of memory as a whole."""

import re
from pathlib import Path

import pytest

from tests.qemu.guest import WITHOUT, Guest, Outcome

MEMORY_MIB = 512
HOG_MIB = 420
LEAST_SWAPPED_PAGES = (100 << 20) // 4096
#: Software emulation is slow, and the machine may be busy.
DEADLINE_SECONDS = 1800


@pytest.fixture(scope="module")
def guest(image: Path) -> Guest:
    return Guest(MEMORY_MIB, image)


def press(guest: Guest, locking: str) -> Outcome:
    environment = {"MEBIBYTES": str(HOG_MIB), "LOCKING": locking}
    outcome = guest.run("pressure.sh", environment, DEADLINE_SECONDS, watched="hog")
    print(outcome.output, outcome.kernel_log, sep="\n")
    assert '"is_swap": true' in outcome.output
    return outcome


def test_every_page_survives(guest: Guest) -> None:
    outcome = press(guest, "off" if WITHOUT == "locking" else "on")
    assert (outcome.status, outcome.hung) == (0, False)
    refused = (
        r"zswapctl: vm\.watermark_boost_factor = 15000: .*\n.*\n",
        r"zswapctl: vm\.min_free_kbytes = 512: .*\n.*\n",
    )
    assert re.search("".join(refused) + r'\{\n(.*\n)*?  "is_swap": true', outcome.output)
    assert len(re.findall(r"^hog: write: .* 0 wrong, 0 lost", outcome.output, re.MULTILINE)) == 3
    counters = dict(re.findall(r"^(\w+) (\d+)$", outcome.output, re.MULTILINE))
    assert int(counters["pswpout"]) > LEAST_SWAPPED_PAGES
    assert counters["oom_kill"] == "0"
    before, after = (re.findall(rf"^faults {when} (.*)$", outcome.output, re.MULTILINE) for when in ("before", "after"))
    assert before
    assert before == after
    # Beside the pager, zswapd itself may be swapped out.
    assert not re.search(r"^VmSwap:\s+0 kB$", outcome.output, re.MULTILINE)


def test_it_hangs_without_locking(guest: Guest) -> None:
    """So that the test above is known to see it. The pager's worker waits, or tries again for ever, for a page of its
    own or for memory, which only it could give."""
    outcome = press(guest, "off")
    assert "zswapd-pager: may not lock its memory" in outcome.output
    assert (outcome.status, outcome.hung) == (None, True)
