"""Fixtures of the embedded default: short-lived directories, families to kill, bounded waits."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from mailgrpc.embedded.postgres import EmbeddedPostgres

from .watching import descendants, is_alive, wait_until

HERE = Path(__file__).parent


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory that any user can pass. (Those of `tmp_path` are closed to others, and
    as root PostgreSQL runs as another user.)"""
    path = Path(tempfile.mkdtemp(prefix="mailgrpc-test-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def data_dir(place: Path) -> Path:
    return place / "data"


@pytest.fixture(scope="session")
def pristine() -> Iterator[Path]:
    """A data directory with an empty database in it, to be copied: sooner done than initdb."""
    path = Path(tempfile.mkdtemp(prefix="mailgrpc-test-", dir="/tmp"))
    path.chmod(0o755)
    with EmbeddedPostgres(path / "data", durable=False):
        pass
    yield path / "data"
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def made_data_dir(pristine: Path, data_dir: Path) -> Path:
    """A data directory in which PostgreSQL has run before."""
    subprocess.run(["cp", "-a", pristine, data_dir], check=True)
    return data_dir


class Family:
    """A `mailgrpc up` in a process of its own, with stand-ins for our own programs."""

    def __init__(self, data_dir: Path, *options: str, **environ: str) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(HERE / "family.py"),
                f"--data-dir={data_dir}",
                "--listen=127.0.0.1:0",
                *options,
            ],
            env={**os.environ, "MAILGRPC_INBOX_SMTP_LISTEN": "127.0.0.1:0", **environ},
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    @property
    def output(self) -> str:
        self._output.seek(0)
        return self._output.read().decode()

    def wait_ready(self) -> Family:
        def ready() -> bool:
            assert self.process.poll() is None, self.output
            return "✓ postgres" in self.output

        wait_until(ready, 30.0, "the family is ready")
        return self

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, within_s: float = 20.0) -> int:
        return self.process.wait(within_s)

    def members(self) -> dict[int, str]:
        """Process id and command of everything that the family has started."""
        return descendants(self.process.pid)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._output.close()


@pytest.fixture
def run_family() -> Iterator[Callable[..., Family]]:
    families: list[Family] = []

    def run(data_dir: Path, *options: str, **environ: str) -> Family:
        families.append(Family(data_dir, *options, **environ))
        return families[-1]

    yield run
    for family in families:
        members = family.members()
        family.close()
        wait_until(partial(_none_alive, members), what="all ended")


def _none_alive(pids: Iterable[int]) -> bool:
    return not any(map(is_alive, pids))


@dataclass(frozen=True)
class AsNobody:
    """A Python that user nobody can run, with our packages."""

    python: str
    uid: int
    gid: int

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        paths = [str(HERE.parent.parent), *(p for p in sys.path if p.endswith("site-packages"))]
        return subprocess.run(
            [self.python, *arguments],
            user=self.uid,
            group=self.gid,
            extra_groups=[],
            cwd="/",
            env={"PYTHONPATH": os.pathsep.join(paths), "PATH": os.defpath},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def as_nobody() -> AsNobody:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    nobody = pwd.getpwnam("nobody")
    ours = str(sys.version_info[:2])
    version = "import mailgrpc.cli.up, sys; print(sys.version_info[:2])"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        candidate = AsNobody(python, nobody.pw_uid, nobody.pw_gid)
        try:
            if candidate.run("-c", version).stdout.strip() == ours:
                return candidate
        except OSError:
            continue
    pytest.skip("user nobody can run no Python of this version")
