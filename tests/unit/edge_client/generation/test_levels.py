"""A U-Net that is trained for low noise levels only draws no others on purpose, and says so where it must."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_client.bundles.bundle import Bundle, open_bundle
from edge_client.cloud.client import Cloud
from edge_client.generation.components import Components
from edge_client.generation.events import Event, Fallback, Finished, Planned, StepDone
from edge_client.generation.levels import fit_levels
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.generation.saved_state import saved_state
from edge_client.generation.segments import parse_segments
from edge_client.generation.serialize import parameters, provenance, replay, result_json
from edge_client.inference.models import Models
from edge_client.request import Request
from edge_client.types import ImageInput, Mode
from hybridsd.errors import InvalidRequest, Reason
from hybridsd.plan import Plan
from tests.support.fake_cloud import FakeCloud, one_process, text_embeds
from tests.support.reference import run_from_seed
from tests.support.tiny_bundle import CHANNELS, Floats, TinyUNet, make_plan, write_bundle

LIMIT = 400
"""Of the timesteps 980, 788, 596, 404, 212, 20 of ddim/6 and 980, 660, 340, 20 of the plans of 4 steps."""
EXACT = 1e-5
REQUEST = Request(prompt="a red fox", mode="hybrid", codec="fp32", seed=11)
Edge = tuple[Bundle, Models]


def open_edge(folder: Path) -> Edge:
    bundle = open_bundle(folder)
    return bundle, Models(folder, bundle.manifest, provider="cpu", threads=1)


def falling(steps: int) -> Plan:
    """Returns a plan whose rows tell noise levels that fall with their timesteps."""
    plan = make_plan("ddim", steps)
    rows = tuple(replace(row, x0_output=-row.timestep / 100) for row in plan.rows)
    return replace(plan, scheduler="euler", rows=rows)


@pytest.fixture(scope="module")
def specialist(tmp_path_factory: pytest.TempPathFactory) -> Edge:
    folder = tmp_path_factory.mktemp("specialist")
    write_bundle(folder, max_timestep=LIMIT, more_plans={f"euler/{steps}": falling(steps) for steps in (3, 4, 6)})
    return open_edge(folder)


@pytest.fixture
def pair(tmp_path: Path) -> Edge:
    """A specialist with a generalist for what is above it."""
    write_bundle(tmp_path / "pair", max_timestep=LIMIT, high_noise_seed=3)
    return open_edge(tmp_path / "pair")


def draw(request: Request, edge: Edge, cloud: Cloud | None) -> tuple[Result, list[Event]]:
    bundle, models = edge
    *events, last = generate(
        resolve(replace(request, request_id=Request().request_id), bundle.manifest), bundle, models, cloud
    )
    assert isinstance(last, Finished)
    return last.result, events


def image(strength: float) -> ImageInput:
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32)).astype(np.float32)
    return ImageInput(image=pixels, strength=strength)


@pytest.mark.parametrize(
    ("scheduler", "steps", "least"), [("ddim", 6, 4), ("dpmpp_2m", 6, 4), ("ddim", 4, 2), ("heun", 4, 2), ("lcm", 4, 2)]
)
def test_a_default_split_hands_over_where_the_edge_can_draw(
    scheduler: str, steps: int, least: int, specialist: Edge, cloud: Cloud, fake: FakeCloud
) -> None:
    """The bundle's share of the steps is half of them, and grows to what its U-Net needs; the request says the same."""
    mode: Mode
    for mode in ("auto", "hybrid"):
        asked = replace(REQUEST, mode=mode, scheduler=scheduler, num_inference_steps=steps)
        result, events = draw(asked, specialist, cloud)
        expected = one_process(scheduler, steps, make_plan(scheduler, steps).first_call(least))

        assert np.abs(result.latents - expected).max() < EXACT
        assert (result.planned_cloud_steps, result.untrained_steps, result.mode) == (least, 0, "hybrid")
        assert isinstance(events[0], Planned)
        assert events[0].cloud_steps == least
        assert fake.requests[-1].handoff_step == least


