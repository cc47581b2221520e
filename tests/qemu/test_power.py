"""A power cut: nothing of memory can be read from the backing disk afterwards, and the next boot has it again."""

import secrets
from pathlib import Path

from tests.qemu.guest import WITHOUT, Guest, Outcome

MEMORY_MIB, DISK_MIB = 512, 64
#: Pages that do not compress take this much by themselves.
LEAST_WRITTEN = 16 << 20
DEADLINE_SECONDS = 900


class Machine:
    """A disk that outlives its guests."""

    def __init__(self, image: Path, disk: Path, encryption: str) -> None:
        self._image, self._disk, self._encryption = image, disk, encryption
        self.secret = secrets.token_hex(16)
        with disk.open("wb") as file:
            file.truncate(DISK_MIB << 20)

    def boot(self, scenario: str, power_off_at: str = "") -> Outcome:
        environment = {
            "SCENARIOS": f"power.{scenario}",
            "SECRET": self.secret,
            "ENCRYPTION": self._encryption,
        }
        outcome = Guest(MEMORY_MIB, self._image).run(
            "inside.sh", environment, DEADLINE_SECONDS, disks=[self._disk], power_off_at=power_off_at
        )
        print(outcome.output)
        return outcome

    def found(self) -> list[int]:
        """Where the secret, or half of it, lies on the disk."""
        data = self._disk.read_bytes()
        assert len(data) - data.count(0) > LEAST_WRITTEN
        half = len(self.secret) // 2
        pieces = [self.secret[:half].encode(), self.secret[half:].encode()]
        return [place for place in map(data.find, pieces) if place >= 0]

    def cut(self) -> None:
        outcome = self.boot("plant", power_off_at="planted")
        assert "planted" in outcome.output, outcome.kernel_log[-5000:]
        assert outcome.status is None


def test_nothing_can_be_read_after_a_power_cut(image: Path, tmp_path: Path) -> None:
    machine = Machine(image, tmp_path / "disk", "off" if WITHOUT == "encryption" else "on")
    machine.cut()
    assert not machine.found()
    outcome = machine.boot("again")
    assert outcome.status == 0, outcome.kernel_log[-5000:]
    assert not machine.found()


def test_without_encryption_it_can(image: Path, tmp_path: Path) -> None:
    """So that the test above is known to see it."""
    machine = Machine(image, tmp_path / "disk", "off")
    machine.cut()
    assert len(machine.found()) == 2
