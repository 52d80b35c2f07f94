"""Named places at which a process can be made to die or freeze: how the fault suite takes aim.

A crash at random hits the wide steps and hardly ever the narrow ones, and the narrow ones are where
mail is lost or sent twice. So each step of a message's way that a promise rests on has a name here,
and `MAILGRPC_FAILPOINTS` says at which of them, and at the how-manieth time, the process is hit:

    drain.started=kill@3      SIGKILL to itself when it comes there for the third time
    smtp.dot=freeze           SIGSTOP to itself, the first time; whoever aimed sends SIGCONT

Several are separated by commas. Nothing is armed unless that is set, and a place then costs a look
at an empty dict. A process that has any armed says so when it starts.
"""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Mapping

from mailgrpc.errors import SettingsError

log = logging.getLogger(__name__)

FAILPOINTS: Mapping[str, str] = {
    "intake.insert": "a flush is about to be stored",
    "intake.inserted": "a flush is committed, nobody has been answered",
    "intake.rung": "a flush is committed and rung for, nobody has been answered",
    "credits.stored": "mail is committed as started by a worker, which has not been told of it",
    "credits.told": "a worker is told what it is to send, and has not read it",
    "drain.claimed": "a batch is leased, nothing of it is started",
    "drain.start": "the start is about to be committed",
    "drain.started": "the start is committed, nothing is sent",
    "smtp.content": "the server waits for the content, nothing of it is written",
    "smtp.dot": "the last look is over, the write with the final dot comes next",
    "smtp.dotted": "the final dot is written, no answer has been read",
    "smtp.answered": "the answer to the final dot is read",
    "http.request": "the last look is over, the first byte of the request comes next",
    "http.requested": "the request is written, no answer has been read",
    "http.answered": "the answer's status is read",
    "drain.sent": "the provider has answered, the result is nowhere but in memory",
    "journal.write": "results are about to be written to the journal",
    "journal.written": "results are written to the journal, not synced",
    "journal.synced": "results are in the journal for good",
    "recorder.record": "results are about to be recorded",
    "recorder.recorded": "results are recorded, the journal does not say so",
    "sessions.beat": "the session is about to beat",
    "reaper.ended": "a silent session is ended, nothing of it is settled",
    "reaper.released": "what a dead session had claimed is given back, what it had started is not settled",
    "reaper.settled": "what a dead session had started is settled, the session is not over",
    "feed.read": "a page of events is read, no subscriber has it",
    "watch.responded": "a response was handed to the transport",
}
"""Every place, in the order in which a message meets it."""

_AIM = re.compile(r"(?P<place>[a-z.]+)=(?P<hit>kill|freeze)(?:@(?P<nth>[1-9][0-9]{0,8}))?")
_HITS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}
_armed: dict[str, dict[int, signal.Signals]] = {}  # place -> the n-th time from now -> with what


def arm(spec: str) -> None:
    """Take aim, instead of whatever was aimed at before. Raises SettingsError."""
    _armed.clear()
    for part in filter(None, (part.strip() for part in spec.split(","))):
        match = _AIM.fullmatch(part)
        if match is None or match["place"] not in FAILPOINTS:
            raise SettingsError(
                f"MAILGRPC_FAILPOINTS: {part!r}: expected PLACE=kill@N or PLACE=freeze@N,"
                f" PLACE one of {', '.join(FAILPOINTS)}"
            )
        _armed.setdefault(match["place"], {})[int(match["nth"] or 1)] = _HITS[match["hit"]]
    if _armed:
        log.warning("this process will be hit at %s", spec)


def reach(place: str) -> None:
    """The process has come to `place`: it dies or freezes here if that was aimed at."""
    if place in _armed:
        _hit(place)


def _hit(place: str) -> None:
    waiting = _armed.pop(place)
    number = waiting.pop(1, None)
    if waiting:
        _armed[place] = {nth - 1: signal_ for nth, signal_ in waiting.items()}
    if number is not None:
        log.warning("hit at %s", place)
        os.kill(os.getpid(), number)
