"""Real programs whose memory becomes the benchmark's pages.

Each program is started by us, does an ordinary job on public data of the machine (package indexes, the sources
under /usr and the standard library) until its memory reaches its share, and waits. Its anonymous private memory
is then read through /proc, and it is ended. It starts with an empty environment and reads only files that
everyone may read, so no secret gets into its pages. Its temporary files go with it.
"""

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import termios
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import trio

from zswapd.anonymous import PAGE as PAGE
from zswapd.anonymous import Memory, family

PATIENCE_SECONDS = 180  # a program that is not ready by then is left out

# Every program below gets: its memory budget in bytes, the seconds it may take, then what it works on. It reads its
# standard input when it is done: the pipe running empty tells us so, end of file (also if we die) tells it to end.

_PYTHON_OVER = """
import gc, sys, time
gc.disable()
budget, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
def over():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 > budget or time.monotonic() > end
"""

_PYTHON_SYNTAX = (
    _PYTHON_OVER
    + """
import ast, os
trees = {}
for folder, folders, files in os.walk(sys.argv[3]):
    folders.sort()
    for name in sorted(files):
        if name.endswith(".py") and not over():
            path = os.path.join(folder, name)
            try:
                trees[path] = ast.parse(open(path, encoding="utf-8").read())
            except (OSError, SyntaxError, ValueError, RecursionError):
                pass
sys.stdin.read()
"""
)

_PYTHON_PACKAGES = (
    _PYTHON_OVER
    + """
import re, subprocess
def lines():
    yield from open("/var/lib/dpkg/status", encoding="utf-8", errors="replace")
    try:
        pipe = subprocess.Popen(["apt-cache", "dumpavail"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, text=True, errors="replace")
    except OSError:
        return
    with pipe:
        yield from pipe.stdout
        pipe.kill()
packages, mentions, package, field = [], {}, {}, ""
for number, line in enumerate(lines()):
    if not line.strip():
        packages.append(package)
        package = {}
        if over():
            break
    elif line[0].isspace():
        package[field] = package.get(field, "") + line
        for word in re.findall(r"[\\w.+-]+", line):
            mentions.setdefault(word.lower(), []).append((number, package.get("Package")))
    else:
        field, _, value = line.partition(":")
        package[field] = value.strip()
        if field in ("Depends", "Suggests", "Recommends"):
            package[field, "parsed"] = [tuple(choice.split()) for choice in value.split(",")]
sys.stdin.read()
"""
)

_PERL_WORDS = """
my ($budget, $seconds, @files) = @ARGV; my (%words, $rss); my $end = time + $seconds;
FILE: for my $file (@files) {
    open(my $in, "<", $file) or next;
    while (my $line = <$in>) {
        push @{$words{$1}}, "$file:$." while $line =~ /(\\w+)/g;
        next if $. % 256;
        open(my $statm, "<", "/proc/self/statm"); ($rss) = (split " ", <$statm>)[1]; close $statm;
        last FILE if $rss * 4096 > $budget || time > $end;
    }
}
my @rest = <STDIN>;
"""

_NODE_WORDS = """
const fs = require("fs"); const [budget, seconds, ...files] = process.argv.slice(1);
const words = new Map(), end = Date.now() + 1000 * seconds;
for (const file of files) {
  let text; try { text = fs.readFileSync(file, "utf8"); } catch { continue; }
  text.split("\\n").forEach((line, number) => { for (const word of line.match(/\\w+/g) ?? []) {
    if (!words.has(word)) words.set(word, []);
    words.get(word).push({file, number, context: line.trim()});
  }});
  if (process.memoryUsage().rss > Number(budget) || Date.now() > end) break;
}
fs.readFileSync(0);
"""

_JAVA_WORDS = """
import java.nio.file.*; import java.util.*;
class Words { public static void main(String[] args) throws Exception {
  long budget = Long.parseLong(args[0]), end = System.currentTimeMillis() + 1000 * (long) Double.parseDouble(args[1]);
  Map<String, List<String>> words = new HashMap<>(); Runtime runtime = Runtime.getRuntime();
  for (int i = 2; i < args.length; i++) {
    String text; try { text = Files.readString(Path.of(args[i])); } catch (Exception unreadable) { continue; }
    int number = 0;
    for (String line : text.split("\\n")) { number++; for (String word : line.split("\\\\W+"))
      words.computeIfAbsent(word, key -> new ArrayList<>()).add(args[i] + ":" + number); }
    if (runtime.totalMemory() - runtime.freeMemory() > budget || System.currentTimeMillis() > end) break;
  }
  System.in.readAllBytes();
} }
"""

_AWK_WORDS = """
function seconds_now(  uptime, part) {
    getline uptime < "/proc/uptime"; close("/proc/uptime"); split(uptime, part, " ")
    return part[1]
}
function look(  sizes, part) {
    getline sizes < "/proc/self/statm"; close("/proc/self/statm"); split(sizes, part, " ")
    over = part[2] * 4096 > ARGV[1] || seconds_now() > end
}
BEGIN {
    end = seconds_now() + ARGV[2]
    for (file = 3; file < ARGC && !over; file++) {
        for (number = 1; (getline line < ARGV[file]) > 0 && !over; number++) {
            count = split(line, words, /[^A-Za-z0-9_]+/)
            for (at = 1; at <= count; at++) places[words[at], ARGV[file], number] = at
            if (number % 256 == 0) look()
        }
        close(ARGV[file])
        look()
    }
    while ((getline line < "-") > 0);
}
"""

