"""The benchmark as a picture, by matplotlib, which is imported only here."""

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zswapd.bench.summary import FIGURES, Spread, Summary, show
from zswapd.errors import ZswapdError

# Title and figures of each panel; the bars of CPU time add up.
PANELS = {
    "fill, MB/s (more is better)": ("fill_mb_per_second",),
    "sequential swap-in, MB/s (more is better)": ("sequential_mb_per_second",),
    "random fault, µs (less is better; logarithmic)": ("random_p50_us", "random_p99_us"),
    "bytes of pages in a byte of memory (more is better)": ("effective_ratio",),
    "written to the disk for an evicted page, in pages (less is better)": ("disk_written_per_page",),
    "swapoff, MB/s (more is better)": ("swapoff_mb_per_second",),
    "CPU seconds (less is better)": (
        "workload_cpu_seconds",
        "zswapd_cpu_seconds",
        "pager_cpu_seconds",
        "kernel_cpu_seconds",
    ),
}
HEIGHT = 0.8  # of all bars of a row; rows are 1 apart


def require(picture: Path) -> None:
    """Raises ZswapdError where pictures cannot be drawn, or not there: else it would be found when all is measured."""
    if find_spec("matplotlib") is None:
        raise ZswapdError("--plot needs matplotlib, which is not installed", "pip install 'zswapd[plot]'")
    if not os.access(picture.parent, os.W_OK):
        raise ZswapdError(
            f"--plot {picture}: {picture.parent} cannot be written", "name a file in a directory that can"
        )


def plot(rows: Summary, title: str, path: Path) -> None:
    """Write the medians as bars, and whiskers from the least to the most, to a PNG file."""
    names = list(rows)
    panels = {heading: keys for heading, keys in PANELS.items() if any(rows[name][keys[0]] for name in names)}
    height = len(panels) * (1 + 0.35 * len(names))
    figure: Any = import_module("matplotlib.figure").Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(title)
    for axes, (heading, keys) in zip(figure.subplots(len(panels), 1), panels.items(), strict=True):
        stacked = keys[0].endswith("seconds")
        thickness = HEIGHT if stacked else HEIGHT / len(keys)
        left = [0.0] * len(names)
        for number, key in enumerate(keys):
            spreads = [rows[name][key] or Spread(median=0, min=0, max=0) for name in names]
            medians = [spread["median"] for spread in spreads]
            below = [spread["median"] - spread["min"] for spread in spreads]
            above = [spread["max"] - spread["median"] for spread in spreads]
            at = [row + (0 if stacked else thickness * (number + 0.5) - HEIGHT / 2) for row in range(len(names))]
            whiskers = None if stacked else (below, above)
            bars = axes.barh(at, medians, thickness, left=left, xerr=whiskers, label=FIGURES[key])
            if stacked:
                left = [one + median for one, median in zip(left, medians, strict=True)]
            else:
                labels = [show(key, median) if median else "" for median in medians]
                axes.bar_label(bars, labels, padding=4)
        if keys[0].startswith("random"):
            axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        if len(keys) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        axes.set_title(heading, fontsize=10)
    figure.savefig(path, format="png", dpi=120)
