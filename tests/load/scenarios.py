"""What `make load` does to real processes, one function a scenario: each returns its rows and the promises it broke."""

import asyncio
import collections
import itertools
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import httpx

from edge_client.bundles.bundle import open_bundle
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.cloud.pool import Pool
from edge_client.generation.events import Finished
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.request import Request
from tests.load.clients import (
    GRACE_S,
    Asked,
    Client,
    Mix,
    ask_all,
    connected,
    keep_asking,
    request_of,
    total,
)
from tests.load.figures import jain, percentile, slope
from tests.load.servers import NAMES, Place, Samples, sampled, started
from tests.load.simulator.observe import VARIABLES, read_spans
from tests.load.simulator.predict import Figures, predict, seen
from tests.support.collector import collector
from tests.support.web_processes import Process

FAIR = 0.95
MAX_MEAN_RETRIES = 2.0
MAX_SLOWER, NOISE_S = 1.5, 0.1
"""How many times slower others may be beside a reader that does not read, and what is noise of a shared machine."""
FLAT_PART = 0.05
"""Of its memory that a process may gain in the second half of a soak."""
MAX_BATCH, MAX_QUEUE = 8, 32
"""Of a cloud, by default."""
NEAR = 0.15
"""By which part the simulator may be off, in throughput and in the median time to the first state."""
MAX_TURNS = 1.5
"""Of a full batch that a job of a token with nothing else may take: it does not wait for others to end."""


