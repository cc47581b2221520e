"""Pages to test with."""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st

PAGE = 4096


def real_pages() -> Iterator[bytes]:
    """Whole pages of this machine's programs and libraries, Python's own first. Different on every machine."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in [*sorted(library.glob("*.py")), Path("/proc/self/exe"), *sorted(Path("/usr/lib").glob("*/*.so*"))]:
        data = path.read_bytes()
        for offset in range(0, len(data) - PAGE + 1, PAGE):
            yield data[offset : offset + PAGE]


def noise(seed: object) -> bytes:
    """A page that no codec makes smaller."""
    return random.Random(str(seed)).randbytes(PAGE)


@st.composite
def pages(draw: st.DrawFn) -> bytes:
    """From all alike to incompressible: some noise, then a repeated pattern."""
    length = draw(st.integers(0, PAGE))
    head = random.Random(draw(st.integers(0, 2**32))).randbytes(length)
    pattern = draw(st.binary(min_size=1, max_size=64))
    return (head + pattern * PAGE)[:PAGE]
