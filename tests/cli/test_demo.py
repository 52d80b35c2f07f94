"""`mailgrpc demo`, as `make demo` runs it."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mailgrpc.cli.output import Output
from mailgrpc.cli.story import Mishap, tell_story
from mailgrpc.client import AsyncMailClient


@pytest.fixture
def place() -> Iterator[Path]:
    """Where the demo keeps its data: short enough for sockets, open to PostgreSQL's user."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def demo(place: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, in a session of its own so that no signal of ours reaches anybody else."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mailgrpc", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # What a developer may have set: none of it takes part.
        env=os.environ
        | {
            "TMPDIR": str(place),
            "MAILGRPC_CHANNEL_URL": "smtp://mail.example.org",
            "MAILGRPC_AUTH": "keys",
        },
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        process.kill()
    assert process.stdout is not None
    process.stdout.close()
    process.wait(30)


STORY = re.compile(
    r"✓ postgres 18\.\d+   ✓ valkey 9\.\d+   ✓ server 127\.0\.0\.1:\d+   ✓ worker"
    r"""   ✓ inbox 127\.0\.0\.1:\d+   \d+\.\d s
(?:  127\.0\.0\.1:\d+ is taken by another program, so it is 127\.0\.0\.1:\d+
)*Enqueue
  msg_…(?P<a>\w{4})  receipt \+ invoice\.pdf  ada@example\.test
  msg_…\w{4}  newsletter +grace@example\.test +not queued: PREFERENCE \(newsletter\)
  msg_…(?P<c>\w{4})  sign-in code +temperror\+1@example\.test
  again, same request_id +→ msg_…(?P=a) replayed, no second mail
  same id, changed subject +→ ALREADY_EXISTS REQUEST_ID_MISMATCH
WatchStatus
(?:  \+\d+\.\d{3} +\w{4}  .*
){6}Raw mail of (?P=a) \(first 20 of \d+ lines\)
(?:  .*
|
){20}3 messages: 2 SENT, 1 SUPPRESSED, each mailed once\. Nothing left running\.
"""
)
MOVES = {
    "a": ["QUEUED → SENDING", "SENDING → SENT"],
    "c": ["QUEUED → SENDING", "SENDING → DEFERRED", "DEFERRED → SENDING", "SENDING → SENT"],
}


def test_it_shows_the_main_job_and_leaves_nothing(demo: subprocess.Popen[str], place: Path) -> None:
    output, _ = demo.communicate(timeout=90)
    assert demo.returncode == 0, output
    story = STORY.fullmatch(output)
    assert story is not None, output
    for which, moves in MOVES.items():
        told = re.findall(rf"  \+\S+ +{story[which]}  (\w+ → \w+)", output)
        assert told == moves
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["✓ postgres", "WatchStatus"])
def test_it_ends_cleanly_when_interrupted(
    demo: subprocess.Popen[str], place: Path, number: signal.Signals, code: int, moment: str
) -> None:
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith(moment):
            break
    demo.send_signal(number)
    rest = demo.stdout.read()
    assert demo.wait(60) == code
    assert rest.splitlines()[-1] == "Interrupted. Nothing left running."
    assert "Traceback" not in rest
    assert list(place.iterdir()) == []


async def test_it_takes_another_port_when_somebody_was_faster(
    monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    from mailgrpc.cli import demo
    from mailgrpc.config import HostPort, Settings

    with socket.create_server(("127.0.0.1", 0)) as taken:
        usual = Settings(listen=HostPort("127.0.0.1", taken.getsockname()[1]))
        monkeypatch.setattr(demo, "USUAL", usual)
        answers = iter([True, False])  # free when it is looked at first
        monkeypatch.setattr(demo, "_is_free", lambda where: next(answers))
        said = io.StringIO()
        async with demo._family(place / "data", Output(said, for_people=True)) as stack:
            assert stack.listen != str(usual.listen)
    assert f"{usual.listen} is taken by another program" in said.getvalue()


async def test_it_fails_when_a_mail_is_missing(mailgrpc_target: str, tmp_path: Path) -> None:
    """Mails that did not come to the inbox are no success, whatever the server says."""
    output = Output(io.StringIO(), for_people=True)
    async with AsyncMailClient(mailgrpc_target) as client:
        with pytest.raises(Mishap, match="not in the inbox"):
            await tell_story(client, tmp_path / "inbox", output)
