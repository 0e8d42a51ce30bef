"""Spans as OTLP bytes, by the protobuf library (proto/otlp_trace.proto).

Owns: the message table; Span values to bytes and back. In: ended spans. Out: an ExportTraceServiceRequest.
Never: makes IDs, reads clocks, decides what is traced.

The library is imported with the first span: few tunnels ever see a traced request. The table below is the .proto's,
kept by hand, so that neither a compiler nor a generated module is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final, NamedTuple

from connector.errors import WireError

UNSET, OK, ERROR = 0, 1, 2
"""Codes of a span's status."""

KIND_INTERNAL = 1
SAMPLED = 0x01
HAS_IS_REMOTE, IS_REMOTE = 0x100, 0x200
"""Bits of `Span.flags` above the trace flags: whether it is known that the parent is remote, and that it is."""

SCOPE = "origin"
SCHEMA_URL = "https://opentelemetry.io/schemas/1.7.0"

Attribute = tuple[str, "str | int | bool"]


class Span(NamedTuple):
    """One ended span. Times are nanoseconds since 1970; without a parent `parent_id` is empty."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    name: str
    start: int
    end: int
    attributes: tuple[Attribute, ...] = ()
    status: int = UNSET
    message: str = ""
    flags: int = SAMPLED | HAS_IS_REMOTE | IS_REMOTE


MESSAGES: Final[dict[str, tuple[tuple[str, int, str, bool], ...]]] = {
    "ExportTraceServiceRequest": (("resource_spans", 1, "ResourceSpans", True),),
    "ResourceSpans": (
        ("resource", 1, "Resource", False),
        ("scope_spans", 2, "ScopeSpans", True),
        ("schema_url", 3, "string", False),
    ),
    "Resource": (("attributes", 1, "KeyValue", True),),
    "ScopeSpans": (("scope", 1, "Scope", False), ("spans", 2, "Span", True)),
    "Scope": (("name", 1, "string", False),),
    "Span": (
        ("trace_id", 1, "bytes", False),
        ("span_id", 2, "bytes", False),
        ("parent_span_id", 4, "bytes", False),
        ("name", 5, "string", False),
        ("kind", 6, "int32", False),
        ("start_time_unix_nano", 7, "fixed64", False),
        ("end_time_unix_nano", 8, "fixed64", False),
        ("attributes", 9, "KeyValue", True),
        ("status", 15, "Status", False),
        ("flags", 16, "fixed32", False),
    ),
    "Status": (("message", 2, "string", False), ("code", 3, "int32", False)),
    "KeyValue": (("key", 1, "string", False), ("value", 2, "AnyValue", False)),
    "AnyValue": (
        ("string_value", 1, "string", False),
        ("bool_value", 2, "bool", False),
        ("int_value", 3, "int64", False),
    ),
}
"""Fields by message: name, number, type, repeated. `AnyValue` is one of its fields."""

ONE_OF: Final = frozenset({"AnyValue"})


@cache
def message_class(name: str) -> Any:
    """Give the library's class of a message."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: PLC0415  (slow, rarely needed)

    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="otlp_trace.proto", package="connector.otlp", syntax="proto3")
    for message, fields in MESSAGES.items():
        made = file.message_type.add(name=message)
        if message in ONE_OF:
            made.oneof_decl.add(name="value")
        for field, number, kind, repeated in fields:
            entry = made.field.add(
                name=field,
                number=number,
                label=field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL,
            )
            if kind in MESSAGES:
                entry.type = field_type.TYPE_MESSAGE
                entry.type_name = f".connector.otlp.{kind}"
            else:
                entry.type = field_type.Type.Value(f"TYPE_{kind.upper()}")
            if message in ONE_OF:
                entry.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"connector.otlp.{name}"))


def encode_spans(spans: Sequence[Span], resource: Sequence[Attribute]) -> bytes:
    """Give one ExportTraceServiceRequest: each span in a ResourceSpans of its own, as cloudflared's exporter has it."""
    export = message_class("ExportTraceServiceRequest")()
    for span in spans:
        entry = export.resource_spans.add(schema_url=SCHEMA_URL)
        _add(entry.resource.attributes, resource)
        scope = entry.scope_spans.add()
        scope.scope.name = SCOPE
        made = scope.spans.add(
            trace_id=span.trace_id,
            span_id=span.span_id,
            parent_span_id=span.parent_id,
            name=span.name,
            kind=KIND_INTERNAL,
            start_time_unix_nano=span.start,
            end_time_unix_nano=span.end,
            flags=span.flags,
        )
        made.status.SetInParent()
        if span.status:
            made.status.code = span.status
            made.status.message = span.message
        _add(made.attributes, span.attributes)
    encoded: bytes = export.SerializeToString(deterministic=True)
    return encoded


def _add(target: Any, attributes: Sequence[Attribute]) -> None:
    for key, value in attributes:
        entry = target.add(key=key)
        if isinstance(value, bool):
            entry.value.bool_value = value
        elif isinstance(value, int):
            entry.value.int_value = value
        else:
            entry.value.string_value = value


def decode_spans(data: bytes) -> list[Span]:
    """Give the spans of an ExportTraceServiceRequest. Errors: WireError."""
    from google.protobuf.message import DecodeError  # noqa: PLC0415  (as above)

    export = message_class("ExportTraceServiceRequest")()
    try:
        export.ParseFromString(data)
    except DecodeError as error:
        raise WireError(f"spans that do not decode: {error}") from None
    return [
        Span(
            trace_id=span.trace_id,
            span_id=span.span_id,
            parent_id=span.parent_span_id,
            name=span.name,
            start=span.start_time_unix_nano,
            end=span.end_time_unix_nano,
            attributes=tuple((entry.key, _value(entry.value)) for entry in span.attributes),
            status=span.status.code,
            message=span.status.message,
            flags=span.flags,
        )
        for entry in export.resource_spans
        for scope in entry.scope_spans
        for span in scope.spans
    ]


def _value(value: Any) -> str | int | bool:
    chosen: str | None = value.WhichOneof("value")
    found: str | int | bool = getattr(value, chosen) if chosen is not None else ""
    return found
