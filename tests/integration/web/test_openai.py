"""OpenAI's own SDK against the gateway: what it sends is understood, and what it reads is what it knows."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
)
from PIL import Image

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from tests.integration.web.conftest import Gate, GatewayServer, picture, pixels, serving, wait_for, watching
from tests.support.fake_cloud import FakeCloud
from tests.support.patience import HANG_S

MORE = {"seed": 5, "scheduler": "ddim", "num_inference_steps": 6, "hybrid": {"split": "2,4"}}
"""What this gateway takes beside OpenAI's own fields."""


def sdk(server: GatewayServer, key: str = "none", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=HANG_S, max_retries=0, **options)


@pytest.fixture
def ai(server: GatewayServer) -> Iterator[openai.OpenAI]:
    with sdk(server) as client:
        yield client


def draw(ai: openai.OpenAI, more: dict[str, Any] | None = None, **options: Any) -> ImagesResponse:
    fields: dict[str, Any] = {"model": "hybrid", "prompt": "a red fox", "size": "32x32", **options}
    response: ImagesResponse = ai.images.generate(**fields, extra_body=MORE if more is None else more)
    return response


def first(response: ImagesResponse) -> bytes:
    assert response.data
    return base64.b64decode(response.data[0].b64_json or "")


def mask() -> bytes:
    """Returns a mask as OpenAI wants it: what is transparent is drawn anew, here the left half."""
    alpha = np.full((32, 32, 4), 255, dtype=np.uint8)
    alpha[:, :16, 3] = 0
    stream = io.BytesIO()
    Image.fromarray(alpha).save(stream, format="PNG")
    return stream.getvalue()


def test_models(ai: openai.OpenAI) -> None:
    """The default, the cloud's and this device's."""
    assert [model.id for model in ai.models.list()] == ["hybrid", "fake-large", "tiny-edge"]


def test_a_picture_as_base64_and_by_address(ai: openai.OpenAI, server: GatewayServer) -> None:
    """One seed is one image, however it comes; with the SDK's bare call, too."""
    response = draw(ai)
    by_address = draw(ai, response_format="url")
    bare = ai.images.generate(prompt="a fox")

    assert (response.output_format, response.size, response.background) == ("png", "32x32", "opaque")
    assert by_address.data is not None
    assert by_address.data[0].b64_json is None
    url = by_address.data[0].url or ""
    assert url.startswith(f"{server.url}/v1/jobs/")
    fetched = httpx.get(url, trust_env=False, verify=False).content
    assert np.array_equal(pixels(first(response)), pixels(fetched))
    assert np.array_equal(pixels(first(response)), pixels(first(draw(ai))))
    assert not np.array_equal(pixels(first(response)), pixels(first(draw(ai, {**MORE, "seed": 6}))))
    assert pixels(first(bare)).shape == (32, 32, 3)


def test_what_this_gateway_adds_is_followed(ai: openai.OpenAI, fake: FakeCloud) -> None:
    """Seed, scheduler, steps and split reach the pipeline; the answer says what ran where."""
    response = draw(ai, n=2)
    record = (response.model_extra or {})["hybrid"]["images"]

    assert [(each["seed"], each["image_index"], each["scheduler"]) for each in record] == [
        (5, 0, "ddim"),
        (5, 1, "ddim"),
    ]
    assert [(each["planned_cloud_steps"], each["actual_cloud_steps"]) for each in record] == [(2, 2)] * 2
    assert [request.handoff_step for request in fake.requests] == [2, 2]
    assert response.data is not None
    one, two = (pixels(each.b64_json or "") for each in response.data)
    assert not np.array_equal(one, two)


@pytest.mark.parametrize(("model", "place"), [("tiny-edge", "edge"), ("fake-large", "hybrid"), ("dall-e-3", "hybrid")])
def test_a_model_is_a_place(model: str, place: str, ai: openai.OpenAI) -> None:
    """This device's name keeps the image here; names that clients send unasked mean the default."""
    response = draw(ai, {**MORE, "hybrid": {}}, model=model)

    assert (response.model_extra or {})["hybrid"]["images"][0]["mode"] == place


