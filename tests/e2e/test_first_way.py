"""The main job, from a caller's Enqueue to the mail in the outbox."""

from __future__ import annotations

import asyncio

from mailgrpc.v1 import delivery_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.gateway import PATIENCE_S, Gateway, enqueue


async def test_a_message_is_sent_and_its_states_are_streamed(gateway: Gateway) -> None:
    stream = gateway.stub.WatchStatus(pb.WatchStatusRequest())
    first = await stream.read()
    assert first.caught_up and first.resume_token

    answer = await gateway.stub.Enqueue(enqueue("ada@example.test", subject="Receipt"))
    states = []
    async with asyncio.timeout(PATIENCE_S):
        while delivery_pb2.DELIVERY_STATE_SENT not in states:
            response = await stream.read()
            for event in response.events:
                assert event.message_id == answer.message_id
                states.append(event.state_changed.delivery.state)
    assert states == [
        delivery_pb2.DELIVERY_STATE_QUEUED,
        delivery_pb2.DELIVERY_STATE_SENDING,
        delivery_pb2.DELIVERY_STATE_SENT,
    ]
    [captured] = gateway.capture.outbox
    assert b"Subject: Receipt" in captured.raw
    stream.cancel()


async def test_the_same_request_id_makes_one_message(gateway: Gateway) -> None:
    request = enqueue(request_id="order-1")
    first = await gateway.stub.Enqueue(request)
    again = await gateway.stub.Enqueue(request)
    assert again.replayed and again.message_id == first.message_id
    assert (await gateway.ended(first.message_id)).state == delivery_pb2.DELIVERY_STATE_SENT
    assert len(gateway.capture.outbox) == 1
