"""Which states of a stream go as residuals, and that a reader ends where the writer says."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cloud_server.engine.events import Snapshot
from cloud_server.engine.request import JobRequest
from cloud_server.rpc.write_states import ResidualCoding, StateWriter
from hybridsd import closed_loop, codec, noise
from hybridsd.closed_loop import Track
from hybridsd.plan import combine, denoise, initial_state
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.contract.test_closed_loop import smooth
from tests.contract.test_plan_parity import compiled

SHAPE = (4, 32, 32)
HANDOFF = 8
PLAN = compiled("dpmpp_2m", 25)
JOB = JobRequest(
    request_id="job", content=b"", model="large", prompt="a fox", latent_shape=SHAPE, plan=PLAN, handoff_call=HANDOFF,
    seed=7, state_every=1,
)  # fmt: skip
CODING = ResidualCoding(0.03)


def snapshots(job: JobRequest = JOB) -> list[Snapshot]:
    """The states of a job, from the first call on."""
    first = job.initial_state or initial_state(job.plan, noise.initial_latents(job.seed, job.image_index, SHAPE))

    def draw(call: int) -> np.ndarray:
        return noise.call_noise(job.seed, job.image_index, call, SHAPE)

    run = denoise(job.plan, list(first), smooth, draw, start=job.first_call, stop=job.handoff_call)
    return [Snapshot(step.call, tuple(step.state), None, step.call == job.handoff_call) for step in run]


def write(events: Sequence[Snapshot], job: JobRequest = JOB, resume_call: int = 0, **coding: Any) -> list[pb.State]:
    writer = StateWriter(job, codec.FLOAT16, replace(CODING, **coding), resume_call=resume_call)
    return [writer.message(event) for event in events]


def read(messages: Sequence[pb.State], track: Track | None) -> list[Track]:
    """What a reader makes of them."""
    tracks = []
    for message in messages:
        if message.HasField("checksum"):
            assert track is not None
            residuals = [codec.decode_residual(each) for each in message.residuals]
            track = closed_loop.follow(PLAN, track, message.call, residuals, draw_noise)
            assert closed_loop.checksum(track.state) == message.checksum
        else:
            track = Track.begin(message.call, [codec.decode_tensor(array) for array in message.arrays])
        tracks.append(track)
    return tracks


def draw_noise(call: int) -> np.ndarray:
    return noise.call_noise(JOB.seed, JOB.image_index, call, SHAPE)


def first_state() -> Track:
    return Track.begin(0, initial_state(PLAN, noise.initial_latents(JOB.seed, JOB.image_index, SHAPE)))


def error(event: Snapshot, track: Track) -> float:
    view = PLAN.rows[event.call].unet_input
    return float(np.abs(combine(view, track.state) - combine(view, event.arrays)).max())


def test_all_states_of_a_stream_are_residuals() -> None:
    """From the seed's noise on; the hand-off is as true as was asked for, the states before up to half as true."""
    events = snapshots()
    messages = write(events)
    tracks = read(messages, first_state())

    assert all(message.HasField("checksum") and not message.arrays for message in messages)
    assert [message.is_handoff for message in messages] == [False] * 7 + [True]
    assert error(events[-1], tracks[-1]) <= 0.6 * CODING.precision
    assert all(error(event, track) <= 1.2 * CODING.precision for event, track in zip(events, tracks, strict=True))
    assert max(error(event, track) for event, track in zip(events, tracks, strict=True)) > 0.6 * CODING.precision
    whole = sum(codec.num_bytes(array.size, codec.INT8) for event in events for array in event.arrays)
    assert sum(message.ByteSize() for message in messages) < whole / 3


@pytest.mark.parametrize("sent", [[8], [4, 8], [1, 2, 8], [3, 4, 5, 6, 7, 8]])
def test_states_that_a_reader_missed_are_made_up_for(sent: list[int]) -> None:
    """A slow link, or a reader that wants the hand-off alone: the next message leads there all the same."""
    events = [event for event in snapshots() if event.call in sent]
    messages = write(events)
    tracks = read(messages, first_state())

    assert not any(message.arrays for message in messages)
    assert error(events[-1], tracks[-1]) <= 0.6 * CODING.precision


