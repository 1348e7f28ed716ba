"""What cannot be drawn is refused when it is asked for, not when its turn comes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from edge_client.web import cloud_watch
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.integration.web.conftest import ask, finish, serving
from tests.support.fake_cloud import FakeCloud, Running, serve
from tests.support.patience import HANG_S


class LimitedCloud(FakeCloud):
    """A cloud that says what it has."""

    says_max_size = 64

    def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> pb.GetCapabilitiesResponse:
        reply = super().GetCapabilities(request, context)
        reply.limits.max_size = self.says_max_size
        reply.models[0].loras.add(name="style")
        reply.models.add(id="other", latent_space=self.latent_space)
        return reply


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Running]:
    started = serve(LimitedCloud())
    yield started
    started.server.stop(grace=None).wait()


@pytest.fixture
def client(tmp_path: Path, bundle: Bundle, models: Models, limited: Running) -> Iterator[httpx.Client]:
    with (
        Cloud(limited.target, cache=Cache(tmp_path / "cache"), idle_timeout_s=HANG_S) as cloud,
        serving(tmp_path / "data", bundle, models, cloud) as server,
        server.client() as client,
    ):
        assert client.get("/v1/capabilities").json()["cloud"]["reachable"]
        yield client


@pytest.mark.parametrize(
    ("changes", "status", "reason", "field", "says"),
    [
        ({"hybrid": {"model": "huge"}}, 409, "MODEL_UNKNOWN", "hybrid.model", "fake-large, other"),
        ({"hybrid": {"segments": "huge:3@cloud,x:3@edge"}}, 409, "MODEL_UNKNOWN", "hybrid.segments", "fake-large"),
        ({"loras": [{"name": "none"}]}, 409, "LORA_UNKNOWN", "loras", "style"),
        ({"loras": [{"name": "style"}], "hybrid": {"model": "other"}}, 409, "LORA_UNKNOWN", "loras", "omit"),
        ({"width": 128}, 422, "SIZE_INVALID", "width", "from 16 to 64"),
        ({"height": 33}, 422, "SIZE_INVALID", "height", "from 16 to 64"),
        ({"height": 1}, 422, "SIZE_INVALID", "height", "from 16 to 64"),
        ({"height": 10**6}, 422, "SIZE_INVALID", "height", "from 16 to 64"),
        ({"height": 33, "hybrid": {"mode": "edge"}}, 422, "SIZE_INVALID", "height", "from 16 to 4096"),
    ],
)
def test_what_the_cloud_does_not_have(
    changes: dict[str, Any], status: int, reason: str, field: str, says: str, client: httpx.Client, limited: Running
) -> None:
    answer = client.post("/v1/jobs", json=ask(**changes))

    assert (answer.status_code, answer.json()["reason"], answer.json()["field"]) == (status, reason, field)
    assert says in answer.json()["detail"]
    assert client.get("/v1/jobs").json()["jobs"] == []
    assert limited.fake.requests == []


def test_what_is_promised_instead_is_taken(client: httpx.Client) -> None:
    """A size that this device does not draw either is not said to be one that it has."""
    for changes in ({"width": 8192}, {"width": 4112}, {"width": 130}, {"height": 4096}):
        said = client.post("/v1/jobs", json=ask(**changes)).json()["detail"]
        larger = [side for side in changes.values() if side <= 4096]
        assert ("hybrid.mode edge to 4096" in said) == bool(larger)


@pytest.mark.parametrize(
    ("hybrid", "words"),
    [
        ({"split": "3,3"}, ("hybrid.split 3,3", "hybrid.cloud_steps")),
        ({"split": "3,3", "max_latency_ms": 5}, ("hybrid.split", "hybrid.cloud_steps")),
        ({"mode": "edge", "max_latency_ms": 5}, ("hybrid.mode", "hybrid.segments")),
        ({"cloud_skip": "0.1"}, ("4,1,0.3", "adaptive")),
        ({"edge_skip": "adaptive:1.5"}, ("edge_skip", "1.5", "above 0 up to 1")),
    ],
)
def test_fields_are_named_as_they_are_sent(
    hybrid: dict[str, Any], words: tuple[str, ...], client: httpx.Client
) -> None:
    answer = client.post("/v1/jobs", json={"prompt": "a fox", "num_inference_steps": 10, "hybrid": hybrid})

    assert answer.status_code == 422
    assert all(word in answer.json()["detail"] for word in words), answer.json()["detail"]


def test_what_this_device_can_do_alone(client: httpx.Client) -> None:
    """A size beyond the cloud's is no trouble for steps here."""
    assert finish(client, width=128, hybrid={"mode": "edge"})["state"] == "completed"


def test_what_is_new_is_asked_for(client: httpx.Client, limited: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old answer of the cloud refuses nothing that a new one allows."""
    monkeypatch.setattr(LimitedCloud, "says_max_size", 128)
    monkeypatch.setattr(cloud_watch, "POLL_INTERVAL_S", 0.0)

    assert client.post("/v1/jobs", json=ask(width=128)).status_code == 202


def test_the_range_is_told(client: httpx.Client) -> None:
    told = client.get("/v1/capabilities").json()["cloud"]
    assert (told["min_size"], told["max_size"]) == (16, 64)
