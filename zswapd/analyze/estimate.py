"""What the pages would take in memory, by codec and by tier: everything that the pool needs for them is counted."""

import statistics
from array import array
from dataclasses import dataclass

from zswapd.analyze.codecs import Codec, Scores
from zswapd.analyze.sample import Sample
from zswapd.anonymous import PAGE
from zswapd.engine import EmbeddedEngine
from zswapd.footprint import DESCRIPTOR_BYTES, HEADER_BYTES, SLOT_BYTES

CONFIDENCE = 1.96  # standard errors to either side: 95 of 100 samples


class Classes:
    """What an object takes of a zsmalloc pool for a swap file of so many bytes."""

    def __init__(self, swap_bytes: int) -> None:
        engine = EmbeddedEngine(
            size_bytes=swap_bytes, allocator="zsmalloc", mem_limit=swap_bytes, algorithm="lz4", zstd_level=3
        )
        classes = iter(engine.stats()["classes"])
        one = next(classes)
        self._taken = array("d")
        for payload in range(PAGE + 1):
            while payload + HEADER_BYTES > one["size_bytes"]:
                one = next(classes)
            self._taken.append(one["pages_per_zspage"] * PAGE / one["objects_per_zspage"])

    def taken(self, payload: int) -> float:
        """Bytes for a payload of so many: with header and padding, and its part of what a full zspage has left."""
        return self._taken[PAGE if is_raw(payload) else payload]


def is_raw(payload: int) -> bool:
    """Whether a page that compresses to so many bytes is stored as it is."""
    return payload > PAGE - HEADER_BYTES


@dataclass(frozen=True)
class Estimate:
    """What a codec makes of the pages. Bytes: on average, for one; `margin`: how far the ratio may be off (95 %), as a
    share of it, since only a sample was compressed. `dictionary_bytes`: once, for all pages; `ratio` has its part."""

    name: str
    algorithm: str
    level: int | None
    payload_bytes: float
    pool_bytes: float
    ratio: float
    margin: float
    incompressible_share: float
    compress_us: float
    decompress_us: float
    dictionary_bytes: int


@dataclass(frozen=True)
class Tier:
    """Pages in one codec, of which those that are idle were compressed again with another, where that makes them
    smaller in the pool. `recompressed_share`: of all pages; `cpu_seconds_per_gib`: for each GiB of idle pages, once."""

    fresh: str
    idle: str
    idle_share: float
    ratio: float
    recompressed_share: float
    cpu_seconds_per_gib: float


class Estimator:
    """For a source of `pages` pages, of which the sample was taken."""

    def __init__(self, pages: int, sample: Sample, classes: Classes) -> None:
        self._pages = pages
        self._stored_share = 1 - sample.same_share  # same-filled pages take nothing of the pool
        self._classes = classes

    def ratio(self, pool_bytes: float, dictionary_bytes: int = 0) -> float:
        """Bytes of a page for a byte of memory: what it takes in the pool, its tables, and its part of dictionaries."""
        tables = SLOT_BYTES + pool_bytes / PAGE * DESCRIPTOR_BYTES
        return PAGE / (pool_bytes + tables + dictionary_bytes / self._pages)

    def codec(self, scores: Scores) -> Estimate:
        taken = self._taken(scores)
        mean = statistics.fmean(taken)
        pool = mean * self._stored_share
        error = statistics.stdev(taken) / len(taken) ** 0.5 if len(taken) > 1 else mean
        codec: Codec = scores.codec
        raw = sum(is_raw(length) for length in scores.lengths)
        return Estimate(
            name=codec.name,
            algorithm=codec.algorithm,
            level=codec.level,
            payload_bytes=statistics.fmean(scores.lengths) * self._stored_share,
            pool_bytes=pool,
            ratio=self.ratio(pool, codec.dictionary_bytes),
            margin=CONFIDENCE * error / mean,
            incompressible_share=raw / len(taken) * self._stored_share,
            compress_us=statistics.median(scores.encode_ns) / 1e3,
            decompress_us=statistics.median(scores.decode_ns) / 1e3,
            dictionary_bytes=codec.dictionary_bytes,
        )

    def tier(self, fresh: Scores, idle: Scores, idle_share: float) -> Tier:
        before, after = self._taken(fresh), self._taken(idle)
        settled = [min(pair) for pair in zip(before, after, strict=True)]
        smaller = sum(new < old for old, new in zip(before, after, strict=True))
        pool = (statistics.fmean(before) * (1 - idle_share) + statistics.fmean(settled) * idle_share) * (
            self._stored_share
        )
        # All that are idle are tried. Medians, or what else runs on the machine would count.
        seconds = (statistics.median(fresh.decode_ns) + statistics.median(idle.encode_ns)) / 1e9
        return Tier(
            fresh=fresh.codec.name,
            idle=idle.codec.name,
            idle_share=idle_share,
            ratio=self.ratio(pool, fresh.codec.dictionary_bytes + idle.codec.dictionary_bytes),
            recompressed_share=smaller / len(before) * self._stored_share * idle_share,
            cpu_seconds_per_gib=seconds * self._stored_share * (1 << 30) / PAGE,
        )

    def _taken(self, scores: Scores) -> list[float]:
        return [self._classes.taken(length) for length in scores.lengths]
