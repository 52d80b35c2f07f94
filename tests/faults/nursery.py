"""Where the programs of a run are born: forked from a process that has imported everything.

A Python that starts costs two seconds of a processor, nearly all of it imports; a storm that kills
one every second would do nothing else. So one process, `python -m tests.faults.nursery`, imports what
`serve` and `work` import, opens nothing, and forks for each life. The child then goes the way of
`python -m tests.faults.entry`: it reads its settings, makes its loop and its connections itself.

It speaks lines of JSON. It is told {"born": n, "arguments", "environ", "log"} and {"signal": n, "to":
pid}, and tells {"born": n, "pid"} and {"died": pid, "code"}, a code being that of `subprocess`. It
signals only children that it has not buried, so that no foreign process is ever met. When its
standard input ends, because whoever runs the storm has, it kills all of them and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

_LOOKS_APART_S = 0.02


class Child:
    """A life, as `asyncio.subprocess.Process` shows one."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery
        self._ended = asyncio.Event()

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing where it has ended."""
        self._nursery.tell({"signal": int(number), "to": self.pid})

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def died(self, code: int) -> None:
        self.returncode = code
        self._ended.set()


class Nursery:
    """The other end: starts it, asks for lives, hears of deaths."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._children: dict[int, Child] = {}
        self._waiting: dict[int, asyncio.Future[Child]] = {}
        self._numbers = itertools.count()
        self._hearing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Nursery:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.faults.nursery"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._hearing = asyncio.create_task(self._hear())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._hearing is not None
        self._process.stdin.close()
        await self._process.wait()
        self._hearing.cancel()
        await asyncio.gather(self._hearing, return_exceptions=True)

    async def bear(self, arguments: list[str], environ: dict[str, str], log: Path) -> Child:
        """A new life; what it says is appended to `log`."""
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        self.tell({"born": number, "arguments": arguments, "environ": environ, "log": str(log)})
        return await self._waiting[number]

    def tell(self, line: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line).encode() + b"\n")

    async def _hear(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            told = json.loads(line)
            if "born" in told:
                child = self._children[told["pid"]] = Child(self, told["pid"])
                self._waiting.pop(told["born"]).set_result(child)
            else:
                self._children.pop(told["died"]).died(told["code"])


def main() -> None:
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # nothing of it has begun when we fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import mailgrpc.cli.main
    import mailgrpc.cli.serve
    import mailgrpc.cli.work
    import mailgrpc.providers.sendgrid
    import mailgrpc.providers.smtp  # noqa: F401
    from tests.faults import entry

    gc.freeze()
    if _tend():
        entry.main()


def _tend() -> bool:
    """True in a child, which is to live; False at the end."""
    children: set[int] = set()
    rest = b""
    while True:
        if select.select([0], [], [], _LOOKS_APART_S)[0]:
            if not (data := os.read(0, 1 << 20)):
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in map(json.loads, lines):
                if "signal" in line:
                    if line["to"] in children:
                        os.kill(line["to"], line["signal"])
                    continue
                if not (pid := os.fork()):
                    _become(line)
                    return True
                children.add(pid)
                _say({"born": line["born"], "pid": pid})
        _bury(children)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)
    return False


def _bury(children: set[int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            children.discard(ended[0])
            _say({"died": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})


def _say(line: dict[str, Any]) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def _become(life: dict[str, Any]) -> None:
    """Of what the nursery is, nothing stays but what it has imported."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(life["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for fd, replaced in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(fd, replaced)
    os.close(nothing)
    os.close(log)
    os.environ.clear()
    os.environ.update(life["environ"])
    sys.argv[1:] = life["arguments"]


if __name__ == "__main__":
    main()
