"""What the gateway refuses: large bodies, malformed requests, invalid or huge images, and pages of other sites."""

import base64
import io
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.inference.models import Models
from edge_client.web.jobs import uploads
from edge_client.web.schemas.native import Problem
from tests.integration.web.conftest import GatewayServer, ask, finish, picture, serving
from tests.support.patience import HANG_S

LIMIT = 1 << 20
"""Bytes of a body, here."""
ELSEWHERE = "https://elsewhere.test"
FRIEND = "https://friend.test"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, models: Models) -> Iterator[GatewayServer]:
    """A gateway with everything that can be closed, closed."""
    settings: dict[str, Any] = {
        "hosts": ("127.0.0.1", "gateway.test"), "cors_origins": (FRIEND,), "max_body_bytes": LIMIT,
    }  # fmt: skip
    with serving(tmp_path_factory.mktemp("data"), bundle, models, None, **settings) as server:
        yield server


def problem(response: httpx.Response, status: int, field: str | None = None) -> dict[str, Any]:
    """Returns a problem, after a look at its form and at the headers that every answer has."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-content-type-options"] == "nosniff"
    said: dict[str, Any] = response.json()
    assert set(said) == set(Problem.model_fields)
    known = Problem.model_validate(said)
    assert (known.status, known.type) == (status, f"urn:hybridsd:problem:{known.reason}")
    assert known.title
    assert known.detail
    assert known.error == {
        "message": known.detail, "type": "invalid_request_error" if status < 500 else "server_error",
        "param": known.field, "code": known.reason,
    }  # fmt: skip
    assert field is None or known.field == field
    assert "Traceback" not in response.text
    return said


@pytest.fixture(autouse=True)
def still_there(client: httpx.Client) -> Iterator[None]:
    """Whatever came, the next one is served."""
    yield
    assert client.get("/healthz").json() == {"status": "ok"}


PATHS = ("/v1/jobs", "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/png-info")


@pytest.mark.parametrize("path", PATHS)
def test_a_body_beyond_the_limit(path: str, client: httpx.Client) -> None:
    """Whether it says its length or comes in pieces, and whatever it is for."""
    content = b'{"prompt": "' + b"a" * LIMIT + b'"}'
    if path.endswith("edits"):
        content = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + b"a" * LIMIT
    headers = {"content-type": "multipart/form-data; boundary=x" if path.endswith("edits") else "application/json"}

    problem(client.post(path, content=content, headers=headers), 413)
    problem(client.post(path, content=iter([content[:1000], content[1000:]]), headers=headers), 413)


def test_a_length_that_lies(server: GatewayServer) -> None:
    """A client that announces gigabytes is told at once, before it sends them."""
    where = urlsplit(server.url)
    head = "POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=HANG_S) as connection:
        connection.sendall(head.format(1 << 40).encode())
        assert b" 413 " in connection.recv(1000)
    with socket.create_connection((where.hostname, where.port), timeout=HANG_S) as connection:
        connection.sendall(head.format(100).encode() + b'{"prompt": ')  # and goes away in the middle


@pytest.mark.parametrize("path", PATHS[:2] + PATHS[3:])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "application/json"), (b"{", "application/json"), (b"\xff\xfe\x00", "application/json"),
        (b"null", "application/json"), (b"[]", "application/json"), (b'"x"', "application/json"),
        (b'{"prompt": ' + b"[" * 100_000, "application/json"), (b'{"seed": 1' + b"0" * 5000 + b"}", "application/json"),
        (b"prompt=a+fox", "application/x-www-form-urlencoded"), (b'{"prompt": "a fox"}', "text/plain"),
        (b"<prompt/>", "application/xml"), (b"--x--", "multipart/form-data; boundary=x"),
    ],
)  # fmt: skip
def test_what_is_no_json_object(content: bytes, kind: str, path: str, client: httpx.Client) -> None:
    response = client.post(path, content=content, headers={"content-type": kind})

    problem(response, response.status_code)
    assert response.status_code in (400, 422)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a \\ud800 fox"}', b'{"prompt": "a fox", "\\ud800": 1}', b'{"prompt": "a fox", "eta": NaN}',
        b'{"prompt": "a fox", "seed": Infinity}', b'{"prompt": "a fox", "hybrid": {"model": "\\ud800"}}',
        b'{"prompt": "a fox", "override_settings": {"sd_model_checkpoint": "\\ud800"}}',
        b'{"prompt": "a fox", "styles": ["\\udfff"]}', b'{"prompt": "a \\u0000 fox", "id": "\\u0000"}',
        b'{"prompt": "a fox", "n": 1e400}', b'{"prompt": "a fox", "seed": 1.5}', b'{"prompt": "a fox", "seed": true}',
        b'{"prompt": "a fox", "eta": 1' + b"0" * 400 + b"}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/generations", "/sdapi/v1/txt2img"])
def test_json_that_python_reads_and_nobody_means(path: str, body: bytes, client: httpx.Client) -> None:
    """Halves of characters, numbers that are none: refused, or read over where the API reads over; never a bug."""
    response = client.post(path, content=body, headers={"content-type": "application/json"})

    if response.status_code not in (200, 202):
        problem(response, 422)
    else:
        assert response.json()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=", b"----"),
        ("application/json", b"{}"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nx\r\n--x--"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--'),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"a" * 70_000 + b"\r\n--x--",
        ),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r'),
    ],
)
def test_forms_that_are_none(kind: str, content: bytes, client: httpx.Client) -> None:
    response = client.post("/v1/images/edits", content=content, headers={"content-type": kind})

    problem(response, response.status_code)
    assert response.status_code in (400, 422)


def bomb() -> bytes:
    """Returns a PNG of a few KB that says to be 60000x60000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(180_001) * 20))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def text_bomb() -> bytes:
    """Returns a small PNG whose text chunk unpacks to 100 MB."""
    whole = picture()
    data = b"parameters\0\0" + zlib.compress(bytes(100 << 20), 9)
    text = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return whole[:33] + text + whole[33:]


