"""A gateway whose U-Net is trained for low noise levels only: what it refuses at the door, and what it says it cost."""

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edge_client.bundles.bundle import Bundle, open_bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from tests.integration.web.conftest import ask, finish, picture, serving, submit, watching
from tests.support.exposition import Exposition
from tests.support.fake_cloud import FakeCloud
from tests.support.tiny_bundle import write_bundle

LEAST = 4
"""Of 6 steps: those of ddim/6 lie at 980, 788, 596, 404, 212, 20."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("specialist") / "edge"
    write_bundle(folder, max_timestep=400)
    return open_bundle(folder)


@pytest.fixture(scope="module")
def models(bundle: Bundle) -> Models:
    return Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)


@pytest.fixture
def alone(tmp_path: Path, bundle: Bundle, models: Models) -> Iterator[httpx.Client]:
    """A gateway without a cloud."""
    with serving(tmp_path / "data", bundle, models, None) as server, server.client() as client:
        yield client


def test_other_splits_are_refused_at_the_door(client: httpx.Client) -> None:
    """By every API, in its words, with the least that fits; goals of an automatic split as well."""
    asked: list[tuple[str, dict, str, str]] = [
        ("/v1/jobs", ask(hybrid={"cloud_steps": 3}), "hybrid.cloud_steps is 3", f"choose {LEAST} to 6"),
        ("/v1/jobs", ask(hybrid={"split": "1,5"}), "hybrid.cloud_steps is 1", f"choose {LEAST} to 6"),
        ("/v1/jobs", ask(hybrid={"mode": "edge"}), "hybrid.mode is edge", f"hybrid.cloud_steps {LEAST} to 6"),
        ("/v1/jobs", ask(hybrid={"segments": "fake-large:3@cloud,small:3@edge"}), "hybrid.segments", "step 4 of 6"),
        ("/v1/jobs", ask(hybrid={"max_cloud_steps": 2}), "hybrid.max_cloud_steps is 2", f"choose {LEAST} or more"),
        ("/sdapi/v1/txt2img", {"prompt": "a fox", "steps": 6, "sampler_name": "DDIM", "refiner_switch_at": 0.5,
                               "width": 32, "height": 32}, "cloud_steps is 3", f"choose {LEAST} to 6"),
    ]  # fmt: skip
    for path, body, what, advice in asked:
        answer = client.post(path, json=body)
        assert answer.status_code == 422, answer.text
        assert answer.json()["reason"] == "SPLIT_INVALID"
        assert what in answer.json()["detail"]
        assert advice in answer.json()["detail"]


def test_defaults_and_weak_redraws_are_taken(client: httpx.Client) -> None:
    """The default split is made to fit; an image that begins low enough may be drawn here alone."""
    (image,) = finish(client)["images"]
    assert (image["planned_cloud_steps"], image["untrained_steps"]) == (LEAST, 0)
    (chosen,) = finish(client, hybrid={"quality": 0.0})["images"]
    assert chosen["actual_cloud_steps"] >= LEAST

    begun = {"image": base64.b64encode(picture()).decode(), "hybrid": {"mode": "edge"}}
    (redrawn,) = finish(client, strength=0.34, **begun)["images"]
    assert (redrawn["mode"], redrawn["untrained_steps"]) == ("edge", 0)
    refused = client.post("/v1/jobs", json=ask(strength=0.7, **begun))
    assert "or strength 0.333 or less" in refused.json()["detail"]


def test_a_takeover_is_told_and_counted(client: httpx.Client, fake: FakeCloud) -> None:
    """In the event, with the image, and at /metrics."""
    fake.die_after_call = 1
    job = submit(client, hybrid={"cloud_steps": 5})
    with watching(client, job["id"]) as events:
        seen = {event.name: event.data for event in events}
    (image,) = seen["completed"]["job"]["images"]
    counted = Exposition(client.get("/metrics").text)

    assert seen["fallback"]["untrained_steps"] == image["untrained_steps"] == 3
    assert "3 steps are drawn here above the noise level" in image["fallback_message"]
    assert "Untrained steps: 3" in image["parameters"]
    assert counted.value("hybridsd_edge_untrained_steps_total") == 3


def test_without_a_cloud_it_takes_over_at_once(alone: httpx.Client) -> None:
    """A picture is better than none, and says why it may be worse; what it can draw well it draws plainly."""
    (image,) = finish(alone)["images"]
    assert (image["mode"], image["untrained_steps"], image["fallback_reason"]) == ("edge", LEAST, "UNAVAILABLE")
    (weak,) = finish(alone, image=base64.b64encode(picture()).decode(), strength=0.34)["images"]
    assert (weak["mode"], weak["untrained_steps"], weak["fallback_reason"]) == ("edge", 0, None)
    assert alone.post("/v1/jobs", json=ask(hybrid={"mode": "edge"})).status_code == 422


def test_capabilities_tell_what_can_be_asked_for(client: httpx.Client, cloud: Cloud) -> None:
    """The level, and for each plan after how many cloud steps this device can draw."""
    edge = client.get("/v1/capabilities").json()["edge"]
    own = {
        each["scheduler"]: dict(zip(each["steps"], each["least_cloud_steps"], strict=True)) for each in edge["offline"]
    }

    assert (edge["max_timestep"], edge["has_high_noise_unet"]) == (400, False)
    assert own == {"ddim": {4: 2, 6: 4}, "dpmpp_2m": {6: 4}, "heun": {4: 2}, "lcm": {4: 2}}
