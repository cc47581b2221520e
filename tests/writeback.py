"""What is counted of a backing disk, as the tests need it."""

from typing import Any

BOUNDS = [0.001, 0.002, 0.004]
NEVER = {"bounds_seconds": BOUNDS, "counts": [0, 0, 0, 0], "sum_seconds": 0}
#: As without a backing disk.
COUNTS = {
    **dict.fromkeys(("backing_bytes", "backing_free_bytes", "live_bytes", "idle_pages"), 0),
    "pages_in_clusters": 0,
    "cluster_seconds": 0.0,
    **dict.fromkeys(("writebacks_in_flight", "cleanings_in_flight", "pages_written", "pages_promoted"), 0),
    **dict.fromkeys(("written_bytes", "cleaning_bytes", "cleaned_segments", "reads", "read_bytes"), 0),
    **dict.fromkeys(("write_errors", "stores_waited"), 0),
    "state": "none",
    "budget_bytes": None,
    "read_latency": NEVER,
    "write_latency": NEVER,
}


#: As long as nothing was recompressed.
RECOMPRESSION: dict[str, Any] = {
    **dict.fromkeys(("pages_recompressed", "pages_not_smaller", "saved_bytes", "in_flight"), 0),
    **dict.fromkeys(("dictionary_bytes", "encoder_bytes", "index_bytes"), 0),
    **dict.fromkeys(("pages_deduplicated", "pages_shared", "shared_pages"), 0),
    "processor_seconds": 0.0,
    "bytes": dict.fromkeys(("lz4", "zstd", "zstd_dictionary", "incompressible"), 0),
    "dictionaries": [],
}


def writeback(**changes: Any) -> Any:
    return {**COUNTS, **changes}
