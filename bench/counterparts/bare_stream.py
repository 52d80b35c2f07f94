"""A bare grpc.aio server on uvloop whose WatchStatus knows nothing. Prints its port, then serves.

Asked for everything, it sends events for as long as the reader takes them, one a response, each
with all that an event of a delivery that was sent carries; they are made beforehand. Asked for one
message, it answers that the reader is caught up and is silent for ever, as an idle stream is.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import uuid

import grpc
import uvloop

from mailgrpc.v1 import delivery_pb2, event_pb2, mail_service_pb2_grpc
from mailgrpc.v1 import mail_service_pb2 as pb

_TOKEN = "t" * 60
_MADE = 1000


def _id(prefix: str) -> str:
    return prefix + os.urandom(13).hex()


def _event() -> event_pb2.Event:
    """SENDING → SENT, as a server tells it; ids are of the length that ours have."""
    event = event_pb2.Event(
        event_id=_id("evt_"),
        kind=event_pb2.EVENT_KIND_STATE_CHANGED,
        message_id=_id("msg_"),
        delivery_id=_id("dlv_"),
        recipient=f"{os.urandom(6).hex()}@example.test",
        custom_args={"order": str(uuid.uuid4())},
    )
    event.occurred_at.GetCurrentTime()
    changed = event.state_changed
    changed.old_state = delivery_pb2.DELIVERY_STATE_SENDING
    changed.attempt.delivery_id = event.delivery_id
    changed.attempt.number = 1
    changed.attempt.call_id = _id("call_")
    changed.attempt.channel = "default"
    changed.attempt.provider = "capture"
    changed.attempt.started_at.GetCurrentTime()
    changed.attempt.ended_at.GetCurrentTime()
    changed.attempt.result.outcome = delivery_pb2.ATTEMPT_OUTCOME_ACCEPTED
    changed.attempt.result.status_code = 250
    changed.attempt.result.provider_message_id = f"capture-{uuid.uuid4()}"
    changed.delivery.delivery_id = event.delivery_id
    changed.delivery.message_id = event.message_id
    changed.delivery.recipient = event.recipient
    changed.delivery.role = delivery_pb2.RECIPIENT_ROLE_TO
    changed.delivery.state = delivery_pb2.DELIVERY_STATE_SENT
    changed.delivery.state_since.CopyFrom(event.occurred_at)
    changed.delivery.version = 3
    changed.delivery.attempt_count = 1
    changed.delivery.last_result.CopyFrom(changed.attempt.result)
    return event


class Bare(mail_service_pb2_grpc.MailServiceServicer):
    def __init__(self) -> None:
        self._made = [
            pb.WatchStatusResponse(events=[_event()], resume_token=_TOKEN) for _ in range(_MADE)
        ]

    async def WatchStatus(self, request, context):  # noqa: N802, ARG002
        yield pb.WatchStatusResponse(caught_up=True, resume_token=_TOKEN)
        if request.filter.message_ids:
            await asyncio.Event().wait()
        for response in itertools.cycle(self._made):
            yield response


async def main() -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    mail_service_pb2_grpc.add_MailServiceServicer_to_server(Bare(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()


uvloop.run(main())
