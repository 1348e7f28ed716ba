"""Solver states of one stream to messages: whole, or as what brings the reader's own state there.

Knows nothing of the engine's workings or the network.
"""

import functools
from dataclasses import dataclass

from cloud_server.engine.events import Snapshot
from cloud_server.engine.request import JobRequest, Latents
from hybridsd import closed_loop, codec, noise
from hybridsd.closed_loop import Residual, Track
from hybridsd.plan import initial_state
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import tensor_pb2

_EARLY = 2.0
"""So much coarser is the first state than the hand-off, which few readers go on from: see docs/performance.md."""
_MAX_COARSENESS = 16.0
_SLOWER, _FASTER, _MAX_SLOWNESS = 1.5, 1.1, 4.0
"""A reader that missed states gets coarser ones, until it gets them all again."""
_MAX_ERROR = 8.0
"""A state whose error would be so many times what is asked for goes whole."""


@dataclass(frozen=True, slots=True)
class ResidualCoding:
    """How a reader wants states; see `DenoiseRequest.residual_coding`."""

    precision: float
    max_state_bytes: int = 0


class StateWriter:
    """Writes the states of one stream, in their order.

    Args:
        request: The job.
        encoding: Of states that go whole, and of previews.
        coding: None writes all states whole.
        resume_call: The call of the state that the reader holds; 0 for none.
    """

    def __init__(
        self,
        request: JobRequest,
        encoding: tensor_pb2.Encoding.ValueType,
        coding: ResidualCoding | None,
        *,
        resume_call: int,
    ) -> None:
        self._request, self._encoding, self._coding = request, encoding, coding
        self._track: Track | None = None
        self._slowness = 1.0
        self._begins_with_request = coding is not None and resume_call <= request.first_call

    def message(self, event: Snapshot) -> pb.State:
        """Returns the message of a state."""
        message = pb.State(
            call=event.call,
            x0_preview=None if event.x0_preview is None else codec.encode_tensor(event.x0_preview, self._encoding),
            is_handoff=event.is_handoff,
        )
        if self._coding is None:
            message.arrays.extend(codec.encode_tensor(array, self._encoding) for array in event.arrays)
            return message
        track = self._begin() if self._begins_with_request else self._track
        self._begins_with_request = False
        found = None if track is None else self._lead(track, event, self._coding)
        if found is not None:
            residuals, self._track = found
            message.residuals.extend(codec.encode_residual(residual) for residual in residuals)
            message.checksum = closed_loop.checksum(self._track.state)
            return message
        message.arrays.extend(codec.encode_tensor(array, self._encoding) for array in event.arrays)
        self._track = Track.begin(event.call, [codec.decode_tensor(array) for array in message.arrays])
        return message

    def _begin(self) -> Track:
        request = self._request
        state = request.initial_state
        if not state:
            latents = request.initial_latents
            if latents is None:
                latents = noise.initial_latents(request.seed, request.image_index, request.latent_shape)
            state = tuple(initial_state(request.plan, latents))
        return Track.begin(request.first_call, state)

    def _lead(self, track: Track, event: Snapshot, coding: ResidualCoding) -> tuple[list[Residual], Track] | None:
        """Returns the residuals, and where they lead; None where the state goes whole."""
        request, num_calls = self._request, event.call - track.call
        if num_calls < 1 or closed_loop.is_far(num_calls, request.latent_shape):
            return None
        draw_noise = functools.cache(self._draw_noise)  # it takes as long as a fast step
        wanted = coding.precision
        if not event.is_handoff:
            missed = num_calls > min(filter(None, (request.state_every, request.preview_every)), default=1)
            self._slowness = min(self._slowness * _SLOWER, _MAX_SLOWNESS) if missed else self._slowness / _FASTER
            self._slowness = max(self._slowness, 1.0)
            left, calls = request.handoff_call - event.call, request.handoff_call - request.first_call - 1
            wanted *= self._slowness * _EARLY ** (left / max(calls, 1))
        coarseness = 1.0
        while True:
            residuals, reached = closed_loop.lead(
                request.plan, track, event.call, event.arrays, coarseness * wanted, draw_noise
            )
            num_bytes = sum(len(residual.data) for residual in residuals)
            if not 0 < coding.max_state_bytes < num_bytes or coarseness >= _MAX_COARSENESS:
                break
            coarseness *= 2.0
        whole_bytes = sum(codec.num_bytes(array.size, self._encoding) for array in event.arrays)
        is_close = closed_loop.largest_error(request.plan, reached, event.arrays) <= _MAX_ERROR * coarseness * wanted
        return (residuals, reached) if is_close and num_bytes < whole_bytes else None

    def _draw_noise(self, call: int) -> Latents:
        request = self._request
        return noise.call_noise(request.seed, request.image_index, call, request.latent_shape)
