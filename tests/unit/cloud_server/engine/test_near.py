"""Approximate reuse: what a near text may begin with, what it says of it, and what never happens unasked."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cloud_server.engine.caller import Caller
from cloud_server.engine.engine import Engine
from cloud_server.engine.events import Event, Finished, Started
from cloud_server.engine.near import text_feature
from cloud_server.engine.prefix_cache import MAX_NEAR, Held, Key, PrefixCache, prefix_digest
from cloud_server.engine.request import ApproximateReuse, JobRequest
from cloud_server.metrics import Metrics
from cloud_server.models.denoiser import Encoded
from cloud_server.models.load import Model
from hybridsd.prompting import TextOptions
from hybridsd.tokens import Quota
from tests.support.engine_fakes import GatedDenoiser, bad_embeds, job_request, states
from tests.unit.cloud_server.engine.test_prefix_cache import ALICE, BOB, MIB, handoff, run, same

MakeEngine = Callable[..., Engine]
NEAR = {"prompt": "a fox on a blue hill"}
OTHER = {"prompt": "a fox on the blue hill"}


def open_to(model: Model, max_calls: int = 3, similarity: float = 0.01, **changes: Any) -> JobRequest:
    """Returns a job that may begin with a state of a near text, by default of almost any."""
    request = job_request(model, **{"state_every": 0, "handoff_call": 5, **changes})
    digest = request.plan.digest()
    group = prefix_digest(request, digest, has_prompt=False)
    reuse = ApproximateReuse(max_calls, similarity, group) if max_calls else None
    return replace(request, prefix=prefix_digest(request, digest), approximate_reuse=reuse)


def told(events: list[Event]) -> tuple[int, float | None, int]:
    """Returns reused calls and how near as the start says, and calls as the end does."""
    started = next(event for event in events if isinstance(event, Started))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.usage.num_reused_calls == started.num_reused_calls
    return started.num_reused_calls, started.similarity, finished.usage.num_calls


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def engine(gated: GatedDenoiser, make_engine: MakeEngine, metrics: Metrics) -> Engine:
    gated.open()
    return make_engine({"tiny": gated}, prefix_cache_bytes=MIB, metrics=metrics)


@pytest.mark.parametrize("max_calls", [1, 2, 3])
async def test_a_near_text_begins_with_the_state_of_the_other(
    tiny_model: Model, engine: Engine, metrics: Metrics, max_calls: int
) -> None:
    """After as many calls as it allows; the rest is its own, and it says so from the start on."""
    whole = states(await run(engine, job_request(tiny_model, handoff_call=5, **NEAR)))
    await run(engine, open_to(tiny_model, **NEAR))

    events = await run(engine, open_to(tiny_model, max_calls, state_every=1, **OTHER))

    num_reused, similarity, num_calls = told(events)
    assert (num_reused, num_calls) == (max_calls, 5 - max_calls)
    denoiser = tiny_model.denoiser
    near, other, empty = (denoiser.encode(text, TextOptions()) for text in (NEAR["prompt"], OTHER["prompt"], ""))
    assert similarity == pytest.approx(float(text_feature(near, empty) @ text_feature(other, empty)), abs=1e-6)
    found = states(events)
    assert sorted(found) == list(range(max_calls, 6))
    assert same(found[max_calls], whole[max_calls])
    assert not same(found[5], whole[5])
    started = next(event for event in events if isinstance(event, Started))
    assert np.array_equal(started.prompt.embeds, other.embeds), "its own text, never the other's"
    counted = [
        metrics.registry.get_sample_value("hybridsd_cloud_cache_requests_total", {"cache": "near", "result": result})
        for result in ("hit", "miss")
    ]
    assert counted == [1, 1]
    assert metrics.registry.get_sample_value("hybridsd_cloud_reused_steps_total") == max_calls


async def test_nothing_approximate_happens_unless_both_asked_for_it(tiny_model: Model, engine: Engine) -> None:
    """A job that did not is neither begun so, nor begun with."""
    await run(engine, open_to(tiny_model, 0, **NEAR))
    assert told(await run(engine, open_to(tiny_model, **OTHER)))[:2] == (0, None)
    assert told(await run(engine, open_to(tiny_model, 0, prompt="a third")))[:2] == (0, None)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5}, {"image_index": 1}, {"guidance_scale": 4.5}, {"negative_prompt": "grey"},
        {"latent_shape": (4, 8, 16)}, {"text_options": TextOptions(weighting=True)},
        {"initial_latents": np.zeros((4, 8, 8), np.float32)}, {"similarity": 1.0}, {"plan": "ddim"},
    ],
    ids=str,
)  # fmt: skip
async def test_all_but_the_text_must_agree(tiny_model: Model, engine: Engine, change: dict[str, Any]) -> None:
    """Noise, guidance, size, solver; and the text must be as near as was asked."""
    if "plan" in change:
        change = {"plan": tiny_model.plans.plan("ddim", 6)}
    await run(engine, open_to(tiny_model, **NEAR))
    assert told(await run(engine, open_to(tiny_model, **{**OTHER, **change})))[:2] == (0, None)


async def test_another_owner_gets_nothing_of_it(tiny_model: Model, engine: Engine) -> None:
    """However near the text is."""
    await run(engine, open_to(tiny_model, **NEAR))
    for caller in (BOB, replace(ALICE, owner="token alice\nann"), Caller(principal="alice")):
        assert told(await run(engine, open_to(tiny_model, **OTHER), caller))[:2] == (0, None)


async def test_what_is_not_exact_is_never_kept(tiny_model: Model, engine: Engine) -> None:
    """The same again finds the near text again, not what came of it; asked exactly, all runs."""
    await run(engine, open_to(tiny_model, **NEAR))
    kept = len(engine.prefix_cache)
    first = await run(engine, open_to(tiny_model, **OTHER))
    again = await run(engine, open_to(tiny_model, **OTHER))
    assert len(engine.prefix_cache) == kept == 4, "after calls 1 to 3, and the hand-off"
    assert told(again)[0] == 3
    assert same(handoff(first), handoff(again))

    exactly = await run(engine, open_to(tiny_model, 0, **OTHER))
    assert told(exactly) == (0, None, 5)
    assert told(await run(engine, open_to(tiny_model, **OTHER))) == (5, None, 0), "what is exact comes first"


async def test_steps_that_are_not_run_are_given_back(tiny_model: Model, engine: Engine) -> None:
    """A quota of 12 steps is enough for 5 and 2, and 5 more, not for a fourth job."""
    caller = replace(ALICE, quota=Quota(steps_per_minute=12))
    for text, steps in (("a fox", 5), ("a foxy", 2), ("a fog", 5)):
        max_calls = 3 if steps == 2 else 1
        request = open_to(tiny_model, max_calls, prompt=text, seed=int(text == "a fog"))
        assert told(await run(engine, request, caller))[2] == steps
    with pytest.raises(Exception, match="steps a minute"):
        await run(engine, open_to(tiny_model, prompt="more", seed=9), caller)


async def test_a_handoff_within_the_first_calls_still_runs_one(tiny_model: Model, engine: Engine) -> None:
    """And embeddings that the caller made are compared like texts."""
    await run(engine, open_to(tiny_model, **NEAR))
    given = Encoded(tiny_model.denoiser.encode("a fox", TextOptions()).embeds)
    assert told(await run(engine, open_to(tiny_model, handoff_call=2, prompt=given)))[::2] == (1, 1)
    assert told(await run(engine, open_to(tiny_model, handoff_call=1, prompt=bad_embeds())))[0] == 0


def test_texts_are_compared_by_what_they_do_not_share() -> None:
    """By the embedding of the whole where there is one; by the mean of tokens without the empty text's else."""
    common, a, b = np.full((4, 3), 50.0), np.zeros((4, 3)), np.zeros((4, 3))
    a[1], b[1] = (1, 0, 0), (0, 2, 0)
    empty, one, other = (Encoded((common + each).astype(np.float32)) for each in (0, a, b))
    assert text_feature(one, empty) @ text_feature(other, empty) == pytest.approx(0.0, abs=1e-5)
    assert text_feature(one, empty) @ text_feature(one, empty) == pytest.approx(1.0, abs=1e-5)
    assert not text_feature(empty, empty).any()
    whole = replace(one, pooled=np.array([0.0, 3.0], np.float32))
    assert text_feature(whole, empty).tolist() == [0.0, 1.0]