@pytest.mark.parametrize("cloud_steps", [0, 1, 3])
def test_an_earlier_split_is_refused_with_the_least_one(
    cloud_steps: int, specialist: Edge, cloud: Cloud, fake: FakeCloud
) -> None:
    """Before anything runs; the number that the message names is then taken."""
    with pytest.raises(InvalidRequest, match=rf"`cloud_steps` is {cloud_steps}, .* up to 400 only.*choose 4 to 6") as e:
        draw(replace(REQUEST, cloud_steps=cloud_steps), specialist, cloud)

    assert (e.value.reason, e.value.field) == (Reason.SPLIT_INVALID, "cloud_steps")
    assert not fake.requests
    assert draw(replace(REQUEST, cloud_steps=4), specialist, cloud)[0].planned_cloud_steps == 4


def test_the_edge_alone_is_refused(specialist: Edge) -> None:
    """Mode edge begins at pure noise."""
    with pytest.raises(InvalidRequest, match=r"`mode` is edge, .*set `mode` to hybrid, with `cloud_steps` 4 to 6$"):
        draw(replace(REQUEST, mode="edge"), specialist, None)


def test_an_image_to_begin_with_counts_from_where_it_begins(specialist: Edge, cloud: Cloud) -> None:
    """A weak enough redraw is the edge's alone; a stronger one names the strength that is."""
    asked = replace(REQUEST, mode="edge", image_input=image(0.34))
    assert draw(asked, specialist, None)[0].untrained_steps == 0

    stronger = replace(asked, image_input=image(0.7))
    with pytest.raises(InvalidRequest, match=r"`cloud_steps` 2 to 4, or `strength` 0.333 or less$"):
        draw(stronger, specialist, None)
    with pytest.raises(InvalidRequest, match=r"`cloud_steps` is 1, .*choose 2 to 4, or `strength`"):
        draw(replace(stronger, mode="hybrid", cloud_steps=1), specialist, cloud)
    result, _ = draw(replace(stronger, mode="hybrid"), specialist, cloud)
    assert (result.actual_cloud_steps, result.untrained_steps) == (2, 0)


def test_a_strength_that_is_named_is_taken(specialist: Edge) -> None:
    """The advice holds."""
    asked = replace(REQUEST, mode="edge", image_input=image(0.333), num_inference_steps=6)
    assert draw(asked, specialist, None)[0].mode == "edge"


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("large:4@cloud,small:2@edge", None),
        ("large:3@cloud,small:3@edge", "small:3@edge.* begins at timestep 404, .*run ddim up to step 4 of 6"),
        ("small:2@edge,large:4@cloud", "begins at timestep 980"),
        ("small:0@edge,large:4@cloud,small:1@edge,large:1@cloud", None),
        ("large:2@cloud(scheduler=euler,steps=4),small:*@edge(scheduler=euler,steps=6)", "begins at timestep 404"),
        ("large:3@cloud(scheduler=euler,steps=4),small:*@edge(scheduler=euler,steps=6)", None),
        ("large:1@cloud(scheduler=euler,steps=4),small:*@edge(scheduler=euler,steps=3)", "run euler up to step 2 of 3"),
    ],
)
def test_segments_are_followed_to_where_the_edge_begins(text: str, refusal: str | None, specialist: Edge) -> None:
    """Also onto another timestep schedule, which is entered by the noise level."""
    bundle, models = specialist
    resolved = resolve(Request(prompt="x", segments=parse_segments(text)), bundle.manifest)
    components = Components(bundle=bundle, models=models, others={}, cloud=None)
    if refusal is None:
        assert fit_levels(resolved, components) == resolved
    else:
        with pytest.raises(InvalidRequest, match=refusal) as caught:
            fit_levels(resolved, components)
        assert caught.value.field == "segments"


