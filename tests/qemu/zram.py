"""What zram of Debian's kernel makes of pages: `python -m tests.qemu.zram FILE BYTES...`, for zswapd.bench.savings.

FILE has several sets of pages, one behind the other, of so many BYTES. Prints a line for each algorithm and set, the
last set being all of FILE: the algorithm, and zram's mm_stat. Nothing of the pages is written to a disk.
"""

import re
import signal
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

import pytest

from tests.qemu import images
from tests.qemu.guest import Guest

#: Those of the kernel (6.12): it has no lzo.
ALGORITHMS = ("lz4", "zstd")
#: What the guest itself needs; half as much as the pages is more than they take.
MEMORY_MIB = 512
DEADLINE_SECONDS = 1800
SCRIPT = "zram.sh"


def main(pages: Path, sizes: list[int]) -> None:
    parts = [*zip(accumulate([0, *sizes]), sizes, strict=False), (0, sum(sizes))]
    images.require()
    # The script is all that lies over the root.
    with tempfile.TemporaryDirectory(prefix="zswapd-qemu-") as name:
        directory = Path(name, "installed")
        script = directory / images.TESTS.relative_to("/") / "tests/qemu" / SCRIPT
        script.parent.mkdir(parents=True)
        script.write_bytes(Path(__file__).with_name(SCRIPT).read_bytes())
        script.chmod(0o755)
        guest = Guest(
            MEMORY_MIB + (sum(sizes) >> 21),
            images.image(directory, Path(name, "image")),
            more=("-overcommit", "mem-lock=on"),
        )
        environment = {
            "ALGORITHMS": ",".join(ALGORITHMS),
            "PARTS": ",".join(f"{start}:{size}" for start, size in parts),
        }
        outcome = guest.run(SCRIPT, environment, DEADLINE_SECONDS, disks=[pages])
    found = re.findall(r"^mm_stat (.+)$", outcome.output, re.MULTILINE)
    if outcome.status != 0 or len(found) != len(ALGORITHMS) * len(parts):
        sys.exit(f"the virtual machine failed: {outcome.output[-1000:]}")
    print(*found, sep="\n")


if __name__ == "__main__":
    # So that the virtual machine is ended, and nothing left, by SIGTERM too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
    except pytest.skip.Exception as lacks:
        sys.exit(str(lacks))
    except KeyboardInterrupt:
        sys.exit("interrupted")
