"""Which user a server runs as, and which directories that user can reach.

PostgreSQL refuses to run as root, rightly. Started by root (a container, a test machine), it runs
as a user that exists already; users are never created. That user may be unable to enter the
directories that root works in (a checkout below `/root`, a home of mode 0700), so whatever it
must reach is first looked at through its eyes.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mailgrpc.errors import EmbeddedError

_UNPRIVILEGED = ("postgres", "_postgres", "nobody")

_LONGEST_BASE = 60
"""A socket's path has at most 107 bytes (104 on macOS); this leaves room for our names in it."""


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this machine."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def __str__(self) -> str:
        """As `lifeline` reads it."""
        return f"{self.uid}:{self.gid}:{','.join(map(str, self.groups))}"

    def own(self, path: Path) -> None:
        """Give `path` (not what lies in it) to this user."""
        os.chown(path, self.uid, self.gid)


def account_for_data(data: Path | None) -> Account | None:
    """Whom a server that must not be root runs as, given where its data lies or will lie.

    None: as this process itself, which is not root. Existing data decides: it stays with its
    owner. Raises EmbeddedError when there is nobody to run as.
    """
    if os.geteuid() != 0:
        return None
    if data is not None and data.exists() and (owner := data.stat().st_uid) != 0:
        return _account_of(owner)
    account = _unprivileged()
    if account is None:
        raise EmbeddedError(
            "PostgreSQL does not run as root, and there is no user `postgres` or `nobody` to run"
            " it as: start mailgrpc as an ordinary user, or give MAILGRPC_DATABASE_URL"
        )
    return account


def _unprivileged() -> Account | None:
    for name in _UNPRIVILEGED:
        try:
            return _account_of(pwd.getpwnam(name).pw_uid)
        except KeyError:
            continue
    return None


def _account_of(uid: int) -> Account:
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise EmbeddedError(
            f"the data belongs to user id {uid}, which is not in /etc/passwd: chown it to a user"
            " that is, or start mailgrpc as that user"
        ) from None
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Account(entry.pw_name, uid, entry.pw_gid, tuple(sorted(set(groups))))


def can_enter(directory: Path, account: Account) -> bool:
    """Whether the mode bits let `account` pass every directory down to and with `directory`.

    Access lists are not looked at: where they allow more, something is copied for nothing.
    """
    path = directory.resolve()
    return all(_may_pass(step, account) for step in (path, *path.parents))


def _may_pass(directory: Path, account: Account) -> bool:
    try:
        status = directory.stat()
    except OSError:
        return False
    if status.st_uid == account.uid:
        needed = stat.S_IXUSR
    elif status.st_gid in (account.gid, *account.groups):
        needed = stat.S_IXGRP
    else:
        needed = stat.S_IXOTH
    return bool(status.st_mode & needed)


def make_data_directory(path: Path) -> None:
    """Make `path` if it is not there, closed to others, as the mails and addresses in it ask for.

    Made by root, it lets the user pass that PostgreSQL will run as. Raises EmbeddedError.
    """
    if path.is_dir():
        return
    try:
        path.mkdir(mode=0o700, parents=True)
        account = _unprivileged() if os.geteuid() == 0 else None
        if account is not None:
            os.chown(path, -1, account.gid)
            path.chmod(0o710)
    except OSError as error:
        raise EmbeddedError(
            f"cannot make the data directory {path}: {error.strerror}; choose another --data-dir"
        ) from error


def make_private_directory(account: Account | None) -> Path:
    """A new directory of mode 0700 with a short path, owned by `account`, for sockets.

    The system's directory for temporary files is taken unless its path is too long for a socket
    or `account` cannot enter it. The caller removes the directory.
    """
    for base in map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp")):  # noqa: S108  mkdtemp
        if len(os.fsencode(base)) > _LONGEST_BASE or not base.is_dir():
            continue
        if not os.access(base, os.W_OK | os.X_OK) or (account and not can_enter(base, account)):
            continue
        path = Path(tempfile.mkdtemp(prefix="mailgrpc-", dir=base))
        if account is not None:
            account.own(path)
        return path
    raise EmbeddedError(
        "no directory for sockets: /tmp cannot be written to, and TMPDIR is too long or not"
        " reachable; set TMPDIR to a short path"
    )
