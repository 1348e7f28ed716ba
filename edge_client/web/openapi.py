"""What FastAPI does not know of the OpenAPI document: tokens, summaries, examples and events."""

import re
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from edge_client.web.schemas import events
from edge_client.web.schemas.native import Problem

_REFERENCE = "#/components/schemas/{model}"
_SECURITY = {
    "token": {"type": "http", "scheme": "bearer", "description": "a token of the operator's --client-tokens"},
    "password": {
        "type": "http", "scheme": "basic",
        "description": "the same token as the password, as AUTOMATIC1111's clients send it; any name",
    },
    "key": {
        "type": "apiKey", "in": "query", "name": "key",
        "description": "part of an image's `url` in a job: for that image alone, and for a day",
    },
}  # fmt: skip
_PUBLIC = ("/healthz", "/readyz")
_SIGNED = "/v1/jobs/{job_id}/images/{index}"
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "JobCreate": [
        {"prompt": "a fox to the left of a donut", "seed": 7, "hybrid": {"split": "8,17"}},
        {"prompt": "a cat", "n": 4, "scheduler": "dpmpp_2m", "num_inference_steps": 25, "hybrid": {"mode": "edge"}},
        {"prompt": "a dog", "hybrid": {"max_latency_ms": 2000}, "previews": 0},
    ],
    "Generation": [
        {"prompt": "a fox to the left of a donut", "size": "128x128", "seed": 7, "hybrid": {"split": "8,17"}},
    ],
    "TextToImage": [
        {"prompt": "a fox to the left of a donut", "steps": 25, "sampler_name": "DPM++ 2M", "refiner_switch_at": 0.32},
    ],
    "ImageToImage": [
        {"prompt": "a cat", "init_images": ["data:image/png;base64,..."], "denoising_strength": 0.6, "steps": 25},
    ],
}
"""Of bodies."""


def operation_id(route: APIRoute) -> str:
    """Returns the name that generated clients give an operation."""
    return re.sub(r"\W+", "_", "_".join((*map(str, route.tags[:1]), route.name)))


def install(app: FastAPI, *, needs_token: bool) -> None:
    """Completes the OpenAPI document of an application.

    Args:
        app: The application.
        needs_token: Whether clients must send a token.
    """
    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        _complete(document, needs_token)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _complete(document: dict[str, Any], needs_token: bool) -> None:
    components = document["components"]
    schemas = components["schemas"]
    schemas["Problem"] = Problem.model_json_schema(ref_template=_REFERENCE)
    for name, schema in events.schemas(_REFERENCE).items():
        schemas.setdefault(name, schema)
    for name, examples in EXAMPLES.items():
        if name in schemas:
            schemas[name].setdefault("examples", examples)
    components["securitySchemes"] = _SECURITY
    tokens: list[dict[str, list[str]]] = [{"token": []}, {"password": []}]
    document["security"] = tokens if needs_token else [{}, *tokens]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            summary, _, rest = operation.get("description", "").partition("\n")
            operation["summary"] = summary.rstrip(".") or operation.get("summary", "")
            operation["description"] = rest.strip() or summary
            if path in _PUBLIC:
                operation["security"] = []
            elif path == _SIGNED:
                operation["security"] = [*document["security"], {"key": []}]
