"""A configuration for what was measured: by rules that stand here, with the reasons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zswapd.analyze.estimate import Estimate
from zswapd.anonymous import PAGE
from zswapd.config import MAX_SIZE, Config, Recompression, format_size

#: A slower codec for pages as they come is worth it when it saves this share of the memory that all of them take, those
#: that are idle having been recompressed, ...
WORTH = 0.10
#: ... a page comes back this much later at most, ...
LATER_US = 8.0
#: ... and it takes this many times the processor time to compress one.
TIMES_THE_TIME = 3.0
#: More effort for cold pages, or a dictionary, is worth it when it saves this share of the memory of those.
COLD_WORTH = 0.02
#: And recompression, when it saves this share of all.
RECOMPRESSION_WORTH = 0.03
#: What is idle now is to be recompressed in so long, with a percentage of a processor in these bounds.
SETTLE_SECONDS, LEAST_PERCENT, MOST_PERCENT = 3600, 1, 20
#: Cold pages have not been used for so many times as long as idle ones.
COLD_AFTER = 10
#: From this share on, pages that do not compress are to leave memory first, if there is a disk.
MUCH_INCOMPRESSIBLE = 0.10
STEP = 64 << 20  # of swap.size; above 64 of them, GiB


@dataclass(frozen=True)
class Idle:
    """Which of the pages nobody uses: their share, of so many; `watched`: measured, for so many seconds."""

    share: float
    pages: int
    watched: float | None = None


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
    return str(value).lower() if isinstance(value, int) else f'"{value}"'


def advise(estimates: Sequence[Estimate], idle: Idle, config: Config) -> Advice:
    """What to set. `estimates`: the fastest first; those with a dictionary last."""
    plain = [one for one in estimates if not one.dictionary_bytes]
    cold = _cold(estimates)

    def memory(fresh: Estimate) -> float:
        """Bytes for a byte of pages."""
        alone = 1 / fresh.ratio
        return min(alone, (1 - idle.share) * alone + idle.share / cold.ratio) if cold else alone

    fastest = chosen = plain[0]
    for one in plain[1:]:
        if (
            memory(one) <= memory(chosen) * (1 - WORTH)
            and one.decompress_us <= fastest.decompress_us + LATER_US
            and one.compress_us <= TIMES_THE_TIME * fastest.compress_us
        ):
            chosen = one
    compression: dict[str, int | str] = {"algorithm": chosen.algorithm}
    if chosen.level is not None:
        compression["zstd_level"] = chosen.level
    settings: dict[str, dict[str, int | str]] = {"compression": compression}
    reasons = [_why(chosen, plain, 1 - memory(chosen) / memory(fastest), 1 - memory(fastest) * fastest.ratio)]
    saved = 1 - memory(chosen) * chosen.ratio
    if cold and saved >= RECOMPRESSION_WORTH:
        settings["recompression"], why = _recompression(chosen, plain, cold, idle)
        reasons.append(f"recompression: {saved:.0%} less memory, with {idle.share:.0%} of the pages idle. {why}")
    else:
        settings["recompression"] = {"cpu_percent": 0}
        reasons.append(f"recompression: would save {saved:.0%}, with {idle.share:.0%} of the pages idle")
    limit = config.pool.mem_limit_bytes
    fits = min(int(limit * chosen.ratio), MAX_SIZE)
    step = STEP if fits < 64 * STEP else 1 << 30
    if size := fits // step * step:
        settings["swap"] = {"size": f"{size >> 20}MiB" if step == STEP else f"{size >> 30}GiB"}
        reasons.append(
            f"swap.size: {format_size(size)} of such pages, as they come, fill the {format_size(limit)} of "
            f"pool.mem_limit ({config.pool.mem_limit})"
        )
    if config.writeback.backing and chosen.incompressible_share >= MUCH_INCOMPRESSIBLE:
        settings["writeback"] = {"incompressible": "first"}
        reasons.append(
            f"writeback.incompressible: {chosen.incompressible_share:.0%} of the pages do not compress, and take "
            "as much memory in the pool as outside"
        )
    return Advice(settings, reasons)


def _cold(estimates: Sequence[Estimate]) -> Estimate | None:
    """What cold pages are best in: of those that the pager may use, the least effort that is not worth less."""
    chosen = None
    for one in estimates:
        if (one.level or 0) < Recompression().idle_level:
            continue
        if chosen is None or one.ratio >= chosen.ratio / (1 - COLD_WORTH):
            chosen = one
    return chosen


def _recompression(
    fresh: Estimate, plain: Sequence[Estimate], cold: Estimate, idle: Idle
) -> tuple[dict[str, int | str], str]:
    """The section, and why. `cold`: what pages are in at last; before that they are in zstd of the default level."""
    assert cold.level is not None
    level = Recompression().idle_level
    first = next((one for one in plain if one.level == level), cold)
    microseconds = fresh.decompress_us + first.compress_us
    if cold is not first:
        microseconds += first.decompress_us + cold.compress_us
    size = idle.share * idle.pages * PAGE
    seconds = size / PAGE * microseconds / 1e6
    percent = min(max(math.ceil(100 * seconds / SETTLE_SECONDS), LEAST_PERCENT), MOST_PERCENT)
    section: dict[str, int | str] = {
        "cpu_percent": percent,
        "idle_level": level,
        "cold_level": cold.level,
        "dictionaries": bool(cold.dictionary_bytes),
    }
    why = (
        f"It takes {microseconds:.0f} µs a page, {seconds:.0f} s of a processor for the {format_size(int(size))} that "
        f"are idle: with {percent} %, {seconds * 100 / percent / 60:.0f} minutes. Cold pages in {cold.name}"
    )
    if cold.dictionary_bytes:
        why += f", of {format_size(cold.dictionary_bytes)}"
    if idle.watched:
        # Not sooner than by default: what was not used in some seconds may be used in a minute.
        after = max(round(idle.watched), Recompression().idle_after)
        section |= {"idle_after": after, "cold_after": COLD_AFTER * after}
        why += f"; {idle.watched:g} s were watched, so that pages count as idle after {after} s"
    return section, why


def _why(chosen: Estimate, plain: Sequence[Estimate], saved: float, by_recompression: float) -> str:
    """`saved`: the share of memory, beside the fastest, of which recompression saves a share by itself."""
    fastest = plain[0]
    settled = " when the idle ones are recompressed" if by_recompression else ""
    if chosen is fastest:
        return (
            f"{chosen.name}: nothing slower saves {WORTH:.0%} of its memory{settled}, within {LATER_US:.0f} µs more "
            f"for a page that comes back, and {TIMES_THE_TIME:.0f} times the time to compress"
        )
    return (
        f"{chosen.name}: {saved:.0%} less memory than {fastest.name}{settled}, for {chosen.compress_us:.1f} µs a page "
        f"in instead of {fastest.compress_us:.1f}, and {chosen.decompress_us:.1f} out instead of "
        f"{fastest.decompress_us:.1f}"
    )
