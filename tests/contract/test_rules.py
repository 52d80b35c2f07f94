"""The rules that the contract keeps, whatever is added to it."""

from __future__ import annotations

import importlib
import keyword
import re
import tomllib
from pathlib import Path
from typing import Any

import protovalidate
import pytest
from google.protobuf import descriptor_pb2

from mailgrpc.core import delivery, event, message
from mailgrpc.errors import Reason
from mailgrpc.v1 import mail_service_pb2, message_pb2

ROOT = Path(__file__).resolve().parents[2]
Field = descriptor_pb2.FieldDescriptorProto

# Words that cannot be an identifier in one of the languages that the contract is generated for.
# Generators rename such fields, each in its own way, and documentation stops matching the code.
GO = "break case chan const continue default defer else fallthrough for func go goto if import \
interface map package range return select struct switch type var"
JAVA = "abstract assert boolean break byte case catch char class const continue default do double \
else enum extends final finally float for goto if implements import instanceof int interface long \
native new package private protected public return short static strictfp super switch \
synchronized this throw throws transient try void volatile while true false null _"
TYPESCRIPT = "arguments await break case catch class const constructor continue debugger default \
delete do else enum eval export extends false finally for function if implements import in \
instanceof interface let new null package private protected public return static super switch \
this throw true try typeof undefined var void while with yield"
CPP = "alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t \
char16_t char32_t class compl concept const consteval constexpr constinit const_cast continue \
co_await co_return co_yield decltype default delete do double dynamic_cast else enum explicit \
export extern false float for friend goto if inline int long mutable namespace new noexcept not \
not_eq nullptr operator or or_eq private protected public register reinterpret_cast requires \
return short signed sizeof static static_assert static_cast struct switch template this \
thread_local throw true try typedef typeid typename union unsigned using virtual void volatile \
wchar_t while xor xor_eq NULL"
KEYWORDS = {*keyword.kwlist, *GO.split(), *JAVA.split(), *TYPESCRIPT.split(), *CPP.split()}


def test_everything_is_documented(contract: Any) -> None:
    assert [f"{e.kind} {e.name}" for e in contract.elements if not e.comment] == []


def test_no_64_bit_integers(contract: Any) -> None:
    """ProtoJSON writes them as strings, and TypeScript reads them as bigint."""
    wide = {
        Field.TYPE_INT64,
        Field.TYPE_UINT64,
        Field.TYPE_SINT64,
        Field.TYPE_FIXED64,
        Field.TYPE_SFIXED64,
    }
    assert [field.name for field in contract.of_kind("field") if field.proto.type in wide] == []


def test_no_reserved_numbers_or_names(contract: Any) -> None:
    """Numbers are kept free by gaps; nothing has ever been removed from this version."""
    types = contract.of_kind("message") + contract.of_kind("enum")
    reserved = [t.name for t in types if t.proto.reserved_range or t.proto.reserved_name]
    assert reserved == []


def test_no_name_is_a_keyword(contract: Any) -> None:
    fields = contract.of_kind("field") + contract.of_kind("oneof")
    names = {element.proto.name for element in fields}
    camel = {re.sub(r"_(\w)", lambda match: match[1].upper(), name) for name in names}
    assert (names | camel) & KEYWORDS == set()


def test_only_standard_rules_and_no_cel(contract: Any) -> None:
    """Rules in CEL would need an interpreter in every client that wants to check beforehand."""
    for element in contract.of_kind("field") + contract.of_kind("message"):
        rules = contract.rules(element)
        assert not {"cel", "cel_expression"} & rules.keys(), element.name
        assert "email" not in rules.get("string", {}), f"{element.name}: refuses IDN"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("Mailbox", message_pb2.Mailbox(address="a")),
        ("GetStatusRequest", mail_service_pb2.GetStatusRequest()),
        ("GetStatusRequest", mail_service_pb2.GetStatusRequest(message_id="m", request_id="r")),
        ("UpdatePrefsRequest", mail_service_pb2.UpdatePrefsRequest(address="ada@example.org")),
        ("EnqueueBatchRequest", mail_service_pb2.EnqueueBatchRequest()),
        ("RetryPolicy", message_pb2.RetryPolicy(max_attempts=101)),
    ],
)
def test_rules_are_ones_that_protovalidate_enforces(contract: Any, name: str, wrong: Any) -> None:
    """A rule that is misspelt compiles just as well, and forbids nothing."""
    judged = contract.constrained(name).FromString(wrong.SerializeToString())
    # Not the module's own validator: it remembers rules by name, also for the stubs without any.
    with pytest.raises(protovalidate.ValidationError):
        protovalidate.Validator().validate(judged)


