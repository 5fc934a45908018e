"""proto/teacher.proto as a page: services, messages, fields and their comments, from protoc's own descriptors."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    SourceCodeInfo,
)

# Field numbers in descriptor.proto, of which a location's path is made.
SERVICES, MESSAGES, ENUMS = 6, 4, 5  # of a file
METHODS, FIELDS, ONEOFS, NESTED_ENUMS, VALUES, SYNTAX = 2, 2, 8, 4, 2, 12

Route = tuple[int, ...]  # what descriptor.proto calls a path


def read_proto(path: Path) -> FileDescriptorProto:
    """The file's descriptor, with where its comments are.

    Raises: subprocess.CalledProcessError for a file that protoc does not take.
    """
    with tempfile.NamedTemporaryFile(suffix=".binpb") as out:
        options = [f"-I{path.parent}", "--include_source_info", f"--descriptor_set_out={out.name}"]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *options, path.name], check=True)
        return FileDescriptorSet.FromString(Path(out.name).read_bytes()).file[0]


def wire_page(file: FileDescriptorProto) -> str:
    """The page, in Markdown, in the order of the file."""
    return "\n\n".join(_Page(file).blocks()) + "\n"


class _Page:
    """One file's descriptor and its comments by path."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._locations = {tuple(location.path): location for location in file.source_code_info.location}

    def blocks(self) -> Iterable[str]:
        yield "# Messages, field by field"
        yield self._comment((SYNTAX,))
        yield (
            f"Package `{self._file.package}`. This page is made of the comments in `proto/teacher.proto`; "
            "[The wire contract](wire-contract.md) says what the shapes are for, and what they are over HTTP."
        )
        for index, service in enumerate(self._file.service):
            yield f"## Service {service.name}"
            for number, method in enumerate(service.method):
                yield from self._method(method, (SERVICES, index, METHODS, number))
        types = [((MESSAGES, index), message) for index, message in enumerate(self._file.message_type)]
        types += [((ENUMS, index), enum) for index, enum in enumerate(self._file.enum_type)]
        for path, described in sorted(types, key=lambda entry: tuple(self._locations[entry[0]].span)):
            yield from self._section(self._locations[path])
            if isinstance(described, DescriptorProto):
                yield from self._message(described, path)
            else:
                yield from self._enum(described, path, described.name)

    def _method(self, method: MethodDescriptorProto, path: Route) -> Iterable[str]:
        sent = ("a stream of " if method.client_streaming else "") + _link(method.input_type)
        answered = ("a stream of " if method.server_streaming else "") + _link(method.output_type)
        yield f"### {method.name}"
        yield f"{sent} → {answered}"
        yield self._comment(path)

    def _message(self, message: DescriptorProto, path: Route) -> Iterable[str]:
        yield f"### {message.name}"
        yield self._comment(path)
        rows = [
            (
                str(field.number),
                f"`{field.name}`",
                self._type(field),
                self._about(message, field, (*path, FIELDS, i), path),
            )
            for i, field in enumerate(message.field)
        ]
        yield _table(("", "field", "type", ""), rows) if rows else "No fields."
        for index, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*path, NESTED_ENUMS, index), f"{message.name}.{enum.name}")

    def _enum(self, enum: EnumDescriptorProto, path: Route, name: str) -> Iterable[str]:
        yield f"### {name}"
        yield self._comment(path)
        rows = [
            (str(value.number), f"`{value.name}`", _cell(self._comment((*path, VALUES, index))))
            for index, value in enumerate(enum.value)
        ]
        yield _table(("", "value", ""), rows)

    def _section(self, location: SourceCodeInfo.Location) -> Iterable[str]:
        """A comment `---- name` on its own between two definitions is a heading."""
        for comment in location.leading_detached_comments:
            title = comment.strip().strip("-").strip()
            yield f"## {title[:1].upper()}{title[1:]}"

    def _type(self, field: FieldDescriptorProto) -> str:
        scalar = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
        name = _link(field.type_name) if field.type_name else scalar
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            return f"repeated {name}"
        return f"optional {name}" if field.proto3_optional else name

    def _about(self, message: DescriptorProto, field: FieldDescriptorProto, path: Route, message_path: Route) -> str:
        """The field's comment, after the oneof that it belongs to and, at its first field, the oneof's own comment."""
        comment = self._comment(path)
        if field.HasField("oneof_index") and not field.proto3_optional:
            is_first = not any(
                other.HasField("oneof_index") and other.oneof_index == field.oneof_index and other.number < field.number
                for other in message.field
            )
            oneof = f"one of `{message.oneof_decl[field.oneof_index].name}`"
            about_oneof = self._comment((*message_path, ONEOFS, field.oneof_index)) if is_first else ""
            comment = "; ".join(part for part in (oneof, about_oneof, comment) if part)
        return _cell(comment)

    def _comment(self, path: Route) -> str:
        """Leading and trailing comment, as paragraphs; what is indented in them keeps its layout."""
        location = self._locations.get(path, SourceCodeInfo.Location())
        lines = (location.leading_comments + location.trailing_comments).splitlines()
        return _paragraphs([line.removeprefix(" ") for line in lines])


def _paragraphs(lines: Sequence[str]) -> str:
    """Markdown of a comment's lines; indented ones become a block of code."""
    texts = []
    for kind, group in groupby(lines, key=_kind):
        if kind == "code":
            texts.append("```text\n" + "\n".join(line[2:] for line in group) + "\n```")
        elif kind == "prose":
            texts.append("\n".join(group))
    return "\n\n".join(texts)


def _kind(line: str) -> str:
    if not line.strip():
        return "nothing"
    return "code" if line.startswith("  ") else "prose"


def _cell(text: str) -> str:
    """Text in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _link(type_name: str) -> str:
    """.vopd.teacher.v1.StreamWaiting.Reason, as a link to its heading on this page."""
    name = ".".join(part for part in type_name.split(".") if part[:1].isupper())
    return f"[{name}](#{name.lower().replace('.', '')})"
