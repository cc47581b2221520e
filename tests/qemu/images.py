"""What a guest is made of: Debian's kernel, a root directory of Debian's packages, and what make install makes."""

import hashlib
import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path

from tests.machine import lacks

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
#: Kernels and roots, each named for the checksums of its packages; a clone has nothing to get anew.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zswapd" / "qemu"
#: By version: Debian's names for what depends on the newest of it. 6.1 is the last without FUSE_NOTIFY_RESEND.
KERNELS = {
    "6.12": ("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"),
    "6.1": ("linux-image-cloud-amd64",),
}
MODULES = ("virtio_pci", "virtio_blk", "squashfs", "overlay", "fuse", "loop", "zram", "dm_flakey", "dm_delay")
#: Beside what is essential.
PACKAGES = ("systemd-sysv", "python3", "fuse3", "libfuse3-3", "dmsetup", "kmod", "mount", "procps")
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mksquashfs": "squashfs-tools",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "gcc": "gcc",
    "apt-get": "apt",
    "dpkg": "dpkg",
}
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
#: Where the tests lie in the guest.
TESTS = Path("/usr/local/lib/zswapd-tests")
HOG = TESTS / "hog"
#: So many bytes are read from the root at once: little, since where memory is short it is read again and again.
_BLOCK = "16K"


def require() -> None:
    """Skips the test where there can be no guest."""
    if platform.machine() != "x86_64" or os.geteuid() != 0:
        lacks("root on x86-64, for a virtual machine")
    for program, package in PROGRAMS.items():
        if not shutil.which(program, path=PATH):
            lacks(f"{program} (Debian: {package}): make test-vm installs it")


@contextmanager
def _made_once(what: Path) -> Iterator[Path | None]:
    """Where to make it, on the way to `what`; None: it is there. Others who want it wait."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=CACHE) as directory:
        flock(lock, LOCK_EX)
        if what.exists():
            yield None
        else:
            yield Path(directory, "made")
            Path(directory, "made").rename(what)


def kernel(version: str) -> Path:
    """The directory of Debian's newest kernel of that version, cloud flavour."""
    for name in KERNELS[version]:
        depends = _output("apt-cache", "depends", name)
        if package := re.search(rf"Depends: (linux-image-{re.escape(version)}\.\S+)", depends):
            break
    else:
        lacks(f"Debian's package {KERNELS[version][0]} of Linux {version}")
    checksum = re.search(r"SHA256:(\w+)", _output("apt-get", "download", "--print-uris", package[1]))
    if not checksum:
        lacks(f"{package[1]}, of which apt-get knows no checksum")
    unpacked = CACHE / f"{package[1]}-{checksum[1][:16]}"
    with _made_once(unpacked) as root:
        if root:
            download = subprocess.run(["apt-get", "download", package[1]], cwd=root.parent, check=False)
            if download.returncode:
                lacks(f"{package[1]}, which apt-get could not download")
            (archive,) = root.parent.glob("*.deb")
            subprocess.run(["dpkg", "-x", archive, root], check=True)
    return unpacked


def root() -> Path:
    """A file system of this machine's release, minimal, with systemd and what zswapd needs: squashfs."""
    packages = _output("apt-cache", "show", "--no-all-versions", "apt", "base-files", "libc6", "systemd", *PACKAGES)
    checksums = re.findall(r"^SHA256: (\w+)$", packages, re.MULTILINE)
    if len(checksums) < len(PACKAGES):
        lacks("Debian's packages of a guest's root, or apt's lists of them")
    python = re.search(r"^Package: python3$(?:\n.+)*?\nVersion: (\d+\.\d+)", packages, re.MULTILINE)
    if not python or python[1] != f"{sys.version_info.major}.{sys.version_info.minor}":
        lacks(
            "a .venv of the Python that Debian has, which is the guest's: python3 -m venv --clear .venv && make build"
        )
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    key = hashlib.sha256("\n".join([*checksums, _BLOCK]).encode()).hexdigest()
    image = CACHE / f"root-{release}-{key[:16]}"
    with _made_once(image) as made:
        if made:
            for old in CACHE.glob(f"root-{release}-*"):
                old.unlink()
            archive = made.with_suffix(".tar")
            command = [
                "mmdebstrap",
                "--quiet",
                "--variant=minbase",
                "--dpkgopt=force-unsafe-io",
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                f"--include={','.join(PACKAGES)}",
                release,
                str(archive),
            ]
            if subprocess.run(command, env=os.environ | {"PATH": PATH}, check=False).returncode:
                lacks("a root of Debian's packages: mmdebstrap could not make it")
            with archive.open("rb") as source:
                subprocess.run(
                    ["sqfstar", "-quiet", "-no-progress", "-comp", "lz4", "-b", _BLOCK, made], stdin=source, check=True
                )
    return image


def install(directory: Path) -> None:
    """What make install makes, and beside it what tests need: nothing else that runs in a guest is ours."""
    command = ["make", "--no-print-directory", "--assume-old=build", "install", f"DESTDIR={directory}", "SYSTEMD=252"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    for program in ("zswapd", "zswapctl"):
        path = directory / "usr/bin" / program
        # Of this machine's release; .venv may be another's.
        path.write_text("#!/usr/bin/python3 -I\n" + path.read_text().partition("\n")[2])
    tests = directory / TESTS.relative_to("/")
    shutil.copytree(REPOSITORY / "tests", tests / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    # Else systemd would take it for the first boot of all.
    (directory / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")


def image(directory: Path, made: Path) -> Path:
    """A file system of what lies in `directory`."""
    command = [
        "mksquashfs",
        str(directory),
        str(made),
        "-quiet",
        "-no-progress",
        "-comp",
        "lz4",
        "-b",
        _BLOCK,
        "-all-root",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return made


def initramfs(unpacked: Path, made: Path) -> Path:
    """What a guest with that kernel boots from: busybox, init.sh, and modules in the order of their loading."""
    version = next(unpacked.glob("boot/vmlinuz-*")).name.removeprefix("vmlinuz-")
    environment = {**os.environ, "PATH": PATH}
    with (CACHE / "lock").open("w") as lock:
        flock(lock, LOCK_EX)
        subprocess.run(["depmod", "--basedir", unpacked, version], env=environment, check=True)
    modules: dict[Path, None] = {}
    for module in MODULES:
        command = ["modprobe", "--dirname", str(unpacked), "--set-version", version, "--show-depends", module]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        modules |= dict.fromkeys(Path(path) for path in re.findall(r"^insmod (\S+)", shown, re.MULTILINE))
    busybox = shutil.which("busybox", path=PATH)
    assert busybox is not None
    with tempfile.TemporaryDirectory(dir=made.parent) as name:
        root = Path(name)
        for directory in ("bin", "modules", "root"):
            (root / directory).mkdir()
        shutil.copy(busybox, root / "bin/busybox")
        shutil.copy(HERE / "init.sh", root / "init")
        for number, path in enumerate(modules):
            data = path.read_bytes()
            target = root / "modules" / f"{number:02}-{path.name.removesuffix('.xz')}"
            target.write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
        files = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        command = [busybox, "cpio", "-o", "-H", "newc"]
        with made.open("wb") as archive:
            subprocess.run(
                command, input=files.encode(), stdout=archive, stderr=subprocess.DEVNULL, cwd=root, check=True
            )
    return made


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