NO_PICTURES = {
    "text": b"an image of a fox", "empty": b"", "truncated": picture((64, 64))[:200], "bomb": bomb(),
    "text bomb": text_bomb(), "tiff": picture(kind="TIFF"), "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "head": b"\x89PNG\r\n\x1a\n",
}  # fmt: skip


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture(name: str, client: httpx.Client) -> None:
    """Refused at once by every API, with the field that has it, and nothing is unpacked for it."""
    content = NO_PICTURES[name]
    text = base64.b64encode(content).decode()
    sent = {"image": ("a.png", content, "image/png")}

    problem(client.post("/v1/jobs", json=ask(image=text)), 422, "image")
    problem(client.post("/v1/jobs", json=ask(image=base64.b64encode(picture()).decode(), mask=text)), 422, "mask")
    problem(client.post("/v1/images/edits", files=sent, data={"prompt": "a fox"}), 422, "image")
    problem(client.post("/sdapi/v1/img2img", json={"prompt": "a fox", "init_images": [text]}), 422, "image")
    problem(client.post("/sdapi/v1/png-info", json={"image": text}), 422, "image")


@pytest.mark.parametrize("text", ["not base64!", "data:image/png;base64,", "data:image/png;base64,@@@", "é", "A"])
def test_what_is_no_base64(text: str, client: httpx.Client) -> None:
    problem(client.post("/v1/jobs", json=ask(image=text)), 422, "image")


