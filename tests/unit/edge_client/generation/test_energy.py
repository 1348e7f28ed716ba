"""Energy and cost of an image, by place: what this device counts or measures, and what the cloud says."""

from dataclasses import replace
from typing import Any

import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.cloud.types import Usage
from edge_client.generation.energy import Account, Prices, Tally
from edge_client.generation.events import Finished
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.generation.serialize import rest_image, result_json
from edge_client.inference.models import Models
from edge_client.request import Request
from edge_client.web.schemas.native import Image
from hybridsd.energy import Energy, Meter, Model
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.fake_cloud import FakeCloud

MACS = {"unet": [100.0, 2.0], "vae_decoder": [0.0, 5.0], "text_encoder": [1000.0]}
CELLS = 8 * 8
REQUEST = Request(prompt="a red fox", scheduler="ddim", num_inference_steps=6, seed=1, guidance_scale=3.0)


class Steady:
    """A counter that rises by one joule each time that it is read."""

    joules = 0.0

    def read_j(self) -> float:
        self.joules += 1.0
        return self.joules


def draw(request: Request, bundle: Bundle, models: Models, cloud: Cloud | None = None, **options: Any) -> Result:
    manifest = replace(bundle.manifest, macs=options.pop("macs", MACS))
    counted = Models(models.folder, manifest, provider="cpu", threads=1)
    *_, last = generate(resolve(request, manifest), replace(bundle, manifest=manifest), counted, cloud, **options)
    assert isinstance(last, Finished)
    return last.result


def test_macs_of_all_that_ran_here_are_counted(bundle: Bundle, models: Models) -> None:
    """Two rows a call with guidance, both texts and the decoder; a price makes them cost something."""
    account = Account(model=Model(0.5), prices=Prices(dollars_per_kwh=0.36))
    result = draw(replace(REQUEST, mode="edge"), bundle, models, account=account)
    cells = result.latents.shape[1] * result.latents.shape[2]
    macs = 6 * 2 * (100 + 2 * cells) + 5 * cells + 2 * 1000

    assert result.energy == {"edge": Energy(0.5 * macs, "modelled")}
    assert result.cost == {"edge": pytest.approx(0.5 * macs / 3.6e6 * 0.36)}


def test_a_bundle_that_does_not_say_leaves_it_unknown(bundle: Bundle, models: Models) -> None:
    result = draw(replace(REQUEST, mode="edge"), bundle, models, macs={})
    assert result.energy == {"edge": None}
    assert result.cost == {"edge": None}

    by_time = draw(replace(REQUEST, mode="edge"), bundle, models, macs={}, account=Account(model=Model(1.0, watts=9.0)))
    energy = by_time.energy["edge"]
    busy_s = sum(step.elapsed_s for step in by_time.steps) + by_time.decode_s + by_time.text_s
    assert energy == Energy(pytest.approx(9.0 * busy_s), "modelled")


def test_a_counter_comes_before_the_model(bundle: Bundle, models: Models) -> None:
    """It is read around text, steps and decoding, and not between them."""
    result = draw(replace(REQUEST, mode="edge"), bundle, models, account=Account(meter=Meter(Steady())))
    assert result.energy == {"edge": Energy(3.0, "measured")}


def test_the_cloud_tells_its_part(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """As it says, with the price of its time; a record and an answer have both places."""

    def tell(message: pb.DenoiseResponse) -> None:
        if message.WhichOneof("event") == "finished":
            message.finished.usage.energy.joules = 42.0
            message.finished.usage.energy.source = pb.ENERGY_SOURCE_MEASURED
            message.finished.usage.compute_duration.FromSeconds(36)

    fake.mangle = tell
    account = Account(prices=Prices(cloud_dollars_per_hour=2.0))
    result = draw(replace(REQUEST, mode="hybrid", cloud_steps=3), bundle, models, cloud, account=account)
    record = result_json(result)

    assert record["energy"]["cloud"] == {"joules": 42.0, "source": "measured"}
    assert record["energy"]["edge"]["source"] == "modelled"
    assert record["cost"] == {"cloud": 0.02, "edge": None}
    shown = Image.model_validate({**rest_image(0, result), "url": "/"})
    assert shown.energy["cloud"] is not None
    assert shown.energy["cloud"].joules == 42.0
    assert record["trace_id"] == shown.trace_id == result.request.trace.trace_id


@pytest.mark.parametrize("joules", [float("nan"), float("inf"), -1.0])
def test_a_cloud_that_lies_about_it_is_not_believed(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud, joules: float
) -> None:
    def lie(message: pb.DenoiseResponse) -> None:
        if message.WhichOneof("event") == "finished":
            message.finished.usage.energy.joules = joules

    fake.mangle = lie
    result = draw(replace(REQUEST, mode="hybrid", cloud_steps=3), bundle, models, cloud)
    assert result.energy["cloud"] is None


def test_a_cloud_that_tells_of_a_part_leaves_the_whole_unknown(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """As where one cloud ran the first calls and was lost, and another told of its own."""

    def tell(message: pb.DenoiseResponse) -> None:
        if message.WhichOneof("event") == "finished":
            message.finished.usage.energy.joules = 42.0
            message.finished.usage.num_calls = 2

    fake.mangle = tell
    account = Account(prices=Prices(cloud_dollars_per_hour=2.0))
    result = draw(replace(REQUEST, mode="hybrid", cloud_steps=3), bundle, models, cloud, account=account)
    assert result.energy["cloud"] is None
    assert result.cost["cloud"] is None


def test_segments_of_the_cloud_add_up() -> None:
    usage = Usage(queue_s=1.0, text_s=0.0, compute_s=2.0, num_calls=3, sent_bytes=4, energy=Energy(5.0, "measured"))

    assert (usage + usage).energy == Energy(10.0, "measured")
    assert (usage + replace(usage, energy=None)).energy is None
    assert Tally().energy(usage, has_cloud=True, busy_s=0.0) == {"cloud": Energy(5.0, "measured")}
