"""A service that keeps states: the same request again is answered from memory, whoever else is served meanwhile."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.engine_fakes import Client, GatedDenoiser, failure, message

StartServer = Callable[..., Awaitable[Client]]


async def test_the_same_again_is_the_same_answer(start_server: StartServer, gated: GatedDenoiser) -> None:
    """All that a caller needs to go on, whatever its encoding is and however it names plan and defaults."""
    client = await start_server(denoiser=gated, prefix_cache_mib=1)
    gated.allow(4)
    first = await client.denoise(message(state_every=1, preview_every=4))

    again = await client.denoise(message(preview_every=4))
    shorter = await client.denoise(message(handoff_step=2, encoding=3))
    named = await client.denoise(message(scheduler=None, plan=first[0].started.plan, width=64, seed=0, model="tiny"))

    assert len(gated.rows) == 4
    assert [one.WhichOneof("event") for one in again] == ["started", "state", "finished"]
    assert again[1].state == next(one.state for one in first if one.state.is_handoff)
    assert again[0].started.num_reused_calls == again[2].finished.usage.num_reused_calls == 4
    assert again[0].started.prompt == first[0].started.prompt
    assert again[2].finished.usage.num_calls == 0
    assert again[2].finished.usage.HasField("energy")
    assert again[2].finished.usage.energy.joules == 0.0
    assert (shorter[1].state.call, shorter[1].state.is_handoff) == (2, True)
    assert named[1].state.arrays == again[1].state.arrays


async def test_a_full_server_answers_what_it_has(start_server: StartServer, gated: GatedDenoiser) -> None:
    """And refuses what it has not, a look-alike as well."""
    client = await start_server(denoiser=gated, prefix_cache_mib=1, max_batch=1, max_queue=1)
    gated.allow(4)
    await client.denoise(message(seed=7))
    streams = []
    for seed in range(9):
        streams.append(client.denoising.Denoise(message(seed=100 + seed)))
        try:
            await streams[-1].read()
        except grpc.RpcError:
            break

    again = await client.denoise(message(seed=7))

    assert again[1].state.is_handoff
    for other in (message(seed=8), message(seed=7, text=pb.TextConditioning(prompt="another"))):
        with pytest.raises(grpc.RpcError) as raised:
            await client.denoise(other)
        assert failure(raised.value)[:2] == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    for stream in streams:
        stream.cancel()


@pytest.mark.parametrize(
    ("reuse", "field"),
    [
        ({"max_calls": 0}, "approximate_reuse.max_calls"),
        ({"max_calls": 4}, "approximate_reuse.max_calls"),
        ({"max_calls": 1, "min_similarity": 0.0}, "approximate_reuse.min_similarity"),
        ({"max_calls": 1, "min_similarity": 1.1}, "approximate_reuse.min_similarity"),
        ({"max_calls": 1, "min_similarity": float("nan")}, "approximate_reuse.min_similarity"),
    ],
)
async def test_what_may_be_taken_over_has_bounds(start_server: StartServer, reuse: Any, field: str) -> None:
    """Each is named; skipped calls cannot be had beside it."""
    client = await start_server(prefix_cache_mib=1)
    wanted = pb.ApproximateReuse(**reuse)
    skipping = pb.CallSkipping(warm_up_calls=2, skipped_calls=1)
    for asked, where in (
        (message(approximate_reuse=wanted), field),
        (message(approximate_reuse=pb.ApproximateReuse(max_calls=1), call_skipping=skipping), "approximate_reuse"),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            await client.denoise(asked)
        assert failure(raised.value)[:3] == ("INVALID_ARGUMENT", "FIELD_INVALID", where)


async def test_a_near_text_is_begun_with_where_it_is_near_enough(start_server: StartServer) -> None:
    """0.95 where nothing is said; the start says how near it is, and an exact answer says nothing."""
    client = await start_server(prefix_cache_mib=1)

    async def ask(prompt: str, **reuse: Any) -> pb.Started:
        asked = message(text=pb.TextConditioning(prompt=prompt), approximate_reuse=pb.ApproximateReuse(**reuse))
        return (await client.denoise(asked))[0].started

    await ask("a fox on a blue hill", max_calls=2)
    strict = await ask("donuts", max_calls=2)
    near = await ask("a fox on the blue hill", max_calls=2, min_similarity=0.01)
    exact = await ask("a fox on a blue hill", max_calls=2)

    assert (strict.num_reused_calls, strict.HasField("reuse_similarity")) == (0, False)
    assert near.num_reused_calls == 2
    assert 0.01 <= near.reuse_similarity <= 1
    assert (exact.num_reused_calls, exact.HasField("reuse_similarity")) == (4, False)