def test_facts_of_an_event_have_the_numbers_of_their_kinds(contract: Any) -> None:
    facts = {
        f"EVENT_KIND_{field.name.upper()}": field.number
        for field in contract.element("Event").proto.field
        if field.HasField("oneof_index")
    }
    assert {"EVENT_KIND_UNSPECIFIED": 0} | facts == numbers(contract, "EventKind")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Reason, "ErrorReason"),
        (delivery.State, "DeliveryState"),
        (delivery.Mode, "DeliveryMode"),
        (delivery.Outcome, "AttemptOutcome"),
        (delivery.Cause, "FailureCause"),
        (delivery.WaitReason, "WaitReason"),
        (delivery.SuppressionReason, "SuppressionReason"),
        (delivery.Role, "RecipientRole"),
        (event.EventKind, "EventKind"),
        (message.Priority, "Priority"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_enum_of_the_domain_is_that_of_the_contract(contract: Any, ours: Any, theirs: str) -> None:
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", theirs).upper()
    named = {f"{prefix}_{value.name}": value.value for value in ours}
    assert {f"{prefix}_UNSPECIFIED": 0} | named == numbers(contract, theirs)


def numbers(contract: Any, enum: str) -> dict[str, int]:
    return {value.name: value.number for value in contract.element(enum).proto.value}


def test_stubs_are_those_of_the_contract(contract: Any) -> None:
    """The stubs say the same as proto/, and nothing about validation."""
    for file in contract.files:
        module = importlib.import_module(file.name.replace("/", ".").replace(".proto", "_pb2"))
        stub = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
        wanted = descriptor_pb2.FileDescriptorProto.FromString(file.SerializeToString())
        wanted.DiscardUnknownFields()  # the buf.validate options
        wanted.ClearField("source_code_info")
        kept = [name for name in wanted.dependency if not name.startswith("buf/")]
        wanted.dependency[:] = kept
        assert without_json_names(stub) == without_json_names(wanted), "run scripts/generate.py"


def without_json_names(file: Any) -> Any:
    """protoc tells plugins the JSON names, and leaves them out of the generated code."""
    pending = list(file.message_type)
    while pending:
        message_type = pending.pop()
        pending += message_type.nested_type
        for field in message_type.field:
            field.ClearField("json_name")
    return file


def test_stubs_do_not_mention_validation() -> None:
    """A caller of the stubs needs no package for the limits."""
    stubs = (ROOT / "mailgrpc/v1").glob("*_pb2*.py*")
    assert [path.name for path in stubs if re.search(r"buf[./]validate", path.read_text())] == []


def test_declared_dependencies_can_load_the_stubs() -> None:
    """Generated code refuses to load under a runtime that is older than its generator."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {}
    for requirement in project["dependencies"]:
        match = re.match(r"([\w-]+)>=([\d.]+)", requirement)
        assert match is not None, f"{requirement}: no lower bound"
        floors[match[1]] = version(match[2])
    messages = (ROOT / "mailgrpc/v1/mail_service_pb2.py").read_text()
    services = (ROOT / "mailgrpc/v1/mail_service_pb2_grpc.py").read_text()
    protobuf = re.search(r"Protobuf Python Version: ([\d.]+)", messages)
    grpcio = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", services)
    assert protobuf is not None and grpcio is not None
    assert floors["protobuf"] >= version(protobuf[1]), f"protobuf>={protobuf[1]} is needed"
    assert floors["grpcio"] >= version(grpcio[1]), f"grpcio>={grpcio[1]} is needed"


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
