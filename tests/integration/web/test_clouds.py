"""A gateway with two clouds: what it says of them, and a job that goes from one to the other."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from edge_client.bundles.bundle import Bundle
from edge_client.cache import Cache
from edge_client.cloud import pool
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.inference.models import Models
from edge_client.web import cloud_watch
from tests.integration.web.conftest import serving, submit, watching
from tests.support.fake_cloud import FakeCloud, Running, serve
from tests.support.patience import HANG_S


@pytest.fixture
def clouds() -> Iterator[list[Running]]:
    served = [serve(FakeCloud()), serve(FakeCloud(model_id="other", loras=("ink",)))]
    served[1].fake.load.num_queued = 50
    yield served
    for each in served:
        each.fake.released.set()
        each.server.stop(grace=None).wait()


@pytest.fixture
def pair(
    clouds: list[Running], tmp_path: Path, bundle: Bundle, models: Models, monkeypatch: pytest.MonkeyPatch
) -> Iterator[httpx.Client]:
    """A client of a gateway whose first choice is the first cloud; it asks them each time that it is asked."""
    monkeypatch.setattr(cloud_watch, "POLL_INTERVAL_S", 0.0)
    with ExitStack() as stack:
        cache = Cache(tmp_path / "cache")
        both = stack.enter_context(
            Pool([each.target for each in clouds], lambda at, _: Cloud(at, cache=cache, idle_timeout_s=HANG_S))
        )
        both.ask_all(HANG_S)
        server = stack.enter_context(serving(tmp_path / "data", bundle, models, both))
        yield stack.enter_context(server.client())


def test_capabilities_are_the_union_and_name_each(pair: httpx.Client, clouds: list[Running]) -> None:
    """Models of all, and what each has."""
    found = pair.get("/v1/capabilities").json()["cloud"]
    assert found["reachable"]
    assert found["target"] == ", ".join(each.target for each in clouds)
    assert [model["id"] for model in found["models"]] == ["fake-large", "other"]
    assert [(each["target"], each["reachable"], each["models"]) for each in found["clouds"]] == [
        (clouds[0].target, True, ["fake-large"]), (clouds[1].target, True, ["other"])
    ]  # fmt: skip


def test_one_of_two_is_enough(pair: httpx.Client, clouds: list[Running]) -> None:
    """One that is away is named as such; the gateway has a cloud still."""
    clouds[0].server.stop(grace=None).wait()
    found = pair.get("/v1/capabilities").json()["cloud"]
    assert found["reachable"]
    assert [each["reachable"] for each in found["clouds"]] == [False, True]
    assert clouds[0].target in found["clouds"][0]["message"]
    assert pair.get("/readyz").json()["cloud_reachable"]


def test_the_log_says_once_which_cloud_is_lost_or_back(pair: httpx.Client, clouds: list[Running]) -> None:
    """Why as well: a token that the cloud does not take any more would else be found by its users."""
    with capture_logs() as lines:
        pair.get("/v1/capabilities")
        clouds[0].fake.token = "another"
        pair.get("/v1/capabilities")
        pair.get("/v1/capabilities")
        clouds[0].fake.token = None
        pair.get("/v1/capabilities")
    told = [line for line in lines if line["event"].startswith("cloud_")]
    assert [(line["event"], line["server"]) for line in told] == [
        ("cloud_lost", clouds[0].target), ("cloud_back", clouds[0].target)
    ]  # fmt: skip
    assert told[0]["reason"] == "UNAUTHENTICATED"


def test_job_goes_on_at_the_other(pair: httpx.Client, clouds: list[Running]) -> None:
    """An event says so, and the image names who ran what."""
    first, second = (each.fake for each in clouds)
    second.model_id = "fake-large"
    pair.get("/v1/capabilities")
    first.die_after_call = 2
    with watching(pair, submit(pair, hybrid={"cloud_steps": 4})["id"]) as events:
        told = {event.name: event.data for event in events}
    assert told["failover"] == {
        "image_index": 0, "server": clouds[1].target, "left": clouds[0].target, "step": 2, "reason": "UNAVAILABLE",
        "message": "Socket closed",
    }  # fmt: skip
    (image,) = told["completed"]["job"]["images"]
    assert [(run["server"], run["num_steps"]) for run in image["clouds"]] == [
        (clouds[0].target, 2), (clouds[1].target, 2)
    ]  # fmt: skip
    assert image["actual_cloud_steps"] == 4
    assert 'hybridsd_edge_failovers_total{reason="UNAVAILABLE"} 1.0' in pair.get("/metrics").text


def test_why_a_cloud_was_left_is_in_the_words_of_the_interface(
    pair: httpx.Client, clouds: list[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the event and in the image: no field of another interface is named."""
    clouds[1].fake.model_id = "fake-large"
    pair.get("/v1/capabilities")
    monkeypatch.setattr(pool, "AGE_S", HANG_S)  # it is not known that the first is gone
    clouds[0].server.stop(grace=None).wait()
    with watching(pair, submit(pair, hybrid={"cloud_steps": 4})["id"]) as events:
        told = {event.name: event.data for event in events}
    first, *_ = told["completed"]["job"]["images"][0]["clouds"]
    assert first["left"] == told["failover"]["message"]
    assert "hybrid.mode" in first["left"]
    assert "`mode`" not in first["left"]


def test_model_of_one_is_drawn_there(pair: httpx.Client, clouds: list[Running]) -> None:
    """A job that names it goes to who has it, however busy."""
    with watching(
        pair, submit(pair, hybrid={"model": "other"}, loras=[{"name": "ink", "weight": 1.0}])["id"]
    ) as events:
        told = {event.name: event.data for event in events}
    assert told["completed"]["job"]["images"][0]["cloud_model"] == "other"
    assert clouds[0].fake.requests == []