# A table of the files of /usr, with indexes, up to about the budget.
_SQLITE_FILES = """
exec sqlite3 :memory: 'CREATE TABLE files(path, bytes INTEGER, mode, changed REAL, inode INTEGER)' '.mode tabs' \\
    ".import '|find /usr -xdev -printf \"%p\\\\t%s\\\\t%m\\\\t%T@\\\\t%i\\\\n\" | head -c $(($1 / 3))' files" \\
    'CREATE INDEX by_path ON files(path)' 'CREATE INDEX by_change ON files(changed, bytes)' '.read /dev/stdin'
"""

# Lines of text, as they were read.
_SORT_LINES = """
budget=$1; shift 2; exec sort --buffer-size="${budget}b" "$@" -
"""

# The compiler has read every header by the time it asks for the last one, which is its standard input.
_CPP_HEADERS = '#include <bits/stdc++.h>\n#include <regex>\n#include "/dev/stdin"\n'


@dataclass(frozen=True)
class Program:
    """How to start a program. `share` is its part of the memory wanted, relative to the others'."""

    name: str
    share: int
    command: Sequence[str]
    source: str = ""  # given as a memfd where the command says {source}
    sized: bool = True  # takes budget, seconds and files as arguments
    needs: str = ""  # another program that it starts


def known() -> list[Program]:
    """The programs that this machine has."""
    python = [sys.executable, "-I", "-S", "-c"]
    every = [
        Program("python-syntax-trees", 6, [*python, _PYTHON_SYNTAX]),
        Program("python-package-index", 3, [*python, _PYTHON_PACKAGES]),
        Program("perl-words", 1, ["perl", "-e", _PERL_WORDS]),
        Program("node-words", 2, ["node", "-e", _NODE_WORDS, "--"]),
        # Its performance data would lie in /tmp, whatever TMPDIR says, and stay there.
        Program(
            "java-words", 1, ["java", "-XX:-UsePerfData", "-Xmx1g", "--source", "11", "{source}"], source=_JAVA_WORDS
        ),
        Program("awk-words", 1, ["awk", _AWK_WORDS]),
        Program("sqlite3-files", 1, ["sh", "-c", _SQLITE_FILES, "sqlite3"], needs="sqlite3"),
        Program("sort-lines", 1, ["sh", "-c", _SORT_LINES, "sort"]),
        Program("g++", 1, ["g++", "-fsyntax-only", "-x", "c++", "{source}"], source=_CPP_HEADERS, sized=False),
    ]
    return [program for program in every if shutil.which(program.needs or program.command[0])]


class Running:
    """A program that was started; `end` it in every case."""

    def __init__(self, program: Program, budget: int, seconds: float, texts: Sequence[str]) -> None:
        self.name = program.name
        source = os.memfd_create("source")
        os.write(source, program.source.encode())
        command = [word.replace("{source}", f"/dev/fd/{source}") for word in program.command]
        if program.sized:
            work = [sysconfig.get_path("stdlib")] if program.name.startswith("python") else texts
            command += [str(budget), str(seconds), *work]
        # It is killed, and cannot remove what it has there (sort has all that is beyond its budget).
        self._temporary = tempfile.TemporaryDirectory(prefix=f"zswapd-bench-{os.getpid()}-", ignore_cleanup_errors=True)
        # A session of its own: Ctrl-C is for us, and everything it starts is ended with its group.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={
                "PATH": os.defpath + ":/usr/sbin:/sbin",
                "LANG": "C.UTF-8",
                "TMPDIR": self._temporary.name,
            },
            start_new_session=True,
            pass_fds=[source],
        )
        os.close(source)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        self._pipe.write(b"\n")
        self._pipe.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> bool:
        """Wait until the program has done its work. False when it ended instead, or took too long."""
        with trio.move_on_after(PATIENCE_SECONDS):
            while self._process.poll() is None:
                unread = fcntl.ioctl(self._pipe, termios.FIONREAD, bytes(4))
                if struct.unpack("i", unread) == (0,):
                    return True
                await trio.sleep(0.05)
        return False

    def present_bytes(self) -> int:
        """Anonymous private memory that is in RAM now, bytes."""
        return sum(end - start for _, start, end in self._runs())

    def pages(self) -> Iterator[bytes]:
        """Its present anonymous pages in address order."""
        buffer = memoryview(bytearray(256 * PAGE))
        for memory, start, end in self._runs():
            at = start
            while at < end:
                got = memory.read(at, buffer[: end - at])
                yield from (bytes(buffer[i : i + PAGE]) for i in range(0, got, PAGE))
                at += max(got, PAGE)

    def _runs(self) -> Iterator[tuple[Memory, int, int]]:
        frames: set[int] = set()
        for pid in family(self._process.pid):
            with Memory(pid) as memory:
                for mapping in memory.mappings(frames):
                    yield from ((memory, start, end) for start, end in mapping.runs)

    def end(self) -> None:
        """Kill it and what it started, and remove its files. Children go first, so that a compiler driver still reaps
        its own."""
        self._pipe.close()
        try:
            for child in family(self._process.pid)[1:]:
                os.kill(child, signal.SIGKILL)
                self._process.wait(timeout=2)
        except (OSError, subprocess.TimeoutExpired):
            pass
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._temporary.cleanup()
