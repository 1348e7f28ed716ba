"""What describes the API works offline, loads nothing from elsewhere, and says what is true."""

import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import playwright.sync_api
import pytest
from pydantic import BaseModel

from edge_client.bundles.bundle import Bundle
from edge_client.inference.models import Models
from edge_client.web.openapi import EXAMPLES
from edge_client.web.schemas import a1111, native, openai
from edge_client.web.schemas.events import DATA
from tests.integration.web.conftest import TOKENS, GatewayServer, serving, submit, watching
from tests.support.fake_cloud import FakeCloud
from tests.support.patience import HANG_S

CHROMIUM = shutil.which("chromium")
METHODS = ("get", "post", "delete", "put", "patch")


@pytest.fixture
def document(client: httpx.Client) -> dict[str, Any]:
    said: dict[str, Any] = client.get("/openapi.json").json()
    return said


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method in METHODS
    }


def test_the_page_of_the_api_works_offline(client: httpx.Client) -> None:
    """All of it lies here, under the policy that all pages have."""
    page = client.get("/docs", follow_redirects=True)
    assert (page.status_code, page.headers["content-type"].partition(";")[0]) == (200, "text/html")
    used = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(used) >= 4
    for address in used:
        assert "//" not in address
        assert client.get(str(page.url.join(address))).status_code == 200
    assert "<script>" not in page.text
    for path in ("/docs/", "/docs/start.js", "/docs/swagger-ui.css", "/openapi.json"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
    assert client.get("/redoc").status_code == 404


@pytest.mark.parametrize("tokens", [(), TOKENS])
def test_the_document_names_the_tokens(tokens: tuple[str, ...], tmp_path: Path, bundle: Bundle, models: Models) -> None:
    """How to send one, whether one is needed, and what needs none."""
    with serving(tmp_path, bundle, models, None, tokens=tokens) as server, server.client() as client:
        document = client.get("/openapi.json").json()
        schemes = document["components"]["securitySchemes"]
        assert {(scheme["type"], scheme.get("scheme")) for scheme in schemes.values()} == {
            ("http", "bearer"), ("http", "basic"), ("apiKey", None),
        }  # fmt: skip
        for name, operation in operations(document).items():
            needed = operation.get("security", document["security"])
            assert {key for each in needed for key in each} <= set(schemes)
            method, path = name.split()
            if "{" not in path and method == "get":
                status = client.get(path).status_code
                assert (status == 401) == (bool(needed) and {} not in needed), name


def test_operations_are_described(document: dict[str, Any]) -> None:
    """By sentences, not by the names of functions; their ids are short and no two alike."""
    found = operations(document)
    for name, operation in found.items():
        assert len(operation["summary"].split()) >= 3, name
        assert operation["summary"][0].isupper(), name
        assert operation["description"], name
        assert re.fullmatch(r"[a-z0-9_]{3,40}", operation["operationId"]), name
    assert len({operation["operationId"] for operation in found.values()}) == len(found)


def test_examples_are_right(document: dict[str, Any]) -> None:
    """Each body of an API has one that its model takes."""
    models: dict[str, type[BaseModel]] = {
        name: getattr(module, name) for name in EXAMPLES for module in (native, openai, a1111) if hasattr(module, name)
    }
    assert set(models) == set(EXAMPLES)
    for name, model in models.items():
        examples = document["components"]["schemas"][name]["examples"]
        assert examples
        for example in examples:
            model.model_validate(example)


def test_events_are_typed(document: dict[str, Any], client: httpx.Client, fake: FakeCloud) -> None:
    """Every event that comes has a schema, and keeps it."""
    schemas = document["components"]["schemas"]
    stream = document["paths"]["/v1/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]["text/event-stream"]
    assert stream["schema"] == {"$ref": "#/components/schemas/JobEvent"}
    named = [each["$ref"].rpartition("/")[2] for each in schemas["JobEvent"]["oneOf"]]
    assert {schemas[name]["properties"]["event"]["const"] for name in named} == set(DATA)
    for reference in re.findall(r"#/components/schemas/(\w+)", str(document)):
        assert reference in schemas

    fake.die_after_call = 2
    jobs = [submit(client, previews=2), submit(client, hybrid={"mode": "edge"}), submit(client, hybrid={"quality": 1})]
    seen = set()
    for job in jobs:
        with watching(client, job["id"]) as events:
            for event in events:
                DATA[event.name].model_validate(event.data)
                seen.add(event.name)
    assert {"queued", "started", "planned", "cloud_started", "step", "preview", "fallback", "split", "image"} <= seen


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine (apt install chromium)")
def test_a_browser_shows_the_api(server: GatewayServer) -> None:
    """All operations, with nothing from elsewhere and nothing that the policy stops."""
    with playwright.sync_api.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{server.url}/docs")
        page.wait_for_selector(".opblock", timeout=1000 * HANG_S)
        shown = page.locator(".opblock").count()
        browser.close()

    assert shown >= 20
    assert said == []
    assert {urlsplit(url).netloc for url in asked} == {urlsplit(server.url).netloc}
