"""The benchmark's pages: memory of real programs, sources and compiled code, held in a memfd."""

import hashlib
import mmap
import os
import random
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import trio

from zswapd.bench.programs import PAGE, Running, known

HEAP_SHARE = 0.75  # the rest is half sources, half compiled code
RUN_PAGES = (64, 256)  # neighbouring pages of one source stay together, as in real memory
SOURCE_SUFFIXES = (
    ".py",
    ".h",
    ".c",
    ".hpp",
    ".js",
    ".ts",
    ".pl",
    ".pm",
    ".java",
    ".rs",
    ".go",
    ".xml",
    ".json",
    ".txt",
)
COMPILED_SUFFIXES = (".so", ".pyc", ".o", ".a", ".jar", ".node")

Report = Callable[[str, int, int], None]  # what is going on, how much is done, of how much


@dataclass
class Corpus:
    """Distinct pages in shared memory; gone when its descriptor is closed.

    Where the process has locked its memory, they are locked too, and so never reach a disk.

    No page is all zeros and no two are equal, so a page that turns up in another's place is always noticed. Both
    occur in real memory and compress to nothing: leaving them out understates what a compressing device gains.
    """

    fd: int
    seed: int
    pages: int = 0
    sources: Counter[str] = field(default_factory=Counter)  # source -> pages
    dropped: Counter[str] = field(default_factory=Counter)  # "zero", "duplicate" -> pages
    mapping: mmap.mmap | None = None
    left_out: list[str] = field(default_factory=list)  # programs that failed or took too long

    def __enter__(self) -> "Corpus":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.mapping:
            self.mapping.close()
        os.close(self.fd)


@dataclass
class Source:
    """Something that yields pages. `expected` is about how many, and weighs it among others of its kind."""

    name: str
    kind: str
    expected: int
    pages: Iterator[bytes]


async def build(pages: int, seed: int, report: Report) -> Corpus:
    """Gather `pages` pages of 4096 bytes, fewer where the machine has no more (see Corpus.pages).

    Starts programs (see programs.py), reads their memory and files under /usr; takes up to about a minute. `seed`
    decides which files are taken and how the sources are interleaved; addresses in heaps differ from run to run. A
    run's rows are comparable because they all use one corpus. Cancelled or failed, nothing is left behind.
    """
    report("listing files", 0, pages)
    rng = random.Random(seed)
    sources, compiled = files(rng)
    running: list[Running] = []
    try:
        budget = int(pages * PAGE * HEAP_SHARE * 1.15)  # some pages will be zero or duplicates
        programs = known()
        shares = sum(program.share for program in programs)
        for program in programs:
            report(f"starting {program.name}", 0, pages)
            running.append(Running(program, budget * program.share // shares, 40, sources[:2000]))
        report("programs at work: " + ", ".join(program.name for program in programs), 0, pages)
        ready = [one for one in running if await one.ready()]
        kinds = [Source(one.name, "heap", one.present_bytes() // PAGE, one.pages()) for one in ready]
        for name, paths in (("source files", sources), ("compiled code", compiled)):
            kinds.append(Source(name, name, pages, _file_pages(paths)))
        corpus = await gather(kinds, pages, seed, report)
        corpus.left_out = [one.name for one in running if one not in ready]
        return corpus
    finally:
        for one in running:
            one.end()


async def gather(sources: Sequence[Source], pages: int, seed: int, report: Report) -> Corpus:
    """Interleave runs of the sources' pages into a corpus, until it has `pages` or the sources are used up."""
    rng = random.Random(seed)
    live = [source for source in sources if source.expected > 0]
    corpus = Corpus(os.memfd_create("zswapd-bench-corpus", os.MFD_CLOEXEC), seed)
    seen: set[bytes] = set()
    try:
        while corpus.pages < pages and live:
            source = _choose(rng, live)
            run: list[bytes] = []
            wanted = min(rng.randint(*RUN_PAGES), pages - corpus.pages)
            for page in source.pages:
                digest = hashlib.blake2b(page, digest_size=16).digest()
                if digest in seen or len(page) < PAGE:
                    corpus.dropped["duplicate"] += 1
                elif not page.strip(b"\0"):
                    corpus.dropped["zero"] += 1
                else:
                    seen.add(digest)
                    run.append(page)
                    if len(run) == wanted:
                        break
            else:
                live.remove(source)
            os.write(corpus.fd, b"".join(run))
            corpus.pages += len(run)
            corpus.sources[source.name] += len(run)
            report("gathering pages", corpus.pages, pages)
            await trio.lowlevel.checkpoint()
        if corpus.pages:
            corpus.mapping = mmap.mmap(corpus.fd, 0)
            for at in range(0, len(corpus.mapping), PAGE):
                corpus.mapping[at]  # memory that is locked on fault is not locked before
    except BaseException:
        os.close(corpus.fd)
        raise
    return corpus


def _choose(rng: random.Random, live: Sequence[Source]) -> Source:
    """Heap three times of four while there is any, and larger heaps oftener, so all last about equally long."""
    kinds = sorted({source.kind for source in live})
    heap = HEAP_SHARE / (1 - HEAP_SHARE) * max(1, len(kinds) - 1)
    kind = rng.choices(kinds, [heap if kind == "heap" else 1 for kind in kinds])[0]
    same = [source for source in live if source.kind == kind]
    return rng.choices(same, [source.expected for source in same])[0]


def files(rng: random.Random) -> tuple[list[str], list[str]]:
    """Source files and compiled files that everyone may read, in seeded order."""
    sources: list[str] = []
    compiled: list[str] = []
    for top in ("/usr", sysconfig.get_path("stdlib")):
        for folder, folders, names in os.walk(top):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                if name.endswith(SOURCE_SUFFIXES):
                    sources.append(path)
                elif name.endswith(COMPILED_SUFFIXES) or ".so." in name or folder == "/usr/bin":
                    compiled.append(path)
    rng.shuffle(sources)
    rng.shuffle(compiled)
    return sources, compiled


def _file_pages(paths: Sequence[str]) -> Iterator[bytes]:
    """The whole pages of regular files that everyone may read; at most 4 MiB of one file."""
    for path in paths:
        try:
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode) or not status.st_mode & stat.S_IROTH:
                continue
            with open(path, "rb", buffering=0) as file:
                content = file.read(4 << 20)
        except OSError:
            continue
        yield from (content[at : at + PAGE] for at in range(0, len(content) - PAGE + 1, PAGE))


def describe(corpus: Corpus) -> str:
    """One line on what the pages are."""
    parts = ", ".join(f"{name} {100 * count / corpus.pages:.0f}%" for name, count in corpus.sources.most_common())
    return f"{corpus.pages * PAGE >> 20} MiB, {corpus.pages} distinct pages (seed {corpus.seed}): {parts}"
