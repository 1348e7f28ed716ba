"""The native API over HTTP: asking, watching, resuming, cancelling, images, pages, limits, webhooks, a lost cloud."""

import http.server
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.web import streams
from edge_client.web.schemas.native import Image, Job
from hybridsd.errors import Reason
from tests.integration.web.conftest import (
    ENDS,
    TOKENS,
    Event,
    Gate,
    GatewayServer,
    ask,
    finish,
    pixels,
    serving,
    submit,
    wait_for,
    watching,
)
from tests.support.fake_cloud import FakeCloud
from tests.support.patience import HANG_S


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def narrow(tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud) -> Iterator[GatewayServer]:
    """A gateway with one worker, two places to wait, and room for three finished jobs."""
    with serving(tmp_path / "data", bundle, models, cloud, workers=1, max_queue=2, max_jobs=3) as server:
        yield server


def problem(response: httpx.Response, status: int, reason: Reason) -> dict[str, Any]:
    """Returns a problem, after a look at what all have in common."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    said: dict[str, Any] = response.json()
    assert (said["status"], said["reason"]) == (status, reason.name)
    return said


def test_a_job_is_accepted_and_completed(client: httpx.Client) -> None:
    """202 with the place where it is; then an image, whose record says what was asked for."""
    response = client.post("/v1/jobs", json=ask(n=2))
    job = Job.model_validate(response.json())

    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/jobs/{job.id}"
    assert job.state in ("queued", "running", "completed")
    ended = wait_for(client, job.id).data["job"]
    assert client.get(response.headers["location"]).json() == ended
    assert (ended["state"], ended["error"], ended["attempts"]) == ("completed", None, 1)
    first, second = (Image.model_validate(image) for image in ended["images"])
    assert (first.index, second.index, first.seed, second.seed, second.image_index) == (0, 1, 5, 5, 1)
    assert (first.mode, first.planned_cloud_steps, first.actual_cloud_steps) == ("hybrid", 3, 3)
    assert [step.place for step in first.steps] == ["cloud"] * 3 + ["edge"] * 3
    one, two = (client.get(image["url"]).content for image in ended["images"])
    assert pixels(one).shape == (32, 32, 3)
    assert not np.array_equal(pixels(one), pixels(two))
    assert client.get(finish(client)["images"][0]["url"]).content[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_is_left_out_is_filled_in_so_that_it_can_be_repeated(client: httpx.Client) -> None:
    """The seed that the gateway chose makes the same image again."""
    first = finish(client, seed=None)
    again = finish(client, seed=first["request"]["seed"])

    assert first["request"]["seed"] is not None
    assert client.get(first["images"][0]["url"]).content != b""
    assert np.array_equal(*(pixels(client.get(job["images"][0]["url"]).content) for job in (first, again)))


def test_events_tell_the_story_in_order(client: httpx.Client, gate: Gate) -> None:
    """Numbers grow, every step comes once, the image before the end, and nothing after it."""
    gate.close(call=1)
    job = submit(client, n=2, previews=2)
    gate.wait()
    with watching(client, job["id"]) as stream:
        first = next(stream)
        gate.open()
        events = [first, *stream]

    names = [event.name for event in events]
    assert [event.number for event in events] == sorted({event.number for event in events})
    assert names[0] == "queued"
    assert names.index("started") < names.index("planned") < names.index("step") < names.index("image")
    assert names[-1] == "completed"
    steps = [(event.data["image_index"], event.data["step"], event.data["place"]) for event in events if is_step(event)]
    assert steps == [(i, s, "cloud" if s < 3 else "edge") for i in range(2) for s in range(6)]
    assert [event.data["image"]["index"] for event in events if event.name == "image"] == [0, 1]
    previews = [event.data["image"] for event in events if event.name == "preview"]
    assert previews
    assert all(pixels(each.partition(",")[2]).shape == (32, 32, 3) for each in previews)
    times = [
        sum(e.data["elapsed_s"] for e in events if e.name == "preview" and e.data["image_index"] == i) for i in range(2)
    ]
    assert [image["preview_s"] for image in events[-1].data["job"]["images"]] == pytest.approx(times)
    assert events[-1].data["job"]["state"] == "completed"


def is_step(event: Event) -> bool:
    return event.name == "step"


def test_a_broken_connection_goes_on_where_it_broke(client: httpx.Client, gate: Gate) -> None:
    """Cut anywhere and taken up by Last-Event-ID, no event is lost or doubled; only previews may be replaced."""
    gate.close(call=3)
    job = submit(client)
    gate.wait()
    for cut in (1, 2, 3, 4, 5):
        with watching(client, job["id"]) as stream:
            before = list(islice(stream, cut))
        with watching(client, job["id"], after=before[-1].number) as stream:
            following = next(stream) if cut < 5 else None
        if following is not None:
            assert following.number > before[-1].number
    with watching(client, job["id"]) as stream:
        before = list(islice(stream, 4))
    gate.open()
    with watching(client, job["id"], after=before[-1].number) as stream:
        after = list(stream)
    with watching(client, job["id"]) as stream:
        whole = list(stream)

    kept = [event for event in whole if event.name != "preview"]
    assert [event for event in before + after if event.name != "preview"] == kept
    assert len([event for event in kept if is_step(event)]) == 6
    with watching(client, job["id"], after=whole[-1].number) as stream:
        assert list(stream) == []


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "²"])
def test_a_last_event_id_that_is_none_is_refused(given: str, client: httpx.Client) -> None:
    job = finish(client)
    response = client.get(f"/v1/jobs/{job['id']}/events", headers={"Last-Event-ID": given.encode()})

    assert problem(response, 422, Reason.FIELD_INVALID)["field"] == "last_event_id"


def test_a_silent_stream_is_kept_alive(client: httpx.Client, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment comes while nothing happens, so that nobody between takes the connection for dead."""
    monkeypatch.setattr(streams, "KEEP_ALIVE_S", 0.05)
    gate.close()
    job = submit(client)
    gate.wait()
    with watching(client, job["id"]) as stream:
        comments = list(islice((event for event in stream if not event.name), 2))
        gate.open()
        rest = list(stream)

    assert all(event.comment.startswith("ping") for event in comments)
    assert rest[-1].name == "completed"


