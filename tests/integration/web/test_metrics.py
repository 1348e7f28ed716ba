"""What a gateway counts at /metrics, who may read it, and that nobody can make it count without bound."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.web.metrics import MAX_TOKENS, Metrics
from hybridsd.tokens import Tokens, add_token
from tests.integration.web.conftest import Gate, serving
from tests.support.exposition import Exposition, exposition_of
from tests.support.fake_cloud import FakeCloud, Running

ASKED = {"prompt": "a fox", "num_inference_steps": 4, "hybrid": {"cloud_steps": 2}}


def of(client: httpx.Client, **options: Any) -> Exposition:
    answer = client.get("/metrics", **options)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Exposition(answer.text)


def draw(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    """Draws through OpenAI's API or ours; returns the job."""
    job = client.post("/v1/jobs", json={**ASKED, **changes}).json()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
        for _ in events.iter_lines():
            pass
    done: dict[str, Any] = client.get(f"/v1/jobs/{job['id']}").json()
    return done


@pytest.fixture
def own(tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud) -> Iterator[httpx.Client]:
    """A gateway of this test alone, and its client."""
    with serving(tmp_path / "data", bundle, models, cloud) as server, server.client() as client:
        yield client


def test_an_image_is_counted_in_all_that_it_is(own: httpx.Client, running_cloud: Running) -> None:
    """Its job, its steps by place, its hand-off, waits, bytes, and the requests by route."""
    assert draw(own)["state"] == "completed"
    seen = of(own)

    assert seen.value("hybridsd_edge_jobs_total", outcome="completed", mode="auto") == 1
    assert seen.value("hybridsd_edge_images_total", mode="hybrid") == 1
    assert seen.value("hybridsd_edge_steps_total", place="cloud") == 2
    assert seen.value("hybridsd_edge_steps_total", place="edge") == 2
    assert seen.value("hybridsd_edge_step_seconds_count") == 2
    assert seen.value("hybridsd_edge_handoff_step_sum") == 2
    assert seen.value("hybridsd_edge_decode_seconds_count") == 1
    assert seen.value("hybridsd_edge_queue_wait_seconds_count") == 1
    assert seen.value("hybridsd_edge_received_bytes_total", codec="residual") > 0
    assert seen.value("hybridsd_edge_token_jobs_total", token="none") == 1
    assert seen.total("hybridsd_edge_takeovers_total") == 0
    assert seen.total("hybridsd_edge_cache_requests_total") > 0
    assert seen.value("hybridsd_edge_ready") == 1
    assert seen.value("hybridsd_edge_cloud_up", target=running_cloud.target) == 1
    assert seen.value("hybridsd_edge_cloud_silent", target=running_cloud.target) == 0
    assert 0 < seen.value("hybridsd_edge_disk_used_bytes") < seen.value("hybridsd_edge_disk_limit_bytes")
    assert seen.value("hybridsd_edge_disk_free_bytes") > 0
    routes = {"POST": "/v1/jobs", "GET": "/v1/jobs/{job_id}/events"}
    for method, route in routes.items():
        status = "202" if method == "POST" else "200"
        assert seen.value("hybridsd_edge_http_requests_total", method=method, route=route, status=status) == 1
        assert seen.value("hybridsd_edge_http_request_duration_seconds_count", route=route) == 1


def test_a_second_image_of_a_prompt_hits_the_cache(own: httpx.Client) -> None:
    """Its embeddings are held; its plan is the bundle's."""
    draw(own, prompt="a fox that nobody saw before")
    first = of(own)
    draw(own, prompt="a fox that nobody saw before")
    second = of(own)
    labels = {"cache": "embeddings", "result": "hit"}
    name = "hybridsd_edge_cache_requests_total"
    assert second.value(name, **labels) > first.value(name, **labels)


def test_a_lost_cloud_is_a_takeover_with_its_reason(own: httpx.Client, fake: FakeCloud) -> None:
    """And the retries before it are counted, too."""
    fake.refuse_with = "UNAVAILABLE"
    record = draw(own)["images"][0]
    seen = of(own)
    assert record["fallback_reason"]
    assert seen.value("hybridsd_edge_takeovers_total", reason=record["fallback_reason"]) == 1
    assert seen.value("hybridsd_edge_images_total", mode="edge") == 1
    assert seen.value("hybridsd_edge_steps_total", place="edge") == 4


def test_the_queue_is_a_gauge(own: httpx.Client, gate: Gate) -> None:
    """Running, waiting, and the streams that are open."""
    gate.close()
    for _ in range(4):
        own.post("/v1/jobs", json=ASKED)
    gate.wait(2)
    job = own.get("/v1/jobs").json()["jobs"][0]["id"]
    with own.stream("GET", f"/v1/jobs/{job}/events") as events:
        lines = events.iter_lines()  # held: dropped, it would end the stream
        next(lines)
        seen = of(own)
    assert seen.value("hybridsd_edge_jobs_running") == 2
    assert seen.value("hybridsd_edge_queue_length") == 2
    assert seen.value("hybridsd_edge_queue_limit") == 256
    assert seen.value("hybridsd_edge_event_streams") == 1
    gate.open()