@dataclass(kw_only=True)
class Report:
    """What a scenario found."""

    rows: list[dict[str, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def promise(self, kept: bool, what: str) -> None:
        """Notes a promise that was not kept."""
        if not kept:
            self.broken.append(what)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of it."""

    seconds: float
    """Of asking, for each number of clients."""
    patience_s: float
    """Of a client, for one picture."""
    crowds: tuple[int, ...]
    predicted: tuple[int, ...]
    """Clients of the crowds that the simulator predicts."""
    jobs: int
    """Of the token that asks for much."""
    overload: int
    """Clients at once."""
    soak_s: float
    sample_s: float
    edges: int
    """Threads that draw beside two clouds."""
    pause_s: float
    """Of an edge between two pictures."""
    kills: int
    """Clouds that are killed and started again, one after the other."""
    cloud_part: float
    """Of the planned cloud steps at least so many are a cloud's, though clouds are killed."""


FULL = Scale(
    seconds=45.0, patience_s=120.0, crowds=(1, 8, 32, 200), predicted=(1, 8, 32), jobs=30,
    overload=10 * (MAX_BATCH + MAX_QUEUE), soak_s=300.0, sample_s=5.0, edges=4, pause_s=0.0, kills=2,
    cloud_part=0.9,
)  # fmt: skip
QUICK = Scale(
    seconds=2.0, patience_s=120.0, crowds=(3,), predicted=(3,), jobs=12, overload=60, soak_s=3.0,
    sample_s=0.5, edges=2, pause_s=0.3, kills=1,
    cloud_part=0.5,  # its pictures take no time, so those of the moments that are lost weigh more
)  # fmt: skip


@asynccontextmanager
async def clients_of(cloud: Process, tokens: Sequence[str], scale: Scale) -> AsyncIterator[list[Client]]:
    """Yields connected clients, after one picture that warms the cloud up."""
    async with connected(f"127.0.0.1:{cloud.port}", tokens, scale.patience_s) as clients:
        await clients[0].ask(request_of(2, 64))
        yield clients


def row_of(scenario: str, asked: Sequence[Asked], elapsed_s: float) -> dict[str, str]:
    """Returns what many requests came to."""
    first = [each.first_state_s for each in asked if each.first_state_s is not None]
    outcomes = collections.Counter(each.outcome for each in asked)
    done = [each.num_retries for each in asked if each.outcome == "done"]
    return {
        "scenario": scenario,
        "images": str(len(asked)),
        "first state p50": f"{percentile(first, 0.5):.2f} s",
        "p99": f"{percentile(first, 0.99):.2f} s",
        "images/s": f"{outcomes['done'] / elapsed_s:.2f}",
        "retries mean": f"{statistics.fmean(done):.2f}" if done else "",
        "max": str(max(done)) if done else "",
        "refused": str(outcomes["refused"]),
        "failed": str(outcomes["failed"]),
        "hung": str(outcomes["hung"]),
    }


def check(report: Report, scenario: str, asked: Sequence[Asked]) -> None:
    """Checks what holds for all scenarios: nothing hangs, nothing is lost, refusals are honest."""
    outcomes = collections.Counter(each.outcome for each in asked)
    reasons = sorted({each.reason for each in asked if each.outcome in ("failed", "hung")})
    report.promise(outcomes["hung"] == 0, f"{scenario}: {outcomes['hung']} of {len(asked)} requests hung")
    report.promise(outcomes["failed"] == 0, f"{scenario}: {outcomes['failed']} of {len(asked)} failed: {reasons}")
    retries = [each.num_retries for each in asked if each.outcome == "done"]
    mean = statistics.fmean(retries) if retries else 0.0
    report.promise(
        mean <= MAX_MEAN_RETRIES, f"{scenario}: an obedient client came {mean:.1f} times again, not {MAX_MEAN_RETRIES}"
    )


def spread_out(place: Place, num_clients: int) -> list[str]:
    """Returns the token of each client: half of them one, a quarter each of the others."""
    shares = [0, 0, 1, 2]
    return [place.tokens[shares[index % 4]] for index in range(num_clients)]


def crowd(place: Place, scale: Scale) -> Report:
    """1, 8, 32, 200 clients with mixed steps and sizes, under three tokens."""
    report, cloud = Report(), place.cloud()

    async def one(num_clients: int) -> None:
        tokens = spread_out(place, num_clients)
        async with clients_of(cloud, tokens, scale) as clients:
            begin = time.monotonic()
            until = begin + scale.seconds
            mixes = [Mix(seed=index) for index in range(num_clients)]
            asking = [keep_asking(client, mix, until) for client, mix in zip(clients, mixes, strict=True)]
            asked = list(itertools.chain.from_iterable(await asyncio.gather(*asking)))
            elapsed_s = time.monotonic() - begin
        name = f"{num_clients} clients"
        row = row_of(name, asked, elapsed_s)
        check(report, name, asked)
        if num_clients >= 32:  # each token asks for more than its share
            early = begin + 0.2 * scale.seconds  # the queue has filled
            served = [total([a for a in asked if a.token == token], early, until) for token in place.tokens]
            row["Jain"] = f"{jain(served):.3f}"
            report.promise(jain(served) >= FAIR, f"{name}: Jain's index is {jain(served):.3f}, not {FAIR}")
        report.rows.append(row)

    with started(cloud):
        for num_clients in scale.crowds:
            asyncio.run(one(num_clients))
    return report


def prediction(place: Place, scale: Scale) -> Report:
    """1, 8, 32 clients as in `crowd`, and what the simulator says of them from the times of the U-Net's calls."""
    report = Report()

    async def one(cloud: Process, tokens: Sequence[str]) -> tuple[list[Asked], float]:
        async with clients_of(cloud, tokens, scale) as clients:
            begin = time.monotonic()
            mixes = [Mix(seed=index) for index in range(len(clients))]
            asking = [keep_asking(*each, begin + scale.seconds) for each in zip(clients, mixes, strict=True)]
            return list(itertools.chain.from_iterable(await asyncio.gather(*asking))), time.monotonic() - begin

    for num_clients in scale.predicted:
        name = f"{num_clients} client" + ("s" if num_clients > 1 else "")
        tokens = spread_out(place, num_clients)
        with collector() as (url, received):
            cloud = place.cloud(f"cloud-{num_clients}", "--traces", "otlp")
            cloud.environment = {**VARIABLES, "OTEL_EXPORTER_OTLP_ENDPOINT": url}
            with started(cloud):
                asked, elapsed_s = asyncio.run(one(cloud, tokens))
            spans = read_spans(received)  # all of them: it sent the last when it ended
        check(report, name, asked)
        if any(each.outcome != "done" for each in asked):
            continue
        measured = Figures.of(asked, elapsed_s)
        predicted = predict(spans, seen(asked), tokens, seconds=scale.seconds, patience_s=scale.patience_s)
        report.rows += [
            {
                "scenario": f"{name}, {what}",
                "images": str(len(asked)) if figures is measured else "",
                "first state p50": f"{figures.first_state_p50:.2f} s",
                "p99": f"{figures.first_state_p99:.2f} s",
                "picture p50": f"{figures.picture_p50:.2f} s",
                "picture p99": f"{figures.picture_p99:.2f} s",
                "images/s": f"{figures.images_per_s:.2f}",
            }
            for what, figures in (("measured", measured), ("predicted", predicted))
        ]
        off = measured.differences(predicted)
        columns = ("images/s", "first state p50", "p99", "picture p50", "picture p99")
        row = {column: f"{100 * part:+.0f} %" for column, part in zip(columns, off.values(), strict=True)}
        report.rows.append({"scenario": f"{name}, difference", **row})
        for what in ("images_per_s", "first_state_p50"):  # of a picture the median lies between those of 4 and 8 steps
            said = f"{name}: the simulator's {what.replace('_', ' ')} is {100 * off[what]:+.0f} % off"
            report.promise(abs(off[what]) <= NEAR, f"{said}, not {100 * NEAR:.0f} % or less")
    return report


def contention(place: Place, scale: Scale) -> Report:
    """Many jobs of one token against one of another."""
    report, cloud = Report(), place.cloud()
    request = lambda: request_of(16, 128)  # noqa: E731 (a fresh id each time)

    async def run() -> None:
        many, one = place.tokens[:2]
        async with clients_of(cloud, [*[many] * scale.jobs, one], scale) as clients:
            *crowd, lone = clients
            alone = await lone.ask(request())
            begin = time.monotonic()
            asking = [asyncio.create_task(client.ask(request())) for client in crowd]
            await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)  # the queue is full of them
            beside = await lone.ask(request())
            asked = [*await ask_all(asking), beside]
            elapsed_s = time.monotonic() - begin
        name = f"{scale.jobs} jobs against 1"
        turn_s = elapsed_s * MAX_BATCH / len(asked)  # which a full batch takes from its first step to its last
        turns = beside.elapsed_s / turn_s
        took = f"{alone.elapsed_s:.2f} s alone, {beside.elapsed_s:.2f} s beside: {turns:.1f} turns of a full batch"
        report.rows.append({**row_of(name, asked, elapsed_s), "the one": took})
        check(report, name, asked)
        if len(asked) > 3 * MAX_BATCH:
            report.promise(turns <= MAX_TURNS, f"{name}: the one takes {turns:.1f} turns, not {MAX_TURNS}")

    with started(cloud):
        asyncio.run(run())
    return report


def overload(place: Place, scale: Scale) -> Report:
    """Ten times as many clients as there are places, all at once."""
    report, cloud = Report(), place.cloud()

    async def run() -> None:
        async with clients_of(cloud, spread_out(place, scale.overload), scale) as clients:
            mix, begin = Mix(), time.monotonic()
            asked = await ask_all([client.ask(mix.next()) for client in clients])
            elapsed_s = time.monotonic() - begin
            after = await clients[0].ask(request_of(2, 64))
        name = f"{scale.overload} clients at once"
        report.rows.append(row_of(name, asked, elapsed_s))
        check(report, name, asked)
        report.promise(after.outcome == "done", f"{name}: the cloud does not draw afterwards: {after.reason}")
        report.promise(elapsed_s <= scale.patience_s + GRACE_S, f"{name}: took {elapsed_s:.0f} s")

    with started(cloud):
        asyncio.run(run())
    return report


def slow_reader(place: Place, scale: Scale) -> Report:
    """One client of a long job reads nothing; the others must not notice."""
    report, cloud = Report(), place.cloud()

    async def run(reads: bool) -> list[Asked]:
        async with clients_of(cloud, [place.tokens[2], *spread_out(place, 4)], scale) as (odd, *clients):
            request = request_of(900, 128, steps=900, scheduler="ddim")
            request.preview_every = 1
            call = odd.call(request, scale.seconds + scale.patience_s)
            await call.read()

            async def drain() -> None:
                while await call.read() is not None:
                    pass

            reader = asyncio.create_task(drain()) if reads else None
            until = time.monotonic() + scale.seconds
            mixes = [Mix(seed=index, sizes=(64,)) for index in range(len(clients))]
            asking = [keep_asking(client, mix, until) for client, mix in zip(clients, mixes, strict=True)]
            asked = list(itertools.chain.from_iterable(await asyncio.gather(*asking)))
            call.cancel()
            if reader is not None:
                await asyncio.gather(reader, return_exceptions=True)
            return asked

    with started(cloud):
        found = {name: asyncio.run(run(name == "reads")) for name in ("reads", "does not read")}
    p99 = []
    for name, asked in found.items():
        row = row_of(f"4 clients beside one that {name}", asked, scale.seconds)
        report.rows.append(row)
        check(report, row["scenario"], asked)
        p99.append(percentile([each.first_state_s for each in asked if each.first_state_s is not None], 0.99))
    report.rows[-1]["p99 ratio"] = f"{p99[1] / p99[0]:.2f}"
    report.promise(
        p99[1] <= MAX_SLOWER * p99[0] + NOISE_S, f"a slow reader makes others {p99[1] / p99[0]:.2f} times slower"
    )
    return report


def soak(place: Place, scale: Scale) -> Report:
    """Cloud and gateway under steady load: memory, open files and threads stay."""
    report, cloud = Report(), place.cloud()
    cloud.start()
    gateway = place.gateway(cloud)
    pictures = 0

    async def draw(until: float) -> None:
        nonlocal pictures
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{gateway.port}", timeout=scale.patience_s, trust_env=False
        ) as client:
            while time.monotonic() < until:
                body = {"prompt": "a red fox", "seed": pictures, "hybrid": {"split": "2,2"}}
                job = (await client.post("/v1/jobs", json=body)).json()
                done = await client.get(f"/v1/jobs/{job['id']}", params={"wait": "true"})
                while (state := done.json()["state"]) in ("queued", "running"):
                    await asyncio.sleep(0.1)
                    done = await client.get(f"/v1/jobs/{job['id']}")
                report.promise(state == "completed", f"a job of the gateway is {state}: {done.json()['error']}")
                pictures += 1

    async def run() -> tuple[list[Asked], float]:
        async with clients_of(cloud, spread_out(place, 6), scale) as clients:
            begin = time.monotonic()
            until = begin + scale.soak_s
            mixes = [Mix(seed=index) for index in range(len(clients))]
            asking = [keep_asking(client, mix, until) for client, mix in zip(clients, mixes, strict=True)]
            *lists, _ = await asyncio.gather(*asking, draw(until))
            return list(itertools.chain.from_iterable(lists)), time.monotonic() - begin

    processes = {"cloud": cloud, "gateway": gateway}
    try:
        with started(gateway), sampled(processes, scale.sample_s) as samples:
            asked, elapsed_s = asyncio.run(run())
    finally:
        cloud.end()
    report.rows.append(row_of(f"soak, {elapsed_s:.0f} s", asked, elapsed_s))
    check(report, "soak", asked)
    for name, taken in samples.items():
        report.rows.append({"scenario": f"soak, {name}", **_judge(report, name, taken)})
    report.rows[-1]["images"] = str(pictures)
    report.promise(pictures > 0, "the gateway drew nothing")
    return report


