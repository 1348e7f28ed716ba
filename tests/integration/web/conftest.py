"""The gateway as a real server: uvicorn on a free loopback port, a tiny bundle, and a fake cloud with a gate."""

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from edge_client.bundles.bundle import Bundle, open_bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.inference.models import Models
from edge_client.web.app import create_app
from edge_client.web.connections import server_config
from edge_client.web.dependencies import Gateway
from edge_client.web.settings import Settings
from hybridsd.tokens import Tokens
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.fake_cloud import FakeCloud, Running, serve
from tests.support.patience import HANG_S
from tests.support.tiny_bundle import write_bundle

ENDS = ("completed", "failed", "cancelled")
TOKENS = ("one-token", "two-token")


class Gate:
    """Holds back the cloud's states from a given call on until it is opened, which keeps a job running."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._call: int | None = None
        self._held = 0

    def __call__(self, message: pb.DenoiseResponse) -> None:
        """Takes the place of `FakeCloud.mangle`."""
        if message.WhichOneof("event") != "state":
            return
        with self._changed:
            if self._call is None or message.state.call < self._call:
                return
            self._held += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._call is None, HANG_S)
            self._held -= 1

    def close(self, call: int = 1) -> None:
        """Holds back the state before this call, and all later ones, of every job."""
        with self._changed:
            self._call = call

    def open(self) -> None:
        """Lets everything through."""
        with self._changed:
            self._call = None
            self._changed.notify_all()

    def wait(self, jobs: int = 1) -> None:
        """Waits until so many jobs are held."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._held >= jobs, HANG_S)


@dataclass(frozen=True)
class GatewayServer:
    """A running gateway."""

    url: str
    app: FastAPI
    data_dir: Path

    @property
    def gateway(self) -> Gateway:
        """What its request handlers share."""
        gateway: Gateway = self.app.state.gateway
        return gateway

    def client(self, **options: Any) -> httpx.Client:
        """Returns a client that ignores proxies."""
        return httpx.Client(**{"base_url": self.url, "timeout": HANG_S, "trust_env": False, "verify": False, **options})


@contextmanager
def listening(app: FastAPI, **options: Any) -> Iterator[str]:
    """Serves an application on a free port; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(
            server_config(app, log_level="error", timeout_graceful_shutdown=1, lifespan="on", **options)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(
                trust_env=False, verify=False, timeout=HANG_S
            ) as client:  # the kernel holds it until the server is up
                assert client.get(f"{url}/healthz", headers={"host": "127.0.0.1"}).status_code in (200, 400)
            yield url
        finally:
            server.should_exit = True
            thread.join(HANG_S)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The edge's bundle, in the latent space of the fake cloud."""
    folder = tmp_path_factory.mktemp("web") / "edge"
    write_bundle(folder)
    return open_bundle(folder)


@pytest.fixture(scope="session")
def models(bundle: Bundle) -> Models:
    return Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)


@pytest.fixture(scope="session")
def running_cloud() -> Iterator[Running]:
    started = serve(FakeCloud(loras=("style", "ink")))
    yield started
    started.fake.released.set()
    started.server.stop(grace=None).wait()


@pytest.fixture(scope="session")
def cloud(running_cloud: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with Cloud(running_cloud.target, cache=Cache(tmp_path_factory.mktemp("web-cache")), idle_timeout_s=HANG_S) as cloud:
        yield cloud


@pytest.fixture(autouse=True)
def fake(running_cloud: Running) -> Iterator[FakeCloud]:
    """The cloud's switches, as they are at first; put back after each test."""
    fake, fresh = running_cloud.fake, FakeCloud()
    yield fake
    for name in ("die_after_call", "die_times", "die_with", "busy_times", "refuse_with", "step_delay_s", "mangle"):
        setattr(fake, name, getattr(fresh, name))
    fake.requests.clear()
    fake.sent.clear()
    fake.cancelled.clear()
    fake.users.clear()
    fake.cancel_seen.clear()


@pytest.fixture
def gate(fake: FakeCloud) -> Iterator[Gate]:
    gate = Gate()
    fake.mangle = gate
    yield gate
    gate.open()


@contextmanager
def serving(
    data_dir: Path,
    bundle: Bundle,
    models: Models,
    cloud: Pool | Cloud | None,
    *,
    others: Mapping[str, Models] = MappingProxyType({}),
    tokens: Tokens | Sequence[str] = (),
    trusted_proxies: Sequence[str] = (),
    **settings: Any,
) -> Iterator[GatewayServer]:
    """Runs a gateway on a free port."""
    if not isinstance(tokens, Tokens):
        settings["tokens"] = Tokens.of(tokens) if tokens else None
    else:
        settings["tokens"] = tokens
    app = create_app(Settings(data_dir=data_dir, **settings), bundle, models, cloud, others=others)
    with listening(app, trusted_proxies=trusted_proxies) as url:
        yield GatewayServer(url, app, data_dir)


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, models: Models, cloud: Cloud
) -> Iterator[GatewayServer]:
    """A gateway without tokens, shared by the tests of a file."""
    with serving(tmp_path_factory.mktemp("data"), bundle, models, cloud) as server:
        yield server


@pytest.fixture
def client(server: GatewayServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@dataclass(frozen=True)
class Event:
    """A server-sent event; a comment has no name."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    number: int = 0
    comment: str = ""


def read_events(response: httpx.Response) -> Iterator[Event]:
    """Yields what a stream says."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        name, _, value = line.partition(":")
        if line and not name:
            yield Event("", comment=value.strip())
        elif line:
            fields[name] = value.removeprefix(" ")
        elif fields:
            yield Event(fields.get("event", "message"), json.loads(fields["data"]), int(fields.get("id", 0)))
            fields = {}


@contextmanager
def watching(client: httpx.Client, job_id: str, after: int | None = None) -> Iterator[Iterator[Event]]:
    """Opens the events of a job; leaving closes the connection, whatever is still to come."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as response:
        assert response.status_code == 200, response.read()
        yield read_events(response)


def wait_for(client: httpx.Client, job_id: str, *names: str) -> Event:
    """Returns the first event of these names; without any, how the job ends."""
    with watching(client, job_id) as events:
        return next(event for event in events if event.name in (names or ENDS))


def ask(**changes: Any) -> dict[str, Any]:
    """Returns a body of the native API: an image of 6 steps, 3 of them the cloud's."""
    body = {"prompt": "a red fox", "scheduler": "ddim", "num_inference_steps": 6, "seed": 5, "width": 32, "height": 32}
    return {**body, **changes}


def submit(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    """Asks for a job; returns it."""
    response = client.post("/v1/jobs", json=ask(**changes))
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    return job


def finish(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    """Asks for a job; returns how it ended."""
    job: dict[str, Any] = wait_for(client, submit(client, **changes)["id"]).data["job"]
    return job


def pixels(content: bytes | str) -> NDArray[np.uint8]:
    """Returns an image, bytes or base64, as an array."""
    raw = base64.b64decode(content) if isinstance(content, str) else content
    with Image.open(io.BytesIO(raw)) as picture:
        return np.asarray(picture.convert("RGB"))


def picture(size: tuple[int, int] = (32, 32), kind: str = "PNG", seed: int = 0) -> bytes:
    """Returns an image file of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize(size).save(stream, format=kind)
    return stream.getvalue()
