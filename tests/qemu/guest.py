"""A virtual machine for a test: its memory is its own, so that a test may use it up. With KVM where that can run it;
emulated in software, it runs wherever QEMU does."""

import functools
import itertools
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.qemu import images

#: One processor until the kernel has patched its own code: QEMU before 8.1 may run what was there before (int3). Later
#: it would when it finds that the TSC, measured on a busy host, is off: it never uses it. Nor is a busy host a lockup.
KERNEL_PARAMETERS = (
    "console=ttyS0",
    "panic=-1",
    "mitigations=off",
    "sysrq_always_enabled",
    "maxcpus=1",
    "tsc=unstable",
    "nosoftlockup",
)
#: The emulated kernel crashes at early boot now and then. That is no test's failure: another one is booted.
BOOTS = 3
BOOTED = "booted"
BOOT_SECONDS = 300
#: What a guest that hangs has to tell why.
SYSRQ_SECONDS = 20
#: In which KVM, where it works, has booted a kernel that finds no root, and so ends.
KVM_SECONDS = 30
POLL_SECONDS = 0.2
#: How long a guest sleeps (suspend to memory) at most: it is woken so often.
WAKE_SECONDS = 3
#: How often a guest that may hang is looked at, and how often in a row a task is found at the same place then.
LOOK_SECONDS = 30
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

    def __init__(self, memory: int, installed: Path, kernel: str = "6.12", more: Sequence[str] = ()) -> None:
        """Gets the kernel and makes the root, over which `installed` lies (images.image). Skips the test where they are
        not to be had. `more`: options of QEMU."""
        self._memory = memory
        self._more = more
        self._unpacked = images.kernel(kernel)
        self._kernel = next(self._unpacked.glob("boot/vmlinuz-*"))
        self._root, self._installed = images.root(), installed

    def run(
        self,
        script: str,
        environment: Mapping[str, str],
        deadline_seconds: int,
        *,
        systemd: bool = False,
        watched: str = "",
        disks: Sequence[Path] = (),
        power_off_at: str = "",
    ) -> Outcome:
        """Boots, runs `script` of this directory as root, and switches the guest off; kills it at the deadline.

        Or before that, once the task of the name `watched` hangs; or once it has said `power_off_at`, as a power cut
        would. Files that are `disks` are /dev/vda and so on.

        With `systemd` that is process 1, and what runs is in `installed`; it switches the guest off itself.
        """
        # The kernel hands variables on to process 1.
        variables = {**environment, "SCRIPT": f"{images.TESTS}/tests/qemu/{script}", "SYSTEMD": "1" if systemd else ""}
        for _ in range(BOOTS):
            outcome = self._boot(variables, deadline_seconds, watched, disks, power_off_at)
            if BOOTED in outcome.output:
                return outcome
            print("not booted:", outcome.kernel_log[-2000:], sep="\n")
        raise AssertionError(f"the guest did not boot in {BOOTS} tries")

    def _boot(
        self,
        variables: Mapping[str, str],
        deadline_seconds: int,
        watched: str,
        disks: Sequence[Path],
        power_off_at: str,
    ) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="zswapd-qemu-") as name:
            directory = Path(name)
            output, kernel_log = directory / "output", directory / "kernel.log"
            initramfs = images.initramfs(self._unpacked, directory / "initramfs")
            roots = {"ROOT": self._root, "INSTALLED": self._installed}
            names = {name: f"/dev/vd{chr(ord('a') + len(disks) + n)}" for n, name in enumerate(roots)}
            drives = [f"file={disk}" for disk in disks] + [f"file={image},readonly=on" for image in roots.values()]
            words = [f"{name}={value}" for name, value in {**variables, **names}.items() if value]
            # fmt: off
            command = [
                *_WITH_US, "qemu-system-x86_64", "-nodefaults", "-display", "none", "-monitor", "stdio", "-no-reboot",
                *_accelerator(self._kernel), "-smp", "2", "-m", f"{self._memory}M", *self._more,
                "-machine", "pc", "-serial", f"file:{kernel_log}", "-serial", f"file:{output}",
                *itertools.chain(*(("-drive", f"if=virtio,format=raw,{drive}") for drive in drives)),
                "-kernel", str(self._kernel), "-initrd", str(initramfs),
                "-append", " ".join([*KERNEL_PARAMETERS, *words]),
            ]
            # fmt: on
            with _process(command) as qemu:
                text = functools.partial(_text, output)
                start = look_at = woken = time.monotonic()
                looks: list[str] = []
                cut = False
                while not _ends(qemu, POLL_SECONDS) and not cut and not _hangs(looks):
                    now = time.monotonic()
                    if now > start + (deadline_seconds if BOOTED in text() else BOOT_SECONDS):
                        break
                    if now > woken + WAKE_SECONDS:
                        _tell(qemu, "system_wakeup")
                        woken = now
                    if watched and now > look_at + LOOK_SECONDS:
                        looks.append(_blocked(watched, _text(kernel_log)))
                        _sysrq(qemu, "w")
                        look_at = now
                    cut = bool(power_off_at) and power_off_at in text()
                if qemu.returncode is None and not cut:
                    _sysrq(qemu, "wmlt")
                    _ends(qemu, SYSRQ_SECONDS)
            ended = re.search(r"^exit status (\d+)$", text(), re.MULTILINE)
            status = int(ended[1]) if ended else None
            return Outcome(status, _hangs(looks), text(), _text(kernel_log))


@functools.cache
def _accelerator(kernel: Path) -> tuple[str, ...]:
    """KVM, if a kernel gets as far with it as to miss its root: that /dev/kvm is there does not say that it works."""
    kvm = ("-accel", "kvm", "-cpu", "host")
    command = [*_WITH_US, "qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot", *kvm, "-m", "256M"]
    boot = ["-serial", "stdio", "-kernel", str(kernel), "-append", "console=ttyS0 panic=-1"]
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        with suppress(subprocess.TimeoutExpired):
            tried = subprocess.run(
                [*command, *boot], stdin=subprocess.DEVNULL, capture_output=True, timeout=KVM_SECONDS
            )
            if b"Unable to mount root fs" in tried.stdout:
                return kvm
    return "-accel", "tcg,thread=multi", "-cpu", "Nehalem"


def _text(path: Path) -> str:
    """What a serial port has said so far."""
    return path.read_text(errors="replace").replace("\r", "") if path.exists() else ""


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits for its end, so long."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def _sysrq(qemu: subprocess.Popen[bytes], keys: str) -> None:
    """Has the guest's kernel log, soon: w, what tasks are blocked; m, its memory; l and t, where all tasks are."""
    _tell(qemu, *(f"sendkey alt-sysrq-{key}" for key in keys))


def _tell(qemu: subprocess.Popen[bytes], *commands: str) -> None:
    """Commands for QEMU's monitor, which may have ended."""
    assert qemu.stdin is not None
    with suppress(BrokenPipeError):
        qemu.stdin.write("".join(f"{command}\n" for command in commands).encode())
        qemu.stdin.flush()


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
    environment = {**os.environ, "PATH": images.PATH}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()