def test_a_reader_that_falls_behind_gets_coarser_states() -> None:
    events = snapshots()
    every_other = [event for event in events if event.call % 2 == 0]
    behind = read(write(every_other), first_state())
    in_time = read(write(every_other, replace(JOB, state_every=2)), first_state())

    assert error(every_other[2], behind[2]) > 1.5 * error(every_other[2], in_time[2])
    assert error(every_other[-1], behind[-1]) <= 0.6 * CODING.precision  # never the hand-off


def test_a_reader_of_previews_alone_does_not_fall_behind() -> None:
    """Without `state_every` states come as often as previews."""
    job, events = replace(JOB, state_every=0, preview_every=2), snapshots()[1::2]
    steps = [message.residuals[-1].step for message in write(events, job)]
    usual = [message.residuals[-1].step for message in write(events, replace(JOB, state_every=2))]
    assert steps == usual


def test_a_state_many_calls_away_goes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """To follow them would take longer than its bytes do."""
    monkeypatch.setattr(closed_loop, "MAX_FOLLOWED_VALUES", 5 * 4 * 32 * 32)
    events = snapshots()
    assert [len(message.arrays) > 0 for message in write([events[4], events[-1]])] == [False, False]
    assert [len(message.arrays) > 0 for message in write([events[5], events[-1]])] == [True, False]


def test_states_keep_to_a_limit_of_bytes() -> None:
    free, bound = write(snapshots()), write(snapshots(), max_state_bytes=700)

    assert max(sum(len(each.data) for each in message.residuals) for message in free) > 700
    assert max(sum(len(each.data) for each in message.residuals) for message in bound) <= 700
    read(bound, first_state())


def test_the_first_state_after_attaching_again_is_whole() -> None:
    events = snapshots()
    messages = write(events[4:], resume_call=4)
    tracks = read(messages, None)

    assert messages[0].arrays
    assert not messages[0].HasField("checksum")
    assert all(message.HasField("checksum") for message in messages[1:])
    assert error(events[-1], tracks[-1]) <= 0.6 * CODING.precision


def test_a_request_with_a_state_begins_with_it() -> None:
    """Whoever asks for the rest of a job holds the state that it begins with."""
    begun = snapshots()[2]
    job = replace(JOB, initial_state=begun.arrays, first_call=begun.call)
    for resume_call in (0, begun.call):
        messages = write(snapshots(job), job, resume_call)
        assert all(message.HasField("checksum") for message in messages)
        read(messages, Track.begin(begun.call, begun.arrays))


def test_what_no_output_leads_to_goes_whole() -> None:
    """A state that is far from any that the solver could come to, as at the end of an inpainting."""
    events = snapshots()
    events[3] = replace(events[3], arrays=tuple(array + 1e5 for array in events[3].arrays))
    messages = write(events)

    assert [bool(message.arrays) for message in messages] == [False] * 3 + [True, True] + [False] * 3  # there, and back
    assert not messages[3].HasField("checksum")
    assert error(events[-1], read(messages, first_state())[-1]) <= 0.6 * CODING.precision


def test_without_being_asked_states_are_whole() -> None:
    writer = StateWriter(JOB, codec.FLOAT32, None, resume_call=0)
    for event in snapshots():
        message = writer.message(event)
        assert not message.HasField("checksum")
        for array, sent in zip(event.arrays, message.arrays, strict=True):
            assert np.array_equal(codec.decode_tensor(sent), array)


def test_previews_travel_as_ever() -> None:
    event = replace(snapshots()[0], x0_preview=np.ones(SHAPE, np.float32))
    (message,) = write([event])
    assert np.array_equal(codec.decode_tensor(message.x0_preview), np.ones(SHAPE))
    assert message.HasField("checksum")
