"""What nobody may change by accident: the contract against golden.json.

`buf breaking` sees names, numbers and types. Just as breaking, and seen by no tool: a limit that
tightens, a default that changes, another status for a reason, another meaning of an empty token.
All of it stands in the golden file, so that a change of it is a line in a review.

Two halves. `derived` is read from the proto files and rewritten by

    UPDATE_GOLDEN=1 python -m pytest tests/contract/test_golden.py

`promised` and `statuses` are written by hand: what the contract says in words. Each promise names
the element of the contract and the words that state it, and is held against the comment there and,
where the code has a constant for it, against the code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, MethodOptions

from mailgrpc.core import admission, delivery, event, message, retry
from mailgrpc.errors import Reason

GOLDEN = Path(__file__).with_name("golden.json")
golden = json.loads(GOLDEN.read_text())


def test_derived_is_what_the_golden_file_says(contract: Any) -> None:
    derived = derive(contract)
    if os.environ.get("UPDATE_GOLDEN"):
        text = json.dumps({**golden, "derived": derived}, indent=2, ensure_ascii=False)
        GOLDEN.write_text(text + "\n")
        pytest.skip("golden.json was rewritten: review the difference")
    for section, expected in golden["derived"].items():
        assert derived[section] == expected, section
    assert derived.keys() == golden["derived"].keys()


def derive(contract: Any) -> dict[str, Any]:
    constrained = contract.of_kind("field") + contract.of_kind("message")
    return {
        "files": {
            file.name: {
                "go_package": file.options.go_package,
                "java_package": file.options.java_package,
                "java_multiple_files": file.options.java_multiple_files,
            }
            for file in contract.files
        },
        "methods": {rpc.name: shown_method(rpc.proto) for rpc in contract.of_kind("rpc")},
        "fields": {
            element.name: {
                str(field.number): shown_field(field, maps_of(element.proto))
                for field in element.proto.field
            }
            for element in contract.of_kind("message")
        },
        "enums": {
            element.name: {value.name: value.number for value in element.proto.value}
            for element in contract.of_kind("enum")
        },
        "constraints": {
            element.name: rules for element in constrained if (rules := contract.rules(element))
        },
    }


def shown_method(method: Any) -> str:
    level = MethodOptions.IdempotencyLevel.Name(method.options.idempotency_level)
    stream = "stream " if method.server_streaming else ""
    return f"{local(method.input_type)} -> {stream}{local(method.output_type)}, {level}"


def shown_field(field: Any, maps: dict[str, str]) -> str:
    kind = shown_type(field)
    if kind in maps:
        return f"{maps[kind]} {field.name}"
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    oneof = " (in a oneof)" if field.HasField("oneof_index") else ""
    return f"{'repeated ' if repeated else ''}{kind} {field.name}{oneof}"


def shown_type(field: Any) -> str:
    if field.type_name:
        return local(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def maps_of(message_type: Any) -> dict[str, str]:
    """The types that stand for the maps of a message, as they are written."""
    return {
        f"{message_type.name}.{entry.name}": f"map<{', '.join(map(shown_type, entry.field))}>"
        for entry in message_type.nested_type
        if entry.options.map_entry
    }


def local(type_name: str) -> str:
    return type_name.removeprefix(".").removeprefix("mailgrpc.v1.")


def seconds(span: timedelta) -> float:
    return span.total_seconds()


# The constants behind the promises, in the units of the golden file. Not every promise has one: a
# behaviour has tests of its own.
IN_CODE: dict[str, Callable[[], Any]] = {
    "recipients of a message, at most": lambda: message.MAX_RECIPIENTS,
    "bytes of a request, at most": lambda: message.MAX_REQUEST_BYTES,
    "delivery mode by default": lambda: message.DeliveryOptions().effective_mode.name,
    "priority by default": lambda: message.DeliveryOptions().effective_priority.name,
    "expiry by default": lambda: seconds(message.DEFAULT_EXPIRY),
    "send_at ahead, at most": lambda: seconds(message.MAX_SEND_AHEAD),
    "expire_at ahead, at most": lambda: seconds(message.MAX_EXPIRY_AHEAD),
    "dedupe_window, at least": lambda: seconds(message.MIN_DEDUPE_WINDOW),
    "dedupe_window, at most": lambda: seconds(message.MAX_DEDUPE_WINDOW),
    "max_attempts by default": lambda: retry.DEFAULT_POLICY.max_attempts,
    "initial_backoff by default": lambda: seconds(retry.DEFAULT_POLICY.initial_backoff),
    "max_backoff by default": lambda: seconds(retry.DEFAULT_POLICY.max_backoff),
    "multiplier by default": lambda: retry.DEFAULT_POLICY.multiplier,
    "jitter": lambda: retry.JITTER,
    "mask of an address that was never set": lambda: admission.ACCEPTS_ALL,
    "aggregate, first to last": lambda: [state.name for state in delivery.AGGREGATE_ORDER],
    "states that have not ended": lambda: sorted(state.name for state in delivery.UNENDED),
    "kinds of event that come unasked": lambda: sorted(kind.value for kind in event.EventKind),
}


@pytest.mark.parametrize("promise", golden["promised"], ids=lambda promise: promise["what"])
def test_promise_stands_in_the_contract(contract: Any, promise: dict[str, Any]) -> None:
    assert promise["says"] in contract.element(promise["element"]).comment


@pytest.mark.parametrize("what", IN_CODE)
def test_promise_is_what_the_code_does(what: str) -> None:
    [promised] = [promise for promise in golden["promised"] if promise["what"] == what]
    assert IN_CODE[what]() == promised["value"]


def test_every_reason_has_a_status() -> None:
    assert golden["statuses"].keys() == {reason.name for reason in Reason} - {"UNSPECIFIED"}


@pytest.mark.parametrize(("reason", "status"), golden["statuses"].items())
def test_reason_comes_with_its_status(reason: str, status: str) -> None:
    # Here and not above: the rest of this file needs no server.
    from mailgrpc.server.interceptors import status_of

    assert status_of(Reason[reason]).name == status


@pytest.mark.parametrize(("reason", "status"), golden["statuses"].items())
def test_comment_of_a_reason_begins_with_its_status(
    contract: Any, reason: str, status: str
) -> None:
    comment = contract.element(f"ErrorReason.ERROR_REASON_{reason}").comment
    assert comment.startswith(f"{status}: ")