def test_cancelling_what_waits_and_what_runs(narrow: GatewayServer, gate: Gate, fake: FakeCloud) -> None:
    """What waits never begins; what runs ends after its step, and the cloud is told."""
    with narrow.client() as client:
        gate.close(call=2)
        running, waiting, last = (submit(client, seed=seed) for seed in range(3))
        gate.wait()
        assert [client.get(f"/v1/jobs/{job['id']}").json()["state"] for job in (running, waiting, last)] == [
            "running", "queued", "queued",
        ]  # fmt: skip
        assert [client.get(f"/v1/jobs/{job['id']}").json()["queue_position"] for job in (running, waiting, last)] == [
            None, 0, 1,
        ]  # fmt: skip
        problem(client.delete(f"/v1/jobs/{running['id']}"), 409, Reason.JOB_FINISHED)
        problem(client.delete(f"/v1/jobs/{waiting['id']}"), 409, Reason.JOB_FINISHED)

        answer = client.post(f"/v1/jobs/{waiting['id']}/cancel")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
        assert client.get(f"/v1/jobs/{last['id']}").json()["queue_position"] == 0
        assert client.post(f"/v1/jobs/{running['id']}/cancel").status_code == 200
        ended = wait_for(client, running["id"])  # though the cloud still holds its state back
        assert (ended.name, ended.data["job"]["images"]) == ("cancelled", [])
        assert fake.cancel_seen.wait(HANG_S)
        gate.open()
        assert wait_for(client, last["id"]).name == "completed"
        for job, state in ((running, "cancelled"), (waiting, "cancelled"), (last, "completed")):
            assert client.get(f"/v1/jobs/{job['id']}").json()["state"] == state
            problem(client.post(f"/v1/jobs/{job['id']}/cancel"), 409, Reason.JOB_FINISHED)
        assert not [event for event in events_of(client, waiting["id"]) if event.name in ("started", "step")]
        assert len([event for event in events_of(client, running["id"]) if is_step(event)]) <= 2


def events_of(client: httpx.Client, job_id: str) -> list[Event]:
    with watching(client, job_id) as stream:
        return list(stream)


def test_a_job_in_the_middle_of_its_edge_steps_stops_within_one(client: httpx.Client, server: GatewayServer) -> None:
    """A job of many steps here is cancelled at the first one that is seen, long before its end."""
    job = submit(client, hybrid={"split": "1,999"}, num_inference_steps=None, n=10, previews=0)
    with watching(client, job["id"]) as stream:
        next(event for event in stream if is_step(event) and event.data["place"] == "edge")
        client.post(f"/v1/jobs/{job['id']}/cancel")
        rest = list(stream)

    assert rest[-1].name == "cancelled"
    assert rest[-1].data["job"]["images"] == []


