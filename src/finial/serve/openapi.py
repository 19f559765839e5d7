"""The API as an OpenAPI document, made from the structs that requests are decoded into: it cannot say anything else.

msgspec.json.encode(document())
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from finial import __version__
from finial.serve import replies, wire

_REF = "#/components/schemas/{name}"

# path -> (summary, request, reply, also streamed as)
_POSTS: dict[str, tuple[str, type, type, type | None]] = {
    "/v1/chat/completions": ("Answer a conversation", wire.ChatRequest, replies.ChatReply, replies.ChatChunk),
    "/v1/completions": ("Continue a text", wire.CompletionRequest, replies.TextReply, replies.TextReply),
    "/v1/embeddings": ("Vectors for texts", wire.EmbeddingRequest, replies.EmbeddingReply, None),
}
_GETS: dict[str, tuple[str, type | None, tuple[int, ...]]] = {
    "/v1/models": ("The model that is served", replies.ModelList, (503,)),
    "/v1/models/{name}": ("One model", replies.Model, (404, 503)),
    "/health": ("Whether the process is well", replies.Health, ()),
    "/ready": ("Whether requests are taken", replies.Health, ()),
    "/metrics": ("Numbers for Prometheus", None, ()),
}
_REFUSALS = {
    400: "A field, by its name, that is not supported or out of its limits",
    401: "The API key is missing or wrong",
    403: "A host or an origin that is not allowed",
    404: "No such model or path",
    405: "Another method is meant",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is no application/json",
    429: "The queue is full; Retry-After says when to ask again",
    503: "The model is loading, or the server is about to end",
}


@functools.cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    kinds: list[type] = [replies.ErrorReply]
    kinds += [kind for _, *found in _POSTS.values() for kind in found if kind is not None]
    kinds += [kind for _, kind, _ in _GETS.values() if kind is not None]
    schemas, components = msgspec.json.schema_components(dict.fromkeys(kinds), ref_template=_REF)
    schema = dict(zip(dict.fromkeys(kinds), schemas, strict=True))
    paths: dict[str, Any] = {}
    for path, (summary, request, reply, event) in _POSTS.items():
        content: dict[str, Any] = {"application/json": {"schema": schema[reply]}}
        if event is not None:
            content["text/event-stream"] = {"schema": {"type": "string"}, "x-event": schema[event]}
        body = {"required": True, "content": {"application/json": {"schema": schema[request]}}}
        answers = {"200": {"description": "The answer", "content": content}} | _refusals(tuple(_REFUSALS), schema)
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": answers}}
    for path, (summary, kind, refusals) in _GETS.items():
        text = {"text/plain": {"schema": {"type": "string"}}}
        content = text if kind is None else {"application/json": {"schema": schema[kind]}}
        answers = {"200": {"description": summary, "content": content}}
        if kind is replies.Health:
            other = "500" if path == "/health" else "503"
            answers[other] = {"description": "It is not", "content": content}
        answers |= _refusals((400, 401, 403, *refusals), schema)
        get: dict[str, Any] = {"summary": summary, "responses": answers}
        if "{name}" in path:
            get["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        if path == "/health":
            get["security"] = []
        paths[path] = {"get": get}
    return {
        "openapi": "3.1.0",
        "info": {"title": "finial", "version": __version__, "description": "The OpenAI API, as finial serves it."},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _refusals(statuses: tuple[int, ...], schema: dict[type, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema[replies.ErrorReply]}}
    return {str(status): {"description": _REFUSALS[status], "content": content} for status in statuses}
