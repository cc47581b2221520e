"""`zswapctl analyze`: what compression would save on pages that a machine really has."""

import dataclasses
import json
import os
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from zswapd._native import lock_memory
from zswapd.analyze import show
from zswapd.analyze.advice import Advice, Idle, advise
from zswapd.analyze.codecs import DICTIONARY_LEVELS, every, score, train
from zswapd.analyze.estimate import Classes, Estimate, Estimator, Tier
from zswapd.analyze.idle import measure
from zswapd.analyze.picture import draw
from zswapd.analyze.sample import Sample, take
from zswapd.analyze.sources import Source, find, processes
from zswapd.anonymous import PAGE
from zswapd.bench.plot import require
from zswapd.bench.screen import Screen, Size
from zswapd.config import Config
from zswapd.errors import ZswapdError

FRESH = ("lz4", "zstd 1")
STUBBORN_BYTES = 3072  # what lz4 leaves so much of is hard to compress


@click.command()
@click.argument("kind", type=click.Choice(["pid", "cgroup", "file", "core"]))
@click.argument("which")
@click.option(
    "--sample",
    "sample_bytes",
    default="32MiB",
    type=Size(1 << 20, "too few pages to say anything"),
    show_default=True,
    help="Pages to compress; more than a third of them train the dictionary, and are not scored.",
)
@click.option(
    "--scan",
    "scan_bytes",
    default="1GiB",
    type=Size(1 << 20, "too few pages to say anything"),
    show_default=True,
    help="Pages to look at, for those that repeat one word or each other.",
)
@click.option("--seed", default=1, show_default=True, help="Decides which pages.")
@click.option(
    "--idle",
    "idle_percent",
    type=click.FloatRange(0, 100),
    help="Of the pages, how many would be idle long enough to be compressed again. Default: 50, an assumption.",
)
@click.option(
    "--watch",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Measure instead what the processes do not use for so long.",
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Draw it into this PNG file (needs matplotlib).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def analyze(
    config: Config,
    kind: str,
    which: str,
    sample_bytes: int,
    scan_bytes: int,
    seed: int,
    idle_percent: float | None,
    watch: float | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Say what each codec, dictionary and tier would save on real pages, and what it would cost.

    The pages are the anonymous ones, in memory, of process WHICH (pid), of all processes in a cgroup and those below
    it (cgroup), the writable ones in a core dump (core), or all of a file (file). What is in swap already is not
    brought back, and not looked at. Nothing is written to a disk.

    "ratio", the effective one, is bytes of pages in a byte of memory: in size classes as the pool has them, with
    headers, padding, tables and dictionaries, but without its reserve and the processes that serve it. "±": what
    another sample might say. Times are medians on this machine, and have the call from Python in them. The dictionary
    is trained with pages that no codec is then scored on. A tier is fresh pages in one codec, and the idle ones
    (--idle, --watch) in another, if they then take less of the pool.
    """
    if picture:
        require(picture)
    if watch and kind in ("file", "core"):
        raise click.UsageError("--watch is for running processes: pid or cgroup")
    if watch and idle_percent is not None:
        raise click.UsageError("--idle and --watch exclude each other")
    if os.geteuid() == 0:  # others may lock so little that they would run out of memory
        with suppress(OSError):  # what cannot be locked may be swapped, as the pages themselves may
            lock_memory()
    with Screen(Console(stderr=True)) as screen:
        idle = 0.5 if idle_percent is None else idle_percent / 100
        if watch:
            idle = measure(processes(kind, which), watch, screen.report)
        screen.report(f"finding the pages of {kind} {which}", 0, 1)
        source = find(kind, which)
        with take(source, scan_bytes // PAGE, sample_bytes // PAGE, seed, screen.report) as sample:
            if not sample.scoring:
                raise ZswapdError(
                    f"{source.name}: all of the {sample.looked_at} pages that were looked at repeat one word, or are "
                    "too few to compress any",
                    "they take no memory in the pool; look at more with --scan and --sample",
                )
            screen.report("training a dictionary", 0, 1)
            codecs = every(train(sample))
            scores = score(codecs, sample, screen.report)
    estimator = Estimator(source.pages, sample, Classes(config.swap.size))
    by_name = {one.codec.name: one for one in scores}
    lz4 = by_name["lz4"]
    estimates = [estimator.codec(one) for one in scores]
    found = Findings(
        source=source,
        sample=sample,
        seed=seed,
        stubborn_share=sum(length >= STUBBORN_BYTES for length in lz4.lengths)
        / len(lz4.lengths)
        * (1 - sample.same_share),
        idle_share=idle,
        idle_how=f"measured over {watch:g} s" if watch else "assumed" if idle_percent is None else "given",
        estimates=estimates,
        tiers=[
            estimator.tier(by_name[fresh], other, idle)
            for fresh, other in product(FRESH, scores)
            if other.codec.level in DICTIONARY_LEVELS
        ],
        advice=advise(estimates, Idle(idle, source.pages, watch), config),
    )
    if picture:
        draw(f"{source.name}, seed {seed}", found.estimates, found.tiers, scores, picture)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
    else:
        found.show()


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that was found. Shares are of all pages."""

    source: Source
    sample: Sample  # wiped: its counts are what is left
    seed: int
    stubborn_share: float
    idle_share: float
    idle_how: str
    estimates: list[Estimate]
    tiers: list[Tier]
    advice: Advice

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source.name,
            "notes": self.source.notes,
            "seed": self.seed,
            "pages": self.source.pages,
            "swapped_pages": self.source.swapped,
            "looked_at_pages": self.sample.looked_at,
            "gone_pages": self.sample.gone,
            "compressed_pages": len(self.sample.scoring),
            "training_pages": len(self.sample.training),
            "same_filled_share": self.sample.same_share,
            "duplicate_share": self.sample.duplicate_share,
            "hard_to_compress_share": self.stubborn_share,
            "idle_share": self.idle_share,
            "idle_share_is": self.idle_how,
            "codecs": [dataclasses.asdict(one) for one in self.estimates],
            "tiers": [dataclasses.asdict(one) for one in self.tiers],
            "recommended": {**dataclasses.asdict(self.advice), "toml": self.advice.toml()},
        }

    def show(self) -> None:
        console = Console(highlight=False, soft_wrap=True, markup=False)
        if not console.is_terminal:
            console.width = 1000  # lines stay whole for grep
        console.print(f"source  {self.source.name}: {show.describe(self.source, self.sample)} (seed {self.seed})")
        console.print(f"pages   {show.kinds(self.source, self.sample, self.stubborn_share)}")
        for note in self.source.notes:
            console.print(f"note    {note}")
        if not any(one.dictionary_bytes for one in self.estimates):
            console.print("note    no dictionary: too few pages to train one, or none that are alike")
        console.print(show.codecs(self.estimates))
        first = self.estimates[0]
        console.print(f"Tiers, {self.idle_share:.0%} of the pages idle ({self.idle_how}), beside {first.name} for all:")
        console.print(show.tiers(self.tiers, first.ratio))
        console.print("Recommended for /etc/zswapd/zswapd.toml:\n")
        console.print(self.advice.toml())
        for reason in self.advice.reasons:
            console.print(reason)
