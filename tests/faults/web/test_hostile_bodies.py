"""Bodies that would stall everybody: refused before they are read or parsed, or parsed where nobody waits for it."""

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import ValidationError

from edge_client.bundles.bundle import Bundle
from edge_client.inference.models import Models
from edge_client.web import bodies
from edge_client.web.schemas.native import JobCreate
from tests.integration.web.conftest import TOKENS, GatewayServer, ask, picture, serving
from tests.support.patience import HANG_S

PATHS = ("/v1/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/png-info", "/sdapi/v1/options")
JSON = {"content-type": "application/json"}


@pytest.fixture
def closed(tmp_path: Path, bundle: Bundle, models: Models) -> Iterator[GatewayServer]:
    """A gateway that wants a token and takes bodies of 1 MiB."""
    with serving(tmp_path, bundle, models, None, tokens=TOKENS, max_body_bytes=1 << 20) as server:
        yield server


def open_request(server: GatewayServer, path: str, length: int, *headers: str) -> socket.socket:
    """Sends the head of a request, and nothing of its body."""
    where = urlsplit(server.url)
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {length}", *headers, "", ""]
    connection = socket.create_connection((where.hostname, where.port), timeout=HANG_S)
    connection.sendall("\r\n".join(lines).encode())
    return connection


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "text/plain"])
@pytest.mark.parametrize("path", [*PATHS, "/v1/images/edits", "/v1/nothing"])
def test_a_stranger_is_refused_before_the_body_comes(path: str, kind: str, closed: GatewayServer) -> None:
    """The answer is there although not one byte of the body was sent."""
    with open_request(closed, path, 1 << 19, f"Content-Type: {kind}") as connection:
        assert b" 401 " in connection.recv(1000)


