"""What a machine may lack: the only good reason not to run a test."""

from typing import NoReturn

import pytest

LACKS = "this machine lacks what the test needs: "


def lacks(reason: str) -> NoReturn:
    """Skips the test, in a way that is accepted where CI is set."""
    pytest.skip(LACKS + reason)
