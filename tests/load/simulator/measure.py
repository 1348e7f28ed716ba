"""Takes the times that the simulator needs from a real cloud: through its door, as clients see them.

So they have all that the server does beside a call.
"""

import asyncio
import itertools
import math
import secrets
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from edge_client.bundles.bundle import Bundle
from edge_client.inference.models import Models
from hybridsd import noise
from hybridsd.prompting import DEFAULT_TEXT
from tests.load.clients import Client, Mix, ask_all, connected, keep_asking, request_of
from tests.load.simulator.closed import crowd
from tests.load.simulator.steps import Edge, Steps

BATCHES = (1, 2, 4, 8)
TRIES = 3
"""Of which the quickest counts: others may use the machine."""
SHORT, TURNOVER_S = 2, 3.0
"""Steps of short requests, and for how long they are asked for."""
PATIENCE_S = 600.0


async def measure_cloud(
    address: str, token: str, *, sizes: Sequence[int], batches: Sequence[int] = BATCHES, calls: int = 16, source: str
) -> Steps:
    """Times steps at each size and batch, what a request costs beside, and a new text.

    Args:
        address: Of a cloud that has nothing else to do.
        token: To ask with.
        sizes: Width of square pictures.
        batches: Guided jobs that step together.
        calls: Steps of each job; the first two do not count.
        source: What to call it.
    """
    async with connected(address, [token] * max(batches), PATIENCE_S) as clients:
        for size in sizes:
            await ask_all([client.ask(request_of(2, size)) for client in clients])
        times: dict[int, dict[int, float]] = {size: dict.fromkeys(batches, math.inf) for size in sizes}
        for _, size, batch in itertools.product(range(TRIES), sizes, batches):
            times[size][batch] = min(times[size][batch], await _step_s(clients[:batch], size, calls))
        overheads, texts = [], []
        for size in sizes:
            for is_new in (False, True) * 6:
                request = request_of(2, size)
                if is_new:
                    request.text.prompt = f"a new text {secrets.token_hex(8)}"
                asked = await clients[0].ask(request)
                rest_s = asked.elapsed_s - 2 * times[size][1]
                (texts if is_new else overheads).append(max(rest_s, 0.0))
        overhead_s = statistics.median(overheads)
        text_s = max(statistics.median(texts) - overhead_s, 0.0)
        steps = Steps(source=source, calls=times, overhead_s=overhead_s, text_s=text_s)
        return replace(steps, turnover_s=await _turnover_s(clients, steps, sizes[0]))


async def _step_s(clients: Sequence[Client], size: int, calls: int) -> float:
    """Returns the seconds from one step to the next while all of them step together."""
    asked = await ask_all([client.ask(request_of(calls, size, seed=index)) for index, client in enumerate(clients)])
    failed = [each.reason for each in asked if each.outcome != "done"]
    if failed:
        raise RuntimeError(f"the cloud did not draw: {failed}")
    begin = max(each.calls[0][0] for each in asked)
    end = min(each.calls[-1][0] for each in asked)
    times = [[at for at, _ in each.calls if begin <= at <= end] for each in asked]
    between = [(seen[-1] - seen[1]) / (len(seen) - 2) for seen in times if len(seen) > 2]
    if not between:  # some had ended before others began
        return await _step_s(clients, size, 2 * calls)
    return statistics.fmean(between)


async def _turnover_s(clients: Sequence[Client], steps: Steps, size: int) -> float:
    """Returns what a request takes of the device: what explains how many short ones are done in a while."""

    def mixes() -> list[Mix]:
        return [Mix(seed=index, cloud_steps=(SHORT,), sizes=(size,)) for index in range(len(clients))]

    begin = time.monotonic()
    until = begin + TURNOVER_S
    lists = await asyncio.gather(
        *(keep_asking(client, mix, until) for client, mix in zip(clients, mixes(), strict=True))
    )
    rate = sum(map(len, lists)) / (time.monotonic() - begin)

    def simulated(turnover_s: float) -> float:
        tokens = [client.token for client in clients]
        half_s = steps.overhead_s / 2
        asked, elapsed_s = crowd(
            lambda _model, width, batch: steps.call_s(width, batch), tokens, before_s=lambda: half_s,
            state_s=lambda: 0.0, after_s=lambda: half_s, turnover_s=turnover_s, seconds=TURNOVER_S,
            patience_s=PATIENCE_S, mixes=mixes(),
        )  # fmt: skip
        return len(asked) / elapsed_s

    low, high = 0.0, 1.0 / rate
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if simulated(middle) > rate else (low, middle)
    return low


def measure_edge(bundle: Bundle, models: Models, sizes: Sequence[int], repeats: int = 5) -> dict[int, Edge]:
    """Times a guided step, a decode and a text of this device at each size; the quickest of several."""
    models.warm_up()
    found = {}
    for size in sizes:
        side = size // bundle.manifest.vae_scale_factor
        latents = noise.initial_latents(0, 0, (bundle.manifest.latent_channels, side, side))
        times: dict[str, list[float]] = {"text_s": [], "step_s": [], "decode_s": []}
        for repeat in range(repeats + 1):
            marks = [time.perf_counter()]
            conditioning, _ = models.encode_pair(f"a fox {repeat}", "" if models.takes_negative else None, DEFAULT_TEXT)
            marks.append(time.perf_counter())
            models.predict_noise(latents, 500.0, conditioning, guidance_scale=4.0)
            marks.append(time.perf_counter())
            models.decode(latents)
            marks.append(time.perf_counter())
            if repeat:  # the first warms up
                for taken, (begin, end) in zip(times.values(), itertools.pairwise(marks), strict=True):
                    taken.append(end - begin)
        found[size] = Edge(**{name: min(taken) for name, taken in times.items()})
    return found


def measure_here(address: str, token: str, *, sizes: Sequence[int], calls: int, source: str) -> Steps:
    """Does `measure_cloud` from where there is no event loop."""
    return asyncio.run(measure_cloud(address, token, sizes=sizes, calls=calls, source=source))