def test_a_picture_of_too_many_bytes(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the body may be large, the image in it may not; it is refused before it is decoded."""
    monkeypatch.setattr(uploads, "MAX_BYTES", 3000)
    problem(client.post("/v1/jobs", json=ask(image="A" * 5000)), 422, "image")
    problem(client.post("/sdapi/v1/png-info", json={"image": "data:image/png;base64," + "A" * 5000}), 422, "image")


@pytest.mark.parametrize("path", ["/v1/jobs", "/sdapi/v1/interrupt", "/v1/images/generations"])
@pytest.mark.parametrize(
    "origin", [ELSEWHERE, "null", "http://127.0.0.1:1", "http://[", "file://", "http://gateway.test.elsewhere.test"]
)
def test_a_page_of_another_site_is_refused(origin: str, path: str, client: httpx.Client) -> None:
    """Also where it is a plain form, for which a browser asks nobody; what it may read is nothing."""
    before = client.get("/v1/jobs").json()
    response = client.post(path, json=ask(), headers={"Origin": origin})

    problem(response, 403)
    assert "access-control-allow-origin" not in response.headers
    assert client.get("/v1/jobs").json() == before
    read = client.get("/v1/jobs", headers={"Origin": origin})
    assert "access-control-allow-origin" not in read.headers


def test_this_page_and_a_friend_are_let_in(client: httpx.Client, server: GatewayServer) -> None:
    """Pages of this gateway, by the name that they were fetched from, and of sites that the operator named."""
    for origin in (server.url, FRIEND):
        assert client.post("/sdapi/v1/interrupt", headers={"Origin": origin}).status_code == 200
    answer = client.get("/v1/jobs", headers={"Origin": FRIEND})
    assert answer.headers["access-control-allow-origin"] == FRIEND
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = client.options("/v1/jobs", headers={"Origin": FRIEND, **asked})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, FRIEND)
    refused = client.options("/v1/jobs", headers={"Origin": ELSEWHERE, **asked})
    assert refused.status_code in (400, 403, 405)
    assert "access-control-allow-origin" not in refused.headers


def test_without_cors_nobody_is_allowed(tmp_path: Path, bundle: Bundle, models: Models) -> None:
    with serving(tmp_path, bundle, models, None) as server, server.client() as client:
        asked = {"Origin": FRIEND, "Access-Control-Request-Method": "POST"}
        answer = client.options("/v1/jobs", headers=asked)
        assert answer.status_code >= 400
        assert not [name for name in answer.headers if name.startswith("access-control")]
        problem(client.post("/sdapi/v1/interrupt", headers={"Origin": FRIEND}), 403)


@pytest.mark.parametrize("host", ["elsewhere.test", "127.0.0.1.elsewhere.test", "gateway.test.", "", "x" * 1000])
def test_a_name_that_is_not_this_gateways(host: str, client: httpx.Client) -> None:
    """A page that lets its own name point here gets nothing, whatever it asks for."""
    for path in ("/v1/jobs", "/", "/static/app.js", "/healthz"):
        problem(client.get(path, headers={"Host": host}), 403)
    assert client.get("/healthz", headers={"Host": "gateway.test:80"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404), ("GET", "/static/../app.py", 404), ("GET", "/static/%2e%2e/app.py", 404),
        ("PUT", "/v1/jobs", 405), ("GET", "/v1/images/generations", 405), ("DELETE", "/healthz", 405),
        ("GET", "/v1/jobs/" + "x" * 65, 422), ("GET", "/v1/jobs/%00", 404), ("GET", "/v1/jobs/%ff", 404),
        ("GET", "/v1/jobs/..%2f..%2fsecret", 404), ("GET", "/v1/jobs/x/images/-1", 422), ("TRACE", "/v1/jobs", 405),
    ],
)  # fmt: skip
def test_paths_and_methods_that_are_none(method: str, path: str, status: int, client: httpx.Client) -> None:
    problem(client.request(method, path), status)


def test_the_page_may_load_nothing_from_elsewhere(client: httpx.Client) -> None:
    """Its headers say so, for the page, the API and images alike."""
    job = finish(client)
    for path in ("/", "/static/app.js", "/v1/jobs", job["images"][0]["url"]):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")


def test_a_form_field_cannot_name_a_file(client: httpx.Client) -> None:
    """The name of an upload is read over."""
    files = {"image": ("../../../etc/passwd", io.BytesIO(picture()), "image/png")}
    response = client.post("/v1/images/edits", files=files, data={"prompt": "a fox", "size": "32x32", "seed": "1"})

    assert response.status_code == 200
