"""States as residuals, over real gRPC: small, followed bit for bit, and never why an image is not finished."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from cloud_server.models.load import Model
from cloud_server.rpc import denoising_service, read_request
from cloud_server.rpc.read_features import read_coded_state
from cloud_server.rpc.server import CloudServer
from edge_client.bundles.bundle import Bundle
from edge_client.cloud import conversion, read_states
from edge_client.cloud.types import CloudState
from edge_client.generation.events import StepDone
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.images.pixels import to_cells
from edge_client.inference.models import Models
from edge_client.request import Request
from edge_client.types import ImageInput
from hybridsd import closed_loop, codec
from hybridsd.errors import InvalidRequest, Reason
from hybridsd.skipping import CallSkipping
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import denoising_service_pb2_grpc
from tests.integration.conftest import Connect, running_server
from tests.integration.test_clouds import OpenPool, draw, open_pool, prefer  # noqa: F401
from tests.integration.test_hybrid import STEPS, request, run, stop_hard
from tests.support.engine_fakes import GatedDenoiser
from tests.support.patience import HANG_S

PART = 5
NEAR = 0.1
"""Of the largest value: what residuals may cost."""
SIDE = 128
"""At 64 pixels a state is 1 KiB whole, and its Huffman codes take half of that; above 66 dB whole states are fp16."""


def ask(scheduler: str = "dpmpp_2m", **changes: Any) -> Request:
    fields = {"width": SIDE, "height": SIDE, "codec": "residual", **changes}
    return request(scheduler, PART, **{"state_psnr": 70.0, **fields} if fields["codec"] == "residual" else fields)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[pb.State]:
    """All states that clouds send."""
    sent: list[pb.State] = []
    write = denoising_service.write_response.response

    def spy(*args: Any, **options: Any) -> pb.DenoiseResponse:
        message = write(*args, **options)
        if message.HasField("state"):
            sent.append(message.state)
        return message

    monkeypatch.setattr(denoising_service.write_response, "response", spy)
    return sent


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[pb.DenoiseRequest]:
    """All requests that clouds read."""
    read, seen = read_request.RequestReader.read, []

    async def spy(self: Any, message: pb.DenoiseRequest, *args: Any) -> Any:
        seen.append(pb.DenoiseRequest.FromString(message.SerializeToString()))
        return await read(self, message, *args)

    monkeypatch.setattr(read_request.RequestReader, "read", spy)
    return seen


def near(result: Any, expected: Any) -> bool:
    scale = float(np.abs(expected.latents).max())
    return bool(np.abs(result.latents - expected.latents).max() <= NEAR * scale)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "pndm", "euler_ancestral", "heun", "unipc"])
def test_every_state_is_small_and_near(
    scheduler: str, server: CloudServer, connect: Connect, bundle: Bundle, models: Models, states: list[pb.State]
) -> None:
    cloud = connect(server)
    exact, _ = run(ask(scheduler, codec="fp32"), bundle, models, cloud)
    del states[:]
    result, events = run(ask(scheduler), bundle, models, cloud)
    seen = [event for event in events if isinstance(event, StepDone) and event.place == "cloud"]

    assert len(seen) == len(states) >= PART
    assert all(state.HasField("checksum") and not state.arrays for state in states)
    assert [closed_loop.checksum(event.state) for event in seen] == [state.checksum for state in states]
    assert near(result, exact)
    assert result.codec == "residual"


def test_it_is_the_default(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models, states: list[pb.State]
) -> None:
    """A third of what the same states took before."""
    asked = replace(ask(), codec=Request().codec)
    run(asked, bundle, models, connect(server))
    residuals = sum(state.ByteSize() for state in states)
    del states[:]
    run(ask(codec="fp16"), bundle, models, connect(server))

    assert residuals < sum(state.ByteSize() for state in states) / 3


@pytest.mark.parametrize("every", [0, 3])
def test_states_in_between_are_not_needed(
    every: int, server: CloudServer, connect: Connect, bundle: Bundle, models: Models, states: list[pb.State]
) -> None:
    cloud = connect(server)
    exact, _ = run(ask(codec="fp32"), bundle, models, cloud)
    del states[:]
    result, _ = run(ask(state_every=every), bundle, models, cloud)

    assert [state.call for state in states] == ([3, PART] if every else [PART])
    assert near(result, exact)


def test_a_finer_one_is_larger_and_nearer(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models, states: list[pb.State]
) -> None:
    cloud = connect(server)
    exact, _ = run(ask(codec="fp32"), bundle, models, cloud)
    errors, sizes = [], []
    for psnr in (50.0, 64.0, 88.0):
        del states[:]
        result, _ = run(ask(state_psnr=psnr), bundle, models, cloud)
        errors.append(float(np.abs(result.latents - exact.latents).mean()))
        sizes.append(sum(state.ByteSize() for state in states))

    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)
    assert errors[0] > 10 * errors[-1]


def test_what_is_kept_and_what_is_skipped(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models, states: list[pb.State]
) -> None:
    """Skipped calls have outputs, too; previews come as they were asked for."""
    cloud, skipping = connect(server), CallSkipping.parse("2,1")
    exact, _ = run(ask(codec="fp32", call_skipping=skipping), bundle, models, cloud)
    del states[:]
    result, _ = run(ask(call_skipping=skipping, preview_every=2), bundle, models, cloud)

    assert near(result, exact)
    assert [state.HasField("x0_preview") for state in states] == [False, True, False, True, False]
    assert all(state.HasField("checksum") for state in states)


@pytest.mark.parametrize("guidance", [1.0, 15.0])
def test_whatever_the_guidance(
    guidance: float, server: CloudServer, connect: Connect, bundle: Bundle, models: Models, states: list[pb.State]
) -> None:
    cloud = connect(server)
    exact, _ = run(ask(codec="fp32", guidance_scale=guidance), bundle, models, cloud)
    del states[:]
    result, _ = run(ask(guidance_scale=guidance), bundle, models, cloud)

    assert near(result, exact)
    assert all(state.HasField("checksum") for state in states)


@pytest.mark.parametrize("part", [PART, STEPS])
def test_a_part_that_is_kept_is_kept(
    part: int, server: CloudServer, connect: Connect, bundle: Bundle, models: Models, states: list[pb.State]
) -> None:
    """Inpainting: outputs are steered, and the last latents of a whole run are put together with what is kept."""
    image = np.random.default_rng(3).uniform(-1, 1, (3, SIDE, SIDE)).astype(np.float32)
    mask = np.zeros((1, SIDE, SIDE), np.float32)
    mask[:, :, : SIDE // 2] = 1.0
    given = ImageInput(image=image, strength=1.0, mask=mask, mask_cells=to_cells(mask, 8))
    cloud = connect(server)
    exact, _ = run(replace(ask(codec="fp32", image_input=given), cloud_steps=part), bundle, models, cloud)
    del states[:]
    result, _ = run(replace(ask(image_input=given), cloud_steps=part), bundle, models, cloud)

    assert near(result, exact)
    assert all(state.HasField("checksum") for state in states)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
def test_an_image_to_begin_with_goes_up_small(
    has_mask: bool, is_old: bool, server: CloudServer, connect: Connect, bundle: Bundle, models: Models,
    requests: list[pb.DenoiseRequest], states: list[pb.State], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As whole numbers, to which the cloud adds the noise itself; an older cloud gets the state, and the same image."""
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    image = np.stack([np.broadcast_to(ramp, (SIDE, SIDE)), np.broadcast_to(ramp[:, None], (SIDE, SIDE))] * 2)[:3]
    mask = np.zeros((1, SIDE, SIDE), np.float32)
    mask[:, :, : SIDE // 2] = 1.0
    kept = {"mask": mask, "mask_cells": to_cells(mask, 8)} if has_mask else {}
    given = ImageInput(image=image.copy(), strength=0.7, **kept)
    exact, _ = run(replace(ask(image_input=given, codec="fp32"), cloud_steps=3), bundle, models, connect(server))
    del requests[:], states[:]
    if is_old:
        monkeypatch.setattr(read_request.RequestReader, "_check", _forgetting(read_request.RequestReader._check))
    result, _ = run(replace(ask(image_input=given), cloud_steps=3), bundle, models, connect(server))

    assert near(result, exact)
    assert requests[0].initial_coded_state.HasField("image")
    assert not requests[0].initial_state
    assert requests[0].inpainting.HasField("packed_latents") == has_mask
    assert len(requests) == 1 + is_old
    if is_old:  # it refuses what it misses, or begins with noise, and is asked anew
        assert requests[1].initial_state
        assert requests[1].inpainting.HasField("latents") == has_mask
        assert requests[0].ByteSize() < requests[1].ByteSize() / 1.5
    assert all(state.HasField("checksum") for state in states)


ZEROS = codec.encode_tensor(np.zeros((4, 8, 8), np.float32), codec.FLOAT32)
TO_2 = [pb.Residuals(call=2)]
WRONG_STATES: dict[str, tuple[dict[str, Any], str]] = {
    "at the beginning": ({"initial_coded_state": pb.CodedState()}, "first_step is 0"),
    "leading elsewhere": (
        {"first_step": 2, "initial_coded_state": pb.CodedState(states=[pb.Residuals(call=1)])}, "one after another"
    ),
    "without states": ({"first_step": 2, "initial_coded_state": pb.CodedState()}, "one after another"),
    "from a call without arrays": (
        {"first_step": 2, "initial_coded_state": pb.CodedState(call=1, states=TO_2)}, "must be 0, not 1"
    ),
    "too many arrays": (
        {"first_step": 2, "initial_coded_state": pb.CodedState(arrays=[ZEROS] * 3, states=TO_2)}, "3 arrays before"
    ),
    "two of them": (
        {"first_step": 2, "initial_state": [ZEROS], "initial_coded_state": pb.CodedState(states=TO_2)}, "the place"
    ),
    "arrays and an image": (
        {"first_step": 2, "initial_coded_state": pb.CodedState(arrays=[ZEROS], states=TO_2, image=pb.PackedLatents())},
        "arrays and an image"
    ),
    "an image and noise": (
        {"initial_latents": ZEROS, "initial_coded_state": pb.CodedState(image=pb.PackedLatents())}, "initial_latents"
    ),
    "an image of no steps": (
        {"initial_coded_state": pb.CodedState(image=pb.PackedLatents(step=0.0, data=b"x"))}, "above 0"
    ),
    "an image of noise": (
        {"initial_coded_state": pb.CodedState(image=pb.PackedLatents(step=0.5, data=b"x"))}, "DEFLATE|values"
    ),
    "residuals of another call": (
        {"first_step": 2, "initial_coded_state": pb.CodedState(states=[
            pb.Residuals(call=2, residuals=[pb.Residual(call=2, step=0.5, data=b"x")])])}, "of calls"
    ),
    "more residuals than calls": (
        {"first_step": 2, "initial_coded_state": pb.CodedState(states=[
            pb.Residuals(call=2, residuals=[pb.Residual()] * 100_000)])}, "100000 for 2 calls"
    ),
    "a precision of 2": ({"residual_coding": pb.ResidualCoding(precision=2.0)}, "precision is 2"),
    "bytes below 0": ({"residual_coding": pb.ResidualCoding(max_state_bytes=-1)}, "max_state_bytes is -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_STATES)
def test_wrong_states_are_refused(name: str, server: CloudServer) -> None:
    fields, message = WRONG_STATES[name]
    asked = pb.DenoiseRequest(
        text=pb.TextConditioning(prompt="a fox"), width=64, height=64, handoff_step=4,
        scheduler=pb.SchedulerSpec(name="dpmpp_2m", num_inference_steps=6), **fields,
    )  # fmt: skip
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel, pytest.raises(grpc.RpcError) as caught:
        list(denoising_service_pb2_grpc.DenoisingServiceStub(channel).Denoise(asked, timeout=HANG_S))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(message, caught.value.details() or "")


def test_states_over_many_calls_are_not_followed(
    server: CloudServer, open_pool: OpenPool, model: Model, bundle: Bundle, models: Models,  # noqa: F811
    requests: list[pb.DenoiseRequest], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """4000 calls of a large image would keep a server busy for minutes: it refuses, and the edge does not ask."""
    monkeypatch.setattr(closed_loop, "MAX_FOLLOWED_VALUES", 4 * (SIDE // 8) ** 2)
    states = [pb.Residuals(call=1), pb.Residuals(call=2)]
    asked = pb.DenoiseRequest(first_step=2, initial_coded_state=pb.CodedState(states=states))
    with pytest.raises(InvalidRequest, match="over 2 calls, too many") as refused:
        read_coded_state(asked, model.plans.plan("ddim", STEPS), 2, (4, SIDE // 8, SIDE // 8), "epsilon")
    assert refused.value.reason is Reason.STATE_INVALID  # at which the edge sends it whole

    with running_server(model, GatedDenoiser(model.denoiser, calls=2)) as dying:
        pool = open_pool(dying, server)
        prefer(pool, dying.port)
        draw(ask(fallback=True), bundle, models, pool, lambda event: stop_hard(dying) if event.step == 1 else None)
    rests = [each for each in requests if each.first_step == 2]
    assert rests[-1].initial_state
    assert not any(each.HasField("initial_coded_state") for each in rests)


def test_whole_states_are_asked_for_where_arithmetic_differs(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models, states: list[pb.State],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A cloud that does not add as we do is found out at its first state, and costs no image."""
    exact, _ = run(ask(codec="fp32"), bundle, models, connect(server))
    del states[:]
    monkeypatch.setattr(closed_loop, "checksum", lambda state: 1)  # the server's
    with caplog.at_level(logging.WARNING):
        result, events = run(ask(), bundle, models, connect(server))

    assert near(result, exact)
    assert (result.actual_cloud_steps, result.fallback_reason) == (PART, None)
    assert len([event for event in events if isinstance(event, StepDone)]) >= STEPS - PART + 1
    assert states[-1].arrays
    assert "asking for whole states" in caplog.text


def test_whole_states_that_follow_are_not_taken_for_earlier_ones(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where arithmetic differs on the way: another cloud must not be sent the residuals that led to a state before."""
    check, checked, seen = read_states.checksum, [], []

    def differ(state: Any) -> int:
        checked.append(check(state))
        return checked[-1] if len(checked) < 3 else checked[-1] + 1

    read = conversion.Conversation.read

    def spy(self: Any, message: pb.DenoiseResponse) -> Any:
        event = read(self, message)
        if isinstance(event, CloudState):
            seen.append((event.call, event.coded))
        return event

    monkeypatch.setattr(read_states, "checksum", differ)
    monkeypatch.setattr(conversion.Conversation, "read", spy)
    run(ask(), bundle, models, connect(server))

    assert seen[-1][0] == PART
    assert [coded is not None for _, coded in seen] == [call < 3 for call, _ in seen]


def test_an_older_cloud_sends_whole_states(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models, states: list[pb.State],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It does not know the field, and leaves it out."""
    monkeypatch.setattr(read_request, "read_residual_coding", lambda _: None)
    exact, _ = run(ask(codec="fp16"), bundle, models, connect(server))
    result, _ = run(ask(), bundle, models, connect(server))

    assert np.array_equal(result.latents, exact.latents)
    assert not any(state.HasField("checksum") for state in states)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_ancestral"])
def test_another_cloud_gets_the_state_as_it_came(
    scheduler: str, is_old: bool, server: CloudServer, open_pool: OpenPool, model: Model, bundle: Bundle,  # noqa: F811
    models: Models, requests: list[pb.DenoiseRequest], states: list[pb.State], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Smaller than the state itself; an older cloud that cannot read it gets it whole."""
    exact = draw(ask(scheduler, codec="fp32"), bundle, models, open_pool(server))
    del requests[:], states[:]
    if is_old:
        forget = _forgetting(read_request.RequestReader._check)
        monkeypatch.setattr(read_request.RequestReader, "_check", forget)
    with running_server(model, GatedDenoiser(model.denoiser, calls=2)) as dying:
        pool = open_pool(dying, server)
        prefer(pool, dying.port)

        def kill(event: StepDone) -> None:
            if event.ends_step and event.step == 1:
                stop_hard(dying)

        result = draw(ask(scheduler, fallback=True), bundle, models, pool, kill)

    assert [run.num_steps for run in result.clouds] == [2, PART - 2]
    assert near(result, exact)
    rests = [each for each in requests if each.first_step == 2]
    assert rests[0].HasField("initial_coded_state")
    assert not rests[0].initial_state
    whole = 4 * (SIDE // 8) ** 2 * 4 * (2 if scheduler == "dpmpp_2m" else 1)
    assert rests[0].initial_coded_state.ByteSize() < whole / 1.5
    assert (len(rests) > 1 and len(rests[-1].initial_state) > 0) == is_old
    assert all(state.HasField("checksum") for state in states)


def _forgetting(check: Callable[..., Any]) -> Callable[..., Any]:
    """A reader that does not know states and latents in few bytes."""

    def forget(self: Any, message: pb.DenoiseRequest, *args: Any) -> Any:
        message.ClearField("initial_coded_state")
        if message.HasField("inpainting"):
            message.inpainting.ClearField("packed_latents")
        return check(self, message, *args)

    return forget


@pytest.mark.parametrize("call", [1, 2, 4])
def test_the_edge_takes_over_from_any_of_them(
    call: int, connect: Connect, model: Model, bundle: Bundle, models: Models
) -> None:
    """The cloud is lost after a state: the image is the one that was split there on purpose."""
    with running_server(model) as whole:
        expected, _ = run(replace(ask(), cloud_steps=call), bundle, models, connect(whole))
    with running_server(model, GatedDenoiser(model.denoiser, calls=call)) as dying:
        cloud = connect(dying)
        for event in generate(resolve(ask(fallback=True), bundle.manifest), bundle, models, cloud):
            if isinstance(event, StepDone) and event.call == call:
                stop_hard(dying)
    result = event.result
    assert result.actual_cloud_steps == call
    assert near(result, expected)


def test_residuals_that_lead_nowhere_are_refused(
    server: CloudServer, connect: Connect, bundle: Bundle, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be followed is what a cloud sent wrongly: the edge goes on from the last sound state."""
    exact, _ = run(ask(codec="fp32"), bundle, models, connect(server))
    read, broken = conversion.codec.decode_residual, []

    def spoil(message: pb.Residual) -> Any:
        residual = read(message)
        if residual.call == 3:
            broken.append(residual)
            return replace(residual, data=residual.data[:-4])
        return residual

    monkeypatch.setattr(conversion.codec, "decode_residual", spoil)
    result, _ = run(ask(fallback=True), bundle, models, connect(server))

    assert broken
    assert result.actual_cloud_steps == 3
    assert result.fallback_message.startswith("the cloud sent something that cannot be used: residuals")
    assert exact.latents.shape == result.latents.shape
