"""The workload as a child process: started, moved into its cgroup, told what to do, ended."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from zswapd.bench.cgroup import MemoryCgroup
from zswapd.bench.corpus import Corpus, Report
from zswapd.errors import ZswapdError

SILENCE_SECONDS = 60  # a workload that says nothing for so long waits for a device that is stuck


class WrongPages(ZswapdError):
    """Pages came back other than they were written."""


class Workload:
    """The running workload; `pid` is its process."""

    def __init__(self, process: trio.Process, group: MemoryCgroup | None, errors: int, report: Report) -> None:
        self.pid = process.pid
        self.verified = 0  # pages compared so far
        self._process = process
        self._group = group
        self._errors = errors
        self._report = report
        self._received = b""

    async def run(self, phase: str, **arguments: int) -> dict[str, Any]:
        """Run a phase (a method of zswapd.bench.workload.Workload) and return its result.

        Raises ZswapdError when the process ends meanwhile or makes no progress, and WrongPages when a page is
        not what it should be.
        """
        self._report(phase, 0, 1)
        assert self._process.stdin is not None
        command = json.dumps({"phase": phase, **arguments}) + "\n"
        try:
            await self._process.stdin.send_all(command.encode())
        except trio.BrokenResourceError:
            raise await self._death(phase) from None
        while (event := await self._event(phase))["event"] == "progress":
            self._report(phase, event["done"], event["total"])
        self._report(phase, 1, 1)
        self.verified += event.get("verified", 0)
        if event.get("wrong"):
            raise WrongPages(f"{event['wrong']} of {event['verified']} pages are wrong: {event['wrong_pages']} ...")
        return event

    async def _event(self, phase: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\n" not in self._received:
            more = None
            with trio.move_on_after(SILENCE_SECONDS):
                more = await self._process.stdout.receive_some()
            if more is None:
                raise ZswapdError(f"{phase}: the workload has made no progress for {SILENCE_SECONDS} s")
            if not more:
                raise await self._death(phase)
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    async def _death(self, phase: str) -> ZswapdError:
        status = await self._process.wait()
        said = os.pread(self._errors, 4096, 0).decode(errors="replace").strip().rpartition("\n")[2]
        if status == -signal.SIGBUS:
            return WrongPages(f"{phase}: SIGBUS: a page could not be read back from swap")
        if status == -signal.SIGKILL and self._group and self._group.oom_kills():
            return ZswapdError(f"{phase}: killed for want of memory: the cgroup's limit or the swap is too small")
        return ZswapdError(f"{phase}: the workload ended with status {status}: {said}")


@asynccontextmanager
async def workload(
    corpus: Corpus, group: MemoryCgroup | None, report: Report, where: str = "swapped"
) -> AsyncIterator[Workload]:
    """A workload on the corpus's pages, in `group` from before it touches any; killed and waited for on exit."""
    errors = os.memfd_create("errors")
    try:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "zswapd.bench.workload", str(corpus.fd), str(corpus.pages), where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=[corpus.fd],
            process_group=0,  # Ctrl-C is for us alone
        )
        try:
            running = Workload(process, group, errors, report)
            await running._event("start")
            if group:
                group.add(process.pid)
            await running.run("expect")
            yield running
        finally:
            with trio.CancelScope(shield=True):
                process.kill()
                with trio.move_on_after(10):  # it may wait for a device whose server is stuck
                    await process.wait()
    finally:
        os.close(errors)
