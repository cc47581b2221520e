"""make install and make uninstall, into a directory that stands for the whole system."""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.daemon import ENVIRONMENT
from tests.machine import lacks
from zswapd import __version__

REPOSITORY = Path(__file__).parents[2]
UNITS = sorted(path.name for path in REPOSITORY.glob("systemd/*.service"))


def make(target: str, root: Path, prefix: str, systemd: int = 252) -> str:
    # Built already, or the tests would not run: nothing is to be installed or fetched on the way.
    command = ["make", "--no-print-directory", "--assume-old=build", target, f"DESTDIR={root}", f"PREFIX={prefix}"]
    command.append(f"SYSTEMD={systemd}")
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


@pytest.fixture(scope="module", params=["/usr", "/opt/z"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("root")
    make("install", root, request.param)
    return root, request.param


def test_everything_is_there_and_nothing_else(installed: tuple[Path, str]) -> None:
    root, prefix = installed
    under = prefix.lstrip("/")
    library = f"{under}/lib/zswapd/"
    own = {name for name in files(root) if not name.startswith(library)}
    docs = ("ARCHITECTURE.md", "CHANGELOG.md", "LICENSE", "MEASURED.md", "README.md")
    assert own == {
        "etc/zswapd/zswapd.toml",
        f"{under}/bin/zswapctl",
        f"{under}/bin/zswapd",
        f"{under}/lib/sysctl.d/60-zswapd.conf",
        f"{under}/lib/tmpfiles.d/zswapd.conf",
        *(f"{under}/lib/systemd/system/{unit}" for unit in UNITS),
        *(f"{under}/share/doc/zswapd/{name}" for name in docs),
        f"{under}/share/zswapd/grafana/provisioning.yml",
        f"{under}/share/zswapd/grafana/zswapd.json",
        f"{under}/share/zswapd/prometheus/prometheus.yml",
        f"{under}/share/zswapd/prometheus/zswapd.rules.yml",
    }
    packages = {Path(name).relative_to(library).parts[0] for name in files(root) - own}
    assert {"zswapd", "trio", "pyfuse3", "pydantic", f"zswapd-{__version__}.dist-info"} <= packages
    assert not packages & {"mypy", "pytest", "ruff", "maturin", "pip", "hypothesis"}
    for program in ("zswapd-pager", "zswapd-keeper", "_native.abi3.so"):
        assert os.access(root / library / "zswapd" / program, os.X_OK), program


def test_units_name_programs_that_are_there(installed: tuple[Path, str]) -> None:
    root, prefix = installed
    named = 0
    for unit in UNITS:
        text = (root / prefix.lstrip("/") / "lib/systemd/system" / unit).read_text()
        for program in re.findall(r"^Exec\w+=(\S+)", text, re.MULTILINE):
            if "zswap" in program:
                named += 1
                assert os.access(root / program.lstrip("/"), os.X_OK), program
    assert named >= 8


def test_the_programs_run_from_there(installed: tuple[Path, str]) -> None:
    """Without the packages that they were copied from."""
    root, prefix = installed
    library = f"{prefix}/lib/zswapd"
    for name in ("zswapd", "zswapctl"):
        program = root / prefix.lstrip("/") / "bin" / name
        # Where it would be if the directory were the whole system.
        text = program.read_text().replace(library, str(root) + library)
        moved = root / name
        moved.write_text(text)
        moved.chmod(0o755)
        result = subprocess.run([moved, "--version"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
        moved.unlink()
        assert (result.returncode, result.stderr) == (0, "")
        assert __version__ in result.stdout


def test_a_python_that_the_units_do_not_see_is_warned_of() -> None:
    lay_out = runpy.run_path(str(REPOSITORY / "install/lay_out.py"))
    for hidden in ("/root/.pyenv/versions/3.11.7/bin/python3.11", "/home/x/python", "/run/user/0/python"):
        assert f"warning: the programs are run by {hidden}" in lay_out["hidden"](Path(hidden))
    for seen in ("/usr/bin/python3", "/opt/home/bin/python", "/rooted/python"):
        assert lay_out["hidden"](Path(seen)) is None


def test_what_is_installed_is_taken_away_again(tmp_path: Path) -> None:
    make("install", tmp_path, "/usr", systemd=254)
    assert (tmp_path / "usr/lib/systemd/system/zswapd-pager.service.d/preserve.conf").exists()
    assert make("uninstall", tmp_path, "/usr") == ""
    assert files(tmp_path) == set()
    assert not (tmp_path / "etc/zswapd").exists()
    assert not (tmp_path / "usr/lib/zswapd").exists()


def test_a_configuration_that_was_changed_stays(tmp_path: Path) -> None:
    config = tmp_path / "etc/zswapd/zswapd.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[swap]\nsize = '2GiB'\n")
    make("install", tmp_path, "/usr")
    assert config.read_text() == "[swap]\nsize = '2GiB'\n"
    assert f"{config} was changed, and stays" in make("uninstall", tmp_path, "/usr")
    assert files(tmp_path) == {"etc/zswapd/zswapd.toml"}


def test_systemd_understands_the_units(installed: tuple[Path, str], tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        lacks("systemd-analyze")
    root, prefix = installed
    for unit in UNITS:
        text = (root / prefix.lstrip("/") / "lib/systemd/system" / unit).read_text()
        # It looks for the programs, where they would be if the directory were the whole system.
        (tmp_path / unit).write_text(text.replace(f"={prefix}/bin/zswap", f"={root}{prefix}/bin/zswap"))
    units = [str(tmp_path / unit) for unit in UNITS]
    result = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def settings(unit: str) -> dict[str, list[str]]:
    """Values by name, in their order."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", (REPOSITORY / "systemd" / unit).read_text(), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS)
def test_no_unit_is_stopped_because_another_fails(unit: str) -> None:
    """Else the swap would be detached when the keeper dies, through the pager that is to be started then."""
    assert not settings(unit).keys() & {"Requires", "Requisite", "BindsTo", "PartOf", "StopPropagatedFrom", "Upholds"}


@pytest.mark.parametrize("unit", UNITS)
def test_no_unit_waits_for_what_comes_after_the_swap(unit: str) -> None:
    """/tmp may be in memory, and is then mounted after swap.target."""
    found = settings(unit)
    assert found["DefaultDependencies"] == ["no"]
    assert "local-fs.target" not in " ".join(found.get("After", []))
    assert "PrivateTmp" not in found


@pytest.mark.parametrize("unit", ["zswapd-pager.service", "zswapd-swap.service", "zswapd-sleep.service"])
def test_who_mounts_or_attaches_has_the_host_s_mounts(unit: str) -> None:
    """All of these would give it a mount namespace of its own (systemd.exec(5))."""
    spaces = "Private(Tmp|Devices|Mounts|IPC|Users)|Protect(System|Home|Proc|Hostname|Kernel.*|ControlGroups)|Root.*"
    spaces += (
        "|(ReadOnly|ReadWrite|Inaccessible|Exec|NoExec)Paths|Bind.*Paths|TemporaryFileSystem|MountFlags|DynamicUser"
    )
    assert [name for name in settings(unit) if re.fullmatch(spaces, name)] == []


def test_pagers_are_not_killed_with_anybody() -> None:
    found = settings("zswapd-pager.service")
    expected = {
        "KillMode": "process",
        "SendSIGKILL": "no",
        "TimeoutStopSec": "infinity",
        "OOMPolicy": "continue",
        "SystemCallErrorNumber": "EPERM",
        "StartLimitIntervalSec": "0",
        "MemorySwapMax": "0",
    }
    assert {name: found[name] for name in expected} == {name: [value] for name, value in expected.items()}


@pytest.mark.parametrize(("unit", "most"), [("zswapd-pager.service", 40), ("zswapd.service", 20)])
def test_units_are_as_confined_as_the_documents_say(unit: str, most: int) -> None:
    if not shutil.which("systemd-analyze"):
        lacks("systemd-analyze")
    path = str(REPOSITORY / "systemd" / unit)
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={most}", path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