def _judge(report: Report, name: str, taken: Samples) -> dict[str, str]:
    """Judges the second half of what a process took: the first fills caches."""
    row = {}
    for what, samples, allowed in (
        ("memory MiB", taken.memory_mib, FLAT_PART), ("files", taken.files, 0.2), ("threads", taken.threads, 0.2)
    ):  # fmt: skip
        half = samples[len(samples) // 2 :]
        if not half:
            continue
        per_s, largest = slope(half), max(value for _, value in samples)
        row[what] = f"max {largest:.0f}, {60 * per_s:+.1f} a minute"
        gained = per_s * (half[-1][0] - half[0][0])
        report.promise(
            gained <= max(allowed * half[0][1], 2.0), f"{name}: {what} grew by {gained:.1f} in the second half"
        )
    return row


def two_clouds(place: Place, scale: Scale) -> Report:
    """Real edges draw with two clouds, of which each is killed and started again in turn."""
    report = Report()
    clouds = [place.cloud(name) for name in ("first", "second")]
    bundle = open_bundle(place.bundle)
    defaults = bundle.manifest.defaults  # which the edge has the plan of, should both clouds be away
    models = Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)
    stop, results, errors = threading.Event(), list[Result](), list[str]()

    def draw(index: int) -> None:
        cache = Cache(place.folder / f"cache-{index}")
        with cloud_pool([f"127.0.0.1:{cloud.port}" for cloud in clouds], place.tokens[index % 3], cache) as cloud:
            for number in itertools.count():
                if stop.is_set():
                    return
                request = Request(
                    prompt="a red fox", seed=number, scheduler=defaults.scheduler, mode="hybrid",
                    num_inference_steps=defaults.num_inference_steps, cloud_steps=4 * defaults.num_inference_steps // 5,
                )  # fmt: skip
                try:
                    *_, last = generate(resolve(request, bundle.manifest), bundle, models, cloud)
                    assert isinstance(last, Finished)
                    results.append(last.result)
                except Exception as error:  # each is a failed image
                    errors.append(f"{type(error).__name__}: {error}")
                stop.wait(scale.pause_s)

    with started(*clouds):
        threads = [threading.Thread(target=draw, args=(index,), name=f"edge-{index}") for index in range(scale.edges)]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            for cloud in clouds[: scale.kills]:
                wait_for_more(results, 2 * scale.edges, scale.patience_s)
                cloud.end(kill=True)
                time.sleep(min(2.0, scale.seconds))  # an outage
                cloud.start()
            wait_for_more(results, 2 * scale.edges, scale.patience_s)
        finally:
            stop.set()
            for thread in threads:
                thread.join(scale.patience_s)
        elapsed_s = time.monotonic() - begin
    planned = sum(result.planned_cloud_steps for result in results)
    actual = sum(result.actual_cloud_steps for result in results)
    part = actual / planned if planned else 0.0
    report.rows.append(
        {
            "scenario": f"2 clouds, {scale.kills} killed and restarted in turn",
            "images": str(len(results)),
            "images/s": f"{len(results) / elapsed_s:.2f}",
            "failed": str(len(errors)),
            "cloud steps": f"{100 * part:.1f} % of {planned}",
        }
    )
    report.promise(not errors, f"two clouds: {len(errors)} images failed: {errors[:3]}")
    report.promise(part >= scale.cloud_part, f"two clouds: {100 * part:.1f} % of the planned steps were run by a cloud")
    return report


@contextmanager
def cloud_pool(servers: Sequence[str], token: str, cache: Cache) -> Iterator[Pool]:
    """Opens what an edge with several --server asks."""

    def connect(target: str, address: str | None) -> Cloud:
        return Cloud(target, token=token, cache=cache)

    with Pool(servers, connect) as pool:
        yield pool


def wait_for_more(results: Sequence[Result], count: int, timeout_s: float) -> None:
    """Waits until there are so many more results, for so long at most."""
    enough, give_up_at = len(results) + count, time.monotonic() + timeout_s
    while len(results) < enough:
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"{count} images were not done in {timeout_s:g} s")
        time.sleep(0.05)


SCENARIOS = {
    "crowd": crowd, "contention": contention, "overload": overload, "two-clouds": two_clouds,
    "slow-reader": slow_reader, "soak": soak, "prediction": prediction,
}  # fmt: skip
COLUMNS = (
    "scenario", "images", "first state p50", "p99", "p99 ratio", "picture p50", "picture p99", "images/s",
    "Jain", "the one", "cloud steps",
    "retries mean", "max", "refused", "failed", "hung", "memory MiB", "files", "threads",
)  # fmt: skip
assert len(NAMES) == 3
