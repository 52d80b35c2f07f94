"""The journal alone: its file, its lock, its places, and what it says when the disk does not."""

from __future__ import annotations

import contextlib
import errno
import logging
import struct
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailgrpc.core.delivery import Cause, Outcome, Result, State, Step, WaitReason
from mailgrpc.db.deliveries import Recorded
from mailgrpc.worker.journal import Journal
from mailgrpc.worker.journal_entry import MOST_BYTES, pack, unpack
from mailgrpc.worker.journal_file import SLOT_BYTES, DiskFile, SlotFile
from tests.gateway import until
from tests.worker.lossy_file import LossyFile

NOW = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def a_result(text: str = "250 ok", **changes: object) -> Recorded:
    recorded = Recorded(
        delivery_id=uuid.uuid4(),
        attempt_id=uuid.uuid4(),
        number=1,
        call_id=uuid.uuid4(),
        channel="default",
        started_at=NOW,
        provider="smtp",
        ended_at=NOW + timedelta(microseconds=1),
        result=Result(Outcome.ACCEPTED, status_code=250, text=text),
        step=Step(State.SENT, False),
    )
    return replace(recorded, **changes)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def opened(directory: Path, **options: object) -> AsyncIterator[tuple[Journal, list]]:
    journal = Journal(directory, slots=8, **options)  # type: ignore[arg-type]
    found = await journal.open()
    try:
        yield journal, found
    finally:
        await journal.close()


async def killed(journal: Journal) -> None:
    """As a kill would: nothing is written any more, and the locks go."""
    assert journal._writer is None or not journal._pending
    for file in (journal._file, *journal._adopted):
        assert file is not None
        file._file.close()
    journal._thread.shutdown()


async def written(directory: Path, *results: Recorded) -> None:
    """What a process that was killed with these results leaves."""
    journal = Journal(directory, slots=8)
    await journal.open()
    journal.append(results)
    await journal.synced()
    await until(lambda: journal._writer is not None and journal._writer.done())
    await killed(journal)


