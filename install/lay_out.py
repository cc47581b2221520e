"""For make install: copies zswapd and every package that it imports, just as .venv has them, to a directory of their
own, and makes the programs that begin there. Nothing is fetched, and the system's Python packages are neither used nor
changed.

    lay_out.py DESTDIR LIBDIR BINDIR    (the last two as they will be named when DESTDIR is /)
"""

import compileall
import shutil
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

SOURCES = Path(__file__).resolve().parents[1] / "zswapd"
PROGRAM = """\
#!{python} -I
import os
import sys

os.environ["PYTHONPATH"] = "{lib}"  # for those that it starts
sys.path.insert(0, "{lib}")
from zswapd.entry import {name}

{name}()
"""


def imported(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """A distribution, and those that it needs, by name."""
    if name not in found:
        found[name] = distribution(name)
        for line in found[name].requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                imported(needed.name, found)
    return found


def hidden(python: Path) -> str | None:
    """What to say of an interpreter that lies where ProtectHome hides it from zswapd.service; None: it does not."""
    if python.is_relative_to("/root") or python.is_relative_to("/home") or python.is_relative_to("/run/user"):
        return (
            f"zswapd: warning: the programs are run by {python}, and zswapd.service sees no home directory: "
            "remove .venv, put another python3 first in PATH, and run make install again"
        )
    return None


def main(destdir: str, lib: str, bin: str) -> None:
    final, directory = Path(destdir + lib), Path(destdir + lib + ".new")
    shutil.rmtree(directory, ignore_errors=True)
    packages = imported("zswapd", {})
    own = packages.pop("zswapd")
    for package in packages.values():
        for file in package.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = directory / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file.locate(), target)
    shutil.copytree(SOURCES, directory / "zswapd", ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    metadata = directory / f"zswapd-{own.version}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(own.read_text("METADATA") or "")
    compileall.compile_dir(directory, quiet=1, stripdir=str(directory), prependdir=lib)
    # At once: a standby may be started from here at any moment.
    old = final.with_suffix(".old")
    if final.exists():
        final.rename(old)
    directory.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    python = Path(sys._base_executable).resolve()
    for name in ("zswapd", "zswapctl"):
        program = Path(destdir + bin, name)
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(PROGRAM.format(python=python, lib=lib, name=name))
        program.chmod(0o755)
    if warning := hidden(python):
        print(warning, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
