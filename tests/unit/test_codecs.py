"""The native codecs against other people's decoders: what the pool holds is plain lz4 blocks and zstd frames."""

from itertools import islice

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pages import PAGE, noise, pages, real_pages
from zswapd._native import compress_page

LEVELS = range(1, 23)
_zstd = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)


def decode(codec: str, payload: bytes) -> bytes:
    if codec == "lz4":
        page: bytes = lz4.block.decompress(payload, uncompressed_size=PAGE)
        return page
    if codec == "zstd":
        return _zstd.decompress(payload, max_output_size=PAGE)
    assert codec == "incompressible"
    return payload


@settings(max_examples=500, deadline=None)
@given(page=pages(), algorithm=st.sampled_from(["lz4", "zstd"]), level=st.sampled_from(LEVELS))
def test_any_page_decodes_elsewhere(page: bytes, algorithm: str, level: int) -> None:
    codec, payload = compress_page(page, algorithm, level)
    assert codec in (algorithm, "incompressible")
    assert decode(codec, payload) == page
    assert len(payload) < PAGE or codec == "incompressible"


@pytest.mark.parametrize("algorithm", ["lz4", *(f"zstd {level}" for level in LEVELS)])
def test_real_pages_decode_elsewhere(algorithm: str) -> None:
    name, _, level = algorithm.partition(" ")
    count = 2000 if name == "lz4" else 200
    original, compressed = 0, 0
    for page in islice(real_pages(), count):
        codec, payload = compress_page(page, name, int(level or 1))
        assert decode(codec, payload) == page
        original, compressed = original + PAGE, compressed + len(payload)
    assert original == count * PAGE
    # Python sources and code: a codec that silently gave up on most would not halve them.
    assert compressed < original * (0.75 if name == "lz4" else 0.6)


def test_a_higher_level_is_smaller() -> None:
    sample = list(islice(real_pages(), 100))
    sizes = [sum(len(compress_page(page, "zstd", level)[1]) for page in sample) for level in (1, 22)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("algorithm", ["lz4", "zstd"])
def test_noise_is_kept_as_it_is(algorithm: str) -> None:
    assert compress_page(noise(1), algorithm, 3) == ("incompressible", noise(1))


def test_only_whole_pages_and_known_levels() -> None:
    for length in (0, PAGE - 1, PAGE + 1):
        with pytest.raises(ValueError, match="4096"):
            compress_page(bytes(length), "lz4", 3)
    for level in (0, 23, -1):
        with pytest.raises(ValueError, match="1 to 22"):
            compress_page(bytes(PAGE), "zstd", level)
    with pytest.raises(ValueError, match="lzo"):
        compress_page(bytes(PAGE), "lzo", 3)
