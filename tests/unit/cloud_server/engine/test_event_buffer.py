"""The buffer: bounded, newest state first, and never without start, hand-off and end."""

import threading

import numpy as np

from cloud_server.engine.event_buffer import MAX_STATES, EventBuffer
from cloud_server.engine.events import Finished, Queued, Snapshot, Started, Usage
from cloud_server.models.denoiser import Encoded
from tests.support.patience import HANG_S


def snapshot(call: int, *, is_handoff: bool = False) -> Snapshot:
    return Snapshot(call, (np.zeros(1, np.float32),), None, is_handoff)


async def test_a_slow_reader_gets_the_newest_state() -> None:
    """Of a thousand states a few remain, the last of them the hand-off, between the start and the end."""
    buffer = EventBuffer()
    buffer.post(Queued(1))
    buffer.post(Started(Encoded(np.zeros((1, 1), np.float32)), None))
    for call in range(1, 1000):
        buffer.post(snapshot(call))
    buffer.post(snapshot(1000, is_handoff=True))
    buffer.post(Finished(Usage(0, 0, 0, 1000)))
    events = []
    while not events or not isinstance(events[-1], Finished):
        events.append(await buffer.next(HANG_S))

    calls = [event.call for event in events if isinstance(event, Snapshot)]
    assert isinstance(events[0], Started)
    assert len(calls) <= MAX_STATES
    assert calls == sorted(calls)
    assert calls[-1] == 1000
    assert buffer.num_dropped == 1000 - len(calls)


async def test_positions_replace_each_other() -> None:
    """Only the newest position waits for the reader, and none after the start."""
    buffer = EventBuffer()
    buffer.post(Queued(3))
    buffer.post(Queued(2))

    assert await buffer.next(HANG_S) == Queued(2)
    assert await buffer.next(0.01) is None


async def test_other_threads_wake_the_reader() -> None:
    """An event that is posted from a thread arrives."""
    buffer = EventBuffer()
    thread = threading.Thread(target=buffer.post, args=(Queued(0),))
    thread.start()

    assert await buffer.next(HANG_S) == Queued(0)
    thread.join()


async def test_superseded_replaces_everything() -> None:
    """A reader that lost its job gets that error and nothing else."""
    buffer = EventBuffer()
    buffer.post(snapshot(1))
    buffer.supersede()

    event = await buffer.next(HANG_S)
    assert type(event).__name__ == "Failed"
    assert await buffer.next(0.01) is None