def test_what_is_not_there(client: httpx.Client) -> None:
    """404 for what never was, 410 for what was deleted; an image that a job does not have is 404."""
    job = finish(client)
    path = f"/v1/jobs/{job['id']}"
    for method, missing in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/images/0")):
        problem(client.request(method, f"/v1/jobs/nobody{missing}"), 404, Reason.NOT_FOUND)
    problem(client.get(f"{path}/images/1"), 404, Reason.NOT_FOUND)
    problem(client.get(f"{path}/images/10"), 422, Reason.FIELD_INVALID)
    problem(client.get("/nothing/here"), 404, Reason.NOT_FOUND)

    assert client.delete(path).status_code == 204
    for method, gone in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/images/0")):
        problem(client.request(method, path + gone), 410, Reason.JOB_GONE)
    assert job["id"] not in [each["id"] for each in client.get("/v1/jobs").json()["jobs"]]
    problem(client.post("/v1/jobs", json=ask(id=job["id"])), 410, Reason.JOB_GONE)


def test_the_oldest_are_pruned(narrow: GatewayServer) -> None:
    """Of five finished jobs three are kept; the others are gone with their files, and said to be."""
    with narrow.client() as client:
        jobs = [finish(client, seed=seed) for seed in range(5)]
        for job in jobs[:2]:
            problem(client.get(f"/v1/jobs/{job['id']}"), 410, Reason.JOB_GONE)
            problem(client.get(job["images"][0]["url"]), 410, Reason.JOB_GONE)
        for job in jobs[2:]:
            assert client.get(job["images"][0]["url"]).status_code == 200
        assert [each["id"] for each in client.get("/v1/jobs").json()["jobs"]] == [job["id"] for job in jobs[:1:-1]]
    assert len(list((narrow.data_dir / "images").rglob("*.png"))) == 3


def test_a_full_queue_says_when_to_come_again(narrow: GatewayServer, gate: Gate) -> None:
    """One runs, two wait, the next is told to come again; and later it may."""
    with narrow.client() as client:
        gate.close()
        first = submit(client)
        gate.wait()
        others = [submit(client, seed=seed) for seed in (6, 7)]
        response = client.post("/v1/jobs", json=ask(seed=8))

        said = problem(response, 429, Reason.TOO_MANY_JOBS)
        assert int(response.headers["retry-after"]) >= said["retry_delay_s"] >= 1
        assert client.post("/v1/jobs", json=ask(seed=6, id="x")).status_code == 429
        gate.open()
        assert {wait_for(client, job["id"]).name for job in (first, *others)} == {"completed"}
        assert client.post("/v1/jobs", json=ask(seed=8)).status_code == 202


def test_asking_twice_with_one_id_is_one_job(client: httpx.Client, fake: FakeCloud) -> None:
    """Before it is done and after; another body with that id is refused."""
    body = ask(id="once", seed=None)
    first, second = (client.post("/v1/jobs", json=body) for _ in range(2))
    ended = wait_for(client, "once").data["job"]
    third = client.post("/v1/jobs", json=body)

    assert {response.status_code for response in (first, second, third)} == {202}
    assert first.json()["created_at"] == second.json()["created_at"] == ended["created_at"]
    assert third.json() == ended
    assert len(fake.requests) == 1
    for other in ({"seed": 6}, {"prompt": "a cat"}, {"hybrid": {"cloud_steps": 1}}):
        said = problem(client.post("/v1/jobs", json={**body, **other}), 422, Reason.REQUEST_ID_REUSED)
        assert said["field"] == "id"


def test_asking_twice_at_the_same_time_is_one_job(server: GatewayServer, fake: FakeCloud) -> None:
    """Clients that repeat a request before the first one is answered make one job, too."""
    barrier = threading.Barrier(8)

    def post(client: httpx.Client) -> httpx.Response:
        client.get("/healthz")  # connects
        barrier.wait(HANG_S)
        return client.post("/v1/jobs", json=ask(id="at-once"))

    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        clients = [stack.enter_context(server.client()) for _ in range(8)]
        answers = list(pool.map(post, clients))

        assert {answer.status_code for answer in answers} == {202}, [answer.text for answer in answers]
        assert wait_for(clients[0], "at-once").name == "completed"
    assert len(fake.requests) == 1


