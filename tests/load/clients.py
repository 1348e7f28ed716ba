"""Many obedient clients in one process: raw stubs over connections of their own, which do what the cloud tells them.

A client that is refused comes again when the cloud says, with the same request, until its patience ends. It never waits
less, and it never asks for more than it was told.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import denoising_service_pb2_grpc

GRACE_S = 15.0
"""Beyond its patience a request that has not ended hangs."""
_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]  # a device has its own connection


@dataclass(kw_only=True)
class Mix:
    """What the clients ask for; each request is another, the same of a seed."""

    cloud_steps: Sequence[int] = (2, 4, 8, 16)
    sizes: Sequence[int] = (64, 96, 128)
    seed: int = 0
    _random: random.Random = field(init=False)
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def next(self) -> pb.DenoiseRequest:
        """Returns the next request."""
        size = self._random.choice(self.sizes)
        return request_of(self._random.choice(self.cloud_steps), size, seed=next(self._numbers))


def request_of(
    cloud_steps: int, size: int, *, seed: int = 0, steps: int = 25, scheduler: str = "dpmpp_2m"
) -> pb.DenoiseRequest:
    """Returns a request for so many steps of a square picture."""
    return pb.DenoiseRequest(
        request_id=f"load-{random.getrandbits(64):016x}",
        text=pb.TextConditioning(prompt=f"a fox on a blue background {seed % 8}"),
        seed=seed,
        scheduler=pb.SchedulerSpec(name=scheduler, num_inference_steps=max(steps, cloud_steps)),
        width=size,
        height=size,
        handoff_step=cloud_steps,
        state_every=1,
    )


@dataclass(kw_only=True)
class Asked:
    """What became of one request."""

    token: str
    begin_s: float
    request_id: str = ""
    calls: list[tuple[float, float]] = field(default_factory=list)
    """When each call of the U-Net was seen, and its latent pixels."""
    first_state_s: float | None = None
    """From the first attempt."""
    elapsed_s: float = 0.0
    num_retries: int = 0
    outcome: str = "hung"
    """"done", "refused" (it was told to come again until its patience ended), "failed" (by another error), "hung"."""
    reason: str = ""


def total(asked: Sequence[Asked], begin_s: float, end_s: float) -> float:
    """Returns the latent pixels times calls that these requests were served in a while."""
    return sum(cost for each in asked for at, cost in each.calls if begin_s <= at < end_s)


class Client:
    """One client: a token and a connection."""

    def __init__(self, channel: grpc.aio.Channel, token: str, patience_s: float) -> None:
        self._stub: Any = denoising_service_pb2_grpc.DenoisingServiceStub(channel)  # typed as if it were not of asyncio
        self.token, self.patience_s = token, patience_s

    async def ask(self, request: pb.DenoiseRequest) -> Asked:
        """Asks for one picture until it is there, or patience ends; never raises."""
        asked = Asked(token=self.token, begin_s=time.monotonic(), request_id=request.request_id)
        try:
            await asyncio.wait_for(self._until_done(request, asked), self.patience_s + GRACE_S)
        except TimeoutError:
            asked.reason = "HUNG"
        asked.elapsed_s = time.monotonic() - asked.begin_s
        return asked

    async def _until_done(self, request: pb.DenoiseRequest, asked: Asked) -> None:
        while True:
            try:
                await self._follow(request, asked)
                asked.outcome = "done"
                return
            except grpc.aio.AioRpcError as error:
                asked.reason, delay_s = read(error)
            if delay_s is None:
                asked.outcome = "failed"
                return
            if time.monotonic() + delay_s > asked.begin_s + self.patience_s:
                asked.outcome = "refused"
                return
            asked.num_retries += 1
            await asyncio.sleep(delay_s)

    def call(self, request: pb.DenoiseRequest, timeout_s: float) -> Any:
        """Begins a call, whose messages are read by whoever wants them."""
        trace = request.request_id.removeprefix("load-")
        metadata = (("authorization", f"Bearer {self.token}"), ("traceparent", f"00-{trace * 2}-{trace}-01"))
        return self._stub.Denoise(request, timeout=timeout_s, metadata=metadata)

    async def _follow(self, request: pb.DenoiseRequest, asked: Asked) -> None:
        left_s = asked.begin_s + self.patience_s - time.monotonic()
        call, cost = 0, request.width * request.height / 64
        async for response in self.call(request, max(left_s, 0.1)):
            if response.WhichOneof("event") == "state":
                now = time.monotonic()
                if asked.first_state_s is None:
                    asked.first_state_s = now - asked.begin_s
                asked.calls += [(now, cost)] * (response.state.call - call)
                call = response.state.call


def read(error: grpc.aio.AioRpcError) -> tuple[str, float | None]:
    """Returns the reason of an error, and when to come again in seconds."""
    reason, delay_s = error.code().name, None
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            delay_s = retry.retry_delay.ToTimedelta().total_seconds()
    return reason, delay_s


@asynccontextmanager
async def connected(address: str, tokens: Sequence[str], patience_s: float) -> AsyncIterator[list[Client]]:
    """Yields a client for each of the tokens, of which some may be the same."""
    channels = [grpc.aio.insecure_channel(address, options=_OPTIONS) for _ in tokens]
    try:
        yield [Client(channel, token, patience_s) for channel, token in zip(channels, tokens, strict=True)]
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def keep_asking(client: Client, mix: Mix, until_s: float) -> list[Asked]:
    """Asks for one picture after another until a time of the monotonic clock; the last one is waited for."""
    done = []
    while time.monotonic() < until_s:
        done.append(await client.ask(mix.next()))
        if done[-1].outcome != "done":
            await asyncio.sleep(0.1)  # a broken cloud is not asked in a tight loop
    return done


async def ask_all(asking: Sequence[Awaitable[Asked]]) -> list[Asked]:
    """Waits for all."""
    return list(await asyncio.gather(*asking))
