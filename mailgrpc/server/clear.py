"""Clear: remove messages by filter, in chunks that others do not feel."""

from __future__ import annotations

import uuid

from google.protobuf import json_format

from mailgrpc.core.ids import MESSAGE, to_text
from mailgrpc.db.clear import CHUNK_MESSAGES, clear_messages, find_clearable, has_clearable
from mailgrpc.db.engine import Database
from mailgrpc.db.projects import Caller
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import InvalidRequest, Reason, Violation
from mailgrpc.server.feed import Feed
from mailgrpc.server.filters import checked_filter
from mailgrpc.v1 import mail_service_pb2 as pb

DEFAULT_MESSAGES = 10_000
MAX_MESSAGES = 100_000
SAMPLES = 10


class Clear:
    """Serves Clear."""

    def __init__(self, database: Database, doorbell: Doorbell, feed: Feed, *, lane: int) -> None:
        self._database = database
        self._doorbell = doorbell
        self._feed = feed
        self._lane = lane

    async def run(self, caller: Caller, request: pb.ClearRequest) -> pb.ClearResponse:
        """The whole call. Each chunk is a transaction: what was removed stays removed.

        A message that is being sent, or starts to be meanwhile, is left alone and counted.
        """
        if not request.HasField("filter") or not request.filter.HasField("created_before"):
            text = "Clear needs a moment before which messages were created"
            raise InvalidRequest(Violation("filter.created_before", Reason.REQUIRED, text))
        if not 0 <= request.max_messages <= MAX_MESSAGES:
            text = f"0 to {MAX_MESSAGES}"
            raise InvalidRequest(Violation("max_messages", Reason.OUT_OF_RANGE, text))
        wanted = checked_filter(request.filter)
        told = json_format.MessageToJson(request.filter, indent=None)
        most = request.max_messages or DEFAULT_MESSAGES
        response = pb.ClearResponse()
        after: uuid.UUID | None = None
        while response.cleared_count < most:
            limit = min(CHUNK_MESSAGES, most - response.cleared_count)
            chunks, sending = await find_clearable(
                self._database,
                caller.project_id,
                wanted,
                force=request.force,
                after=after,
                limit=limit,
            )
            response.sending_count += len(sending)
            clearable = [message_id for chunk in chunks for message_id in chunk]
            if request.validate_only:
                response.cleared_count += len(clearable)
            else:
                for chunk in chunks:
                    await self._clear(caller, chunk, request.force, told, response)
            room = SAMPLES - len(response.sample_message_ids)
            response.sample_message_ids.extend(to_text(MESSAGE, i) for i in clearable[:room])
            if len(clearable) + len(sending) < limit:
                return response
            after = max(clearable + sending)
        response.more = await has_clearable(
            self._database, caller.project_id, wanted, force=request.force, after=after
        )
        return response

    async def _clear(
        self,
        caller: Caller,
        message_ids: list[uuid.UUID],
        force: bool,
        told: str,
        response: pb.ClearResponse,
    ) -> None:
        # In doubt about the commit it raises, and the caller is told to come back: doing it again
        # finds nothing left and would count nothing.
        cleared = await clear_messages(
            self._database,
            self._lane,
            caller.actor,
            caller.project_id,
            message_ids,
            force=force,
            filter_json=told,
        )
        response.cleared_count += cleared.cleared
        response.sending_count += cleared.sending
        self._doorbell.hint_feed()
        self._feed.wake()