def test_pages_of_jobs(tmp_path: Path, bundle: Bundle, models: Models, gate: Gate, cloud: Cloud) -> None:
    """The newest first; the pages together are all of them; a state picks."""
    with serving(tmp_path, bundle, models, cloud, workers=1) as server, server.client() as client:
        done = [finish(client, seed=seed)["id"] for seed in range(4)]
        gate.close()
        running = submit(client)["id"]
        gate.wait()
        seen, before = [], None
        for _ in range(3):
            query: dict[str, Any] = {"limit": 2} | ({} if before is None else {"before": before})
            page = client.get("/v1/jobs", params=query).json()
            seen.append([job["id"] for job in page["jobs"]])
            before = page["next"]

        assert seen == [[running, done[3]], [done[2], done[1]], [done[0]]]
        assert before is None
        picked = client.get("/v1/jobs", params={"state": "running"}).json()["jobs"]
        assert [job["id"] for job in picked] == [running]
        for query in ({"limit": 0}, {"limit": 201}, {"before": "x"}, {"state": "lost"}):
            problem(client.get("/v1/jobs", params=query), 422, Reason.FIELD_INVALID)
        gate.open()
        assert wait_for(client, running).name == "completed"


@pytest.mark.parametrize(("kind", "head"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_pictures_in_each_format(kind: str, head: bytes, client: httpx.Client) -> None:
    """Of the kind that was asked for, close to the PNG; to be kept for ever, for an image never changes."""
    job = finish(client)
    whole = client.get(job["images"][0]["url"])
    response = client.get(job["images"][0]["url"], params={"format": kind, "quality": 100, "download": "1"})

    assert response.headers["content-type"] == f"image/{kind}"
    assert response.content.startswith(head)
    assert "immutable" in response.headers["cache-control"]
    assert response.headers["content-disposition"] == f'attachment; filename="{job["id"]}-0.{kind}"'
    difference = pixels(response.content).astype(int) - pixels(whole.content)
    assert np.abs(difference).max() <= {"png": 0, "jpeg": 8, "webp": 0}[kind]
    problem(client.get(job["images"][0]["url"], params={"format": "gif"}), 422, Reason.FIELD_INVALID)


def test_a_lower_quality_is_smaller(client: httpx.Client) -> None:
    url = finish(client, width=128, height=128)["images"][0]["url"]
    small, large = (client.get(url, params={"format": "jpeg", "quality": q}).content for q in (5, 95))

    assert len(small) < len(large)


def test_jobs_belong_to_their_token(tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """Another token's job is not there; its image is for whoever has its signed address, and for no other path."""
    with serving(tmp_path, bundle, models, cloud, tokens=TOKENS) as server, server.client() as nobody:
        with server.client(headers=bearer(TOKENS[0])) as owner, server.client(headers=bearer(TOKENS[1])) as other:
            job = finish(owner, id="mine", n=2)
            path = f"/v1/jobs/{job['id']}"
            for method, what in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/events")):
                problem(other.request(method, path + what), 404, Reason.NOT_FOUND)
                problem(nobody.request(method, path + what), 401, Reason.UNAUTHENTICATED)
            problem(other.get(f"{path}/images/0"), 404, Reason.NOT_FOUND)
            assert other.get("/v1/jobs").json()["jobs"] == []
            problem(other.post("/v1/jobs", json=ask(id="mine", n=2)), 422, Reason.REQUEST_ID_REUSED)

            assert owner.get(f"{path}/images/0").status_code == 200
            first, second = (image["url"] for image in job["images"])
            assert nobody.get(first).content == owner.get(f"{path}/images/0").content
            assert nobody.get(first, params={**httpx.URL(first).params, "format": "webp"}).status_code == 200
            assert nobody.get(second).status_code == 200
            key = httpx.URL(first).params["key"]
            for url in (f"{path}/images/1?key={key}", f"{path}/images/0?key={key[:-1]}", f"{path}/images/0?key=é"):
                problem(nobody.get(url), 401, Reason.UNAUTHENTICATED)
            problem(nobody.get(f"{path}?key={key}"), 401, Reason.UNAUTHENTICATED)
        for headers in (bearer("wrong"), {"Authorization": "Basic !!"}, {"Authorization": "x"}):
            response = nobody.get("/v1/jobs", headers=headers)
            problem(response, 401, Reason.UNAUTHENTICATED)
            assert response.headers["www-authenticate"].startswith("Bearer")
        assert nobody.get("/healthz").status_code == 200


@contextmanager
def listener(*statuses: int) -> Iterator[tuple[str, list[dict[str, Any]], threading.Event]]:
    """Runs a server that answers calls with these, then with 200; yields its host, what came, and whether all did."""
    came: list[dict[str, Any]] = []
    answers, done = [*statuses, 200], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            came.append({"path": self.path, "job": body, "id": self.headers["X-HybridSD-Job"]})
            self.send_response(answers[len(came) - 1])
            self.end_headers()
            if len(came) == len(answers):
                done.set()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", came, done
        finally:
            server.shutdown()
            thread.join(HANG_S)


@pytest.mark.parametrize("failures", [(), (500, 302)])
def test_webhooks_are_told_the_end(
    failures: tuple[int, ...], tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Once; again where the other side failed; after a restart nobody is told a second time."""
    with listener(*failures) as (host, came, done):
        with serving(tmp_path, bundle, models, cloud, webhook_hosts=[host]) as server, server.client() as client:
            monkeypatch.setattr(server.gateway.webhooks, "_first_delay_s", 0.01)
            job = finish(client, webhook=f"http://{host}/told?x=1", n=2)
            assert done.wait(HANG_S)
        with serving(tmp_path, bundle, models, cloud, webhook_hosts=[host]) as server, server.client() as client:
            assert finish(client)["state"] == "completed"
            assert client.get(f"/v1/jobs/{job['id']}").json() == job
    assert len(came) == len(failures) + 1
    for call in came:
        assert (call["path"], call["id"], call["job"]) == ("/told?x=1", job["id"], job)


@pytest.mark.parametrize(
    ("url", "status", "reason"),
    [
        ("http://169.254.169.254/latest", 403, Reason.PERMISSION_DENIED),
        ("http://allowed.test:81/", 403, Reason.PERMISSION_DENIED),
        ("http://allowed.test:80@elsewhere.test/", 403, Reason.PERMISSION_DENIED),
        ("http://elsewhere.test#@allowed.test:80/", 403, Reason.PERMISSION_DENIED),
        ("file:///etc/passwd", 422, Reason.FIELD_INVALID),
        ("allowed.test:80", 422, Reason.FIELD_INVALID),
        ("http://[", 422, Reason.FIELD_INVALID),
        ("http://allowed.test:80/\r\nx", 422, Reason.FIELD_INVALID),
    ],
)
def test_only_hosts_that_the_operator_named_are_told(
    url: str, status: int, reason: Reason, tmp_path: Path, bundle: Bundle, models: Models
) -> None:
    with (
        serving(tmp_path, bundle, models, None, webhook_hosts=["allowed.test:80"]) as server,
        server.client() as client,
    ):
        said = problem(client.post("/v1/jobs", json=ask(webhook=url)), status, reason)

        assert said["field"] == "webhook"
        assert client.get("/v1/jobs").json()["jobs"] == []


def test_a_lost_cloud_does_not_lose_the_job(client: httpx.Client, fake: FakeCloud) -> None:
    """The device goes on from the last state, says so, and draws what a split at that step would have drawn."""
    expected = finish(client, hybrid={"cloud_steps": 2})
    fake.die_after_call = 2
    job = submit(client, hybrid={"cloud_steps": 5})
    events = events_of(client, job["id"])
    ended = events[-1].data["job"]

    fallback = next(event for event in events if event.name == "fallback")
    assert (fallback.data["planned"], fallback.data["actual"], fallback.data["reason"]) == (5, 2, "UNAVAILABLE")
    assert ended["state"] == "completed"
    image = ended["images"][0]
    assert (image["planned_cloud_steps"], image["actual_cloud_steps"]) == (5, 2)
    assert (image["fallback_reason"], image["fallback_message"]) == ("UNAVAILABLE", "Socket closed")
    assert np.array_equal(*(pixels(client.get(each["images"][0]["url"]).content) for each in (expected, ended)))


def test_without_fallback_a_lost_cloud_fails_the_job(client: httpx.Client, fake: FakeCloud) -> None:
    """With the row of the table of errors, in the job and in its last event; such a job can be deleted."""
    fake.die_after_call = 2
    ended = finish(client, hybrid={"cloud_steps": 5, "fallback": False})

    assert (ended["state"], ended["images"]) == ("failed", [])
    assert (ended["error"]["reason"], ended["error"]["status"]) == ("UNAVAILABLE", 502)
    assert client.delete(f"/v1/jobs/{ended['id']}").status_code == 204


def test_every_end_is_an_end_of_the_stream(client: httpx.Client) -> None:
    """Events of a job that ended long ago are its end alone, or all of them; both end with its state."""
    job = finish(client)

    assert events_of(client, job["id"])[-1].name in ENDS
    assert events_of(client, job["id"])[-1].data["job"] == job
