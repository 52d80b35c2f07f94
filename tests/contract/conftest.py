"""The contract as its own files say it: compiled with its options and its comments.

The stubs in mailgrpc.v1 carry neither, so these tests compile proto/ themselves. The compiled files
live in a descriptor pool of their own, which leaves the process's default pool alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc_tools
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mailgrpc.v1"


@dataclass(frozen=True)
class Element:
    """Something of the contract that has a name, with the comment that stands before it."""

    kind: str  # service, rpc, message, oneof, field, enum, value
    name: str  # full, without the package: "EnqueueRequest.request_id"
    proto: Any  # its descriptor, as a message of descriptor.proto
    comment: str  # unwrapped: one line


class Contract:
    """The compiled contract."""

    def __init__(self, compiled: bytes) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        for file in descriptor_pb2.FileDescriptorSet.FromString(compiled).file:
            self._pool.Add(file)
        # Parsed by this pool's own classes, which know the buf.validate extensions.
        file_set: Any = message_factory.GetMessageClass(
            self._pool.FindMessageTypeByName("google.protobuf.FileDescriptorSet")
        )
        files = file_set.FromString(compiled).file
        self.files = [file for file in files if file.package == PACKAGE]
        self.elements = [element for file in self.files for element in _elements(file)]

    def of_kind(self, kind: str) -> list[Element]:
        return [element for element in self.elements if element.kind == kind]

    def element(self, name: str) -> Element:
        return next(element for element in self.elements if element.name == name)

    def rules(self, element: Element) -> dict[str, Any]:
        """The buf.validate rules of a field or message; empty if there are none."""
        extension = self._pool.FindExtensionByName(f"buf.validate.{element.kind}")
        if not element.proto.options.HasExtension(extension):
            return {}
        rules = element.proto.options.Extensions[extension]
        shown = json_format.MessageToDict(rules, preserving_proto_field_name=True)
        return {key: _plain(value) for key, value in shown.items()}

    def constrained(self, name: str) -> Any:
        """The class of a message with its rules, which the stubs lack: protovalidate can judge it.

        Parse the bytes of a stub's message into it.
        """
        return message_factory.GetMessageClass(
            self._pool.FindMessageTypeByName(f"{PACKAGE}.{name}")
        )


@pytest.fixture(scope="session")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Contract:
    target = tmp_path_factory.mktemp("contract") / "compiled"
    proto = ROOT / "proto"
    arguments = [
        "protoc",
        f"-I{proto}",
        f"-I{proto / 'vendor'}",
        f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
        "--include_imports",
        "--include_source_info",
        f"--descriptor_set_out={target}",
        *sorted(str(path) for path in proto.glob("mailgrpc/**/*.proto")),
    ]
    assert protoc.main(arguments) == 0, f"the contract does not compile with {sys.executable}"
    return Contract(target.read_bytes())


def _plain(value: Any) -> Any:
    """JSON has 64-bit numbers as strings; a reader of the golden file wants numbers."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, str) and value.isdigit():
        return int(value)
    return value


def _elements(file: Any) -> Iterator[Element]:
    # Comments are found by the path of field numbers and indexes in FileDescriptorProto.
    comments = {
        tuple(location.path): " ".join(location.leading_comments.split())
        for location in file.source_code_info.location
    }

    def element(kind: str, name: str, proto: Any, *path: int) -> Element:
        return Element(kind, name, proto, comments.get(path, ""))

    def of_message(message: Any, name: str, *path: int) -> Iterator[Element]:
        if message.options.map_entry:
            return
        yield element("message", name, message, *path)
        for index, field in enumerate(message.field):
            yield element("field", f"{name}.{field.name}", field, *path, 2, index)
        for index, oneof in enumerate(message.oneof_decl):
            yield element("oneof", f"{name}.{oneof.name}", oneof, *path, 8, index)
        for index, nested in enumerate(message.nested_type):
            yield from of_message(nested, f"{name}.{nested.name}", *path, 3, index)
        for index, enum in enumerate(message.enum_type):
            yield from of_enum(enum, f"{name}.{enum.name}", *path, 4, index)

    def of_enum(enum: Any, name: str, *path: int) -> Iterator[Element]:
        yield element("enum", name, enum, *path)
        for index, value in enumerate(enum.value):
            yield element("value", f"{name}.{value.name}", value, *path, 2, index)

    for index, message in enumerate(file.message_type):
        yield from of_message(message, message.name, 4, index)
    for index, enum in enumerate(file.enum_type):
        yield from of_enum(enum, enum.name, 5, index)
    for index, service in enumerate(file.service):
        yield element("service", service.name, service, 6, index)
        for number, method in enumerate(service.method):
            yield element("rpc", f"{service.name}.{method.name}", method, 6, index, 2, number)