def test_each_segment_is_held_to_its_own_bundle(specialist: Edge, bundle: Bundle, models: Models) -> None:
    """A bundle that is good for all may begin, and the specialist finish."""
    segments = parse_segments("all:4@edge,tiny-edge:2@edge")
    resolved = resolve(Request(prompt="x", segments=segments), bundle.manifest)
    others = {"all": models}
    fit_levels(resolved, Components(bundle=specialist[0], models=specialist[1], others=others, cloud=None))
    turned = resolve(Request(prompt="x", segments=parse_segments("tiny-edge:4@edge,all:2@edge")), bundle.manifest)
    with pytest.raises(InvalidRequest, match="begins at timestep 980"):
        fit_levels(turned, Components(bundle=specialist[0], models=specialist[1], others=others, cloud=None))


def test_a_plan_that_only_the_cloud_has_is_asked_for(specialist: Edge, cloud: Cloud, fake: FakeCloud) -> None:
    """The bundle has none of 5 steps: 980, 740, 500, 260, 20."""
    fake.compiled = make_plan("ddim", 5)
    asked = replace(REQUEST, num_inference_steps=5)
    with pytest.raises(InvalidRequest, match=r"`cloud_steps` is 2, .*choose 3 to 5"):
        draw(replace(asked, cloud_steps=2), specialist, cloud)
    assert draw(asked, specialist, cloud)[0].actual_cloud_steps == 3


@pytest.mark.parametrize("died_after", [None, 1, 3, 4])
def test_a_takeover_draws_and_says_what_it_costs(
    died_after: int | None, specialist: Edge, cloud: Cloud, fake: FakeCloud
) -> None:
    """In event, message, records and file: how many steps, and which. From the level on it costs none."""
    fake.refuse_with = Reason.UNAVAILABLE if died_after is None else None
    fake.die_after_call = died_after
    done = died_after or 0
    asked = replace(REQUEST, cloud_steps=6)
    result, events = draw(asked, specialist, cloud)
    untrained = max(4 - done, 0)
    (fallback,) = (event for event in events if isinstance(event, Fallback))
    record = provenance(result)

    assert (result.actual_cloud_steps, fallback.untrained_steps, result.untrained_steps) == (done, untrained, untrained)
    assert [step.get("untrained", False) for step in record["steps"]] == [done <= call < 4 for call in range(6)]
    assert [record.is_trained for record in result.steps] == [not done <= call < 4 for call in range(6)]
    assert ("above the noise level" in result.fallback_message) == bool(untrained)
    assert (f"Untrained steps: {untrained}" in parameters(result)) == bool(untrained)
    assert result_json(result).get("untrained_steps", 0) == untrained
    if untrained:  # nobody may ask for such an image
        with pytest.raises(InvalidRequest, match="draw it as planned, with `cloud_steps` 6"):
            replay(record)
    elif died_after is not None:
        assert replay(record)["hybrid"]["cloud_steps"] == 4


def test_a_takeover_costs_nothing_where_the_bundle_draws_all(
    bundle: Bundle, models: Models, cloud: Cloud, fake: FakeCloud
) -> None:
    """Records of bundles that do not say are as they were."""
    fake.die_after_call = 1
    result, events = draw(replace(REQUEST, cloud_steps=6), (bundle, models), cloud)
    (fallback,) = (event for event in events if isinstance(event, Fallback))

    assert (fallback.message, fallback.untrained_steps) == ("Socket closed", 0)
    assert provenance(result).keys().isdisjoint({"untrained_steps", "high_noise_steps"})
    assert set(provenance(result)["steps"][-1]) == {"step", "call", "place"}


def test_a_saved_state_above_the_level_is_the_clouds(specialist: Edge, cloud: Cloud) -> None:
    """It goes on there up to the level; below it the edge may finish alone."""
    result, events = draw(REQUEST, specialist, cloud)
    steps = [event for event in events if isinstance(event, StepDone)]
    early, late = (saved_state(result, "tiny-test", steps[call - 1]) for call in (2, 4))

    assert draw(Request(resume=late, mode="edge"), specialist, None)[0].untrained_steps == 0
    with pytest.raises(InvalidRequest, match=r"`cloud_steps` 4 to 6"):
        draw(Request(resume=early, mode="edge"), specialist, None)
    continued, _ = draw(Request(resume=early, codec="fp32"), specialist, cloud)
    assert np.abs(continued.latents - result.latents).max() < EXACT


