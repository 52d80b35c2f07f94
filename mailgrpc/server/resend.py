"""Resend: force one more attempt, and remember the request with its answer.

The steps are decided on what is read, and happen only if nothing changed since: all of them and
the request id in one transaction, else it is read and decided again.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mailgrpc.core.address import checked_address
from mailgrpc.core.delivery import resend_refusal, resend_step
from mailgrpc.core.event import MessageStatus
from mailgrpc.core.message import MAX_RECIPIENTS
from mailgrpc.core.place import encode_token
from mailgrpc.core.text import check_text
from mailgrpc.db.content import pack_json
from mailgrpc.db.deliveries import Move, resend_deliveries
from mailgrpc.db.engine import AmbiguousCommit, Database, StaleVersion
from mailgrpc.db.messages import read_contents, read_known_requests, read_statuses
from mailgrpc.db.preferences import read_refusals
from mailgrpc.db.projects import Caller
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import (
    InvalidRequest,
    NotFound,
    Precondition,
    Reason,
    RequestIdMismatch,
    StoreUnavailable,
    Violation,
)
from mailgrpc.server import convert
from mailgrpc.server.feed import Feed
from mailgrpc.server.interceptors import code_number
from mailgrpc.v1 import mail_service_pb2 as pb

_RULE = 1
_TRIES = 5
_WHY = {
    Reason.MESSAGE_SENDING: "it is being sent now",
    Reason.NOT_RESENDABLE: "it is queued already, or the recipient has complained",
    Reason.DUPLICATE_RISK: "it may have been sent; accept_duplicate_risk sends it all the same",
    Reason.STILL_SUPPRESSED: "what suppressed it still stands",
}


@dataclass(frozen=True, slots=True)
class _Decision:
    """What is to be done: moves, and refusals by recipient."""

    moves: list[Move]
    refused: dict[str, Reason]


class Resend:
    """Serves Resend."""

    def __init__(self, database: Database, doorbell: Doorbell, feed: Feed, *, lane: int) -> None:
        self._database = database
        self._doorbell = doorbell
        self._feed = feed
        self._lane = lane

    async def run(self, caller: Caller, request: pb.ResendRequest) -> pb.ResendResponse:
        """The whole call."""
        if violations := check_text("request_id", request.request_id, 255):
            raise InvalidRequest(*violations)
        message_id = convert.message_id("message_id", request.message_id)
        recipients = _checked_recipients(request.recipients)
        if message_id is None:
            raise NotFound("no such message")
        said = json.dumps([str(message_id), list(recipients), request.accept_duplicate_risk])
        fingerprint = hashlib.sha256(said.encode()).digest()
        token = encode_token(caller.project_id, await self._feed.now())
        in_doubt = False  # whether an earlier turn of this call may have done it
        for _ in range(_TRIES):
            refused = await self._known(caller, request.request_id, fingerprint)
            if refused is not None:
                return await self._answer(
                    caller, message_id, recipients, refused, token=token, replayed=not in_doubt
                )
            status = await self._status(caller, message_id)
            decision = await self._decide(
                caller, status, recipients, accept_risk=request.accept_duplicate_risk
            )
            try:
                won = await resend_deliveries(
                    self._database,
                    self._lane,
                    caller.actor,
                    project_id=caller.project_id,
                    request_id=request.request_id,
                    message_id=message_id,
                    fingerprint=fingerprint,
                    rule=_RULE,
                    response=pack_json({r: int(why) for r, why in decision.refused.items()}),
                    moves=decision.moves,
                )
            except StaleVersion:
                continue
            except AmbiguousCommit:
                if not request.request_id:
                    raise  # what was read next would not tell whose change it is
                in_doubt = True
                continue
            if won:
                self._doorbell.ring()
                self._doorbell.hint_feed()
                self._feed.wake()
                return await self._answer(
                    caller, message_id, recipients, decision.refused, token=token, replayed=False
                )
        raise StoreUnavailable("the message keeps changing; try again")

    async def _known(
        self, caller: Caller, request_id: str, fingerprint: bytes
    ) -> dict[str, Reason] | None:
        """The refusals that were answered to this request before; None for a new one."""
        if not request_id:
            return None
        key = (caller.project_id, request_id)
        found = (await read_known_requests(self._database, [key])).get(key)
        if found is None:
            return None
        if found.is_enqueue or found.fingerprint != fingerprint:
            raise RequestIdMismatch(request_id)
        await self._database.confirm()
        refused: dict[str, Any] = found.response or {}  # type: ignore[assignment]
        return {recipient: Reason(number) for recipient, number in refused.items()}

    async def _status(self, caller: Caller, message_id: uuid.UUID) -> MessageStatus:
        statuses = await read_statuses(self._database, caller.project_id, [message_id])
        if message_id not in statuses:
            raise NotFound("no such message")
        return statuses[message_id]

    async def _decide(
        self,
        caller: Caller,
        status: MessageStatus,
        recipients: Mapping[str, int],
        *,
        accept_risk: bool,
    ) -> _Decision:
        contents = await read_contents(self._database, [status.message_id], with_files=False)
        content = contents.get(status.message_id)
        if content is None or content.message is None:
            raise Precondition(Reason.CONTENT_ERASED, "the content of this message is erased")
        of_message = {d.recipient for d in status.deliveries}
        for recipient, index in recipients.items():
            if recipient not in of_message:
                text = "the message does not go to this address"
                raise InvalidRequest(
                    Violation(f"recipients[{index}]", Reason.INVALID_ADDRESS, text)
                )
        refusals = await read_refusals(
            self._database, caller.project_id, [d.recipient for d in status.deliveries]
        )
        now = datetime.now(UTC)
        decision = _Decision([], {})
        for delivery in status.deliveries:
            if recipients and delivery.recipient not in recipients:
                continue
            reason = resend_refusal(delivery, accept_duplicate_risk=accept_risk)
            if reason is None and refusals[delivery.recipient].of(delivery.flags):
                reason = Reason.STILL_SUPPRESSED
            if reason is not None:
                decision.refused[delivery.recipient] = reason
                continue
            step, forced, expire_at = resend_step(delivery, now)
            decision.moves.append(Move(delivery, step, forced, expire_at))
        return decision

    async def _answer(
        self,
        caller: Caller,
        message_id: uuid.UUID,
        recipients: Collection[str],
        refused: Mapping[str, Reason],
        *,
        token: str,
        replayed: bool,
    ) -> pb.ResendResponse:
        """A result for each recipient asked about, with its delivery as it is now."""
        statuses = await read_statuses(self._database, caller.project_id, [message_id])
        deliveries = {d.recipient: d for d in statuses[message_id].deliveries} if statuses else {}
        response = pb.ResendResponse(replayed=replayed, resume_token=token)
        for recipient in recipients or deliveries:
            result = response.results.add()
            if recipient in deliveries:
                result.delivery.CopyFrom(convert.delivery(deliveries[recipient]))
            else:
                result.delivery.recipient = recipient
            if (reason := refused.get(recipient)) is not None:
                error = Precondition(reason, _WHY[reason])
                result.error.CopyFrom(convert.item_error(error, code_number(error)))
        return response


def _checked_recipients(asked: Sequence[str]) -> dict[str, int]:
    """The addresses asked for, normalised, each with the first place where it stands."""
    if len(asked) > MAX_RECIPIENTS:
        text = f"at most {MAX_RECIPIENTS} recipients"
        raise InvalidRequest(Violation("recipients", Reason.TOO_MANY, text))
    places: dict[str, int] = {}
    for index, text in enumerate(asked):
        places.setdefault(checked_address(f"recipients[{index}]", text), index)
    return places
