"""The memory in an ELF core dump (elf(5)). The file comes from outside: every number in it is checked."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from zswapd.anonymous import PAGE
from zswapd.errors import ZswapdError

ET_CORE, PT_LOAD, PF_W = 4, 1, 2
PN_XNUM = 0xFFFF  # there are more program headers than fit: their number is in the first section header
MAX_HEADERS = 1 << 20  # a process has 65530 mappings by default


@dataclass(frozen=True)
class Segment:
    """Whole pages of memory that was writable: where it was, where it is in the file, and how many bytes of it."""

    address: int
    offset: int
    size: int


@dataclass(frozen=True)
class Core:
    segments: list[Segment]
    missing: int  # bytes that ought to be in the file, and are not


@dataclass(frozen=True)
class _Layout:
    """Of a class of ELF files: the header from e_phoff on, a program header and its fields, and where sh_info is."""

    header: str
    program: str
    fields: tuple[str, ...]
    section_info: int


_LAYOUTS = {
    1: _Layout("16xHHI4xIII2xHHH", "8I", ("type", "offset", "address", "", "size", "", "flags", ""), 28),
    2: _Layout("16xHHI8xQQI2xHHH", "IIQQQQQQ", ("type", "flags", "offset", "address", "", "size", "", ""), 44),
}


def read(path: Path) -> Core:
    """Finds what was writable memory. Raises ZswapdError where it is no core dump, or a damaged one."""

    def refuse(why: str) -> ZswapdError:
        return ZswapdError(f"{path} is not a core dump: {why}", "see core(5); analyze file takes any file of pages")

    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        head = file.read(64)
        layout = _LAYOUTS.get(head[4]) if head[:4] == b"\x7fELF" and len(head) == 64 else None
        order = {1: "<", 2: ">"}.get(head[5]) if layout else None
        if layout is None or order is None:
            raise refuse("it does not begin as an ELF file")
        header = struct.unpack_from(order + layout.header, head)
        kind, _, _, offset, sections, _, entry, count, _ = header
        if kind != ET_CORE:
            raise refuse(f"it is an ELF file of type {kind}, not {ET_CORE}")
        if entry != struct.calcsize(order + layout.program):
            raise refuse(f"its program headers have {entry} bytes")
        if count == PN_XNUM and sections < length:
            file.seek(sections + layout.section_info)
            count = int.from_bytes(file.read(4), "little" if order == "<" else "big")
        if not 0 < count <= MAX_HEADERS or offset + count * entry > length:
            raise refuse(f"{count} program headers at byte {offset} do not fit into its {length} bytes")
        file.seek(offset)
        table = file.read(count * entry)
    segments, missing = [], 0
    for values in struct.iter_unpack(order + layout.program, table):
        one = dict(zip(layout.fields, values, strict=True))
        if one["type"] != PT_LOAD or not one["flags"] & PF_W:
            continue
        size = max(0, min(one["size"], length - one["offset"]))
        missing += one["size"] - size
        skipped = -one["address"] % PAGE  # up to where its first page begins
        if size >= skipped + PAGE:
            pages = (size - skipped) // PAGE * PAGE
            segments.append(Segment(one["address"] + skipped, one["offset"] + skipped, pages))
    return Core(segments, missing)
