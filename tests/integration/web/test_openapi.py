"""The OpenAPI document and the server say the same, whatever is sent: schemathesis, and bytes that are nearly right."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
)

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from tests.integration.web.conftest import GatewayServer, ask, finish, picture, serving

pytestmark = pytest.mark.slow

MAX_EXAMPLES = 5
"""Of each operation and kind of data."""
NOT_CHECKED = [
    positive_data_acceptance,  # what the document cannot say is refused: a size that is no multiple, a model's name
    negative_data_rejection,  # OpenAI's and AUTOMATIC1111's APIs read over fields that they do not know
]
CAPS = {"num_inference_steps": 4, "steps": 4, "n": 2, "batch_size": 1, "n_iter": 2, "width": 64, "height": 64}
"""So that no example asks for a large image."""


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, models: Models, cloud: Cloud
) -> Iterator[GatewayServer]:
    """A gateway with room for everything that is asked for."""
    with serving(tmp_path_factory.mktemp("data"), bundle, models, cloud, max_queue=10_000) as server:
        yield server


def cap(value: Any) -> Any:
    """Returns a body that asks for small images where it asks for large ones; all else stays as it is."""
    if not isinstance(value, dict):
        return value
    capped = {
        name: min(each, CAPS[name]) if name in CAPS and type(each) in (int, float) else cap(each)
        for name, each in value.items()
    }
    if isinstance(size := capped.get("size"), str) and size[:1].isdigit():
        capped["size"] = "32x32"
    return capped


def operations(url: str) -> Iterator[Any]:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in schema.get_all_operations():
        yield result.ok()


def try_out(operation: Any, mode: GenerationMode, job_id: str | None) -> None:
    """Sends examples of an operation; raises what does not fit the document."""

    @hypothesis.settings(
        max_examples=MAX_EXAMPLES, derandomize=True, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        case.body = cap(case.body)
        if job_id is not None:
            case.path_parameters["job_id"] = job_id
        response = case.call()
        is_stream = "text/event-stream" in response.headers.get("content-type", ["?"])[0]
        # OpenAPI 3.1 cannot say what an event of a stream is: the document says that the stream is text
        not_checked = [*NOT_CHECKED, response_schema_conformance] if is_stream else NOT_CHECKED
        case.validate_response(response, excluded_checks=not_checked)

    send()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of schemathesis and hypothesis about each other
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name)
def test_the_document_and_the_server_agree(mode: GenerationMode, server: GatewayServer, client: httpx.Client) -> None:
    """Every status, media type, header and body is a documented one, for right and wrong requests of each operation."""
    failures: dict[str, BaseException] = {}
    seen = []
    for operation in operations(server.url):
        takes_id = "{job_id}" in operation.path
        for job_id in (None, finish(client)["id"]) if takes_id else (None,):
            try:
                try_out(operation, mode, job_id)
            except hypothesis.errors.Unsatisfiable:  # nothing can be wrong about a request that has no parts
                continue
            except Exception as error:
                failures[f"{operation.label} {job_id}"] = error
        seen.append(operation.label)
    assert not failures, "\n\n".join(f"{name}: {error!r:.3000}\n{error}" for name, error in failures.items())
    assert {"POST /v1/jobs", "POST /v1/images/edits", "POST /sdapi/v1/img2img", "GET /v1/capabilities"} <= set(seen)


def test_every_problem_of_the_document_is_a_problem(client: httpx.Client) -> None:
    """Each answer that is no success has the one schema; the document names all operations of the APIs."""
    document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                if int(status) < 400:
                    continue
                where = f"{method} {path} {status}"
                assert list(answer["content"]) == ["application/problem+json"], where
                schema = answer["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, where
    assert len(document["paths"]) >= 20


BODIES: dict[str, bytes] = {
    "/v1/jobs": json.dumps(ask(num_inference_steps=4, hybrid={"split": "2,2"}, loras=[])).encode(),
    "/v1/images/generations": json.dumps(
        {"prompt": "a fox", "size": "32x32", "n": 1, "stream": False, "num_inference_steps": 4, "hybrid": {}}
    ).encode(),
    "/sdapi/v1/txt2img": json.dumps(
        {"prompt": "a fox", "seed": 5, "steps": 4, "width": 32, "height": 32, "sampler_name": "DDIM", "eta": 0.0}
    ).encode(),
    "/sdapi/v1/options": json.dumps({"sd_model_checkpoint": "fake-large", "send_seed": [1, {"y": None}]}).encode(),
    "/v1/images/edits": b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % part
        for part in (
            (b"prompt", b"", b"a fox"), (b"size", b"", b"32x32"), (b"num_inference_steps", b"", b"4"),
            (b"hybrid[split]", b"", b"2,2"), (b"image", b'; filename="a.png"', picture()),
        )
    ) + b"--x--\r\n",
}  # fmt: skip
SPICE = [
    b"\x00", b"\xff", b"\\ud800", b"\\u0000", b"NaN", b"-1", b"1e999", b"null", b"{}", b"[]", b'"', b"{", b"}", b",",
    b"true", b"9" * 30, b"\r\n", b"--x", b"a" * 5000, b"[" * 3000, "\U0001f98aé".encode(), b"<lora:x:1>", b"((a:2)",
    b"%00",
]  # fmt: skip


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Returns bytes with one to three changes: something put in, cut out, doubled or overwritten."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        stop = min(len(content), start + rng.randint(0, 12))
        middle = rng.choice((b"", rng.choice(SPICE), content[start:stop] * 2, rng.randbytes(stop - start)))
        content = content[:start] + middle + content[stop:]
    return content


@pytest.mark.parametrize("path", BODIES)
def test_bytes_that_are_nearly_right(path: str, server: GatewayServer, client: httpx.Client) -> None:
    """Forty small changes to a good body: only documented statuses, never a bug; and it still serves good ones."""
    rng = random.Random(path)
    kind = "multipart/form-data; boundary=x" if path.endswith("edits") else "application/json"
    headers = {"content-type": kind}
    documented = client.get("/openapi.json").json()["paths"][path]["post"]["responses"]
    seen: Counter[int] = Counter()
    for _ in range(40):
        body = mutate(BODIES[path], rng)
        response = client.post(path, content=body, headers=headers)
        seen[response.status_code] += 1
        assert str(response.status_code) in documented, (body, response.text)
        assert response.status_code < 500, (body, response.text)
        if response.status_code >= 400:
            assert response.headers["content-type"] == "application/problem+json", body
            assert response.json()["status"] == response.status_code

    assert client.post(path, content=BODIES[path], headers=headers).status_code in (200, 202)
    assert len(seen) >= 2
