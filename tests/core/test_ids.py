"""Ids keep the order of time, and tell a delivery's message."""

from __future__ import annotations

import subprocess
import sys
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailgrpc.core.ids import (
    DELIVERY,
    MESSAGE,
    delivery_id,
    from_text,
    message_of,
    new_id,
    new_message_id,
    rfc_message_id,
    to_text,
)

_MILLISECONDS = st.integers(0, 2**48 - 1)
_PREFIXES = st.sampled_from([MESSAGE, DELIVERY])


@given(st.uuids(), _PREFIXES)
def test_an_id_survives_the_way_to_a_caller_and_back(value: uuid.UUID, prefix: str) -> None:
    text = to_text(prefix, value)
    assert len(text) == len(prefix) + 26
    assert from_text(prefix, text) == value


@given(st.uuids(), st.uuids())
def test_texts_are_ordered_like_their_ids(one: uuid.UUID, other: uuid.UUID) -> None:
    assert (one < other) == (to_text(MESSAGE, one) < to_text(MESSAGE, other))


@given(_MILLISECONDS, _MILLISECONDS)
def test_later_ids_are_greater(one: int, other: int) -> None:
    if one < other:
        assert new_id(one) < new_id(other)
        assert new_message_id(one) < new_message_id(other)


@given(_MILLISECONDS)
def test_an_id_is_a_uuid_of_version_7(now_ms: int) -> None:
    for value in (new_id(now_ms), new_message_id(now_ms)):
        assert (value.version, value.variant) == (7, uuid.RFC_4122)
        assert value.int >> 80 == now_ms


@given(st.integers(1, 65535), st.integers(1, 65535))
def test_a_delivery_tells_its_message(number: int, other: int) -> None:
    message = new_message_id()
    delivery = delivery_id(message, number)
    assert message_of(delivery) == message
    assert message < delivery
    assert (delivery == delivery_id(message, other)) == (number == other)


def test_new_ids_differ_within_a_millisecond() -> None:
    assert len({new_message_id(0) for _ in range(10_000)}) == 10_000


def test_a_forked_process_makes_other_ids() -> None:
    code = (
        "import os\n"
        "from mailgrpc.core.ids import new_id\n"
        "new_id(0)\n"  # draws for those that follow
        "reading, writing = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.write(writing, new_id(0).bytes)\n"
        "    os._exit(0)\n"
        "print(new_id(0).bytes.hex(), os.read(reading, 16).hex())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine, childs = done.stdout.split()
    assert mine != childs


@pytest.mark.parametrize(
    "text",
    [
        "",
        "msg_",
        "dlv_" + "0" * 26,
        "msg_" + "0" * 25,
        "msg_" + "0" * 27,
        "msg_" + "u" * 26,  # not in Crockford's alphabet
        "msg_" + "0" * 25 + "A",
        "msg_8" + "0" * 25,  # 2 ** 128
        "msg_" + "٠" * 26,  # digits, but not ours
    ],
)
def test_what_was_never_given_out_is_not_an_id(text: str) -> None:
    assert from_text(MESSAGE, text) is None


@given(st.text(max_size=40))
def test_any_text_is_an_id_or_none(text: str) -> None:
    value = from_text(MESSAGE, MESSAGE + text)
    assert value is None or to_text(MESSAGE, value) == MESSAGE + text


def test_the_message_id_header_stands_under_the_senders_domain() -> None:
    header = rfc_message_id(uuid.UUID(int=0), "ops@example.org")
    assert header == f"<msg_{'0' * 26}@example.org>"
