"""A configuration for what was measured: by rules that stand here, with the reasons."""

from collections.abc import Sequence
from dataclasses import dataclass

from zswapd.analyze.estimate import Estimate
from zswapd.config import MAX_SIZE, Config, format_size

#: A slower codec is worth it when it saves this share of the memory that the faster one takes, ...
WORTH = 0.10
#: ... a page comes back this much later at most, ...
LATER_US = 8.0
#: ... and it takes this many times the processor time to compress one.
TIMES_THE_TIME = 3.0
#: From this share on, pages that do not compress are to leave memory first, if there is a disk.
MUCH_INCOMPRESSIBLE = 0.10
STEP = 64 << 20  # of swap.size; above 64 of them, GiB


@dataclass(frozen=True)
class Advice:
    """`settings`: by section and key, all of them options of zswapd; `reasons`: why, a sentence each."""

    settings: dict[str, dict[str, int | str]]
    reasons: list[str]

    def toml(self) -> str:
        lines = []
        for section, keys in self.settings.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {_toml(value)}" for key, value in keys.items()]
        return "\n".join(lines) + "\n"


def _toml(value: int | str) -> str:
    return str(value) if isinstance(value, int) else f'"{value}"'


def advise(estimates: Sequence[Estimate], config: Config) -> Advice:
    """What to set. `estimates`: the fastest first. Without dictionaries and idle tiers, which are no options yet."""
    plain = [one for one in estimates if not one.dictionary_bytes]
    fastest = chosen = plain[0]
    for one in plain[1:]:
        if (
            one.ratio >= chosen.ratio / (1 - WORTH)
            and one.decompress_us <= fastest.decompress_us + LATER_US
            and one.compress_us <= TIMES_THE_TIME * fastest.compress_us
        ):
            chosen = one
    compression: dict[str, int | str] = {"algorithm": chosen.algorithm}
    if chosen.level is not None:
        compression["zstd_level"] = chosen.level
    settings: dict[str, dict[str, int | str]] = {"compression": compression}
    reasons = [_why(chosen, plain)]
    limit = config.pool.mem_limit_bytes
    fits = min(int(limit * chosen.ratio), MAX_SIZE)
    step = STEP if fits < 64 * STEP else 1 << 30
    if size := fits // step * step:
        settings["swap"] = {"size": f"{size >> 20}MiB" if step == STEP else f"{size >> 30}GiB"}
        reasons.append(
            f"swap.size: {format_size(size)} of such pages fill the {format_size(limit)} of pool.mem_limit "
            f"({config.pool.mem_limit})"
        )
    if config.writeback.backing and chosen.incompressible_share >= MUCH_INCOMPRESSIBLE:
        settings["writeback"] = {"incompressible": "first"}
        reasons.append(
            f"writeback.incompressible: {chosen.incompressible_share:.0%} of the pages do not compress, and take "
            "as much memory in the pool as outside"
        )
    return Advice(settings, reasons)


def _why(chosen: Estimate, plain: Sequence[Estimate]) -> str:
    fastest = plain[0]
    if chosen is fastest:
        return (
            f"{chosen.name}: nothing slower saves {WORTH:.0%} of its memory within {LATER_US:.0f} µs more for a page "
            f"that comes back, and {TIMES_THE_TIME:.0f} times the time to compress"
        )
    return (
        f"{chosen.name}: {1 - fastest.ratio / chosen.ratio:.0%} less memory than {fastest.name}, for "
        f"{chosen.compress_us:.1f} µs a page in instead of {fastest.compress_us:.1f}, and {chosen.decompress_us:.1f} "
        f"out instead of {fastest.decompress_us:.1f}"
    )
