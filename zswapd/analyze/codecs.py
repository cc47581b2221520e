"""The codecs, by the lz4 and zstandard packages, as the pager uses the C libraries: lz4 blocks, and zstd frames without
magic number, content size, checksum or dictionary id."""

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import lz4.block
import zstandard

from zswapd.analyze.sample import Report, Sample
from zswapd.anonymous import PAGE
from zswapd.errors import ZswapdError
from zswapd.recompression import DICTIONARY_BYTES

MAGICLESS = zstandard.FORMAT_ZSTD1_MAGICLESS
LEVELS = (1, 3, 9)
DICTIONARY_LEVELS = (3, 9)
#: Bytes to train with for each of the dictionary: with less it learns these pages by heart.
TRAINING_SHARE = 16
LEAST_DICTIONARY = 8 << 10
#: What zstd decodes with a dictionary, beside its bytes (ZSTD_DDict: its entropy tables); the same again to encode.
ENTROPY_TABLES = 28 << 10
BATCH = 64  # pages for one codec, then the same for the next: what slows the machine down slows down all


@dataclass(frozen=True)
class Codec:
    """How to compress a page, and back. `dictionary_bytes`: memory that it takes, once for all pages."""

    name: str
    algorithm: str
    level: int | None
    encode: Callable[[memoryview], bytes]
    decode: Callable[[bytes], bytes]
    dictionary_bytes: int = 0


@dataclass(frozen=True)
class Scores:
    """What a codec has made of every page of the sample: bytes, and nanoseconds to compress and decompress it."""

    codec: Codec
    lengths: "array[int]" = field(default_factory=lambda: array("H"))
    encode_ns: "array[int]" = field(default_factory=lambda: array("Q"))
    decode_ns: "array[int]" = field(default_factory=lambda: array("Q"))


def lz4_codec() -> Codec:
    def encode(page: memoryview) -> bytes:
        block: bytes = lz4.block.compress(page, store_size=False)
        return block

    def decode(block: bytes) -> bytes:
        page: bytes = lz4.block.decompress(block, uncompressed_size=PAGE)
        return page

    return Codec("lz4", "lz4", None, encode, decode)


def zstd_codec(level: int, dictionary: bytes = b"") -> Codec:
    """zstd, with a dictionary if there is one."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=PAGE, format=MAGICLESS, write_content_size=False, write_checksum=False, write_dict_id=False
    )
    shared, memory = None, 0
    if dictionary:
        shared = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_FULLDICT)
        shared.precompute_compress(level=level)
        memory = _dictionary_memory(level, len(dictionary))
    compressor = zstandard.ZstdCompressor(dict_data=shared, compression_params=parameters)
    decompressor = zstandard.ZstdDecompressor(dict_data=shared, format=MAGICLESS)

    def decode(frame: bytes) -> bytes:
        return decompressor.decompress(frame, max_output_size=PAGE)

    name = f"zstd {level}" + (" + dictionary" if dictionary else "")
    return Codec(name, "zstd", level, compressor.compress, decode, memory)


def _dictionary_memory(level: int, size: int) -> int:
    """Bytes of a dictionary that is ready to compress and to decompress with: itself once, and zstd's tables."""
    parameters = zstandard.ZstdCompressionParameters.from_level(level, dict_size=size)
    tables = 4 * ((1 << parameters.hash_log) + (1 << parameters.chain_log)) + (1 << parameters.hash_log)
    return size + tables + 2 * ENTROPY_TABLES


def train(sample: Sample) -> bytes:
    """A dictionary of the sample's training pages; empty where they are too few for one. Takes some seconds."""
    size = min(DICTIONARY_BYTES, len(sample.training) * PAGE // TRAINING_SHARE)
    if size < LEAST_DICTIONARY:
        return b""
    try:
        pages: list[bytes | bytearray | memoryview] = [bytes(sample.held.page(number)) for number in sample.training]
        return zstandard.train_dictionary(size, pages, level=max(DICTIONARY_LEVELS)).as_bytes()
    except zstandard.ZstdError:  # it finds nothing that repeats
        return b""


def every(dictionary: bytes) -> list[Codec]:
    """All that are scored; the first one is the fastest."""
    plain = [lz4_codec(), *(zstd_codec(level) for level in LEVELS)]
    return plain + ([zstd_codec(level, dictionary) for level in DICTIONARY_LEVELS] if dictionary else [])


def score(codecs: Iterable[Codec], sample: Sample, report: Report) -> list[Scores]:
    """Compress and decompress all scoring pages with each codec. Raises ZswapdError if one does not come back."""
    scores = [Scores(codec) for codec in codecs]
    for first in range(0, len(sample.scoring), BATCH):
        report("compressing", first, len(sample.scoring))
        for one in scores:
            _score(one, sample, sample.scoring[first : first + BATCH])
    return scores


def _score(scores: Scores, sample: Sample, numbers: Sequence[int]) -> None:
    encode, decode, clock = scores.codec.encode, scores.codec.decode, time.perf_counter_ns
    for number in numbers:
        page = sample.held.page(number)
        begun = clock()
        payload = encode(page)
        encoded = clock()
        back = decode(payload)
        decoded = clock()
        if back != page:
            raise ZswapdError(f"{scores.codec.name}: a page did not come back as it was", "report it: this is a bug")
        scores.lengths.append(min(len(payload), PAGE))
        scores.encode_ns.append(encoded - begun)
        scores.decode_ns.append(decoded - encoded)
