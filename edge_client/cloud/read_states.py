"""Solver states of one stream, from messages: whole, or what leads there from the one before.

Nothing that arrives is trusted.
"""

from dataclasses import replace
from typing import NoReturn

from edge_client.cloud.types import CloudSegment, CodedState
from edge_client.types import Latents
from hybridsd import codec, noise
from hybridsd.closed_loop import Track, checksum, follow, is_far
from hybridsd.errors import Reason
from hybridsd.plan import Plan, initial_state
from hybridsd.v1 import denoising_service_pb2 as pb


class Diverged(Exception):
    """Residuals led to another state here than in the cloud: its arithmetic is not ours."""


class StateReader:
    """Reads the states of one stream, in their order.

    Args:
        asked: What was asked for.
        holds_later: Whether a state after the first one of the request is held: then the first to come is whole.
        takes_residuals: Whether residuals were asked for.

    Attributes:
        coded: The last state as it came; None where no residuals were asked for, or none has come.
    """

    def __init__(self, asked: CloudSegment, *, holds_later: bool, takes_residuals: bool) -> None:
        self._asked, self._takes_residuals = asked, takes_residuals
        self._begins_with_request = not holds_later
        self._track: Track | None = None
        self.coded: CodedState | None = None

    def read(self, plan: Plan, state: pb.State) -> tuple[Latents, ...]:
        """Returns the arrays of a state of the plan.

        Raises:
            InternalError: INTERNAL, saying what is wrong.
            InvalidRequest: TENSOR_INVALID.
            Diverged: They are not those that the cloud has.
        """
        return self._follow(plan, state) if state.HasField("checksum") else self._whole(plan, state)

    def _whole(self, plan: Plan, state: pb.State) -> tuple[Latents, ...]:
        if len(state.arrays) != plan.num_arrays(state.call):
            _refuse(f"a state of {len(state.arrays)} arrays; it must have {plan.num_arrays(state.call)}")
        shape = self._asked.resolved.latent_shape
        arrays = tuple(codec.decode_tensor(array, shape=shape, field="state") for array in state.arrays)
        self._begins_with_request = False
        if self._takes_residuals:
            self._track, self.coded = Track.begin(state.call, arrays), CodedState(call=state.call, arrays=arrays)
        return arrays

    def _follow(self, plan: Plan, state: pb.State) -> tuple[Latents, ...]:
        if not self._takes_residuals:
            _refuse("residuals, which were not asked for")
        if self._begins_with_request:
            self._track, self.coded = self._begin(plan)
            self._begins_with_request = False
        if self._track is None or self.coded is None:
            _refuse("residuals before any state that they begin with")
        if is_far(state.call - self._track.call, self._track.x0.shape):
            _refuse(f"residuals from call {self._track.call} to {state.call}, too many at this size")
        residuals = codec.decode_residuals(state.residuals, state.call - self._track.call)
        self._track = follow(plan, self._track, state.call, residuals, self._draw_noise)
        if checksum(self._track.state) != state.checksum:
            raise Diverged(f"the state before call {state.call} is another one here than in the cloud")
        self.coded = replace(self.coded, states=(*self.coded.states, (state.call, residuals)))
        return self._track.state

    def _begin(self, plan: Plan) -> tuple[Track, CodedState]:
        """Returns the first state of the request, and how another cloud would hear of it."""
        asked = self._asked
        if asked.initial_state:
            coded = asked.coded_state
            if coded is None or coded.states:
                coded = CodedState(call=asked.first_call, arrays=asked.initial_state)
            return Track.begin(asked.first_call, asked.initial_state), coded
        latents = asked.request.initial_latents
        if latents is None:
            latents = noise.initial_latents(asked.request.seed, asked.image_index, asked.resolved.latent_shape)
        return Track.begin(0, initial_state(plan, latents)), CodedState(call=0, arrays=())

    def _draw_noise(self, call: int) -> Latents:
        asked = self._asked
        return noise.call_noise(asked.request.seed, asked.image_index, call, asked.resolved.latent_shape)


def _refuse(what: str) -> NoReturn:
    raise Reason.INTERNAL.error(f"the cloud sent something that cannot be used: {what}")
