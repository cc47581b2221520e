"""Programs out of Debian's packages that are not installed: a service would begin to run."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.machine import lacks

BUILD = Path(__file__).parents[1] / "build/debian"


def unpacked(package: str) -> Path:
    """Where the package's newest version is unpacked; downloads it where it is not. Skips the test where there is no
    apt, or no such package; with CI set, an archive that cannot be reached is a failure."""
    for program in ("apt-get", "dpkg"):
        if not shutil.which(program):
            lacks(f"{program}, to unpack Debian's {package}")
    for lists_may_be_old in (True, False):
        version = _candidate(package)
        if version and (found := _unpack(package, version)):
            return found
        if lists_may_be_old:
            subprocess.run(["apt-get", "-qq", "update"], check=False)
    if not version:
        lacks(f"a package {package}, as far as apt knows")
    pytest.skip(f"apt-get could not download {package}")


def _unpack(package: str, version: str) -> Path | None:
    """None: the archive has no such version any more, or cannot be reached."""
    directory = BUILD / f"{package}_{version}"
    if not directory.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as name:
            # Not as another user, who may not write here.
            download = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", f"{package}={version}"]
            if subprocess.run(download, cwd=name, check=False).returncode:
                return None
            (archive,) = Path(name).glob("*.deb")
            subprocess.run(["dpkg", "-x", archive, f"{name}/root"], check=True)
            Path(name, "root").rename(directory)
    return directory


def _candidate(package: str) -> str | None:
    """The version that apt would install."""
    command = ["apt-cache", "policy", package]
    english = {**os.environ, "LC_ALL": "C"}
    said = subprocess.run(command, env=english, capture_output=True, text=True, check=False).stdout
    found = re.search(r"Candidate: (\d\S*)", said)
    return found[1] if found else None
