"""The program that takes memory in a guest."""

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def hog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("hog") / "hog"
    source = Path(__file__).with_name("hog.c")
    subprocess.run(["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program
