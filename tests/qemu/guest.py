"""A virtual machine for a test: Debian's kernel, and this machine's root directory, read-only, as the guest's.

The guest's memory is its own, so that a test may use it up. Emulated in software: it runs wherever QEMU does.
"""

import functools
import itertools
import lzma
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.daemon import wait_until
from tests.machine import lacks

HERE = Path(__file__).parent
#: Kernels, unpacked, each in a directory that is named for the package's checksum; a clone has nothing to get anew.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zswapd" / "qemu"
#: By version: Debian's names for what depends on the newest of it. 6.1 is the last without FUSE_NOTIFY_RESEND.
KERNELS = {
    "6.12": ("linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"),
    "6.1": ("linux-image-cloud-amd64",),
}
MODULES = ("virtio_pci", "virtiofs", "fuse", "loop", "overlay", "virtio_blk", "zram", "dm_flakey", "dm_delay")
#: One processor until the kernel has patched its own code: QEMU before 8.1 may run what was there before (int3).
KERNEL_PARAMETERS = ("console=ttyS0", "panic=-1", "mitigations=off", "sysrq_always_enabled", "maxcpus=1")
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin:/usr/lib/qemu:/usr/libexec"
PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "virtiofsd": "qemu-system-x86 or virtiofsd",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "dmsetup": "dmsetup",
    "gcc": "gcc",
    "apt-get": "apt",
    "dpkg": "dpkg",
}
#: The emulated kernel crashes at early boot now and then. That is no test's failure: another one is booted.
BOOTS = 3
BOOTED = "booted"
BOOT_SECONDS = 300
#: What a guest that hangs has to tell why.
SYSRQ_SECONDS = 20
POLL_SECONDS = 0.2
#: How often a guest that may hang is looked at, and how often in a row a task is found at the same place then.
LOOK_SECONDS = 15
LOOKS = 3
#: ZSWAPD_TEST_WITHOUT=locking, encryption or detaching: the test that guards it goes without, and must fail.
WITHOUT = os.environ.get("ZSWAPD_TEST_WITHOUT", "")
#: Whatever becomes of us, a virtual machine does not outlive us.
_WITH_US = ("setpriv", "--pdeathsig", "KILL")


@dataclass(frozen=True)
class Outcome:
    """What has become of a guest.

    `status` is its script's exit status; None: there was none before the deadline. `hung`: the task that was watched
    had got no further for LOOKS looks.
    """

    status: int | None
    hung: bool
    output: str
    kernel_log: str

    def complaints(self) -> list[str]:
        """What the guest's kernel has said that it never should."""
        return re.findall(r".*(?:BUG:|Oops|blocked for more than|WARNING: CPU).*", self.kernel_log)


class Guest:
    """Boots with `memory` MiB and two processors. Needs root and, the first time, Debian's package archive."""

    def __init__(self, memory: int, kernel: str = "6.12") -> None:
        """Gets the kernel and makes the initramfs. Skips the test where that cannot be."""
        self._memory = memory
        if platform.machine() != "x86_64" or os.geteuid() != 0:
            lacks("root on x86-64, for a virtual machine")
        for program, package in PROGRAMS.items():
            if not shutil.which(program, path=PATH):
                lacks(f"{program} (Debian: {package}): make test-vm installs it")
        CACHE.mkdir(parents=True, exist_ok=True)
        unpacked = _kernel(kernel)
        self._kernel = next(unpacked.glob("boot/vmlinuz-*"))
        self._initramfs = _initramfs(unpacked, self._kernel.name.removeprefix("vmlinuz-"))

    def run(
        self,
        script: Path,
        environment: Mapping[str, str],
        deadline_seconds: int,
        *,
        watched: str = "",
        disks: Sequence[Path] = (),
        power_off_at: str = "",
    ) -> Outcome:
        """Boots, runs `script` as root, and switches the guest off; kills it at the deadline.

        Or before that, once the task of the name `watched` hangs; or once it has said `power_off_at`, as a power cut
        would. Files that are `disks` are /dev/vda and so on.

        With INSTALLED in `environment`, a directory, systemd is process 1, with what lies there over this machine's
        root, and `script` one of its services; who switches the guest off is the script.
        """
        # The kernel hands variables on to process 1.
        variables = [f"{name}={value}" for name, value in {**environment, "SCRIPT": str(script)}.items()]
        for _ in range(BOOTS):
            outcome = self._boot(variables, deadline_seconds, watched, disks, power_off_at)
            if BOOTED in outcome.output:
                return outcome
            print("not booted:", outcome.kernel_log[-2000:], sep="\n")
        raise AssertionError(f"the guest did not boot in {BOOTS} tries")

    def _boot(
        self, variables: list[str], deadline_seconds: int, watched: str, disks: Sequence[Path], power_off_at: str
    ) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="zswapd-qemu-") as name:
            directory = Path(name)
            output, kernel_log = directory / "output", directory / "kernel.log"
            # fmt: off
            command = [
                *_WITH_US, "qemu-system-x86_64", "-nodefaults", "-display", "none", "-monitor", "stdio", "-no-reboot",
                "-accel", "tcg,thread=multi", "-cpu", "Nehalem", "-smp", "2", "-m", f"{self._memory}M",
                "-object", f"memory-backend-memfd,id=memory,size={self._memory}M,share=on",
                "-machine", "pc,memory-backend=memory",
                "-chardev", f"socket,id=host,path={directory}/virtiofs",
                "-device", "vhost-user-fs-pci,chardev=host,tag=host",
                "-serial", f"file:{kernel_log}", "-serial", f"file:{output}",
                *itertools.chain(*(("-drive", f"if=virtio,format=raw,file={disk}") for disk in disks)),
                "-kernel", str(self._kernel), "-initrd", str(self._initramfs),
                "-append", " ".join([*KERNEL_PARAMETERS, *variables]),
            ]
            # fmt: on
            with _virtiofsd(directory / "virtiofs"), _process(command) as qemu:
                text = functools.partial(_text, output)
                start = look_at = time.monotonic()
                looks: list[str] = []
                cut = False
                while not _ends(qemu, POLL_SECONDS) and not cut and not _hangs(looks):
                    now = time.monotonic()
                    if now > start + (deadline_seconds if BOOTED in text() else BOOT_SECONDS):
                        break
                    if watched and now > look_at + LOOK_SECONDS:
                        _sysrq(qemu, "w")
                        looks.append(_blocked(watched, _text(kernel_log)))
                        look_at = now
                    cut = bool(power_off_at) and power_off_at in text()
                if qemu.returncode is None and not cut:
                    _sysrq(qemu, "wmlt")
            ended = re.search(r"^exit status (\d+)$", text(), re.MULTILINE)
            status = int(ended[1]) if ended else None
            return Outcome(status, _hangs(looks), text(), _text(kernel_log))


