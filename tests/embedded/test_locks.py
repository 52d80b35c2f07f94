"""One family at a time in a data directory, decided by locks and not by pid files."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from mailgrpc.embedded.locks import FamilyLock
from mailgrpc.embedded.process import Launch, Process, inherited_environ
from mailgrpc.errors import EmbeddedError


def test_a_second_family_is_refused_with_the_first_ones_pid(place: Path) -> None:
    lock = FamilyLock(place)
    lock.acquire()
    with pytest.raises(EmbeddedError, match=rf"\(process {os.getpid()}\) is running on"):
        FamilyLock(place).acquire()
    lock.release()
    again = FamilyLock(place)
    again.acquire()
    again.release()


def test_the_children_of_a_dead_parent_are_waited_for(place: Path) -> None:
    lock = FamilyLock(place)
    lock.acquire()
    launch = Launch(
        name="x",
        argv=["/bin/sh", "-c", "exec sleep 1000"],
        environ=inherited_environ(),
        locks=[lock.fd],
    )
    child = Process(launch)
    lock.release()  # as if the parent were gone; the child lives

    told = threading.Event()
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        told.set()

    next_family = FamilyLock(place)
    waiting = threading.Thread(target=next_family.acquire, args=(say,))
    waiting.start()
    assert told.wait(5)
    assert said == ["waiting for the processes of an earlier run to end"]
    assert next_family.fd >= 0
    assert waiting.is_alive()
    child.stop(signal.SIGTERM, 5)
    waiting.join(5)
    assert not waiting.is_alive()
    next_family.release()


def test_waiting_has_a_bound_and_says_what_to_do(place: Path) -> None:
    lock = FamilyLock(place)
    lock.acquire()
    launch = Launch(
        name="x",
        argv=["/bin/sh", "-c", "exec sleep 1000"],
        environ=inherited_environ(),
        locks=[lock.fd],
    )
    child = Process(launch)
    lock.release()
    with pytest.raises(EmbeddedError, match="processes of an earlier run still use"):
        FamilyLock(place).acquire(patience_s=0.1)
    child.stop(signal.SIGTERM, 5)


def test_waiting_can_be_abandoned(place: Path) -> None:
    lock = FamilyLock(place)
    lock.acquire()
    child = Process(
        Launch(
            name="x",
            argv=["/bin/sh", "-c", "exec sleep 1000"],
            environ=inherited_environ(),
            locks=[lock.fd],
        )
    )
    lock.release()
    waiting = FamilyLock(place)
    waiting.abandon()
    with pytest.raises(EmbeddedError, match="stopped while waiting"):
        waiting.acquire()
    child.stop(signal.SIGTERM, 5)
