"""What was found as a picture, by matplotlib, which is imported only here."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from zswapd.analyze.codecs import Scores
from zswapd.analyze.estimate import Estimate, Tier
from zswapd.anonymous import PAGE


def draw(title: str, estimates: Sequence[Estimate], tiers: Sequence[Tier], scores: Sequence[Scores], to: Path) -> None:
    """Write a PNG file: ratios, times, and how the compressed lengths are distributed. Blocks; OSError."""
    names = [one.name for one in estimates]
    rows = range(len(names))
    height = 5 + 0.35 * (2 * len(names) + len(tiers))
    figure: Any = import_module("matplotlib.figure").Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(title)
    ratios = [len(names) + len(tiers), len(names), 8]
    ratio, times, lengths = figure.subplots(3, 1, height_ratios=ratios)

    labels = names + [f"{tier.fresh}, idle: {tier.idle}" for tier in tiers]
    values = [one.ratio for one in estimates] + [tier.ratio for tier in tiers]
    errors = [one.ratio * one.margin for one in estimates] + [0.0] * len(tiers)
    bars = ratio.barh(range(len(labels)), values, 0.7, xerr=errors)
    ratio.bar_label(bars, [f"{value:.2f}" for value in values], padding=4)
    share = f"; {tiers[0].idle_share:.0%} of the pages idle" if tiers else ""
    ratio.set_title(f"bytes of pages in a byte of memory (more is better{share})", fontsize=10)
    ratio.set_yticks(range(len(labels)), labels)

    for offset, what, figures in (
        (-0.2, "compress", [one.compress_us for one in estimates]),
        (0.2, "decompress", [one.decompress_us for one in estimates]),
    ):
        bars = times.barh([row + offset for row in rows], figures, 0.4, label=what)
        times.bar_label(bars, [f"{value:.1f}" for value in figures], padding=4)
    times.set_title("µs per page, median (less is better)", fontsize=10)
    times.set_yticks(rows, names)
    times.legend(loc="upper left", bbox_to_anchor=(1, 1))

    for one in scores:
        ordered = sorted(one.lengths)
        lengths.plot(ordered, [100 * (at + 1) / len(ordered) for at in range(len(ordered))], label=one.codec.name)
    lengths.set_title("% of the pages that compress to so many bytes or fewer", fontsize=10)
    lengths.set_xlim(0, PAGE)
    lengths.legend(loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (ratio, times):
        axes.margins(x=0.12)
        axes.invert_yaxis()
    figure.savefig(to, format="png", dpi=120)