def journals(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.journal"))


async def test_what_a_killed_process_wrote_is_found_by_the_next_one(tmp_path: Path) -> None:
    one, other = a_result(), a_result("later")
    await written(tmp_path, one, other)
    async with opened(tmp_path) as (journal, found):
        assert sorted(found, key=str) == sorted([one, other], key=str)
        assert len(journals(tmp_path)) == 1  # the same file goes on
        assert journal.room == 6


async def test_what_is_recorded_is_not_found_again(tmp_path: Path) -> None:
    one, other = a_result(), a_result()
    journal = Journal(tmp_path, slots=8)
    await journal.open()
    journal.append([one, other])
    await journal.synced()
    journal.recorded([one])
    await until(lambda: not journal._marks)
    await until(lambda: journal._writer is not None and journal._writer.done())
    await killed(journal)
    async with opened(tmp_path) as (_, found):
        assert found == [other]


async def test_what_is_recorded_before_it_was_written_takes_no_place(tmp_path: Path) -> None:
    async with opened(tmp_path) as (journal, _):
        for _ in range(100):
            one = a_result()
            journal.append([one])
            journal.recorded([one])
        await until(lambda: not journal._marks and not journal._pending)
        assert journal.room == 8
        assert journal._file is not None
        assert not journal._file.live


async def test_a_process_that_ends_with_all_recorded_leaves_no_file(tmp_path: Path) -> None:
    one = a_result()
    async with opened(tmp_path) as (journal, _):
        journal.append([one])
        await journal.synced()
        journal.recorded([one])
    assert journals(tmp_path) == []
    async with opened(tmp_path) as (journal, _):
        journal.append([one])
    assert len(journals(tmp_path)) == 1


async def test_a_file_that_is_held_is_left_alone_and_one_whose_holder_died_is_adopted(
    tmp_path: Path,
) -> None:
    one = a_result()
    async with opened(tmp_path) as (neighbour, _):
        neighbour.append([one])
        await neighbour.synced()
        async with opened(tmp_path) as (journal, found):
            assert found == []
            assert await journal.adopt() == []
            await written(tmp_path / "elsewhere", other := a_result())
            [orphan] = journals(tmp_path / "elsewhere")
            orphan.rename(tmp_path / orphan.name)
            assert await journal.adopt() == [other]
            assert await journal.adopt() == []  # once
            journal.recorded([other])
            await until(lambda: not journal._marks)
            await journal.adopt()
            assert not (tmp_path / orphan.name).exists()


async def test_places_are_given_once_and_come_back_when_results_are_recorded(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as (journal, _):
        journal.reserve(6)
        assert journal.room == 2
        results = [a_result() for _ in range(5)]
        journal.append(results)
        journal.unreserve(6)
        assert journal.room == 3
        journal.recorded(results)
        assert journal.room == 8


@pytest.mark.parametrize("spoilt", ["entry", "checksum", "length"])
async def test_a_spoilt_entry_costs_itself_alone_and_the_file_is_set_aside(
    tmp_path: Path, spoilt: str, caplog: pytest.LogCaptureFixture
) -> None:
    results = [a_result() for _ in range(3)]
    await written(tmp_path, *results)
    [path] = journals(tmp_path)
    content = bytearray(path.read_bytes())
    offset = 2 * SLOT_BYTES + {"length": 0, "checksum": 4, "entry": 30}[spoilt]
    content[offset] ^= 0xFF
    path.write_bytes(content)
    async with opened(tmp_path) as (_, found):
        assert len(found) == 2
        assert all(r in results for r in found)
        assert path.with_suffix(".damaged").read_bytes() == bytes(content)
    assert any(r.levelno == logging.ERROR and "set aside" in r.message for r in caplog.records)
    async with opened(tmp_path) as (_, found):
        assert len(found) == 2  # they are in a whole file now


async def test_a_file_that_is_just_being_made_is_left_to_its_maker(tmp_path: Path) -> None:
    (tmp_path / "x.new").touch()
    async with opened(tmp_path) as (journal, found):
        assert found == []
        assert await journal.adopt() == []
    assert list(tmp_path.iterdir()) == [tmp_path / "x.new"]


async def test_a_journal_that_cannot_be_read_hides_none_of_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Guarded(DiskFile):
        def __init__(self, path: Path, *, create: bool = False) -> None:
            if path.name == "m.journal":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            super().__init__(path, create=create)

    results = [a_result() for _ in range(2)]
    async with opened(tmp_path, open_file=Guarded) as (journal, _):
        for name, one in zip(("a", "z"), results, strict=True):
            await written(tmp_path / name, one)
            [path] = journals(tmp_path / name)
            path.rename(tmp_path / f"{name}.journal")
        (tmp_path / "m.journal").write_bytes(b"not ours to read")
        found = await journal.adopt()
        assert sorted(found, key=str) == sorted(results, key=str)
        await journal.adopt()
        journal.recorded(found)
        await until(lambda: not journal._marks)
    assert caplog.text.count("cannot be read") == 1
    assert (tmp_path / "m.journal").exists()


@pytest.mark.parametrize("content", [b"", b"short", b"MGJOURN9" + bytes(4096), bytes(SLOT_BYTES)])
async def test_what_is_not_a_journal_of_ours_is_set_aside_whole(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.journal"
    path.write_bytes(content)
    async with opened(tmp_path) as (journal, found):
        assert found == []
        assert journal.room == 8
    assert path.with_suffix(".damaged").read_bytes() == content
    assert "set aside" in caplog.text


async def test_a_file_that_is_cut_off_is_set_aside(tmp_path: Path) -> None:
    await written(tmp_path, a_result())
    [path] = journals(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    async with opened(tmp_path) as (_, found):
        assert found == []
    assert path.with_suffix(".damaged").exists()


async def test_what_was_not_synced_when_the_machine_went_is_gone_and_nothing_else(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path, slots=8, open_file=LossyFile)
    await journal.open()
    synced, lost = a_result(), a_result()
    journal.append([synced])
    await journal.synced()
    assert journal._file is not None
    file = journal._file._file
    assert isinstance(file, LossyFile)
    file.sync_nothing = True
    journal.append([lost])
    await journal.synced()
    await killed(journal)
    async with opened(tmp_path) as (_, found):
        assert found == [synced]


class FullDisk(DiskFile):
    """A disk that takes nothing while it is full."""

    full = True

    def write(self, data: bytes, offset: int) -> None:
        if FullDisk.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(data, offset)


async def test_a_full_disk_leaves_no_places_says_so_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mailgrpc.worker.journal._RETRY_S", 0.01)
    monkeypatch.setattr(FullDisk, "full", True)
    async with opened(tmp_path, open_file=FullDisk) as (journal, _):
        assert journal.room == 0
        assert "No space left" in journal.trouble
        assert journals(tmp_path) == []  # nothing half made is left
        monkeypatch.setattr(FullDisk, "full", False)
        await until(lambda: journal.room == 8)
        assert not journal.trouble
        # A file that exists and can no longer be written.
        monkeypatch.setattr(FullDisk, "full", True)
        one = a_result()
        journal.append([one])
        await until(lambda: bool(journal.trouble))
        assert journal.room == 0
        journal.recorded([one])  # recorded from memory meanwhile
        monkeypatch.setattr(FullDisk, "full", False)
        await until(lambda: journal.room == 8)
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 2
    assert journals(tmp_path) == []


async def test_a_directory_that_cannot_be_made_is_trouble(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    async with opened(tmp_path / "file") as (journal, _):
        assert journal.room == 0
        assert "cannot be written" in journal.trouble


_TIMES = st.datetimes(
    NOW.replace(year=1990, tzinfo=None), NOW.replace(year=2200, tzinfo=None), timezones=st.just(UTC)
)
_TEXT = st.text(max_size=1024)
RECORDED = st.builds(
    Recorded,
    st.uuids(),
    st.uuids(),
    st.integers(1, 2**31 - 1),
    st.uuids(),
    st.text(max_size=63),
    _TIMES,
    st.text(max_size=16),
    _TIMES,
    st.builds(
        Result,
        st.sampled_from(Outcome),
        st.sampled_from(Cause),
        st.integers(0, 999),
        st.text(max_size=11),
        _TEXT,
        st.text(max_size=128),
        st.none() | st.timedeltas(timedelta(0), timedelta(days=60)),
    ),
    st.builds(
        Step,
        st.sampled_from(State),
        st.booleans(),
        st.none() | _TIMES,
        st.sampled_from(WaitReason),
        st.booleans(),
    ),
)


@given(RECORDED)
def test_an_entry_says_what_was_put_in_and_fits_its_slot(recorded: Recorded) -> None:
    entry = pack(recorded)
    assert len(entry) <= MOST_BYTES
    back = unpack(entry)
    result, said = recorded.result, back.result
    if len(entry) < MOST_BYTES // 2:  # surely not cut
        assert back == recorded
    assert replace(back, result=result) == recorded
    assert (said.outcome, said.cause) == (result.outcome, result.cause)
    assert result.text.startswith(said.text)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_entry_are_refused(entry: bytes) -> None:
    with contextlib.suppress(ValueError):
        pack(unpack(entry))


def test_a_slot_holds_its_head_and_the_largest_entry() -> None:
    assert struct.calcsize("<II") + MOST_BYTES == SLOT_BYTES


async def test_a_damaged_journal_on_a_full_disk_does_not_hide_the_one_before_it(
    tmp_path: Path,
) -> None:
    elsewhere = tmp_path / "elsewhere"
    good, bad = a_result("good"), a_result("bad")
    await written(elsewhere, good)
    journals(elsewhere)[0].rename(tmp_path / "1.journal")
    await written(elsewhere, bad)
    damaged = journals(elsewhere)[0].rename(tmp_path / "2.journal")
    with damaged.open("r+b") as file:  # the machine went down in the midst of a write
        file.seek(SLOT_BYTES + 100)
        file.write(b"\xff" * 64)
    is_full = False

    def on_this_disk(path: Path, *, create: bool = False) -> DiskFile:
        if create and is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return DiskFile(path, create=create)

    async with opened(tmp_path / "x", open_file=on_this_disk) as (journal, _):
        journal._directory = tmp_path  # its own file was made before the disk filled up
        is_full = True
        found: list[Recorded] = []
        for _ in range(3):
            with contextlib.suppress(OSError):
                found += await journal.adopt()
        is_full = False  # and even when there is space again
        for _ in range(3):
            with contextlib.suppress(OSError):
                found += await journal.adopt()
        assert good.attempt_id in {r.attempt_id for r in found}


async def test_the_file_of_another_installation_is_left_alone(tmp_path: Path) -> None:
    one = a_result()
    ours, theirs = uuid.uuid4(), uuid.uuid4()
    journal = Journal(tmp_path, slots=8)
    await journal.open(theirs)
    journal.append([one])
    await journal.synced()
    await until(lambda: journal._writer is not None and journal._writer.done())
    await killed(journal)
    stranger = Journal(tmp_path, slots=8)
    assert await stranger.open(ours) == []
    assert await stranger.adopt() == []
    await stranger.close()
    again = Journal(tmp_path, slots=8)
    assert await again.open(theirs) == [one]
    await again.close()


async def test_a_damaged_file_without_a_readable_result_survives_a_full_disk(
    tmp_path: Path,
) -> None:
    file = SlotFile.create(tmp_path, ".journal", 4, DiskFile)
    file._file.write(b"\x07\0\0\0garbage", SLOT_BYTES)
    file.let_go()

    def full(path: Path, *, create: bool = False) -> DiskFile:
        if create:
            raise OSError(errno.ENOSPC, "No space left on device")
        return DiskFile(path)

    journal = Journal(tmp_path, slots=4, open_file=full)
    await journal.open()
    await journal.close()
    assert len(journals(tmp_path)) == 1