def by_boundary(kind: str, steps: int, boundary: float) -> Floats:
    """Returns the final latents of one process that picks its U-Net by the timestep of each call, as Wan 2.2 does."""
    plan, high, low = make_plan(kind, steps), TinyUNet(seed=3), TinyUNet(seed=0)
    embeds, negative = text_embeds("a red fox"), text_embeds("")

    def predict(sample: Floats, timestep: float) -> Floats:
        unet = low if timestep <= boundary else high
        return unet.guided(sample, timestep, embeds, negative, 3.0)

    *_, last = run_from_seed(plan, predict, seed=11, shape=(CHANNELS, 4, 4))
    return last.state[0]


@pytest.mark.parametrize(("kind", "steps"), [("ddim", 6), ("dpmpp_2m", 6), ("lcm", 4), ("heun", 4)])
@pytest.mark.parametrize("boundary", [LIMIT, 335, 655.5])
def test_a_second_unet_draws_what_is_above(
    kind: str, steps: int, boundary: float, tmp_path: Path, cloud: Cloud, fake: FakeCloud
) -> None:
    """Each call runs the U-Net for its timestep, also between the two calls of a step of Heun (340 and 330)."""
    write_bundle(tmp_path, max_timestep=boundary, high_noise_seed=3)
    fake.die_after_call, fake.die_times = 0, 100  # it sends the texts, and is lost
    asked = replace(REQUEST, scheduler=kind, num_inference_steps=steps, cloud_steps=1)
    result, events = draw(asked, open_edge(tmp_path), cloud)
    plan = make_plan(kind, steps)
    high = [row.timestep > boundary for row in plan.rows]

    assert np.abs(result.latents - by_boundary(kind, steps, boundary)).max() < EXACT
    assert [record.unet == "unet_high_noise" for record in result.steps] == high
    assert [step.get("unet") for step in provenance(result)["steps"]] == [
        "unet_high_noise" if each else None for each in high
    ]
    assert result.high_noise_steps == len({row.step for row in plan.rows if row.timestep > boundary})
    assert result.untrained_steps == 0
    assert not any(event.untrained_steps for event in events if isinstance(event, Fallback))
    assert f"High noise steps: {result.high_noise_steps}" in parameters(result)


def test_with_a_second_unet_every_split_is_taken(pair: Edge, cloud: Cloud) -> None:
    """As with a bundle that is good for all: the edge alone, early hand-overs, the small model first."""
    text = "small:2@edge,large:4@cloud"
    for asked in (
        replace(REQUEST, mode="edge"),
        replace(REQUEST, cloud_steps=1),
        replace(REQUEST, mode="auto", segments=parse_segments(text)),
        replace(REQUEST, mode="edge", image_input=image(1.0)),
    ):
        assert draw(asked, pair, cloud)[0].high_noise_steps
    assert draw(REQUEST, pair, cloud)[0].planned_cloud_steps == 3


def test_the_second_unet_is_loaded_when_it_is_needed(pair: Edge, cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """And let go by the next image that does not need it; several that do share it."""
    loaded: list[str] = []
    load: Callable = Models._load
    monkeypatch.setattr(Models, "_load", lambda self, role, choice: loaded.append(role) or load(self, role, choice))
    finish = replace(REQUEST, cloud_steps=4)
    for asked, times in ((finish, 0), (replace(REQUEST, mode="edge"), 1), (replace(REQUEST, mode="edge"), 1),
                         (finish, 1), (replace(REQUEST, mode="edge"), 2)):  # fmt: skip
        draw(asked, pair, cloud)
        assert loaded.count("unet_high_noise") == times
    assert loaded.count("unet") == 1
