"""What a swap file costs in memory beside its pages: the tables of whoever serves it, which are locked."""

from zswapd.config import PAGE_SIZE, Config, format_size, mem_total
from zswapd.errors import ConfigError

#: Per page of the swap file, taken at the start: its slot word and age, and its share of those for shared pages; with a
#: backing disk, links and note in the LRU.
SLOT_BYTES, LRU_BYTES = 10, 12
#: Per page of the pool, taken as it grows: its descriptor (zsmalloc's, the larger one).
DESCRIPTOR_BYTES = 24
#: Of each object in the pool: its header. What would be larger than a page with it is stored as it is.
HEADER_BYTES = 10
#: A page takes two pages of the pool at worst: itself, and a header.
_WORST = 2
#: The tables may take one part in this many of RAM: there have to be pages, and others, too.
_SHARE = 2


def tables_bytes(size: int, mem_limit: int, *, slot: int = SLOT_BYTES) -> int:
    """Bytes of the tables of a full swap file of `size` bytes whose pool may take `mem_limit`, with `slot` for each of
    its pages."""
    pool = min(mem_limit, _WORST * size)
    return size // PAGE_SIZE * slot + pool // PAGE_SIZE * DESCRIPTOR_BYTES


def refuse_huge(config: Config, ram: int | None = None) -> None:
    """Raises ConfigError if the tables for swap.size would not fit in half of `ram` bytes (None: this machine's RAM).

    For who makes a swap file. Loading the configuration does not ask: what is attached must always be detachable.
    """
    ram = mem_total() if ram is None else ram
    size, limit, most = config.swap.size, config.pool.mem_limit_bytes, ram // _SHARE
    slot = SLOT_BYTES + (LRU_BYTES if config.writeback.backing else 0)
    if (tables := tables_bytes(size, limit, slot=slot)) <= most:
        return
    # With as much of the pool as there can be, or with the worst pages, whichever leaves more.
    beside_pool = (most - limit // PAGE_SIZE * DESCRIPTOR_BYTES) // slot
    fits = max(beside_pool, most // (slot + _WORST * DESCRIPTOR_BYTES)) * PAGE_SIZE
    raise ConfigError(
        f"swap.size = {format_size(size)}: its tables, which are locked in memory, would take {format_size(tables)} of "
        f"the {format_size(ram)} that this machine has: more than half",
        f"make swap.size {fits >> 30}GiB or less",
    )