def _text(path: Path) -> str:
    """What a serial port has said so far."""
    return path.read_text(errors="replace").replace("\r", "") if path.exists() else ""


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits for its end, so long."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def _sysrq(qemu: subprocess.Popen[bytes], keys: str) -> None:
    """Has the guest's kernel say in its log: w, what tasks are blocked; m, its memory; l and t, where all tasks are."""
    assert qemu.stdin is not None
    qemu.stdin.write("".join(f"sendkey alt-sysrq-{key}\n" for key in keys).encode())
    qemu.stdin.flush()
    _ends(qemu, SYSRQ_SECONDS)


def _blocked(task: str, kernel_log: str) -> str:
    """Where a task was, its registers in user space, when the kernel last said what is blocked; "" if it was not."""
    *_, last = kernel_log.split("sysrq: Show Blocked State")
    found = re.search(rf"task:{task} (?:(?!</TASK>).)*?RIP: 0033:(.*?)</TASK>", last, re.DOTALL)
    return re.sub(r"^\[[ .\d]+\]", "", found[1], flags=re.MULTILINE) if found else ""


def _hangs(looks: list[str]) -> bool:
    return len(looks) >= LOOKS and looks[-1] != "" and len(set(looks[-LOOKS:])) == 1


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `command`, and kills it if it has not ended by itself."""
    environment = {**os.environ, "PATH": PATH}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def _virtiofsd(socket: Path) -> Iterator[None]:
    """Serves this machine's root directory at `socket`.

    cache=always: else the guest's kernel drops the pages of a file, mapped and locked ones too, whenever somebody opens
    it. A pager whose libc is dropped waits for memory.
    """
    with _process(
        [*_WITH_US, "virtiofsd", f"--socket-path={socket}", "-o", "source=/,sandbox=chroot,cache=always"]
    ) as process:
        wait_until(lambda: socket.exists() or process.poll() is not None, "virtiofsd listens")
        if process.poll() is not None:
            lacks(f"what virtiofsd needs: it ended at once, with status {process.returncode}")
        yield


def _kernel(version: str) -> Path:
    """Where Debian's newest kernel of that version, cloud flavour, is unpacked; downloads it where it is not."""
    for name in KERNELS[version]:
        depends = subprocess.run(["apt-cache", "depends", name], capture_output=True, text=True, check=False).stdout
        if package := re.search(rf"Depends: (linux-image-{re.escape(version)}\.\S+)", depends):
            break
    else:
        lacks(f"Debian's package {KERNELS[version][0]} of Linux {version}")
    command = ["apt-get", "download", "--print-uris", package[1]]
    uri = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    checksum = re.search(r"SHA256:(\w+)", uri)
    if not checksum:
        lacks(f"{package[1]}, of which apt-get knows no checksum")
    unpacked = CACHE / f"{package[1]}-{checksum[1][:16]}"
    if not unpacked.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            download = subprocess.run(["apt-get", "download", package[1]], cwd=directory, check=False)
            if download.returncode:
                lacks(f"{package[1]}, which apt-get could not download")
            (archive,) = Path(directory).glob("*.deb")
            subprocess.run(["dpkg", "-x", archive, f"{directory}/root"], check=True)
            Path(directory, "root").rename(unpacked)
    return unpacked


def _initramfs(kernel: Path, version: str) -> Path:
    """Makes the archive that the guest boots from: busybox, init.sh, and modules in the order of their loading."""
    environment = {**os.environ, "PATH": PATH}
    subprocess.run(["depmod", "--basedir", kernel, version], env=environment, check=True)
    modules: dict[Path, None] = {}
    for name in MODULES:
        command = ["modprobe", "--dirname", str(kernel), "--set-version", version, "--show-depends", name]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        modules |= dict.fromkeys(Path(path) for path in re.findall(r"^insmod (\S+)", shown, re.MULTILINE))
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        root = Path(name)
        for directory in ("bin", "modules", "root"):
            (root / directory).mkdir()
        busybox = shutil.which("busybox", path=PATH)
        assert busybox is not None
        shutil.copy(busybox, root / "bin/busybox")
        shutil.copy(HERE / "init.sh", root / "init")
        for number, path in enumerate(modules):
            data = path.read_bytes()
            module = root / "modules" / f"{number:02}-{path.name.removesuffix('.xz')}"
            module.write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
        initramfs = kernel / "initramfs"
        files = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        with initramfs.open("wb") as archive:
            command = [busybox, "cpio", "-o", "-H", "newc"]
            subprocess.run(
                command, input=files.encode(), stdout=archive, stderr=subprocess.DEVNULL, cwd=root, check=True
            )
        return initramfs
