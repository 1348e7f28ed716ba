"""What is wrong with a request is said in our words."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel, ValidationError

from edge_client.web import errors
from edge_client.web.schemas.a1111 import ImageToImage, PngInfo, TextToImage
from edge_client.web.schemas.native import JobCreate
from edge_client.web.schemas.openai import Generation

ODD: list[Any] = [
    None, -1, -1e9, 1e9, 10**20, 0.5, float("nan"), "", " ", "x" * 5000, "\ud800", [], ["a", "b", "c"], {}, {"x": 1},
    True, [{}], [{"name": "a", "weight": 99}], [{"name": "a"}] * 9,
    {"mode": "x", "split": "a", "cloud_steps": -1, "segments": "", "codec": "x", "deadline_ms": 0, "private": "q"},
]  # fmt: skip


@pytest.mark.parametrize("schema", [JobCreate, Generation, TextToImage, ImageToImage, PngInfo])
def test_no_phrase_of_the_library(schema: type[BaseModel]) -> None:
    """Every field with every odd value: the message says what to send, not what a validator says."""
    found = 0
    for field in schema.model_fields:
        for value in ODD:
            try:
                schema.model_validate({"prompt": "x", field: value})
            except ValidationError as error:
                for each in error.errors():
                    said = errors._describe(field, each)
                    found += 1
                    assert said.startswith(field)
                    assert any(f": {word} " in said for word in ("send", "choose", "it", "there", "a")), said
                    assert not any(word in said for word in ("Input", "should", "required", "permitted", "see /docs"))

    assert found > 10


def test_a_body_that_is_no_json() -> None:
    """The same of a body that cannot be read at all."""
    app = errors.FastAPI()
    errors.install(app)

    @app.post("/")
    async def post(body: JobCreate) -> None:
        return

    with TestClient(app) as client:
        head = {"Content-Type": "application/json"}
        bodies = (b"{", b"", b"[]", b"7")
        told = [client.post("/", content=body, headers=head).json()["detail"] for body in bodies]

    assert told[0] == "body: it is not JSON; send a JSON object"
    assert all("send" in detail and "valid" not in detail for detail in told), told
