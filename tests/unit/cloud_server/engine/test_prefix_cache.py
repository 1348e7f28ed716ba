"""The prefix cache: what answers a job bit for bit, what begins one, what is nobody's business, and its bounds."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cloud_server.engine.caller import Caller
from cloud_server.engine.engine import Engine
from cloud_server.engine.event_buffer import EventBuffer
from cloud_server.engine.events import Event, Finished, Snapshot, Started
from cloud_server.engine.prefix_cache import Held, Key, PrefixCache, prefix_digest
from cloud_server.engine.request import JobRequest, Stage
from cloud_server.metrics import Metrics
from cloud_server.models.denoiser import Encoded
from cloud_server.models.load import Model
from cloud_server.models.served import FixedModels
from hybridsd.energy import Energy
from hybridsd.errors import CloudBusy
from hybridsd.prompting import TextOptions
from hybridsd.skipping import CallSkipping
from hybridsd.tokens import Quota
from tests.support.engine_fakes import GatedDenoiser, job_request, read_to_end, read_to_start, states

MakeEngine = Callable[..., Engine]
MIB = 2**20
ALICE = Caller(principal="alice", owner="token alice\n")
BOB = Caller(principal="bob", owner="token bob\n")


def keyed(model: Model, /, **changes: Any) -> JobRequest:
    """Returns a job whose states are kept."""
    request = job_request(model, **{"state_every": 0, **changes})
    return replace(request, prefix=prefix_digest(request, request.plan.digest()))


async def run(engine: Engine, request: JobRequest, caller: Caller = ALICE) -> list[Event]:
    buffer = EventBuffer()
    job = engine.submit(request, buffer, caller=caller)
    events = await read_to_end(buffer)
    engine.detach(job, buffer)
    return events


def handoff(events: list[Event]) -> Snapshot:
    return next(event for event in events if isinstance(event, Snapshot) and event.is_handoff)


def same(one: Snapshot, other: Snapshot) -> bool:
    return one.call == other.call and all(np.array_equal(a, b) for a, b in zip(one.arrays, other.arrays, strict=True))


@pytest.fixture
def opened(gated: GatedDenoiser) -> GatedDenoiser:
    gated.open()
    return gated


async def test_the_same_again_is_answered_bit_for_bit_without_the_device(
    tiny_model: Model, make_engine: MakeEngine, opened: GatedDenoiser
) -> None:
    """Started, the hand-off and the end; nothing ran, nothing was taken, and the text is the one of before."""
    metrics = Metrics()
    engine = make_engine({"tiny": opened}, prefix_cache_bytes=MIB, metrics=metrics)
    first = await run(engine, keyed(tiny_model, handoff_call=4))
    num_calls = len(opened.rows)

    again = await run(engine, keyed(tiny_model, handoff_call=4, state_every=1))

    assert len(opened.rows) == num_calls == 4
    assert [type(event) for event in again] == [Started, Snapshot, Finished]
    assert same(handoff(again), handoff(first))
    started, finished = again[0], again[-1]
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert started.num_reused_calls == finished.usage.num_reused_calls == 4
    assert started.prompt is next(event for event in first if isinstance(event, Started)).prompt
    assert (finished.usage.num_calls, finished.usage.compute_s, finished.usage.text_s) == (0, 0.0, 0.0)
    assert finished.usage.energy == Energy(0.0, "measured")
    assert engine.is_idle
    counted = {
        result: metrics.registry.get_sample_value(
            "hybridsd_cloud_cache_requests_total", {"cache": "prefixes", "result": result}
        )
        for result in ("hit", "part", "miss")
    }
    assert counted == {"hit": 1, "part": 0, "miss": 1}
    assert metrics.registry.get_sample_value("hybridsd_cloud_reused_steps_total") == 4


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_ancestral", "heun"])
async def test_a_later_handoff_begins_where_an_earlier_one_ended(
    tiny_model: Model, make_engine: MakeEngine, opened: GatedDenoiser, scheduler: str
) -> None:
    """Only the calls behind it run, and alone on a CPU all bits are those of the whole run."""
    plan = tiny_model.plans.plan(scheduler, 6)
    engine = make_engine({"tiny": opened}, prefix_cache_bytes=MIB)
    whole = await run(make_engine({"tiny": tiny_model.denoiser}), job_request(tiny_model, plan=plan, handoff_call=5))
    await run(engine, keyed(tiny_model, plan=plan, handoff_call=2))

    events = await run(engine, keyed(tiny_model, plan=plan, handoff_call=5, state_every=1))

    assert len(opened.rows) == 2 + 3
    assert sorted(states(events)) == [2, 3, 4, 5], "that it begins at is sent, too: the caller can go on from it"
    assert all(same(states(events)[call], states(whole)[call]) for call in (2, 3, 4, 5))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.usage.num_calls, finished.usage.num_reused_calls) == (3, 2)

    await run(engine, keyed(tiny_model, plan=plan, handoff_call=5))
    assert len(opened.rows) == 2 + 3, "the end of the longer run is kept as well"


async def test_states_on_the_way_answer_earlier_handoffs(
    tiny_model: Model, make_engine: MakeEngine, opened: GatedDenoiser
) -> None:
    """Those that were sent; their previews only to whoever asks for one."""
    engine = make_engine({"tiny": opened}, prefix_cache_bytes=MIB)
    whole = await run(engine, keyed(tiny_model, state_every=2, preview_every=2))

    plain = handoff(await run(engine, keyed(tiny_model, handoff_call=4)))
    seen = handoff(await run(engine, keyed(tiny_model, handoff_call=4, preview_every=4)))

    assert len(opened.rows) == 6
    assert same(replace(plain, is_handoff=False), states(whole)[4])
    assert plain.x0_preview is None
    assert np.array_equal(seen.x0_preview, states(whole)[4].x0_preview)  # type: ignore[arg-type]


async def test_a_full_queue_and_a_quota_do_not_matter(
    tiny_model: Model, make_engine: MakeEngine, gated: GatedDenoiser
) -> None:
    """What is kept is answered while all places are taken, and costs no steps; what is not is refused as ever."""
    caller = replace(ALICE, quota=Quota(jobs=2, queued=1, steps_per_minute=20))
    metrics = Metrics()
    engine = make_engine({"tiny": gated}, prefix_cache_bytes=MIB, max_batch=1, max_queue=1, metrics=metrics)
    gated.allow(3)
    kept = keyed(tiny_model, handoff_call=3)
    await run(engine, kept, caller)
    buffers = []
    for seed in range(1, 6):  # places of a few groups' worth, and the queue
        buffers.append(EventBuffer())
        try:
            engine.submit(keyed(tiny_model, seed=seed, handoff_call=1), buffers[-1], caller=ALICE)
        except CloudBusy:
            break
    else:
        pytest.fail("the queue took all")
    await read_to_start(buffers[0])
    with pytest.raises(CloudBusy):
        engine.check_room("new", caller, steps=3, seed=99)
    reused = "hybridsd_cloud_reused_steps_total"
    assert metrics.registry.get_sample_value(reused) == 0
    with pytest.raises(CloudBusy):
        await run(engine, keyed(tiny_model, handoff_call=4), caller)
    assert metrics.registry.get_sample_value(reused) == 0, "what is refused reuses nothing"

    for _ in range(10):  # of 3 steps each: more than a minute's
        engine.check_room("again", caller, steps=3, seed=0)
        events = await run(engine, keyed(tiny_model, handoff_call=3), caller)
        assert handoff(events).call == 3
    with pytest.raises(CloudBusy):
        await run(engine, keyed(tiny_model, handoff_call=3, prompt="another"), caller)


async def test_a_finished_answer_is_found_by_its_id(
    tiny_model: Model, make_engine: MakeEngine, opened: GatedDenoiser
) -> None:
    """A retry attaches to it as to any other job."""
    engine = make_engine({"tiny": opened}, prefix_cache_bytes=MIB)
    await run(engine, keyed(tiny_model, handoff_call=2))
    request = keyed(tiny_model, handoff_call=2, request_id="mine")

    first, second = await run(engine, request), await run(engine, request)

    assert same(handoff(first), handoff(second))
    assert isinstance(first[-1], Finished)
    assert first[-1] == second[-1]


async def test_nothing_is_shared_between_owners(
    tiny_model: Model, make_engine: MakeEngine, opened: GatedDenoiser
) -> None:
    """Another token, another user of one, and without tokens another machine run theirs themselves."""
    engine = make_engine({"tiny": opened}, prefix_cache_bytes=MIB)
    callers = [
        ALICE, BOB, replace(ALICE, owner="token alice\nann", user="ann"), Caller(principal="1.2.3.4"),
        Caller(principal="1.2.3.5"), Caller(principal="1.2.3.4", user="ann"),
    ]  # fmt: skip
    for number, caller in enumerate(callers, start=1):
        await run(engine, keyed(tiny_model, handoff_call=1), caller)
        assert len(opened.rows) == number
    for caller in callers:
        await run(engine, keyed(tiny_model, handoff_call=1), caller)
    assert len(opened.rows) == len(callers)


class ChangingModels(FixedModels):
    """Models of which one is loaded anew from elsewhere."""

    def __init__(self, *devices: Any) -> None:
        super().__init__(*devices)
        self.contents: Hashable = 1

    def content(self, model: str) -> Hashable:
        return self.contents


async def test_states_of_a_model_that_was_replaced_are_not_found(tiny_model: Model, gated: GatedDenoiser) -> None:
    """Nor are those kept that it was replaced in the middle of; a job that waits begins afresh."""
    served = ChangingModels({"tiny": gated})
    engine = Engine(served, num_threads=1, max_batch=1, prefix_cache_bytes=MIB)
    engine.start()
    try:
        gated.allow(2)
        await run(engine, keyed(tiny_model, handoff_call=2))
        served.contents = 2
        gated.allow(1)
        await run(engine, keyed(tiny_model, handoff_call=1))
        assert len(gated.rows) == 3, "not begun with what the old one led to"

        buffer = EventBuffer()
        engine.submit(keyed(tiny_model, seed=5, handoff_call=1), buffer, caller=ALICE)
        await read_to_start(buffer)
        served.contents = 3  # in the middle of it
        gated.allow(1)
        await read_to_end(buffer)
        assert len(engine.prefix_cache) == 2
        gated.allow(1)
        await run(engine, keyed(tiny_model, seed=5, handoff_call=1))
        assert len(gated.rows) == 5

        buffers = [EventBuffer(), EventBuffer()]
        engine.submit(keyed(tiny_model, seed=6, handoff_call=1), buffers[0], caller=ALICE)
        await read_to_start(buffers[0])
        engine.submit(keyed(tiny_model, seed=5, handoff_call=3), buffers[1], caller=ALICE)
        served.contents = 4  # while it waits to go on from what the old one led to
        gated.open()
        finished = (await read_to_end(buffers[1]))[-1]
        assert isinstance(finished, Finished)
        assert (finished.usage.num_calls, finished.usage.num_reused_calls) == (3, 0)
    finally:
        gated.open()
        engine.stop()


async def test_skipped_calls_are_answered_and_not_gone_on_from(
    tiny_model: Model, make_engine: MakeEngine, opened: GatedDenoiser
) -> None:
    """Which calls are skipped behind a hand-off depends on those before it."""
    engine = make_engine({"tiny": opened}, prefix_cache_bytes=MIB)
    skipping = CallSkipping(2, 2, 0.3)
    first = await run(engine, keyed(tiny_model, handoff_call=4, skipping=skipping))
    num_calls = len(opened.rows)
    again = await run(engine, keyed(tiny_model, handoff_call=4, skipping=skipping))
    assert same(handoff(first), handoff(again))
    assert len(opened.rows) == num_calls

    await run(engine, keyed(tiny_model, handoff_call=6, skipping=skipping))
    assert len(opened.rows) > num_calls + 2


async def test_models_that_change_on_the_way_go_on_from_what_is_kept(
    tiny_model: Model, make_engine: MakeEngine, opened: GatedDenoiser
) -> None:
    """With the stage that the state is in, and its texts."""
    later = (Stage(3, "other", 2.0),)
    both = {"tiny": opened, "other": tiny_model.denoiser}
    whole = await run(make_engine(both), job_request(tiny_model, more_stages=later, handoff_call=5))
    engine = make_engine(both, prefix_cache_bytes=MIB)
    await run(engine, keyed(tiny_model, more_stages=later, handoff_call=4))
    num_calls = len(opened.rows)

    events = await run(engine, keyed(tiny_model, more_stages=later, handoff_call=5))

    assert same(handoff(events), handoff(whole))
    assert len(opened.rows) == num_calls


async def test_nothing_is_kept_without_room_or_a_digest(
    tiny_model: Model, make_engine: MakeEngine, opened: GatedDenoiser
) -> None:
    """Off is off, and a state that fits in nowhere is not kept."""
    for engine, request in (
        (make_engine({"tiny": opened}), keyed(tiny_model, handoff_call=1)),
        (make_engine({"tiny": opened}, prefix_cache_bytes=100), keyed(tiny_model, handoff_call=1)),
        (make_engine({"tiny": opened}, prefix_cache_bytes=MIB), job_request(tiny_model, handoff_call=1)),
    ):
        before = len(opened.rows)
        await run(engine, request)
        await run(engine, replace(request, request_id="again"))
        assert len(opened.rows) == before + 2
        assert (len(engine.prefix_cache), engine.prefix_cache.num_bytes) == (0, 0)


async def test_any_worker_goes_on_from_what_another_kept(tiny_model: Model, gated: GatedDenoiser) -> None:
    """Where all devices are of one kind; of several kinds nothing is kept, for their bits differ."""
    other = GatedDenoiser(tiny_model.denoiser)
    engine = Engine(FixedModels({"tiny": gated}, {"tiny": other}), num_threads=1, prefix_cache_bytes=MIB)
    engine.start()
    try:
        gated.allow(2)
        await run(engine, keyed(tiny_model, handoff_call=2))
        blocker, buffer = EventBuffer(), EventBuffer()
        engine.submit(keyed(tiny_model, seed=5, handoff_call=6), blocker, caller=ALICE)
        await read_to_start(blocker)  # and does not get on
        engine.submit(keyed(tiny_model, handoff_call=3), buffer, caller=ALICE)
        other.open()
        assert handoff(await read_to_end(buffer)).call == 3
        assert len(other.rows) == 1
    finally:
        gated.open()
        other.open()
        engine.stop()

    other.device = torch.device("meta")
    mixed = Engine(FixedModels({"tiny": gated}, {"tiny": other}), prefix_cache_bytes=MIB)
    assert mixed.prefix_cache.max_bytes == 0


def test_all_that_decides_the_bits_is_in_the_digest_and_no_more(tiny_model: Model) -> None:
    """Each change is another digest; how far it runs, what is shown and who waits is not."""
    base = keyed(tiny_model)
    latents = np.zeros((4, 8, 8), np.float32)
    embeds = Encoded(np.zeros((12, 8), np.float32))
    changes: list[dict[str, Any]] = [
        {}, {"prompt": "another"}, {"negative_prompt": "another"}, {"negative_prompt": None}, {"prompt": embeds},
        {"prompt": replace(embeds, embeds=np.ones((12, 8), np.float32))},
        {"prompt": replace(embeds, pooled=np.zeros(8, np.float32))}, {"text_options": TextOptions(weighting=True)},
        {"text_options": TextOptions(long_prompt="chunk")}, {"guidance_scale": 4.5}, {"model": "other"},
        {"more_stages": (Stage(2, "other", 4.0),)}, {"more_stages": (Stage(3, "other", 4.0),)},
        {"loras": (("ink", 1.0),)}, {"loras": (("ink", 0.5),)}, {"seed": 1}, {"image_index": 1},
        {"latent_shape": (4, 8, 16)}, {"size": (64, 64)}, {"first_call": 1, "initial_state": (latents,)},
        {"initial_state": (latents,)}, {"initial_state": (latents + 1,)}, {"initial_latents": latents},
        {"initial_latents": latents + 1}, {"skipping": CallSkipping(2, 1, 0.3)}, {"known_latents": latents},
        {"known_latents": latents, "mask": latents[:1]}, {"known_latents": latents, "mask": latents[:1] + 1},
        {"plan": tiny_model.plans.plan("dpmpp_2m", 7)}, {"plan": tiny_model.plans.plan("ddim", 6)},
    ]  # fmt: skip
    digests = [keyed(tiny_model, **change).prefix for change in changes]
    assert len(set(digests)) == len(changes)
    same_bits = {"handoff_call": 2, "state_every": 3, "preview_every": 2, "reattach_grace_s": 5.0, "request_id": "x"}
    assert keyed(tiny_model, **same_bits).prefix == base.prefix


async def test_a_state_on_the_way_is_no_end_where_the_last_call_must_run(
    tiny_model: Model, make_engine: MakeEngine, opened: GatedDenoiser
) -> None:
    """A criterion skips none before the hand-off: a longer job may have skipped there, and published what it led to."""
    skipping = CallSkipping.adaptive(1.0, warm_up_calls=2)
    expected = await run(make_engine({"tiny": opened}), keyed(tiny_model, handoff_call=4, skipping=skipping))
    engine = make_engine({"tiny": opened}, prefix_cache_bytes=MIB)
    longer = await run(engine, keyed(tiny_model, handoff_call=6, skipping=skipping, state_every=1))
    found = await run(engine, keyed(tiny_model, handoff_call=4, skipping=skipping))

    on_the_way = next(event for event in longer if isinstance(event, Snapshot) and event.call == 4)
    assert not np.array_equal(on_the_way.arrays[0], handoff(expected).arrays[0])
    assert same(handoff(found), handoff(expected))


class TestPrefixCache:
    """The store alone."""

    def key(self, name: str, owner: str = "me") -> Key:
        return Key(owner, 0, 0, (("tiny", None),), name.encode())

    def held(self, call: int = 1, kib: int = 1, texts: Any = ()) -> Held:
        return Held(call, (np.zeros(256 * kib, np.float32),), None, texts)

    def test_the_oldest_goes_first_and_before_it_what_no_job_ended_with(self) -> None:
        """A state that was asked for is young again; bytes and hints follow."""
        cache = PrefixCache(4096)
        for name, is_end in (("a", True), ("b", True), ("c", False), ("d", True)):
            cache.keep(self.key(name), self.held(), is_end=is_end)
        assert cache.find(self.key("a"), 0, 1) is not None
        cache.keep(self.key("e"), self.held(), is_end=True)
        assert cache.find(self.key("c"), 0, 1) is None
        cache.keep(self.key("f"), self.held(), is_end=True)
        assert [cache.find(self.key(name), 0, 1) is not None for name in "abdef"] == [True, False, True, True, True]
        assert (len(cache), cache.num_bytes) == (4, 4096)
        cache.keep(self.key("g"), self.held(kib=4), is_end=True)
        assert (len(cache), cache.num_bytes) == (1, 4096)
        cache.keep(self.key("h"), self.held(kib=5), is_end=True)
        assert len(cache) == 1, "what has no room at all drops nothing"

    def test_texts_are_counted_once_for_all_that_share_them(self) -> None:
        """And no more when the last of these is gone."""
        text = Encoded(np.zeros(256, np.float32))
        texts = ((text, None),)
        cache = PrefixCache(8192)
        for name in "abc":
            cache.keep(self.key(name), self.held(texts=texts), is_end=True)
            cache.keep(self.key(name), self.held(2, texts=((replace(text), None),)), is_end=True)
        assert cache.num_bytes == 7 * 1024
        cache.keep(self.key("d"), self.held(kib=8), is_end=True)
        assert (len(cache), cache.num_bytes) == (1, 8192)

    def test_the_same_again_is_kept_once_with_the_preview_of_either(self) -> None:
        """A state on the way becomes an end, never the other way."""
        cache = PrefixCache(4096)
        seen = replace(self.held(), x0_preview=np.zeros(8, np.float32))
        for held, is_end in ((seen, False), (self.held(), True), (self.held(), False)):
            cache.keep(self.key("a"), held, is_end=is_end)
        assert (len(cache), cache.num_bytes) == (1, 1024 + 32)
        cache.keep(self.key("b"), self.held(kib=3), is_end=False)
        found = cache.find(self.key("a"), 0, 1)
        assert found is not None
        assert found.x0_preview is not None

    def test_the_furthest_that_is_asked_for_is_found(self) -> None:
        """Behind where the job begins, and up to its hand-off."""
        cache = PrefixCache(10**6)
        for call in (2, 5, 9):
            cache.keep(self.key("a"), self.held(call), is_end=True)

        def call_of(after: int, last: int, **options: bool) -> int | None:
            found = cache.find(self.key("a"), after, last, **options)
            return None if found is None else found.call

        assert [call_of(0, last) for last in (1, 2, 4, 5, 20)] == [None, 2, 2, 5, 9]
        assert call_of(5, 8) is None
        assert [call_of(0, last, exactly=True) for last in (4, 5)] == [None, 5]

    def test_hints_are_of_owner_seed_and_index(self) -> None:
        """And gone with the states."""
        cache = PrefixCache(1024)
        cache.keep(self.key("a"), self.held(), is_end=True)
        assert [cache.may_hold(*hint) for hint in (("me", 0, 0), ("me", 1, 0), ("me", 0, 1), ("you", 0, 0))] == [
            True, False, False, False,
        ]  # fmt: skip
        cache.keep(self.key("b", "you"), self.held(), is_end=True)
        assert not cache.may_hold("me", 0, 0)