def test_the_index_is_bounded_and_goes_with_the_states() -> None:
    """So many texts of a group; what has been dropped is not found, and its bytes are gone."""
    cache, group = PrefixCache(10**6), Key("me", 0, 0, (), b"group")
    feature = np.eye(1, 8, dtype=np.float32)[0]
    held = Held(1, (np.zeros(16, np.float32),), None, ())
    for number in range(MAX_NEAR + 1):
        key = Key("me", 0, 0, (), str(number).encode())
        cache.keep(key, held, is_end=True, near=(group, feature * (1.0 + (number == 0))))
        cache.keep(key, replace(held, call=2), is_end=True, near=(group, feature))
    assert cache.num_bytes == 2 * (MAX_NEAR + 1) * 64 + MAX_NEAR * 32
    found = cache.find_near(group, feature, 0, 1, 0.5)
    assert found is not None
    assert (found[0].call, found[1]) == (1, 1.0), "the first, which would be nearer, is not among them any more"
    assert cache.find_near(group, -feature, 0, 3, 0.5) is None
    assert cache.find_near(replace(group, owner="you"), feature, 0, 3, 0.5) is None
    cache.keep(Key("me", 1, 0, (), b"large"), Held(1, (np.zeros(250_000, np.float32),), None, ()), is_end=True)
    assert cache.find_near(group, feature, 0, 3, 0.5) is None
    assert cache.num_bytes == 10**6