@pytest.mark.parametrize("content", [b"{", b"", b'{"prompt": ""}', b"\xff", b"[" * 100_000])
def test_a_stranger_learns_nothing_of_a_body(content: bytes, closed: GatewayServer) -> None:
    with closed.client() as client:
        for path in PATHS:
            assert client.post(path, content=content, headers=JSON).status_code == 401
            wrong = {**JSON, "authorization": "Bearer wrong"}
            assert client.post(path, content=content, headers=wrong).status_code == 401


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content",
    [
        json.dumps({f"k{index}": index for index in range(200_000)}).encode(),
        json.dumps({"prompt": "a fox", "loras": [{}] * 100_000}).encode(),
        json.dumps({"prompt": "a fox", "hybrid": {f"k{index}": [] for index in range(100_000)}}).encode(),
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["keys", "items", "nested keys", "deep"],
)
def test_too_many_values_are_counted_not_parsed(
    content: bytes, path: str, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[bytes] = []
    monkeypatch.setattr(bodies, "parse_json", parsed.append)
    answer = client.post(path, content=content, headers=JSON)

    assert (answer.status_code, answer.json()["field"]) == (422, "body")
    assert str(bodies.MAX_VALUES) in answer.json()["detail"]
    assert parsed == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("depth", [100, 5000])
def test_depth_is_bounded(depth: int, path: str, client: httpx.Client) -> None:
    content = b'{"prompt": "a fox", "override_settings": ' + b'{"a":' * depth + b"1" + b"}" * (depth + 1)
    answer = client.post(path, content=content, headers=JSON)

    assert (answer.status_code, answer.json()["field"]) == (422, "body")
    assert str(bodies.MAX_DEPTH) in answer.json()["detail"]


@pytest.mark.parametrize("where", ["", "hybrid", "loras"])
def test_many_unknown_fields_are_one_error(where: str) -> None:
    """Whether at the top, in an object or in a list; it names the first."""
    unknown = {f"k{index}": index for index in range(15_000)}
    lora = {"name": "a", **unknown}
    nested: dict[str, Any] = {"": unknown, "hybrid": {"hybrid": unknown}, "loras": {"loras": [lora]}}
    with pytest.raises(ValidationError) as caught:
        JobCreate.model_validate({"prompt": "a fox", **nested[where]})

    assert [error["loc"][-1] for error in caught.value.errors()] == ["k0"]


def test_an_unknown_field_is_named(client: httpx.Client) -> None:
    answer = client.post("/v1/jobs", json=ask(colour="red", size="large"))

    assert (answer.status_code, answer.json()["field"]) == (422, "colour")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_long_name_does_not_come_back(path: str, client: httpx.Client) -> None:
    """Of a megabyte, or of many in one another."""
    for name in ("k" * 1_000_000, "\N{SNOWMAN}" * 100_000):
        answer = client.post(path, json={"prompt": "a fox", name: 1})
        assert answer.status_code == 422
        assert name[:50] in answer.json()["detail"]
        assert len(answer.content) < 4000


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "\xff"}', "UTF-8"),
        (gzip.compress(b'{"prompt": "a fox"}', mtime=0), "Content-Encoding"),
        (b'{"prompt": "a fox", "seed": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_json_that_cannot_be_read(content: bytes, said: str, path: str, client: httpx.Client) -> None:
    """The answer says what it is."""
    answer = client.post(path, content=content, headers=JSON)

    assert (answer.status_code, answer.json()["field"]) == (422, "body")
    assert said in answer.json()["detail"]


@pytest.mark.parametrize("name", ["prompt", "n", "hybrid[mode]"])
def test_a_form_field_that_is_there_twice(name: str, client: httpx.Client) -> None:
    """None wins silently."""
    parts = {"image": ("a.png", picture(), "image/png")}
    data = {"prompt": "a fox", name: ["1", "2"]}
    answer = client.post("/v1/images/edits", files=parts, data=data)

    assert (answer.status_code, answer.json()["field"]) == (422, name)
    assert "twice" in answer.json()["detail"]


def test_a_whole_number_that_is_too_large(client: httpx.Client) -> None:
    answer = client.get("/v1/jobs", params={"limit": "9" * 5000})

    assert answer.status_code == 422
    assert "smaller" in answer.json()["detail"]


@pytest.mark.parametrize("path", PATHS)
def test_parsing_holds_nobody_up(path: str, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one body is being parsed, others are answered."""
    parse, began, may_end = bodies.parse_json, threading.Event(), threading.Event()

    def slow(content: bytes) -> Any:
        began.set()
        assert may_end.wait(HANG_S)
        return parse(content)

    monkeypatch.setattr(bodies, "parse_json", slow)
    sender = threading.Thread(target=client.post, args=(path,), kwargs={"json": {"image": "x", "prompt": ""}})
    sender.start()
    try:
        assert began.wait(HANG_S)
        assert client.get("/healthz").json() == {"status": "ok"}
    finally:
        may_end.set()
        sender.join(HANG_S)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_body_that_does_not_come(kind: str, closed: GatewayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender is told so; nothing is held for it any more."""
    monkeypatch.setattr(bodies, "PATIENCE_S", 0.0)
    token = f"Authorization: Bearer {TOKENS[0]}"
    with open_request(closed, "/v1/images/edits", 1000, f"Content-Type: {kind}", token) as connection:
        assert b" 408 " in connection.recv(1000)


def test_bodies_in_memory_are_bounded_and_shared(closed: GatewayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One client may hold half of what all may hold; another has room all the while."""
    monkeypatch.setattr(bodies, "MAX_IN_FLIGHT", 2)
    content = b'{"image": "' + b"A" * 700_000 + b'"}'
    parse, began, may_end = bodies.parse_json, threading.Event(), threading.Event()

    def slow(content: bytes) -> Any:
        began.set()
        assert may_end.wait(HANG_S)
        return parse(content)

    one, two = ({**JSON, "authorization": f"Bearer {token}"} for token in TOKENS)
    path = "/sdapi/v1/png-info"
    with closed.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(bodies, "parse_json", slow)
            kept = threading.Thread(target=client.post, args=(path,), kwargs={"content": content, "headers": one})
            kept.start()
            assert began.wait(HANG_S)
        try:
            refused = client.post(path, content=content, headers=one)
            other = client.post(path, content=content, headers=two)
        finally:
            may_end.set()
            kept.join(HANG_S)
        again = client.post(path, content=content, headers=one)

    assert (refused.status_code, refused.json()["reason"]) == (429, "TOO_MANY_JOBS")
    assert refused.headers["retry-after"] == "1"
    assert (other.status_code, again.status_code) == (422, 422)  # no image, but read


@pytest.mark.parametrize("content", ["[" * 60_000, '{"a":' * 5000])
def test_depth_in_a_form_field_is_bounded(content: str, client: httpx.Client) -> None:
    files = {"image": ("a.png", b"image", "image/png")}
    answer = client.post("/v1/images/edits", files=files, data={"prompt": "a fox", "hybrid": content})

    assert (answer.status_code, answer.json()["reason"]) == (422, "FIELD_INVALID")


def test_a_body_in_single_bytes(server: GatewayServer) -> None:
    """It comes together, whatever the pieces."""
    with server.client() as client:
        body = json.dumps(ask(n=0)).encode()
        answer = client.post("/v1/jobs", content=(body[at : at + 1] for at in range(len(body))), headers=JSON)

    assert (answer.status_code, answer.json()["field"]) == (422, "n")
