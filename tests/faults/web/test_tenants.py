"""A gateway under attack by one tenant serves the other."""

import base64
import threading
from collections import Counter
from pathlib import Path

import httpx

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.web.streams import MAX_STREAMS
from hybridsd.tokens import Quota, Tokens, add_token
from tests.integration.web.conftest import Gate, GatewayServer, ask, finish, picture, serving, submit, wait_for
from tests.support.patience import HANG_S


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def attack(server: GatewayServer, token: str, end: threading.Event, statuses: Counter[int]) -> None:
    """Asks for all that costs something, as fast as answers come, until it is told to end."""
    image = base64.b64encode(picture((64, 64))).decode()
    bodies = [
        ask(n=10), ask(n=10, image=image), ask(width=4096, height=4096), ask(num_inference_steps=1000, n=10),
        {"prompt": "x" * 4001}, {"prompt": []},
    ]  # fmt: skip
    with server.client(headers=bearer(token)) as client:
        while not end.is_set():
            for body in bodies:
                statuses[client.post("/v1/jobs", json=body).status_code] += 1
            statuses[client.get("/v1/jobs?owner=*").status_code] += 1
            statuses[client.post("/v1/jobs/theirs/cancel").status_code] += 1


def test_one_tenant_attacks_and_the_other_is_served(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud
) -> None:
    """Jobs, uploads and what is refused, from four connections at once: the other's jobs are taken and drawn, and are
    neither seen nor stopped nor deleted; the attacker stays within its limits.
    """
    file, end = tmp_path / "tokens", threading.Event()
    quota = Quota(jobs=1, queued=4, steps_per_minute=600, pixels=64 * 64, bytes=50_000)
    mallory, alice = add_token(file, "mallory", quota=quota), add_token(file, "alice")
    statuses: Counter[int] = Counter()
    settings = {"tokens": Tokens(file), "max_queue": 8, "max_jobs": 16, "workers": 2}
    with serving(tmp_path / "data", bundle, models, cloud, **settings) as server:
        threads = [threading.Thread(target=attack, args=(server, mallory, end, statuses)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            with server.client(headers=bearer(alice)) as client:
                jobs = [finish(client, id=("theirs" if seed == 0 else None), seed=seed) for seed in range(4)]
                kept = client.get("/v1/jobs").json()["jobs"]
                images = [client.get(job["images"][0]["url"]).status_code for job in jobs]
                me = client.get("/v1/me").json()
            with server.client(headers=bearer(mallory)) as client:
                used = client.get("/v1/me").json()["quotas"]
        finally:
            end.set()
            for thread in threads:
                thread.join(HANG_S)
    assert [job["state"] for job in jobs] == ["completed"] * 4
    assert [job["id"] for job in kept] == [job["id"] for job in reversed(jobs)]
    assert (images, me["quotas"]) == ([200] * 4, {})
    assert used["jobs"]["used"] <= 1
    assert used["queued"]["used"] <= 4
    assert set(statuses) <= {202, 403, 404, 422, 429}, statuses
    assert min(statuses[status] for status in (403, 404, 422, 429)) > 0


def test_streams_of_one_tenant_leave_room_for_the_other(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, gate: Gate
) -> None:
    """One has as many open as it may; the other watches its own."""
    file = tmp_path / "tokens"
    mallory, alice = add_token(file, "mallory"), add_token(file, "alice")
    with (
        serving(tmp_path / "data", bundle, models, cloud, tokens=Tokens(file), workers=1) as server,
        server.client(headers=bearer(mallory), limits=httpx.Limits(max_connections=None)) as one,
        server.client(headers=bearer(alice)) as two,
    ):
        gate.close()
        job = submit(one)
        gate.wait()
        caller = server.gateway.access.caller_of("mallory")
        server.gateway.streams._open[caller.user] = MAX_STREAMS
        assert one.get(f"/v1/jobs/{job['id']}/events").status_code == 429
        other = submit(two)
        gate.open()
        assert wait_for(two, other["id"]).name == "completed"
