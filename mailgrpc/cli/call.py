"""`mailgrpc call`: any method with JSON, for who has no grpcurl."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import click
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from mailgrpc.cli.output import Output
from mailgrpc.cli.session import Session, pass_session
from mailgrpc.client.transport import BlockingTransport, Silence, Stream, run_blocking
from mailgrpc.v1 import mail_service_pb2

SERVICE = mail_service_pb2.DESCRIPTOR.services_by_name["MailService"]


@click.command()
@click.argument("method", required=False)
@click.argument("body", metavar="[JSON]", default="{}")
@click.option("--describe", is_flag=True, help="Print the fields of the request instead.")
@pass_session
def call(session: Session, method: str | None, body: str, describe: bool) -> None:
    r"""Call any method with JSON.

    JSON is the request as ProtoJSON, `-` reads it from stdin. Answers are ProtoJSON, one object a
    line, also those of a stream, until Ctrl-C. It is one plain call: nothing is filled in and
    nothing tried again. Without METHOD: list the methods.

    \b
      mailgrpc call GetStatus '{"messageId": "msg_…"}'
      mailgrpc call WatchStatus '{"snapshot": "SNAPSHOT_UNENDED"}'
    """
    output = Output()
    if method is None:
        output.table(("method", "request", "answer"), map(_signature, SERVICE.methods))
        return
    found = SERVICE.methods_by_name.get(method.rpartition("/")[2].rpartition(".")[2])
    if found is None:
        raise click.UsageError(f"no method {method!r}: `mailgrpc call` lists them")
    if describe:
        output.table(("field", "type"), _fields(found.input_type, "", set()))
        return
    _call(session, found, _parse(found, sys.stdin.read() if body == "-" else body), output)


def _call(session: Session, method: MethodDescriptor, request: Message, output: Output) -> None:
    transport = BlockingTransport(session.endpoint())
    try:
        if not method.server_streaming:
            timeout_s = session.policy().timeout_s
            output.json(run_blocking(transport.call(method.name, request, timeout_s)))
            return
        for response in _read(transport.stream(method.name, request)):
            output.json(response)
    finally:
        run_blocking(transport.close())


def _read(stream: Stream) -> Iterator[Message]:
    """What comes, for as long as somebody wants to see it."""
    day_s = 86400.0
    while True:
        try:
            response = run_blocking(stream.read(day_s))
        except Silence:
            return
        if response is None:
            return
        yield response


def _parse(method: MethodDescriptor, text: str) -> Message:
    try:
        return ParseDict(json.loads(text), GetMessageClass(method.input_type)())
    except (ParseError, ValueError) as error:
        raise click.UsageError(f"not a {method.input_type.name}: {error}") from error


def _signature(method: MethodDescriptor) -> tuple[str, str, str]:
    stream = "stream of " if method.server_streaming else ""
    return method.name, method.input_type.name, stream + method.output_type.name


def _fields(message: Descriptor, prefix: str, above: set[str]) -> Iterator[tuple[str, str]]:
    """(path, type) of each field, those of our own messages within it too."""
    for field in message.fields:
        path = prefix + field.json_name
        yield path, _type(field)
        inner = field.message_type
        if inner is None or inner.full_name in above or _is_foreign(inner):
            continue
        inside = f"{path}[]." if field.is_repeated else f"{path}."
        yield from _fields(inner, inside, above | {inner.full_name})


def _is_foreign(message: Descriptor) -> bool:
    """A timestamp or the like, or a map: nothing to look into."""
    return message.file.package != SERVICE.file.package or message.GetOptions().map_entry


def _type(field: FieldDescriptor) -> str:
    if field.message_type is not None:
        name = field.message_type.name
        if field.message_type.GetOptions().map_entry:
            name = "map of strings"
    elif field.enum_type is not None:
        name = " | ".join(value.name for value in field.enum_type.values)
    else:
        name = _SCALARS.get(field.type, "number")
    return f"list of {name}" if field.is_repeated and "map" not in name else name


_SCALARS = {
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "base64",
    FieldDescriptor.TYPE_BOOL: "bool",
}