@pytest.mark.parametrize(("kind", "head"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_output_formats(kind: Any, head: bytes, ai: openai.OpenAI) -> None:
    response = draw(ai, output_format=kind, output_compression=100)
    url = (draw(ai, output_format=kind, response_format="url").data or [])[0].url or ""

    assert response.output_format == kind
    assert first(response).startswith(head)
    assert httpx.get(url, trust_env=False, verify=False).content.startswith(head)
    difference = pixels(first(response)).astype(int) - pixels(first(draw(ai)))
    assert np.abs(difference).max() <= {"png": 0, "jpeg": 8, "webp": 0}[kind]


def test_sizes(ai: openai.OpenAI) -> None:
    """Width before height; auto is the bundle's."""
    assert pixels(first(draw(ai, size="64x32"))).shape == (32, 64, 3)
    assert pixels(first(draw(ai, size="auto"))).shape == (32, 32, 3)


def test_a_picture_says_how_it_was_made(ai: openai.OpenAI) -> None:
    with Image.open(io.BytesIO(first(draw(ai)))) as image:
        known = json.loads(image.text["hybridsd"])  # type: ignore[attr-defined]

    assert (known["seed"], known["prompt"]) == (5, "a red fox")


def test_streaming(ai: openai.OpenAI) -> None:
    """Partial images in order, then the image that comes without streaming, as the SDK's classes."""
    *partial, completed = draw_stream(ai, partial_images=2)

    assert all(isinstance(event, ImageGenPartialImageEvent) for event in partial)
    assert isinstance(completed, ImageGenCompletedEvent)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert {event.output_format for event in (*partial, completed)} == {"png"}
    assert all(pixels(event.b64_json).shape == (32, 32, 3) for event in partial)
    assert np.array_equal(pixels(completed.b64_json), pixels(first(draw(ai))))
    assert completed.usage.total_tokens == 0


def draw_stream(ai: openai.OpenAI, more: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    fields: dict[str, Any] = {"prompt": "a red fox", "size": "32x32", "extra_body": MORE if more is None else more}
    return list(ai.images.generate(**fields, stream=True, **options))


def test_streaming_several_pictures(ai: openai.OpenAI) -> None:
    """Without partial images only the finished ones come, each as it is when it is not streamed."""
    events = draw_stream(ai, n=2, output_format="webp", output_compression=100)

    assert [event.type for event in events] == ["image_generation.completed"] * 2
    whole = draw(ai, n=2).data or []
    assert all(
        np.array_equal(pixels(event.b64_json), pixels(each.b64_json or ""))
        for event, each in zip(events, whole, strict=True)
    )


def test_an_edit(ai: openai.OpenAI) -> None:
    """What is transparent in the mask is drawn anew, the rest stays; nested fields come through a form."""
    response = ai.images.edit(
        image=("fox.png", picture(), "image/png"), mask=("mask.png", mask(), "image/png"), prompt="a blue cat",
        size="32x32", extra_body={"seed": 3, "num_inference_steps": 6, "scheduler": "ddim", "hybrid": {"split": "2,4"}},
    )  # fmt: skip
    record = (response.model_extra or {})["hybrid"]["images"][0]
    drawn, given = pixels(first(response)).astype(int), pixels(picture())

    assert (record["seed"], record["planned_cloud_steps"], record["num_inference_steps"]) == (3, 2, 6)
    assert np.abs(drawn - given)[:, 16:].max() <= 1
    assert np.abs(drawn - given)[:, :8].max() > 16


def test_an_edit_is_streamed(ai: openai.OpenAI) -> None:
    """The same image as at once, as the SDK's classes; a list of one image is one image."""
    fields: dict[str, Any] = {
        "image": [("fox.png", picture(), "image/png")], "prompt": "a blue cat",
        "extra_body": {"seed": 3, "strength": 0.9, "num_inference_steps": 6, "scheduler": "ddim"},
    }  # fmt: skip
    *partial, completed = list(ai.images.edit(**fields, stream=True, partial_images=1))
    whole = ai.images.edit(**fields)

    assert [type(event) for event in partial] == [ImageEditPartialImageEvent]
    assert isinstance(completed, ImageEditCompletedEvent)
    assert completed.type == "image_edit.completed"
    assert np.array_equal(pixels(completed.b64_json), pixels(first(whole)))


@pytest.mark.parametrize(
    ("options", "more", "param"),
    [
        ({"size": "33x32"}, {}, "width"),
        ({"size": "big"}, {}, "size"),
        ({"n": 11}, {}, "n"),
        ({"prompt": " "}, {}, "prompt"),
        ({"output_format": "gif"}, {}, "output_format"),
        ({}, {"hybrid": {"split": "2,5"}, "num_inference_steps": 6}, "hybrid.split"),
        ({}, {"hybrid": {"splitt": "2,5"}}, "hybrid.splitt"),
        ({}, {"seed": -1}, "seed"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], more: dict[str, Any], param: str, ai: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        draw(ai, more, **options)

    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code in ("FIELD_INVALID", "PROMPT_EMPTY", "SIZE_INVALID", "SPLIT_INVALID")
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"]


def test_an_unknown_model(ai: openai.OpenAI) -> None:
    """Is 404, as there: of other answers the SDK would ask again, and make a failed job each time."""
    with pytest.raises(openai.NotFoundError) as caught:
        draw(ai, model="sd-9")

    assert (caught.value.code, caught.value.param) == ("MODEL_UNKNOWN", "model")


def test_tokens(tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """The SDK's key is the token; an address of an image needs none."""
    with serving(tmp_path, bundle, models, cloud, tokens=["right"]) as server:
        with sdk(server, "wrong") as ai, pytest.raises(openai.AuthenticationError) as caught:
            ai.models.list()
        assert caught.value.code == "UNAUTHENTICATED"
        with sdk(server, "wrong") as ai, pytest.raises(openai.AuthenticationError):
            draw(ai)
        with sdk(server, "right") as ai:
            url = (draw(ai, response_format="url", output_format="jpeg").data or [])[0].url or ""
            assert len(list(ai.models.list())) == 3
    assert "key=" in url
    assert "format=jpeg" in url


def test_a_full_queue_is_a_rate_limit(tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud, gate: Gate) -> None:
    """Which the SDK waits for by itself, as Retry-After says, unless it is told not to."""
    with serving(tmp_path, bundle, models, cloud, workers=1, max_queue=1) as server, sdk(server) as ai:
        gate.close()
        streams = [ai.images.generate(prompt="a fox", stream=True, extra_body=MORE) for _ in range(1)]
        gate.wait()
        streams.append(ai.images.generate(prompt="a cat", stream=True, extra_body=MORE))
        with pytest.raises(openai.RateLimitError) as caught:
            draw(ai)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        gate.open()
        assert [[event.type for event in stream] for stream in streams] == [["image_generation.completed"]] * 2


def test_the_cloud_is_lost_and_nobody_takes_over(ai: openai.OpenAI, fake: FakeCloud) -> None:
    """As an answer a server's error; in a stream, an error event, which the SDK raises."""
    fake.die_after_call = 1
    more = {**MORE, "hybrid": {"split": "2,4", "fallback": False}}
    with pytest.raises(openai.InternalServerError) as answered:
        draw(ai, more)
    with pytest.raises(openai.APIError) as streamed:
        draw_stream(ai, more)

    assert (answered.value.status_code, answered.value.code) == (502, "UNAVAILABLE")
    assert streamed.value.code == "UNAVAILABLE"
    assert "Socket closed" in streamed.value.message


def test_closing_a_stream_early_cancels_the_job(
    ai: openai.OpenAI, client: httpx.Client, gate: Gate, fake: FakeCloud
) -> None:
    """Nobody wants the image any more, so neither this device nor the cloud goes on."""
    gate.close(call=4)
    stream = ai.images.generate(
        prompt="a red fox", stream=True, partial_images=2, extra_body={**MORE, "hybrid": {"split": "6,0"}}
    )
    assert next(iter(stream)).type == "image_generation.partial_image"
    job_id = client.get("/v1/jobs", params={"limit": 1}).json()["jobs"][0]["id"]
    with watching(client, job_id) as events:
        stream.close()
        ended = next(event for event in events if event.name in ("completed", "cancelled"))

    assert ended.name == "cancelled"
    assert fake.cancel_seen.wait(HANG_S)


def test_a_caller_who_goes_away_cancels_the_job(server: GatewayServer, client: httpx.Client, gate: Gate) -> None:
    """The same without a stream: the SDK gives up, and the job ends though the cloud still holds it."""
    gate.close(call=2)
    with sdk(server).with_options(timeout=0.5) as hurried, pytest.raises(openai.APITimeoutError):
        hurried.images.generate(prompt="a red fox", extra_body=MORE)
    job_id = client.get("/v1/jobs", params={"limit": 1}).json()["jobs"][0]["id"]

    assert wait_for(client, job_id).name == "cancelled"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"quality": "excellent"}, "quality"),
        ({"style": "cubist"}, "style"),
        ({"moderation": "none"}, "moderation"),
        ({"partial_images": 2}, "set stream to true"),
        ({"output_format": "png", "output_compression": 50}, "choose jpeg or webp"),
    ],
)
def test_nothing_is_taken_without_effect(client: httpx.Client, fields: dict[str, Any], says: str) -> None:
    """A value that OpenAI has not, or that nothing would come of, is refused by name."""
    answer = client.post("/v1/images/generations", json={"prompt": "a fox", **fields})

    assert answer.status_code == 422
    assert says in answer.json()["detail"]


def test_null_is_what_was_not_given(client: httpx.Client) -> None:
    """Of every field that OpenAI's clients send as null."""
    nulls = dict.fromkeys(("n", "size", "quality", "style", "stream", "partial_images", "negative_prompt", "user"))
    answer = client.post("/v1/images/generations", json={"prompt": "a fox", **nulls})

    assert answer.status_code == 200
