"""What was found, for people: lines and tables."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from zswapd.analyze.estimate import Estimate, Tier
from zswapd.analyze.sample import Sample
from zswapd.analyze.sources import Source
from zswapd.anonymous import PAGE
from zswapd.config import format_size


def describe(source: Source, sample: Sample) -> str:
    """One line on what the pages are."""
    looked = "all" if sample.looked_at == source.pages else f"{sample.looked_at:,}"
    parts = [
        f"{source.pages:,} pages in memory ({format_size(source.pages * PAGE)})",
        f"{looked} looked at, {len(sample.scoring):,} compressed, {len(sample.training):,} for the dictionary",
    ]
    if source.swapped:
        parts.append(f"{source.swapped:,} in swap, not looked at")
    if sample.gone:
        parts.append(f"{sample.gone:,} gone by then")
    return "; ".join(parts)


def kinds(source: Source, sample: Sample, stubborn: float) -> str:
    """One line on pages that are special. `stubborn`: the share that lz4 leaves 3 KiB or more of."""
    some = "" if sample.looked_at == source.pages else " at least (only among those looked at)"
    return (
        f"same-filled {sample.same_share:.1%}; duplicates {sample.duplicate_share:.1%}{some}; "
        f"hard to compress (3 KiB or more with lz4) {stubborn:.1%}"
    )


def codecs(estimates: Sequence[Estimate]) -> Table:
    """The codecs: bytes of a page, and its processor time, into the pool and out of it."""
    table = Table(Column("\ncodec", no_wrap=True), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in (
        "\nratio",
        "\n±",
        "payload\nB/page",
        "in pool\nB/page",
        "kept\nas is",
        "in\nµs",
        "out\nµs",
        "dict.\nMiB",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for one in estimates:
        table.add_row(
            one.name,
            f"{one.ratio:.2f}",
            f"{one.margin:.1%}",
            f"{one.payload_bytes:.0f}",
            f"{one.pool_bytes:.0f}",
            f"{one.incompressible_share:.1%}",
            f"{one.compress_us:.1f}",
            f"{one.decompress_us:.1f}",
            f"{one.dictionary_bytes / (1 << 20):.1f}" if one.dictionary_bytes else "-",
        )
    return table


def tiers(every: Sequence[Tier], best: float) -> Table:
    """The tiers. `best`: the effective ratio to compare with."""
    table = Table("fresh\npages", Column("idle\npages", no_wrap=True), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("settled\nratio", "memory\nsaved", "recom-\npressed", "CPU s per\nidle GiB"):
        table.add_column(title, justify="right", no_wrap=True)
    for tier in every:
        table.add_row(
            tier.fresh,
            tier.idle,
            f"{tier.ratio:.2f}",
            f"{1 - best / tier.ratio:.0%}",
            f"{tier.recompressed_share:.0%}",
            f"{tier.cpu_seconds_per_gib:.1f}",
        )
    return table
