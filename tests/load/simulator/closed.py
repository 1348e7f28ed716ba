"""The clients of `make load` in virtual time: each asks for one picture after another and comes again when told."""

import itertools
import random
from collections.abc import Callable, Sequence

from cloud_server.engine.caller import Caller
from hybridsd.errors import HybridSDError
from tests.load.clients import Asked, Mix
from tests.load.simulator.clock import Clock
from tests.load.simulator.cloud import CallTime, Cloud, Image

Delay = Callable[[], float]
"""Returns seconds."""


class _Client:
    def __init__(
        self, clock: Clock, cloud: Cloud, token: str, next_image: Callable[[], Image], *, until_s: float,
        patience_s: float, state_s: Delay, after_s: Delay,
    ) -> None:  # fmt: skip
        self._clock, self._cloud, self._next_image = clock, cloud, next_image
        self._caller = Caller(principal=token, owner=token)
        self._until_s, self._patience_s, self._state_s, self._after_s = until_s, patience_s, state_s, after_s
        self.done: list[Asked] = []

    def ask(self) -> None:
        """Asks for the next picture, unless it is late."""
        if self._clock.now_s < self._until_s:
            self._asked = Asked(token=self._caller.principal, begin_s=self._clock.now_s)
            self._image = self._next_image()
            self._try()

    def _try(self) -> None:
        try:
            self._cloud.ask(self._image, self._caller, self._on_state)
        except HybridSDError as error:
            delay_s = error.retry_delay_s or 0.0
            asked = self._asked
            asked.reason = error.reason.name
            if self._clock.now_s + delay_s > asked.begin_s + self._patience_s:
                self._end("refused", 0.1)
                return
            asked.num_retries += 1
            self._clock.after(delay_s, self._try)

    def _on_state(self, call: int) -> None:
        self._clock.after(self._state_s(), lambda: self._arrived(call))

    def _arrived(self, call: int) -> None:
        asked, now_s = self._asked, self._clock.now_s
        if asked.first_state_s is None:
            asked.first_state_s = now_s - asked.begin_s
        asked.calls.append((now_s, self._image.size**2 / 64))
        if call == self._image.calls:
            self._clock.after(self._after_s(), lambda: self._end("done", 0.0))

    def _end(self, outcome: str, pause_s: float) -> None:
        asked = self._asked
        asked.outcome, asked.elapsed_s = outcome, self._clock.now_s - asked.begin_s
        self.done.append(asked)
        self._clock.after(pause_s, self.ask)


def crowd(
    call_s: CallTime, tokens: Sequence[str], *, before_s: Delay, state_s: Delay, after_s: Delay,
    seconds: float, patience_s: float, turnover_s: float = 0.0, max_batch: int = 8, max_queue: int = 32,
    mixes: Sequence[Mix] | None = None, seed: int = 0, clock: Clock | None = None,
) -> tuple[list[Asked], float]:  # fmt: skip
    """Returns what `tests.load.scenarios.crowd` would see of one device: the requests, and how long it took.

    Args:
        call_s: Of one model.
        tokens: Of each client.
        before_s: Returns what lies between asking and the first call, at the earliest; as do the next two:
        state_s: Between the end of a call and its state here.
        after_s: Between the last state and the end of a stream.
        turnover_s: Of the device's time that each request takes.
        seconds: Of asking; the last pictures are waited for.
        patience_s: Of a client, for one picture.
        max_batch: Of the cloud.
        max_queue: Of the cloud.
        mixes: What each client asks for; by default as there.
        seed: Of the jitter of refusals.
        clock: At 0, for who looks at it.
    """
    clock = clock or Clock()
    cloud = Cloud(
        clock, call_s, max_batch=max_batch, max_queue=max_queue, prepare_s=before_s, turnover_s=turnover_s,
        rand=random.Random(seed).random,
    )  # fmt: skip
    numbers = itertools.count()

    def images(mix: Mix) -> Callable[[], Image]:
        def next_image() -> Image:
            request = mix.next()
            return Image(
                request_id=f"load-{next(numbers)}", model="load", size=request.width, calls=request.handoff_step,
                prompt=request.text.prompt,
            )  # fmt: skip

        return next_image

    clients = [
        _Client(
            clock, cloud, token, images(mix), until_s=seconds, patience_s=patience_s,
            state_s=state_s, after_s=after_s,
        )
        for mix, token in zip(mixes or [Mix(seed=index) for index in range(len(tokens))], tokens, strict=True)
    ]  # fmt: skip
    for client in clients:
        clock.at(0.0, client.ask)
    clock.run()
    return list(itertools.chain.from_iterable(client.done for client in clients)), clock.now_s