def test_refusals_are_counted_by_reason(own: httpx.Client) -> None:
    """Of every room: a field, an unknown page, a strange origin."""
    own.post("/v1/jobs", json={**ASKED, "num_inference_steps": 0})
    own.get("/v1/jobs/nobody")
    own.post("/v1/jobs", json=ASKED, headers={"origin": "http://evil.test"})
    seen = of(own)
    for reason in ("FIELD_INVALID", "NOT_FOUND", "PERMISSION_DENIED"):
        assert seen.value("hybridsd_edge_refusals_total", reason=reason) == 1
    assert seen.total("hybridsd_edge_http_requests_total", status="403") == 1


def test_strangers_make_no_series(own: httpx.Client) -> None:
    """Paths, methods, ids, users, hosts and prompts are in no label: 300 of them are a handful of series."""
    draw(own)
    of(own)
    before = len(of(own).values)
    for index in range(50):
        own.get(f"/nowhere-{index}")
        own.request(f"WHAT{index}", "/v1/jobs")
        own.get(f"/v1/jobs/id-{index}", headers={"x-request-id": f"request-{index}", "user-agent": f"agent-{index}"})
        own.post("/v1/jobs", json={**ASKED, "hybrid": {"mode": f"mode-{index}"}, "id": f"id-{index}"})
        own.post("/v1/images/generations", json={"prompt": f"prompt-{index}", "model": f"model-{index}", "n": 0})
        own.get(f"/static/file-{index}.js")
    seen = of(own)
    new = len(seen.values) - before
    assert new <= 8 * 16, "at most 8 new routes, of some 16 series each"
    assert seen.value("hybridsd_edge_http_requests_total", method="GET", route="other", status="404") == 50
    assert seen.value("hybridsd_edge_http_requests_total", method="GET", route="/static", status="404") == 50
    for word in ("nowhere", "WHAT", "id-1", "request-", "agent-", "mode-", "model-", "prompt-", "file-", "a fox"):
        assert word not in seen.text


def test_tokens_are_bounded() -> None:
    """Beyond the bound all are one."""
    metrics = Metrics()
    for index in range(300):
        metrics.note_job(outcome="completed", mode="auto", token=f"token-{index}", queue_s=0.0, num_images=1)
        metrics.note_request(method=f"M{index}", route="/", status=200, reason=None, elapsed_s=0.1)
    seen = exposition_of(metrics.registry)
    series = {name: sum(each == name for each, _ in seen.values) for name in seen.kinds}
    assert series["hybridsd_edge_token_jobs_total"] == series["hybridsd_edge_token_images_total"] == MAX_TOKENS + 1
    assert seen.value("hybridsd_edge_token_jobs_total", token="other") == 300 - MAX_TOKENS
    assert series["hybridsd_edge_http_requests_total"] == 1


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    """Tokens by name, in a file."""
    path, scopes = tmp_path / "tokens", {"drawer": "generate", "reader": "metrics", "boss": "admin"}
    return {name: add_token(path, name, scopes=frozenset({scope})) for name, scope in scopes.items()}


def test_who_may_read_it(tmp_path: Path, tokens: dict[str, str], bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """The scope metrics, or admin; whoever draws may not, nor may strangers; named tokens are counted by name."""
    settings = {"tokens": Tokens(tmp_path / "tokens")}
    with serving(tmp_path / "data", bundle, models, cloud, **settings) as server, server.client() as client:

        def status(name: str) -> int:
            return client.get("/metrics", headers={"authorization": f"Bearer {tokens.get(name, name)}"}).status_code

        assert client.get("/metrics").status_code == 401
        assert [status(name) for name in ("wrong", "drawer", "reader", "boss")] == [401, 403, 200, 200]
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        with server.client(headers={"authorization": f"Bearer {tokens['drawer']}"}) as drawer:
            assert draw(drawer)["state"] == "completed"
        seen = of(client, headers={"authorization": f"Bearer {tokens['reader']}"})
        assert seen.value("hybridsd_edge_token_jobs_total", token="drawer") == 1
        assert seen.value("hybridsd_edge_token_images_total", token="drawer") == 1
        assert not any(secret in seen.text for secret in tokens.values())


def test_when_tokens_expire(tmp_path: Path, bundle: Bundle, models: Models) -> None:
    """By name; those that never do have none."""
    path = tmp_path / "tokens"
    path.write_text(
        f'[a]\nsha256 = "{"0" * 64}"\nexpires = 2037-01-01T00:00:00Z\n[b]\nsha256 = "{"1" * 64}"\n', encoding="utf-8"
    )
    reader = add_token(path, "reader", scopes=frozenset({"metrics"}))
    settings = {"tokens": Tokens(path)}
    with serving(tmp_path / "data", bundle, models, None, **settings) as server, server.client() as client:
        seen = of(client, headers={"authorization": f"Bearer {reader}"})
    assert seen.value("hybridsd_edge_token_expiry_timestamp_seconds", token="a") == 2114380800
    assert seen.total("hybridsd_edge_token_expiry_timestamp_seconds") == 2114380800


def test_head_is_counted_with_its_route(own: httpx.Client) -> None:
    own.head("/v1/capabilities")
    labels = {"method": "HEAD", "route": "/v1/capabilities", "status": "200"}
    assert of(own).value("hybridsd_edge_http_requests_total", **labels) == 1


def test_two_gateways_of_a_process_count_apart(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, own: httpx.Client
) -> None:
    draw(own)
    with serving(tmp_path / "other", bundle, models, cloud) as server, server.client() as client:
        assert of(client).total("hybridsd_edge_jobs_total") == 0
    assert of(own).total("hybridsd_edge_jobs_total") == 1
