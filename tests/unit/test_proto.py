# SPDX-License-Identifier: Apache-2.0
"""Holds the compiled wire protocol to the facts about it: field by field, number by number.

The facts (facts/*.json) list what the published interfaces define; the descriptors are what the driver really
speaks. Both are brought into the same plain form here and compared. What the calls do is not this file's business.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from google.protobuf import descriptor_pb2 as pb
from google.protobuf.message import Message

from csi_driver.rpc.pb import api_pb2, csi_pb2

# Plain JSON: names, numbers, and whatever is marked.
Fact: TypeAlias = dict[str, Any]

ROOT = Path(__file__).parents[2]
FACTS: dict[str, Fact] = {
    name: json.loads((Path(__file__).parent / "facts" / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("csi-1.13", "registration-v1")
}
COMPILED = {
    "csi-1.13": pb.FileDescriptorProto.FromString(csi_pb2.DESCRIPTOR.serialized_pb),
    "registration-v1": pb.FileDescriptorProto.FromString(api_pb2.DESCRIPTOR.serialized_pb),
}
MARKS = {
    "csi_secret": "csi_secret",
    "alpha_field": "alpha",
    "alpha_message": "alpha",
    "alpha_enum": "alpha",
} | {
    "alpha_enum_value": "alpha",
    "alpha_method": "alpha",
    "alpha_service": "alpha",
}
FieldProto = pb.FieldDescriptorProto
SCALARS = {
    FieldProto.TYPE_BOOL: "bool",
    FieldProto.TYPE_BYTES: "bytes",
    FieldProto.TYPE_INT32: "int32",
    FieldProto.TYPE_INT64: "int64",
    FieldProto.TYPE_STRING: "string",
}


def marks(options: Message) -> Fact:
    """The options of one element; one that has no fact of its own stays under its full name, and so differs."""
    return {
        MARKS[field.name] if field.is_extension and field.name in MARKS else field.full_name: value
        for field, value in options.ListFields()
        if field.name != "map_entry"
    }


def type_name(field: pb.FieldDescriptorProto, package: str) -> str:
    if field.type in (FieldProto.TYPE_MESSAGE, FieldProto.TYPE_ENUM):
        return field.type_name.removeprefix(f".{package}.").removeprefix(".")
    return SCALARS[field.type]


def field_facts(field: pb.FieldDescriptorProto, message: pb.DescriptorProto, package: str) -> Fact:
    facts = {
        "name": field.name,
        "number": field.number,
        "type": type_name(field, package),
        **marks(field.options),
    }
    entries = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
    entry = entries.get(field.type_name.rpartition(".")[2]) if field.type == FieldProto.TYPE_MESSAGE else None
    if entry is not None:
        key, value = (type_name(part, package) for part in entry.field)
        facts["type"] = f"map<{key}, {value}>"
    elif field.label == FieldProto.LABEL_REPEATED:
        facts["repeated"] = True
    if field.HasField("oneof_index"):
        facts["oneof"] = message.oneof_decl[field.oneof_index].name
    if field.proto3_optional:
        facts["proto3_optional"] = True
    return facts


def enum_facts(enum: pb.EnumDescriptorProto) -> Fact:
    facts: Fact = {"name": enum.name, **marks(enum.options)}
    facts["values"] = [{"name": v.name, "number": v.number, **marks(v.options)} for v in enum.value]
    if enum.reserved_range:
        facts["reserved"] = [[span.start, span.end] for span in enum.reserved_range]
    return facts


def message_facts(message: pb.DescriptorProto, package: str) -> Fact:
    facts: Fact = {"name": message.name, **marks(message.options)}
    if message.reserved_range:
        # A descriptor's end is exclusive, the facts' is not.
        facts["reserved"] = [[span.start, span.end - 1] for span in message.reserved_range]
    facts["fields"] = [field_facts(field, message, package) for field in message.field]
    if nested := [n for n in message.nested_type if not n.options.map_entry]:
        facts["messages"] = [message_facts(n, package) for n in nested]
    if message.enum_type:
        facts["enums"] = [enum_facts(enum) for enum in message.enum_type]
    return facts


def method_facts(method: pb.MethodDescriptorProto, package: str) -> Fact:
    facts: Fact = {
        "name": method.name,
        "request": method.input_type.removeprefix(f".{package}."),
        "response": method.output_type.removeprefix(f".{package}."),
        **marks(method.options),
    }
    if method.client_streaming:
        facts["client_streaming"] = True
    if method.server_streaming:
        facts["server_streaming"] = True
    return facts


def service_facts(service: pb.ServiceDescriptorProto, package: str) -> Fact:
    methods = [method_facts(method, package) for method in service.method]
    return {"name": service.name, **marks(service.options), "methods": methods}


def extension_facts(extension: pb.FieldDescriptorProto, package: str) -> Fact:
    return {
        "name": extension.name,
        "extends": extension.extendee.removeprefix("."),
        "number": extension.number,
        "type": type_name(extension, package),
    }


def file_facts(file: pb.FileDescriptorProto) -> Fact:
    package = file.package
    return {
        "syntax": file.syntax,
        "package": package,
        "extensions": [extension_facts(extension, package) for extension in file.extension],
        "services": [service_facts(service, package) for service in file.service],
        "enums": [enum_facts(enum) for enum in file.enum_type],
        "messages": [message_facts(message, package) for message in file.message_type],
    }


def by_name(facts: Iterable[Fact]) -> dict[str, Fact]:
    return {fact["name"]: fact for fact in facts}


def sorted_parts(fact: Fact) -> Fact:
    """The same fact with its parts in order of number or name: the order of definition is not on the wire."""
    return {key: sort_part(value) for key, value in sorted(fact.items())}


def sort_part(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if not all(isinstance(item, dict) for item in value):
        return sorted(value)
    return sorted(
        (sorted_parts(item) for item in value), key=lambda item: (item.get("number", 0), item["name"])
    )


def elements(kind: str) -> list[tuple[str, str]]:
    return [(source, fact["name"]) for source, facts in FACTS.items() for fact in facts.get(kind, [])]


@pytest.mark.parametrize("source", FACTS)
def test_file_has_the_package_and_the_syntax(source: str) -> None:
    compiled = file_facts(COMPILED[source])

    assert {key: compiled[key] for key in ("package", "syntax")} == {
        key: FACTS[source][key] for key in ("package", "syntax")
    }


@pytest.mark.parametrize("kind", ["extensions", "services", "enums", "messages"])
@pytest.mark.parametrize("source", FACTS)
def test_file_defines_nothing_less_and_nothing_more(source: str, kind: str) -> None:
    compiled = file_facts(COMPILED[source])

    assert sorted(by_name(compiled[kind])) == sorted(by_name(FACTS[source].get(kind, [])))


@pytest.mark.parametrize(("source", "name"), elements("messages"))
def test_message_is_as_the_facts_say(source: str, name: str) -> None:
    compiled = by_name(file_facts(COMPILED[source])["messages"])

    assert sorted_parts(compiled[name]) == sorted_parts(by_name(FACTS[source]["messages"])[name])


@pytest.mark.parametrize(("source", "name"), elements("enums"))
def test_enum_is_as_the_facts_say(source: str, name: str) -> None:
    compiled = by_name(file_facts(COMPILED[source])["enums"])

    assert sorted_parts(compiled[name]) == sorted_parts(by_name(FACTS[source]["enums"])[name])


@pytest.mark.parametrize(("source", "name"), elements("services"))
def test_service_is_as_the_facts_say(source: str, name: str) -> None:
    compiled = by_name(file_facts(COMPILED[source])["services"])

    assert sorted_parts(compiled[name]) == sorted_parts(by_name(FACTS[source]["services"])[name])


@pytest.mark.parametrize(("source", "name"), elements("extensions"))
def test_extension_is_as_the_facts_say(source: str, name: str) -> None:
    compiled = by_name(file_facts(COMPILED[source])["extensions"])

    assert compiled[name] == by_name(FACTS[source]["extensions"])[name]


def test_a_changed_number_a_lost_mark_and_a_renamed_oneof_are_seen() -> None:
    file = pb.FileDescriptorProto.FromString(csi_pb2.DESCRIPTOR.serialized_pb)
    messages = {message.name: message for message in file.message_type}
    messages["Volume"].field[0].number = 9
    messages["DeleteVolumeRequest"].field[1].options.ClearExtension(csi_pb2.csi_secret)
    messages["VolumeCapability"].oneof_decl[0].name = "kind"
    expected = by_name(FACTS["csi-1.13"]["messages"])

    compiled = by_name(file_facts(file)["messages"])

    different = [name for name in expected if sorted_parts(compiled[name]) != sorted_parts(expected[name])]
    assert different == ["VolumeCapability", "Volume", "DeleteVolumeRequest"]


def test_generated_code_is_what_the_proto_files_generate() -> None:
    done = subprocess.run(
        [ROOT / "tools" / "proto", "--check"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
