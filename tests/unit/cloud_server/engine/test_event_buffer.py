"""The mailbox: bounded, newest state first, and never without start, hand-off and end."""

import threading

import numpy as np

from cloud_server.engine.event_buffer import MAX_STATES, Mailbox
from cloud_server.engine.request import Encoded, Finished, Queued, Snapshot, Started, Usage


def snapshot(call: int, *, is_handoff: bool = False) -> Snapshot:
    return Snapshot(call, (np.zeros(1, np.float32),), None, is_handoff)


async def test_a_slow_reader_gets_the_newest_state() -> None:
    """Of a thousand states a few remain, the last of them the hand-off, between the start and the end."""
    mailbox = Mailbox()
    mailbox.post(Queued(1))
    mailbox.post(Started(Encoded(np.zeros((1, 1), np.float32)), None))
    for call in range(1, 1000):
        mailbox.post(snapshot(call))
    mailbox.post(snapshot(1000, is_handoff=True))
    mailbox.post(Finished(Usage(0, 0, 0, 1000)))
    events = []
    while not events or not isinstance(events[-1], Finished):
        events.append(await mailbox.next(1.0))

    calls = [event.call for event in events if isinstance(event, Snapshot)]
    assert isinstance(events[0], Started)
    assert len(calls) <= MAX_STATES
    assert calls == sorted(calls)
    assert calls[-1] == 1000
    assert mailbox.num_dropped == 1000 - len(calls)


async def test_positions_replace_each_other() -> None:
    """Only the newest position waits for the reader, and none after the start."""
    mailbox = Mailbox()
    mailbox.post(Queued(3))
    mailbox.post(Queued(2))

    assert await mailbox.next(1.0) == Queued(2)
    assert await mailbox.next(0.01) is None


async def test_other_threads_wake_the_reader() -> None:
    """An event that is posted from a thread arrives."""
    mailbox = Mailbox()
    thread = threading.Thread(target=mailbox.post, args=(Queued(0),))
    thread.start()

    assert await mailbox.next(10.0) == Queued(0)
    thread.join()


async def test_superseded_replaces_everything() -> None:
    """A reader that lost its job gets that error and nothing else."""
    mailbox = Mailbox()
    mailbox.post(snapshot(1))
    mailbox.supersede()

    event = await mailbox.next(1.0)
    assert type(event).__name__ == "Failed"
    assert await mailbox.next(0.01) is None
