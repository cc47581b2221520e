"""What a system call answers with when it fails."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises_errno(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is checked below
        yield
    assert errno.errorcode.get(caught.value.errno or 0) == errno.errorcode[number]
