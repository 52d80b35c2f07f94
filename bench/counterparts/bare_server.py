"""A bare grpc.aio server on uvloop: parses an EnqueueRequest, returns an EnqueueResponse, no more.

Prints its port, then serves until it is ended.
"""

from __future__ import annotations

import asyncio

import grpc
import uvloop

from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import mail_service_pb2_grpc


class Bare(mail_service_pb2_grpc.MailServiceServicer):
    async def Enqueue(self, request, context):  # noqa: N802, ARG002
        return pb.EnqueueResponse(message_id="msg_" + "0" * 26, state=1, resume_token="t" * 38)


async def main() -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    mail_service_pb2_grpc.add_MailServiceServicer_to_server(Bare(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()


uvloop.run(main())
