"""Our checks of Enqueue against protovalidate: whatever the contract refuses, so do we.

The checks run by hand because they lie on the path of every message. The contract states most of
its limits as rules for protovalidate too, which here plays the oracle: never may we be laxer, and
the field is named by the same path. Stricter we are in many things that its rules cannot say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import protovalidate
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mailgrpc.core.shape import checked_submission
from mailgrpc.errors import InvalidRequest
from mailgrpc.server import convert
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import message_pb2

Draw = Callable[[st.SearchStrategy[Any]], Any]
Change = Callable[[pb.EnqueueRequest, Draw], None]


def a_request() -> pb.EnqueueRequest:
    """A request that everyone accepts, with one of everything."""
    return pb.EnqueueRequest(
        request_id="id",
        message=message_pb2.MailMessage(
            sender=message_pb2.Mailbox(address="ops@example.org"),
            to=[message_pb2.Recipient(address="ann@example.com")],
            cc=[message_pb2.Recipient(address="bob@example.com")],
            bcc=[message_pb2.Recipient(address="eve@example.com")],
            reply_to=[message_pb2.Mailbox(address="desk@example.org")],
            subject="s",
            text="t",
            html="h",
            headers=[message_pb2.Header(name="X-A", value="v")],
            attachments=[message_pb2.Attachment(filename="a.pdf")],
            tags=["t"],
            categories=["c"],
            flags=2,
            custom_args={"k": "v"},
            correlation_id="c",
        ),
        options=message_pb2.DeliveryOptions(
            retry=message_pb2.RetryPolicy(max_attempts=1), channel="c"
        ),
    )


def text(where: Callable[[pb.EnqueueRequest], Any], field: str, limit: int) -> Change:
    """Set a text to a length about its limit, in characters of one to four octets."""
    lengths = st.sampled_from([0, 1, limit, limit + 1])

    def change(request: pb.EnqueueRequest, draw: Draw) -> None:
        setattr(where(request), field, draw(st.sampled_from("aü🦊")) * draw(lengths))

    return change


def address(where: Callable[[pb.EnqueueRequest], Any]) -> Change:
    locals_ = st.sampled_from([0, 1, 60, 64, 65, 300, 310, 320])

    def change(request: pb.EnqueueRequest, draw: Draw) -> None:
        domain = draw(st.sampled_from(["", "@", "@a", "@a.de", "@example.com"]))
        where(request).address = draw(st.sampled_from("aü")) * draw(locals_) + domain

    return change


def count(field: str, limit: int) -> Change:
    """Give a list a length about its limit, of copies of its first item."""

    def change(request: pb.EnqueueRequest, draw: Draw) -> None:
        items = getattr(request.message, field)
        item, length = items[0], draw(st.sampled_from([0, 1, limit, limit + 1]))
        del items[:]
        items.extend([item] * length)

    return change


def number(where: Callable[[pb.EnqueueRequest], Any], field: str, *values: int) -> Change:
    def change(request: pb.EnqueueRequest, draw: Draw) -> None:
        setattr(where(request), field, draw(st.sampled_from(values)))

    return change


def arguments(request: pb.EnqueueRequest, draw: Draw) -> None:
    sizes = st.sampled_from([0, 1, 255, 256, 257])
    pairs = draw(st.sampled_from([1, 2, 31, 32, 33]))
    for n in range(pairs):
        request.message.custom_args[f"k{n}"] = ""
    request.message.custom_args["x" * draw(sizes)] = draw(st.sampled_from("aü")) * draw(sizes)


def without(parent: Callable[[pb.EnqueueRequest], Any], field: str) -> Change:
    return lambda request, draw: parent(request).ClearField(field)


CHANGES: list[Change] = [
    text(lambda r: r, "request_id", 255),
    without(lambda r: r, "message"),
    without(lambda r: r, "options"),
    without(lambda r: r.message, "sender"),
    address(lambda r: r.message.sender),
    address(lambda r: r.message.to[0]),
    address(lambda r: r.message.cc[0]),
    address(lambda r: r.message.bcc[0]),
    address(lambda r: r.message.reply_to[0]),
    text(lambda r: r.message.sender, "name", 256),
    text(lambda r: r.message.cc[0], "name", 256),
    text(lambda r: r.message.bcc[0], "name", 256),
    text(lambda r: r.message.reply_to[0], "name", 256),
    text(lambda r: r.message, "subject", 998),
    text(lambda r: r.message, "text", 2 * 1024 * 1024),
    text(lambda r: r.message, "html", 2 * 1024 * 1024),
    text(lambda r: r.message.headers[0], "name", 76),
    text(lambda r: r.message.headers[0], "value", 998),
    text(lambda r: r.message.attachments[0], "filename", 255),
    text(lambda r: r.message, "correlation_id", 256),
    text(lambda r: r.options, "channel", 63),
    count("reply_to", 10),
    count("headers", 50),
    count("attachments", 50),
    count("tags", 10),
    count("categories", 10),
    number(lambda r: r.message, "flags", -(2**31), -1, 0, 1, 2, 2**31 - 1),
    number(lambda r: r.options.retry, "max_attempts", -(2**31), -1, 0, 100, 101, 2**31 - 1),
    number(lambda r: r.options, "mode", -1, 0, 1, 2, 3),
    number(lambda r: r.options, "priority", -10, 0, 1, 10, 20, 30, 40, 50),
    arguments,
    lambda request, draw: request.message.tags.append("t" * draw(st.sampled_from([0, 64, 65]))),
]


@st.composite
def requests(draw: Draw) -> pb.EnqueueRequest:
    request = a_request()
    for change in draw(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=5)):
        try:
            change(request, draw)
        except IndexError:  # an earlier change has emptied the list
            continue
    return request


def refused_by_us(request: pb.EnqueueRequest) -> set[str]:
    try:
        checked_submission(convert.submission(request))
    except InvalidRequest as error:
        return {_without_key(violation.field) for violation in error.violations}
    return set()


def refused_by_contract(contract: Any, request: pb.EnqueueRequest) -> set[str]:
    constrained = contract.constrained("EnqueueRequest").FromString(request.SerializeToString())
    violations = protovalidate.Validator().collect_violations(constrained)
    return {_without_key(_path(violation.proto.field)) for violation in violations}


def _path(field_path: Any) -> str:
    path = ""
    for element in field_path.elements:
        path += f".{element.field_name}" if path else element.field_name
        if element.subscript is not None:
            subscript = element.subscript.value
            path += f'["{subscript}"]' if isinstance(subscript, str) else f"[{subscript}]"
    return path


def _without_key(path: str) -> str:
    """We show the beginning of a key that is too long."""
    return path.partition('["')[0]


# The oracle compiles its rules once a thread and class; large texts take their time.
@settings(
    deadline=None,
    max_examples=600,
    suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow],
)
@given(request=requests())
def test_whatever_the_contract_refuses_we_refuse_by_the_same_field(
    contract: Any, request: pb.EnqueueRequest
) -> None:
    by_contract = refused_by_contract(contract, request)
    event(f"refused by the contract: {bool(by_contract)}")
    by_us = refused_by_us(request)
    if "message" in by_contract:  # nothing below it is looked at
        assert "message" in by_us
    else:
        # We do not look at every item of a list that is too long itself.
        within_too_many = {path for path in by_contract if path.partition("[")[0] in by_us}
        assert by_contract - within_too_many <= by_us


def test_the_request_that_the_changes_start_from_is_accepted(contract: Any) -> None:
    assert refused_by_contract(contract, a_request()) == set()
    assert refused_by_us(a_request()) == set()
