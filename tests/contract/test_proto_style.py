"""The .proto files keep the rules of buf's STANDARD and COMMENTS lint that matter, and their stubs are current."""

import importlib.resources
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

PROTOS = Path(__file__).parents[2] / "protos"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[descriptor_pb2.FileDescriptorProto]:
    """Our files, parsed with their comments."""
    out = tmp_path_factory.mktemp("descriptors") / "set.bin"
    include = importlib.resources.files("grpc_tools") / "_proto"
    names = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.glob("hybridsd/v1/*.proto"))
    command = ["-m", "grpc_tools.protoc", f"-I{PROTOS}", f"-I{include}", "--include_source_info"]
    subprocess.run([sys.executable, *command, f"--descriptor_set_out={out}", *names], check=True, cwd=PROTOS)
    return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def elements(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
    """Yields kind, full name, source path and descriptor of everything that must have a comment."""
    for i, message in enumerate(file.message_type):
        yield "message", message.name, (4, i), message
        for j, field in enumerate(message.field):
            yield "field", f"{message.name}.{field.name}", (4, i, 2, j), field
        synthetic = {field.oneof_index for field in message.field if field.proto3_optional}  # protoc's own
        for j, oneof in enumerate(message.oneof_decl):
            if j in synthetic:
                continue
            yield "oneof", f"{message.name}.{oneof.name}", (4, i, 8, j), oneof
    for i, enum in enumerate(file.enum_type):
        yield "enum", enum.name, (5, i), enum
        for j, value in enumerate(enum.value):
            yield "value", f"{enum.name}.{value.name}", (5, i, 2, j), value
    for i, service in enumerate(file.service):
        yield "service", service.name, (6, i), service
        for j, method in enumerate(service.method):
            yield "method", f"{service.name}.{method.name}", (6, i, 2, j), method


def test_everything_has_a_comment(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """Each message, field, oneof, enum, value, service and method says what it means, as a sentence."""
    bare = []
    count = 0
    for file in files:
        comments = {tuple(at.path): at.leading_comments.strip() for at in file.source_code_info.location}
        for kind, name, path, _ in elements(file):
            count += 1
            if not comments.get(path, "").endswith("."):
                bare.append(f"{kind} {name}")

    assert count > 100
    assert bare == []


def test_numbers_say_their_unit_or_range(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """Every integer and real field of a request gives its range or default."""
    silent = []
    for file in files:
        comments = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}
        for kind, name, path, field in elements(file):
            numeric = kind == "field" and field.type in (1, 2, 3, 5)
            if numeric and name.split(".")[0].endswith(("Request", "Spec")) and not re.search(r"\d", comments[path]):
                silent.append(name)

    assert silent == []


def test_names_follow_the_style(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """Package and folder agree, cases are right, enums are prefixed and begin with 0, and requests are unique."""
    for file in files:
        assert file.package == "hybridsd.v1"
        assert file.syntax == "proto3"
        for kind, name, _, _element in elements(file):
            last = name.split(".")[-1]
            if kind in ("field", "oneof"):
                assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", last), name
            elif kind == "value":
                prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name.split(".")[0]).upper()
                assert last.startswith(prefix + "_"), name
            else:
                assert re.fullmatch(r"([A-Z][a-z0-9]*)+", last), name
        for enum in file.enum_type:
            assert enum.value[0].number == 0
            assert enum.value[0].name.endswith("_UNSPECIFIED")
        for service in file.service:
            assert service.name.endswith("Service")
            for method in service.method:
                assert method.input_type == f".hybridsd.v1.{method.name}Request"
                assert method.output_type == f".hybridsd.v1.{method.name}Response"


def test_no_untyped_bags(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    """Only tensor data, hashes, ids by content and file chunks are bytes; nothing is unsigned, a map or an Any."""
    allowed = {"data", "chunk", "sha256", "digest", "plan_digest", "known_digests", "text_encoder_digest"}
    for file in files:
        for kind, name, _, field in elements(file):
            if kind == "field":
                assert field.type != 12 or field.name in allowed, name
                assert field.type not in (4, 6, 7, 13), name
                assert not field.type_name.startswith((".google.protobuf.Any", ".google.protobuf.Struct")), name
        assert not any(message.nested_type for message in file.message_type)


def test_committed_stubs_are_current() -> None:
    """Generating again changes nothing."""
    result = subprocess.run(
        [sys.executable, PROTOS / "generate.py", "--check"], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr
