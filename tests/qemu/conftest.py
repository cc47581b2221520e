"""What is laid over the root of every guest."""

import subprocess
from pathlib import Path

import pytest

from tests.qemu import images


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of what make install makes, with the tests, and the program that takes memory in a guest."""
    images.require()
    directory = tmp_path_factory.mktemp("installed")
    hog = directory / images.HOG.relative_to("/")
    images.install(directory)
    source = Path(__file__).with_name("hog.c")
    subprocess.run(["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", hog, source], check=True)
    return directory


@pytest.fixture(scope="session")
def image(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, for a guest without systemd."""
    return images.image(installed, tmp_path_factory.mktemp("image") / "installed")
