"""`hybridsd serve` as a process that is stopped, or killed in the middle: no job and no image is lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
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
from edge_client.web.jobs.store import Store
from tests.integration.web.conftest import Gate, ask, finish, pixels, serving, submit, wait_for, watching
from tests.support.fake_cloud import FakeCloud, Running
from tests.support.patience import HANG_S


class Process:
    """A gateway in a process of its own."""

    def __init__(self, data_dir: Path, bundle: Bundle, cloud: Running, home: Path, *options: str) -> None:
        self._port_file = home / "port"
        self._port_file.unlink(missing_ok=True)
        command = [
            sys.executable, "-c", "from edge_client.cli.main import main; main()", "serve", "--port", "0",
            "--port-file", str(self._port_file), "--data-dir", str(data_dir), "--bundle", str(bundle.folder),
            "--server", cloud.target, "--provider", "cpu", "--threads", "1", "--workers", "1",
            *options,
        ]  # fmt: skip
        environment = {
            **os.environ, "HYBRIDSD_EDGE_CACHE": str(home / "cache"), "XDG_DATA_HOME": str(home / "share"),
        }  # fmt: skip
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self.process.stderr is not None
        said = self.process.stderr.readline().decode()  # comes when it listens, in the log's format: JSON in a pipe
        assert said.startswith("{"), said + self.process.stderr.read().decode()
        line = json.loads(said)
        assert line["event"] == "listening"
        self.url: str = line["address"]
        assert self.url.startswith("http://127.0.0.1:")

    @property
    def port(self) -> int:
        return int(self._port_file.read_text())

    def end(self, how: signal.Signals) -> str:
        """Ends it; returns what else it has said."""
        self.process.send_signal(how)
        _, said = self.process.communicate(timeout=HANG_S)
        return said.decode()

    def client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(verify=False, retries=6)  # of connecting, with growing pauses
        return httpx.Client(base_url=self.url, timeout=HANG_S, transport=transport)


@pytest.fixture
def start(tmp_path: Path, bundle: Bundle, running_cloud: Running) -> Any:
    """Starts gateways with one data folder; ends what is left."""

    @contextmanager
    def starting() -> Iterator[tuple[Process, httpx.Client]]:
        gateway = Process(tmp_path / "data", bundle, running_cloud, tmp_path)
        try:
            with gateway.client() as client:
                yield gateway, client
        finally:
            with contextlib.suppress(ProcessLookupError):
                if gateway.process.poll() is None:
                    gateway.process.kill()
            gateway.process.communicate(timeout=HANG_S)

    return starting


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, models: Models, cloud: Cloud
) -> dict[tuple[int, int], np.ndarray[Any, Any]]:
    """Images by seed and index, as an undisturbed gateway draws them."""
    with serving(tmp_path_factory.mktemp("alone"), bundle, models, cloud) as server, server.client() as client:
        return {
            (seed, image["index"]): pixels(client.get(image["url"]).content)
            for seed in range(4)
            for image in finish(client, seed=seed, n=2)["images"]
        }


def drawn(client: httpx.Client, job: dict[str, Any]) -> dict[tuple[int, int], np.ndarray[Any, Any]]:
    return {(image["seed"], image["index"]): pixels(client.get(image["url"]).content) for image in job["images"]}


@pytest.mark.slow
def test_killed_in_the_middle(start: Any, alone: Any, gate: Gate, fake: FakeCloud, tmp_path: Path) -> None:
    """What ran is begun again, what waited waits again, what was drawn is kept: all are what they would have been.

    One job is done; of the next one the first image is drawn and the second one runs; two wait. Then comes kill -9.
    """
    with start() as (gateway, client):
        done = finish(client, seed=0, n=2)
        assert gateway.port == int(gateway.url.rstrip("/").rpartition(":")[2])
        kept = [client.get(image["url"]).content for image in done["images"]]
        running = submit(client, seed=1, n=2, id="running")
        first = wait_for(client, running["id"], "image").data["image"]
        gate.close()  # before the second image, or in it, or between this job and the next
        waiting = [submit(client, seed=seed, n=2) for seed in (2, 3)]
        gate.wait()
        states = [client.get(f"/v1/jobs/{job['id']}").json()["state"] for job in (running, *waiting)]
        gateway.end(signal.SIGKILL)
    assert states[-1] == "queued"
    png = next((tmp_path / "data" / "images").glob(f"*/{first['index']}.png"))
    assert png.stat().st_size > 0
    gate.open()

    with start() as (gateway, client):
        assert client.get(f"/v1/jobs/{done['id']}").json() == done
        assert [client.get(image["url"]).content for image in done["images"]] == kept
        ended = [wait_for(client, job["id"]).data["job"] for job in (running, *waiting)]
        assert [job["state"] for job in ended] == ["completed"] * 3
        assert [job["id"] for job in client.get("/v1/jobs").json()["jobs"]] == [
            job["id"] for job in (*waiting[::-1], running, done)
        ]
        together = {key: value for job in (done, *ended) for key, value in drawn(client, job).items()}
        again = client.post("/v1/jobs", json=ask(seed=1, n=2, id="running"))
        assert (again.status_code, again.json()["state"]) == (202, "completed")
        assert gateway.end(signal.SIGTERM).count("Traceback") == 0
        assert gateway.process.returncode in (0, -signal.SIGTERM)
    assert sorted(together) == sorted(alone)
    for key, value in together.items():
        assert np.array_equal(value, alone[key]), key


def test_a_watcher_goes_on_across_a_restart(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, alone: Any, gate: Gate
) -> None:
    """Numbers grow across it: with the last one from before, the events of the new attempt come, and the end."""
    gate.close(call=2)
    with serving(tmp_path, bundle, models, cloud) as server, server.client() as client:
        job = submit(client, seed=2, n=2)
        with watching(client, job["id"]) as events:
            seen = next(event for event in events if event.name == "step")
    gate.open()

    with serving(tmp_path, bundle, models, cloud) as server, server.client() as client:
        with watching(client, job["id"], after=seen.number) as events:
            after = list(events)
        pictures = drawn(client, after[-1].data["job"])

    assert [event.number for event in after] == sorted({event.number for event in after})
    assert after[0].number > seen.number
    assert len([event for event in after if event.name == "step"]) == 12
    assert (after[-1].name, after[-1].data["job"]["attempts"]) == ("completed", 2)
    for key, value in pictures.items():
        assert np.array_equal(value, alone[key])


def test_what_ends_the_gateway_is_not_begun_for_ever(
    tmp_path: Path, bundle: Bundle, models: Models, gate: Gate, cloud: Cloud
) -> None:
    """A job that was begun three times and never ended fails at the next start; the one behind it is drawn."""
    gate.close()
    with serving(tmp_path, bundle, models, cloud, workers=1) as server, server.client() as client:
        submit(client, id="deadly")
        submit(client, id="behind")
        wait_for(client, "deadly", "started")
    store = Store(tmp_path, max_jobs=10)
    for _ in range(2):  # what two more gateways note that are killed
        assert store.begin("deadly").state == "running"
    store.close()
    gate.open()

    with serving(tmp_path, bundle, models, cloud, workers=1) as server, server.client() as client:
        ended = wait_for(client, "deadly").data["job"]
        assert (ended["state"], ended["error"]["reason"]) == ("failed", "INTERNAL")
        assert wait_for(client, "behind").name == "completed"
