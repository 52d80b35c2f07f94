"""The lifeline: a small process that holds one child and ends it when the parent is gone.

What is promised: however the parent ends, `kill -9` included, its child ends within seconds; and
while the child lives, so does the lock that says that its data directory is in use.

A parent that is killed can do nothing any more, and a child rarely notices that its parent is
gone (PR_SET_PDEATHSIG would tell it, on Linux alone, not past a change of user, and by one signal
without a second, harder one). The kernel, though, closes a dead process's descriptors. So each
child is held by one process of this script, which reads from a socket whose other end the parent
alone holds:

    a byte          its value is a signal for the child; SIGKILL goes to the child's process group
    end of file     the parent is gone: send each signal of the plan in turn, then SIGKILL

To the parent, the lifeline writes one line: the child's process id. It exits as the child did:
with its code, or 128 + the number of the signal that ended it. Descriptors that carry locks are
inherited by the lifeline and by the child, so that a lock (flock) is free only when both have
ended, even where somebody killed the lifeline alone.

What can go wrong: whoever forks the parent without an exec shares its end of the socket, and the
end of file waits for that process too.

The script runs as `python -I -S lifeline.py CONTROL PLAN ACCOUNT REMOVE CLOSE -- COMMAND …` and
imports only what costs nothing: it starts once a child and stays as long as it.

    CONTROL   number of the socket's descriptor
    PLAN      what ends an orphan, e.g. `2:5,3:2`: signal 2, wait 5 s, signal 3, wait 2 s
    ACCOUNT   `-`, or whom the child runs as: `uid:gid:group,group`
    REMOVE    `-`, or a directory to remove after an orphan has ended
    CLOSE     `-`, or descriptors that are the child's alone: `7,8`
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

EXIT_CANNOT_START = 127
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def main(argv: list[str]) -> int:
    """Hold one child until it has ended, and return the exit code that tells how."""
    control, plan, account, remove, close = argv[:5]
    control_fd = int(control)
    os.set_inheritable(control_fd, False)
    # A service manager signals the whole family at once; this process outlives its child.
    for ignored in _IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    child = os.fork()
    if child == 0:
        _become(account, argv[6:])
    for fd in _numbers(close):
        os.close(fd)
    steps = [(int(step.split(":")[0]), float(step.split(":")[1])) for step in plan.split(",")]
    orphaned, status = _hold(child, control_fd, wake_r, steps)
    _signal_group(child)  # what the child itself had started
    if orphaned and remove != "-":
        import shutil  # noqa: PLC0415  it costs as much as all the rest, and is rarely needed

        shutil.rmtree(remove, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _become(account: str, command: list[str]) -> None:
    """In the child: give up privileges and run the command. Never returns."""
    aim = "begin"
    try:
        os.setpgid(0, 0)
        # Python ignores SIGPIPE, and what is ignored stays so over an exec.
        for number in (*_IGNORED, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        aim = f"become user {account} (start mailgrpc as an ordinary user instead)"
        if account != "-":
            uid, gid, groups = account.split(":")
            os.setgroups(_numbers(groups))
            os.setgid(int(gid))
            os.setuid(int(uid))
        aim = f"run {command[0]}"
        os.execv(command[0], command)  # noqa: S606  what the parent asked for
    except OSError as error:
        os.write(2, f"cannot {aim}: {error.strerror}\n".encode())
    finally:
        os._exit(EXIT_CANNOT_START)


def _hold(
    child: int, control_fd: int, wake_r: int, steps: list[tuple[int, float]]
) -> tuple[bool, int]:
    """Serve the parent until the child has ended: (was the parent gone first, wait status)."""
    watched = [control_fd, wake_r]
    act_at: float | None = None
    with contextlib.suppress(OSError):  # gone already? The loop reads the end of file.
        os.write(control_fd, b"%d\n" % child)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return act_at is not None, status
        timeout = None if act_at is None else max(0.0, act_at - time.monotonic())
        ready, _, _ = select.select(watched, [], [], timeout)
        if wake_r in ready:
            os.read(wake_r, 4096)
        if control_fd in ready:
            orders = _read(control_fd)
            for order in orders:
                _signal(child, order)
            if not orders:
                watched.remove(control_fd)
                act_at = time.monotonic()
        if act_at is not None and act_at <= time.monotonic():
            number, seconds = steps.pop(0) if steps else (signal.SIGKILL, 1.0)
            _signal(child, number)
            act_at = time.monotonic() + seconds


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 64)
    except OSError:  # a reset says the same as an end of file
        return b""


def _signal(child: int, number: int) -> None:
    if number == signal.SIGKILL:
        _signal_group(child)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _signal_group(child: int) -> None:
    # The group is empty, or (macOS) only zombies are left in it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number not in ("", "-")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
