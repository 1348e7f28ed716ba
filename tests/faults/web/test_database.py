"""A gateway whose database is lost, or says nothing: it hangs nobody, says so, and goes on as before."""

import time
from pathlib import Path

import httpx
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.web.jobs import database
from tests.integration.web.conftest import Gate, ask, finish, submit, watching
from tests.integration.web.test_replicas import two_replicas
from tests.support.postgres import Postgres


def until_ready(client: httpx.Client) -> None:
    """Waits until the gateway says that it is."""
    while client.get("/readyz").status_code != 200:
        time.sleep(0.1)


def test_while_the_database_is_away(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, postgres: Postgres
) -> None:
    """Every route that needs it says 503 and when to come again, and so do the health checks; then all is as before."""
    with (
        two_replicas(tmp_path, bundle, models, cloud, postgres.fresh()) as (one, _two),
        one.client() as client,
    ):
        job = finish(client, seed=1)
        assert client.get("/readyz").status_code == 200
        postgres.stop()
        try:
            asked = [
                client.post("/v1/jobs", json=ask()),
                client.get("/v1/jobs"),
                client.get(f"/v1/jobs/{job['id']}"),
                client.get(f"/v1/jobs/{job['id']}/events"),
                client.get(job["images"][0]["url"]),
                client.post(f"/v1/jobs/{job['id']}/cancel"),
                client.post("/v1/images/generations", json={"prompt": "a fox", "size": "32x32"}),
                client.get("/sdapi/v1/progress"),
                client.get("/readyz"),
            ]
            lives, said = client.get("/healthz").status_code, client.get("/metrics").text
        finally:
            postgres.start()
        until_ready(client)
        assert client.get(f"/v1/jobs/{job['id']}").json() == job
        assert finish(client, seed=1)["state"] == "completed"

    assert {(each.status_code, each.json()["reason"]) for each in asked} == {(503, "DATABASE_UNAVAILABLE")}
    assert all(int(each.headers["retry-after"]) >= 1 for each in asked)
    assert lives == 200
    assert "hybridsd_edge_database_up 0.0" in said
    assert "hybridsd_edge_ready 0.0" in said


def test_a_database_that_says_nothing(
    tmp_path: Path,
    bundle: Bundle,
    models: Models,
    cloud: Cloud,
    postgres: Postgres,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes connections and is silent. Who asks is answered; who watches a job sees its end once it speaks again."""
    with (
        two_replicas(tmp_path, bundle, models, cloud, postgres.fresh()) as (one, _two),
        one.client() as client,
    ):
        gate.close(call=2)
        job = submit(client)
        with watching(client, job["id"]) as events:
            while next(events).name != "step":
                pass
            postgres.freeze()
            try:
                with monkeypatch.context() as hurry:
                    hurry.setattr(database, "CALL_S", 1.0)
                    asked = [client.post("/v1/jobs", json=ask()) for _ in range(20)]
                lives = client.get("/healthz").status_code
                gate.open()
            finally:
                postgres.thaw()
            last = list(events)[-1]
        until_ready(client)
        assert finish(client)["state"] == "completed"

    assert {(each.status_code, each.json()["reason"]) for each in asked} == {(503, "DATABASE_UNAVAILABLE")}
    assert lives == 200
    assert (last.name, last.data["job"]["attempts"]) == ("completed", 1)
