"""A journal's directory under any order of appends, syncs, kills, power cuts and adoptions.

Three processes share it, each with a file of its own (`SlotFile`) and what it adopted of others. A
result that was synced and not told as recorded is found by whoever takes its file next; what was
never appended is found by nobody. A killed process leaves what it wrote; a lost machine leaves what
was synced (`LossyFile`), and so may bring back what was marked as recorded, which is harmless.
"""

from __future__ import annotations

import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mailgrpc.db.deliveries import Recorded
from mailgrpc.worker.journal_entry import pack
from mailgrpc.worker.journal_file import DiskFile, SlotFile
from tests.machines import steps
from tests.worker.lossy_file import LossyFile
from tests.worker.test_journal import a_result

SLOTS = 4
SUFFIX = ".journal"
WHO = st.integers(0, 2)


@dataclass(eq=False)
class Process:
    """Who holds a file of its own, first, and those that it adopted."""

    files: list[SlotFile] = field(default_factory=list)

    @property
    def own(self) -> SlotFile:
        return self.files[0]

    def places(self) -> int:
        return SLOTS - len(self.own.live)


class Directory(RuleBasedStateMachine):
    """What happens to the processes that keep their journals in one directory."""

    def __init__(self) -> None:
        super().__init__()
        self._temporary = tempfile.TemporaryDirectory()
        self.path = Path(self._temporary.name)
        self.processes = [Process() for _ in range(3)]
        self.made: list[Path] = []
        self.appended: dict[uuid.UUID, Recorded] = {}
        self.durable: set[uuid.UUID] = set()  # synced, and never told as recorded
        self.stalled: set[uuid.UUID] = set()  # written, and not synced

    def teardown(self) -> None:
        for process in self.processes:
            self._let_go(process)
        self._temporary.cleanup()

    # Each process.

    @rule(who=WHO)
    def begin(self, who: int) -> None:
        """It takes a file that nobody holds, or makes one."""
        process = self.processes[who]
        if not process.files:
            for path in self._paths():
                if self._take_over(process, path):
                    return
            process.files.append(SlotFile.create(self.path, SUFFIX, SLOTS, LossyFile))
            self.made.append(process.own.path)

    @precondition(lambda self: self.running)
    @rule(who=WHO, results=st.integers(1, SLOTS), stalls=st.booleans())
    def append(self, who: int, results: int, stalls: bool) -> None:
        """As many as there are places for; a sync that stalls says that it is done, and is not."""
        process = self.running[who % len(self.running)]
        new = [a_result() for _ in range(min(results, process.places()))]
        self.appended |= {r.attempt_id: r for r in new}
        file = _lossy(process.own)
        file.sync_nothing = stalls
        process.own.write([(r.attempt_id, pack(r)) for r in new])
        file.sync_nothing = False
        self.stalled |= {r.attempt_id for r in new}
        if not stalls:
            self._synced(process.own)

    @precondition(lambda self: self.running)
    @rule(who=WHO, data=st.data())
    def tell_recorded(self, who: int, data: st.DataObject) -> None:
        """Whichever of its files a result lies in."""
        process = self.running[who % len(self.running)]
        live = [i for file in process.files for i in file.live]
        if live:
            places = data.draw(st.sets(st.integers(0, len(live) - 1), min_size=1))
            told = [live[n] for n in places]
            for file in process.files:
                file.mark(told)
            self.durable -= set(told)
            self.stalled -= set(told)

    @precondition(lambda self: self.running)
    @rule(who=WHO)
    def sync(self, who: int) -> None:
        process = self.running[who % len(self.running)]
        for file in process.files:
            file.probe()
            self._synced(file)

    @precondition(lambda self: self.running)
    @rule(who=WHO)
    def adopt(self, who: int) -> None:
        process = self.running[who % len(self.running)]
        for path in self._paths():
            self._take_over(process, path)
        for file in [f for f in process.files[1:] if not f.live]:
            process.files.remove(file)
            file.close()
            assert not file.path.exists()

    @precondition(lambda self: self.running)
    @rule(who=WHO)
    def end_in_peace(self, who: int) -> None:
        """What is not recorded stays for the next one, and a file without any goes."""
        process = self.running[who % len(self.running)]
        for file in process.files:
            _lossy(file).sync()
            self._synced(file)
            file.close()
            assert file.path.exists() == bool(file.live)
        process.files.clear()

    # What ends them.

    @precondition(lambda self: self.running)
    @rule(who=WHO)
    def kill(self, who: int) -> None:
        """The kernel has what was written."""
        process = self.running[who % len(self.running)]
        for file in process.files:
            _lossy(file).sync()
            self._synced(file)
        self._let_go(process)

    @precondition(lambda self: self.running)
    @rule()
    def lose_the_machine(self) -> None:
        for process in self.processes:
            self._let_go(process)
        self.stalled.clear()

    # What must hold.

    @invariant()
    def nobody_else_can_take_a_file_that_is_held(self) -> None:
        held = [file.path for process in self.processes for file in process.files]
        assert len(held) == len(set(held))
        for path in held:
            with pytest.raises(BlockingIOError):
                DiskFile(path)

    @invariant()
    def a_place_is_taken_by_one_result(self) -> None:
        for process in self.processes:
            for file in process.files:
                slots = list(file.live.values())
                assert len(slots) == len(set(slots))
                assert sorted(slots + file._free) == list(range(1, SLOTS + 1))

    @invariant()
    def what_is_durable_lies_in_one_file_and_in_nobodys_memory_alone(self) -> None:
        on_disk: set[uuid.UUID] = set()
        for path in self._paths():
            try:
                file, found = SlotFile.take_over(path, DiskFile)
            except BlockingIOError:  # its holder knows
                continue
            on_disk |= {r.attempt_id for r in found}
            file._file.close()
        held = {i for p in self.processes for f in p.files for i in f.live}
        assert self.durable <= on_disk | held
        assert on_disk | held <= set(self.appended)
        assert not on_disk & held

    # How.

    @property
    def running(self) -> list[Process]:
        return [process for process in self.processes if process.files]

    def _paths(self) -> list[Path]:
        """The oldest first; their names are drawn at random."""
        return sorted(self.path.glob(f"*{SUFFIX}"), key=self.made.index)

    def _take_over(self, process: Process, path: Path) -> bool:
        try:
            file, found = SlotFile.take_over(path, LossyFile)
        except BlockingIOError:
            return False
        process.files.append(file)
        assert not file.damaged
        assert all(self.appended[r.attempt_id] == r for r in found)
        assert {r.attempt_id for r in found} == set(file.live)
        self.durable |= set(file.live)  # also what was told as recorded and came back
        return True

    def _synced(self, file: SlotFile) -> None:
        self.durable |= set(file.live)
        self.stalled -= set(file.live)

    @staticmethod
    def _let_go(process: Process) -> None:
        for file in process.files:
            file._file.close()
        process.files.clear()


def _lossy(file: SlotFile) -> LossyFile:
    assert isinstance(file._file, LossyFile)
    return file._file


def test_what_was_synced_and_not_recorded_is_found_whatever_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for sync in ("fsync", "fdatasync"):  # LossyFile says what a sync means here; the disk is slow
        monkeypatch.setattr(f"os.{sync}", lambda fd: None)
    run_state_machine_as_test(Directory, settings=steps(100, 40))
