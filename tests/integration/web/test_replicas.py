"""Replicas of the gateway behind a balancer: whichever a client reaches, it finds its jobs, images and limits there."""

import base64
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.integration.web.conftest import (
    TOKENS,
    Gate,
    GatewayServer,
    finish,
    picture,
    pixels,
    serving,
    submit,
    wait_for,
    watching,
)
from tests.integration.web.test_restart import Process
from tests.support.fake_cloud import FakeCloud, Running
from tests.support.patience import HANG_S
from tests.support.postgres import Postgres

BEARER = {"authorization": f"Bearer {TOKENS[0]}"}


@contextmanager
def two_replicas(
    folder: Path, bundle: Bundle, models: Models, cloud: Cloud, url: str, **settings: Any
) -> Iterator[tuple[GatewayServer, GatewayServer]]:
    """Runs two, each with a folder of its own; their images are in a third."""
    options = {"database": url, "images": folder / "images", "workers": 1, "lease_s": 600.0, **settings}
    with contextlib.ExitStack() as running:
        one, two = (
            running.enter_context(serving(folder / name, bundle, models, cloud, **options)) for name in ("one", "two")
        )
        yield one, two


@pytest.fixture
def clients(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, postgres: Postgres
) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Clients with the same token, each of another replica."""
    with (
        two_replicas(tmp_path, bundle, models, cloud, postgres.fresh(), tokens=TOKENS) as (one, two),
        one.client(headers=BEARER) as first,
        two.client(headers=BEARER) as second,
    ):
        yield first, second


def test_signed_addresses_are_valid_at_every_replica(clients: tuple[httpx.Client, httpx.Client]) -> None:
    """Without a token, as an <img> asks; also after a job is done elsewhere, and until it is deleted anywhere."""
    one, two = clients
    job = finish(one, seed=1)
    url = job["images"][0]["url"]
    answers = [each.get(url, headers={"authorization": ""}) for each in clients]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    assert two.get(f"/v1/jobs/{job['id']}").json() == job
    assert two.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert [each.get(f"/v1/jobs/{job['id']}").status_code for each in clients] == [410, 410]
    assert one.get(url, headers={"authorization": ""}).status_code == 410


def test_a_stream_goes_on_at_another_replica(clients: tuple[httpx.Client, httpx.Client], gate: Gate) -> None:
    """With Last-Event-ID: nothing twice, nothing missing."""
    one, two = clients
    gate.close(call=2)
    job = submit(one, seed=2)
    with watching(two, job["id"]) as events:
        seen = [next(events)]
        while seen[-1].name != "step":
            seen.append(next(events))
    gate.open()
    with watching(one, job["id"], after=seen[-1].number) as events:
        rest = list(events)
    with watching(two, job["id"]) as events:
        whole = list(events)

    left_out = ("queued", "preview")  # each replica counts the queue by itself; of previews the last one is kept
    assert [each.number for each in [*seen, *rest] if each.name not in left_out] == [
        each.number for each in whole if each.name not in left_out
    ]
    assert len([each for each in [*seen, *rest] if each.name == "step"]) == 6
    assert rest[-1].name == "completed"
    assert pixels(two.get(rest[-1].data["job"]["images"][0]["url"]).content).shape == (32, 32, 3)


def test_a_client_that_waits_gets_what_another_replica_drew(
    clients: tuple[httpx.Client, httpx.Client], gate: Gate
) -> None:
    """OpenAI's and AUTOMATIC1111's clients keep one connection; progress and interruption may come by another."""
    one, two = clients
    gate.close()
    held = submit(one, seed=1)
    wait_for(one, held["id"], "started")
    answers: list[httpx.Response] = []
    fields = {"prompt": "a red fox", "width": 32, "height": 32, "steps": 6, "force_task_id": "mine"}
    asking = threading.Thread(target=lambda: answers.append(one.post("/sdapi/v1/txt2img", json=fields)))
    asking.start()
    gate.wait(jobs=2)  # each replica has one
    progress = [each.get("/sdapi/v1/progress").json() for each in clients]
    assert [each["current_task"] for each in progress] == ["mine", "mine"]
    assert two.post("/sdapi/v1/interrupt").status_code == 200
    gate.open()
    asking.join(HANG_S)
    drawn = one.post("/v1/images/generations", json={"prompt": "a red fox", "size": "32x32", "num_inference_steps": 6})

    assert answers[0].json()["images"] is not None
    assert two.get("/v1/jobs/mine").json()["state"] == "cancelled"
    assert drawn.status_code == 200
    assert wait_for(two, held["id"]).name == "completed"


def test_images_at_an_address(tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, postgres: Postgres) -> None:
    """Of fsspec: what was given and what was drawn is there for both, and goes when the job goes."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    given = picture()
    with two_replicas(tmp_path, bundle, models, cloud, postgres.fresh(), images="memory://gateway/images") as both:
        one, two = both
        with one.client() as first, two.client() as second:
            body = {"image": base64.b64encode(given).decode(), "strength": 0.5, "n": 2}
            job = finish(first, **body)
            assert job["state"] == "completed"
            for index in range(2):
                answers = [each.get(f"/v1/jobs/{job['id']}/images/{index}").content for each in (first, second)]
                assert answers[0] == answers[1]
            kept = system.find("/gateway/images/images")
            assert second.delete(f"/v1/jobs/{job['id']}").status_code == 204
            assert first.get(f"/v1/jobs/{job['id']}/images/0").status_code == 410
    assert len(kept) == 2
    assert system.find("/gateway/images/images") == []
    assert system.find("/gateway/images/uploads") == []
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_killed_in_the_middle_another_goes_on(
    tmp_path: Path,
    bundle: Bundle,
    models: Models,
    cloud: Cloud,
    running_cloud: Running,
    postgres: Postgres,
    fake: FakeCloud,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """kill -9: the other replica keeps the image that was drawn, and draws what was missing as it would have been.

    Who watches there sees the job go on. The database's password is said nowhere.
    """
    with serving(tmp_path / "alone", bundle, models, cloud) as server, server.client() as client:
        alone = [pixels(client.get(image["url"]).content) for image in finish(client, seed=1, n=2)["images"]]
    num_begun = itertools.count(1)

    def hold_second(message: pb.DenoiseResponse) -> None:
        if message.WhichOneof("event") == "started" and next(num_begun) == 2:
            gate.close()
        gate(message)

    fake.mangle = hold_second
    monkeypatch.setenv("HYBRIDSD_DATABASE", postgres.fresh().replace("test@", "test:hunter2@"))
    options = ("--images", str(tmp_path / "images"), "--lease", "5")
    running: list[Process] = []
    try:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        running.append(Process(tmp_path / "one" / "data", bundle, running_cloud, tmp_path / "one", *options))
        with running[0].client() as client:
            job = submit(client, seed=1, n=2)
            wait_for(client, job["id"], "image")
            gate.wait()
        running.append(Process(tmp_path / "two" / "data", bundle, running_cloud, tmp_path / "two", *options))
        with running[1].client() as client:
            with watching(client, job["id"]) as events:
                seen = [next(events)]
                said = running[0].end(signal.SIGKILL)
                gate.open()
                seen += events
            ended = seen[-1].data["job"]
            drawn = [pixels(client.get(image["url"]).content) for image in ended["images"]]
        said += running[1].end(signal.SIGTERM)
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                if process.process.poll() is None:
                    process.process.kill()
            process.process.communicate(timeout=HANG_S)

    assert (ended["state"], ended["attempts"]) == ("completed", 2)
    assert [event.data["attempt"] for event in seen if event.name == "started"][-1] == 2
    assert [event.number for event in seen] == sorted({event.number for event in seen})
    assert len(drawn) == 2
    assert all(np.array_equal(*each) for each in zip(drawn, alone, strict=True))
    assert "hunter2" not in said
    assert "Traceback" not in said


def test_an_address_that_is_wrong_is_said_without_its_password(tmp_path: Path, bundle: Bundle) -> None:
    """By its option, at the start, with exit code 2."""
    command = [sys.executable, "-c", "from edge_client.cli.main import main; main()", "serve", "--port", "0"]
    command += ["--data-dir", str(tmp_path), "--bundle", str(bundle.folder), "--no-cloud"]
    done = subprocess.run(
        [*command, "--database", "mysql://root:hunter2@host/db"], capture_output=True, text=True, timeout=HANG_S,
        check=False, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 2
    assert "--database" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout
