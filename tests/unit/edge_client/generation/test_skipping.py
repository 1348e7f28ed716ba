"""Calls that this device leaves out, and how a cloud is asked to."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.generation.energy import Account
from edge_client.generation.events import Finished
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.generation.serialize import parameters, provenance, replay, result_json
from edge_client.inference.models import Models
from edge_client.request import Request
from hybridsd.energy import Model
from hybridsd.errors import InvalidRequest
from hybridsd.skipping import CallSkipping
from tests.support.fake_cloud import FakeCloud

REQUEST = Request(prompt="a red fox", mode="edge", codec="fp32", seed=11, scheduler="ddim", num_inference_steps=6)
RULE = CallSkipping.adaptive(1.0, 3, 2)


def draw(request: Request, bundle: Bundle, models: Models, cloud: Cloud | None = None, **options: Any) -> Result:
    asked = replace(request, request_id=Request().request_id)
    *_, last = generate(resolve(asked, bundle.manifest), bundle, models, cloud, **options)
    assert isinstance(last, Finished)
    return last.result


def letters(result: Result) -> str:
    return "".join("." if record.is_skipped else "R" for record in result.steps)


@pytest.mark.parametrize(("text", "expected"), [("2,1", "RR.R.R"), ("adaptive:1,3,2", "RRR..R"), ("adaptive:1e-9", "")])
def test_skipped_calls_run_no_unet(
    text: str, expected: str, bundle: Bundle, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told in the record, and take no energy; by a tolerance of hardly anything none is."""
    rule = CallSkipping.parse(text) if "e-" not in text else CallSkipping.adaptive(1e-9)
    calls: list[float] = []
    predict = models.predict_noise

    def counting(sample: Any, timestep: float, *rest: Any, **more: Any) -> Any:
        calls.append(timestep)
        return predict(sample, timestep, *rest, **more)

    monkeypatch.setattr(models, "predict_noise", counting)
    account = Account(model=Model(1.0))
    plain = draw(REQUEST, bundle, models, account=account)
    calls.clear()
    result = draw(replace(REQUEST, edge_skipping=rule), bundle, models, account=account)

    assert letters(result) == (expected or "RRRRRR")
    assert len(calls) == letters(result).count("R")
    assert result.num_edge_skipped_calls == letters(result).count(".")
    assert np.isfinite(result.latents).all()
    assert np.array_equal(result.latents, plain.latents) == (not expected)
    skipped = [bool(step.get("skipped")) for step in provenance(result)["steps"]]
    assert skipped == [letter == "." for letter in letters(result)]


def test_a_takeover_skips_as_a_deliberate_split_does(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """What the cloud knew of its calls is not in a state: three calls run first, whenever it was lost."""
    request = replace(REQUEST, mode="hybrid", edge_skipping=RULE, scheduler="dpmpp_2m")
    for call in (1, 2, 3):
        fake.die_after_call = None
        split = draw(replace(request, cloud_steps=call), bundle, models, cloud)
        fake.die_after_call = call
        lost = draw(replace(request, cloud_steps=6), bundle, models, cloud)

        assert lost.fallback_reason is not None
        assert letters(lost) == letters(split) == "R" * call + {1: "RRR.R", 2: "RRRR", 3: "RRR"}[call]
        assert np.array_equal(lost.latents, split.latents)


def test_the_cloud_is_asked_in_its_words(bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud) -> None:
    """With a tolerance the pattern's count is 0, which a cloud that knows no tolerance refuses."""
    request = replace(REQUEST, mode="hybrid", cloud_steps=3)
    draw(replace(request, call_skipping=CallSkipping.adaptive(0.25, 5, 2, 0.5)), bundle, models, cloud)
    asked = fake.requests[-1].call_skipping
    assert (asked.tolerance, asked.warm_up_calls, asked.max_skipped_calls, asked.extrapolation) == (0.25, 5, 2, 0.5)
    assert asked.skipped_calls == 0

    draw(replace(request, call_skipping=CallSkipping(4, 2)), bundle, models, cloud)
    asked = fake.requests[-1].call_skipping
    assert (asked.warm_up_calls, asked.skipped_calls, asked.max_skipped_calls) == (4, 2, 0)
    assert not asked.HasField("tolerance")


def test_records_say_it_and_replay_it(bundle: Bundle, models: Models) -> None:
    result = draw(replace(REQUEST, edge_skipping=RULE), bundle, models)

    assert 'Edge skip: "adaptive:1.0,3,2,0.7"' in parameters(result)
    assert json.loads(json.dumps(result_json(result)))["edge_skip"] == RULE.describe()
    assert replay(provenance(result))["hybrid"]["edge_skip"] == RULE.describe()
    old = {name: value for name, value in provenance(result).items() if name != "edge_skip"}
    assert replay(old)["hybrid"]["edge_skip"] is None


@pytest.mark.parametrize("field", ["call_skipping", "edge_skipping"])
def test_ranges_are_named(field: str, bundle: Bundle) -> None:
    wrong: dict[str, Any] = {field: CallSkipping.adaptive(1.5)}
    with pytest.raises(InvalidRequest, match=f"`tolerance` of `{field}` is 1.5; choose above 0 up to 1") as raised:
        resolve(replace(REQUEST, mode="hybrid", cloud_steps=3, **wrong), bundle.manifest)
    assert raised.value.field == field
