"""The requests that common clients send, as their sources and documents have them, against a model of other sizes."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.images.files import read_text
from edge_client.inference.models import Models
from edge_client.web.schemas.a1111 import HARMLESS, NEUTRAL, TextToImage
from tests.integration.web.conftest import GatewayServer, picture, pixels, serving
from tests.support.patience import HANG_S

SILLY_TAVERN = {
    "url": "http://127.0.0.1:8080", "auth": "name:secret", "prompt": "a red fox", "negative_prompt": "blurry, text",
    "sampler_name": "DDIM", "scheduler": "automatic", "steps": 6, "cfg_scale": 7, "width": 512, "height": 512,
    "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 2, "hr_additional_modules": [],
    "denoising_strength": 0.7, "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True,
    "clip_skip": 1, "save_images": True, "send_images": True, "do_not_save_grid": False, "do_not_save_samples": False,
}  # fmt: skip
OPEN_WEBUI = {
    "prompt": "a red fox", "batch_size": 1, "width": 512, "height": 512, "steps": 6, "negative_prompt": "blurry",
    "cfg_scale": 7.0, "sampler_name": "DDIM", "scheduler": "Automatic",
}  # fmt: skip
LIBRE_CHAT = {
    "prompt": "a red fox", "negative_prompt": "blurry", "cfg_scale": 4.5, "steps": 6, "width": 1024, "height": 1024
}  # fmt: skip
NULLS = dict.fromkeys({*TextToImage.model_fields, *NEUTRAL, *HARMLESS} - {"prompt"})


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, models: Models, cloud: Cloud
) -> Iterator[GatewayServer]:
    """A gateway with --fit-size, as the demo has it."""
    with serving(tmp_path_factory.mktemp("data"), bundle, models, cloud, fit_size=True) as server:
        yield server


@pytest.fixture
def ai(server: GatewayServer) -> Iterator[openai.OpenAI]:
    transport = httpx.Client(trust_env=False, timeout=HANG_S)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=transport, max_retries=0) as ai:
        yield ai


@pytest.mark.parametrize(
    ("body", "size"),
    [
        (SILLY_TAVERN, 512), (OPEN_WEBUI, 512), (LIBRE_CHAT, 1024), ({"prompt": "a red fox", **NULLS}, 32),
        ({}, 32), ({"prompt": "", "cfg_scale": 0}, 32), ({"prompt": "a fox", "force_task_id": ""}, 32),
        ({"prompt": "a fox", "alwayson_scripts": {"ControlNet": {"args": []}}, "styles": [], "s_noise": 1.0}, 32),
    ],
)  # fmt: skip
def test_text_to_image(body: dict[str, Any], size: int, client: httpx.Client) -> None:
    """What each sends by default is drawn, in the size that it asks for; a password is not repeated."""
    response = client.post("/sdapi/v1/txt2img", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    info = json.loads(answer["info"])

    assert pixels(answer["images"][0]).shape == (size, size, 3)
    assert (info["width"], info["height"]) == (size, size)
    assert info["prompt"] == body.get("prompt", "")
    assert "auth" not in answer["parameters"]


def test_silly_tavern_asks_for_lists(client: httpx.Client) -> None:
    """Before it shows its settings; each has the names that it reads."""
    names = {
        path: [each[key] for each in client.get(f"/sdapi/v1/{path}").raise_for_status().json()]
        for path, key in (
            ("upscalers", "name"), ("latent-upscale-modes", "name"), ("sd-vae", "model_name"),
            ("sd-modules", "model_name"), ("samplers", "name"), ("schedulers", "name"), ("sd-models", "title"),
        )
    }  # fmt: skip

    assert names["upscalers"][0] == "None"
    assert (names["latent-upscale-modes"], names["sd-vae"], names["sd-modules"]) == ([], [], [])
    assert "DDIM" in names["samplers"]
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] in names["sd-models"]


def test_open_webui_sends_all_options_back(client: httpx.Client) -> None:
    """With another model in them."""
    options = client.get("/sdapi/v1/options").json()
    again = client.post("/sdapi/v1/options", json={**options, "sd_model_checkpoint": "fake-large"})

    assert again.status_code == 200, again.text


@pytest.mark.parametrize("model", ["dall-e-2", "dall-e-3"])
def test_langchain_and_llamaindex_read_an_address(model: str, ai: openai.OpenAI, client: httpx.Client) -> None:
    """Without asking for one, for DALL-E answers so; the size is the one asked for, and the file says both."""
    image = (ai.images.generate(prompt="a fox", model=model, n=1, size="1024x1024", quality="standard").data or [])[0]
    assert image.b64_json is None
    content = client.get(image.url or "").content
    record = json.loads(read_text(content)["hybridsd"])

    assert pixels(content).shape == (1024, 1024, 3)
    assert (record["width"], record["drawn_size"]) == (1024, [32, 32])
    assert "Drawn size: 32x32" in read_text(content)["parameters"]


def test_open_webui_asks_openai(ai: openai.OpenAI) -> None:
    response = ai.images.generate(
        prompt="a fox", model="gpt-image-1", n=1, size="1536x1024", response_format="b64_json", user="somebody"
    )

    assert pixels((response.data or [])[0].b64_json or "").shape == (1024, 1536, 3)
    assert response.usage is not None
    assert response.usage.total_tokens == 0


def test_the_quality_is_in_the_address(ai: openai.OpenAI, client: httpx.Client) -> None:
    fields: dict[str, Any] = {"prompt": "a fox", "size": "64x64", "output_format": "jpeg", "extra_body": {"seed": 5}}
    coarse, fine = (
        client.get((ai.images.generate(**fields, model="dall-e-3", output_compression=value).data or [])[0].url or "")
        for value in (0, 95)
    )

    assert coarse.headers["content-type"] == fine.headers["content-type"] == "image/jpeg"
    assert len(coarse.content) < len(fine.content)


def test_variations_and_several_edits(ai: openai.OpenAI) -> None:
    """A variation needs no words; of several images each is edited, the first by its mask."""
    given = [("a.png", picture(seed=1), "image/png"), ("b.png", picture(seed=2), "image/png")]
    varied = ai.images.create_variation(image=given[0], n=2, size="256x256", response_format="b64_json")
    edited = ai.images.edit(image=given, prompt="a cat", extra_body={"seed": 1, "strength": 0.4})
    alone = [ai.images.edit(image=each, prompt="a cat", extra_body={"seed": 1, "strength": 0.4}) for each in given]

    images = [pixels(each.b64_json or "") for each in varied.data or []]
    assert [image.shape for image in images] == [(256, 256, 3)] * 2
    assert (images[0] != images[1]).any()
    assert [each.b64_json for each in edited.data or []] == [(each.data or [])[0].b64_json for each in alone]


def test_a_model_by_its_id(ai: openai.OpenAI) -> None:
    assert ai.models.retrieve("fake-large").id == "fake-large"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("gpt-9")


def test_unknown_models_make_no_jobs(server: GatewayServer, client: httpx.Client) -> None:
    """Whatever the SDK asks again for, it is not this."""
    before = client.get("/v1/jobs", params={"limit": 1}).json()["jobs"]
    transport = httpx.Client(trust_env=False, timeout=HANG_S)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=transport) as ai:
        for options in ({"model": "sd-9"}, {"extra_body": {"negativ_prompt": "typo"}}):
            with pytest.raises((openai.NotFoundError, openai.UnprocessableEntityError)):
                ai.images.generate(prompt="a fox", **options)  # type: ignore[arg-type]

    assert client.get("/v1/jobs", params={"limit": 1}).json()["jobs"] == before


@pytest.mark.parametrize("kind", ["GIF", "BMP", "PNG"])
def test_image_to_image(kind: str, client: httpx.Client) -> None:
    """A GIF and a BMP begin an image, too; at strength 0 it is the image itself."""
    given = base64.b64encode(picture((32, 32), kind)).decode()
    body = {"prompt": "a cat", "steps": 6, "sampler_name": "DDIM", "init_images": [given], "seed": 1}
    drawn = client.post("/sdapi/v1/img2img", json={**body, "denoising_strength": 0.6})
    same = client.post("/sdapi/v1/img2img", json={**body, "denoising_strength": 0, "batch_size": 2})
    assert (drawn.status_code, same.status_code) == (200, 200), (drawn.text[:300], same.text[:300])

    with Image.open(io.BytesIO(base64.b64decode(given))) as image:
        original = pixels(as_png(image))
    assert all((pixels(each) == original).all() for each in same.json()["images"])
    assert len(same.json()["images"]) == 2
    assert (pixels(drawn.json()["images"][0]) != original).any()


def as_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, format="PNG")
    return stream.getvalue()


def test_extras_and_the_rest(client: httpx.Client) -> None:
    """Lanczos is there to enlarge with; what describes images is not."""
    image = base64.b64encode(picture((16, 12))).decode()
    wide = client.post(
        "/sdapi/v1/extra-single-image", json={"image": image, "upscaling_resize": 2, "upscaler_1": "Lanczos"}
    )
    faces = client.post("/sdapi/v1/extra-single-image", json={"image": image, "gfpgan_visibility": 1})

    assert pixels(wide.json()["image"]).shape == (24, 32, 3)
    assert faces.status_code == 422
    assert client.post("/sdapi/v1/interrogate", json={"image": image, "model": "clip"}).status_code == 422
    assert client.get("/internal/ping").json() == {}
    assert client.post("/internal/progress", json={"id_task": "none"}).json()["completed"] is False
    for path in ("skip", "refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings"):
        assert client.post(f"/sdapi/v1/{path}").status_code == 200
    for path in ("embeddings", "cmd-flags", "memory", "hypernetworks", "prompt-styles", "extensions", "script-info",
                 "face-restorers", "realesrgan-models"):  # fmt: skip
        assert client.get(f"/sdapi/v1/{path}").status_code == 200


@pytest.mark.parametrize("path", ["/", "/v1/models", "/sdapi/v1/options", "/healthz", "/readyz", "/static/app.js"])
def test_head(path: str, client: httpx.Client) -> None:
    """Is answered wherever GET is, without a body."""
    response = client.head(path)

    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == client.get(path).headers["content-type"]


def test_head_of_a_stream_ends(client: httpx.Client, gate: Any) -> None:
    """Though the job of its events does not."""
    gate.close()
    job_id = client.post("/v1/jobs", json={"prompt": "a fox", "hybrid": {"split": "2,4"}}).json()["id"]

    assert client.head(f"/v1/jobs/{job_id}/events").status_code == 200


def test_another_size_only_where_it_is_asked_for(tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud) -> None:
    """By the operator or by the request; else the sizes of the models are said."""
    body = {"prompt": "a fox", "width": 100, "height": 60, "steps": 6}
    with serving(tmp_path, bundle, models, cloud) as server, server.client() as client:
        refused = client.post("/sdapi/v1/txt2img", json=body)
        drawn = client.post("/sdapi/v1/txt2img", json={**body, "fit_size": True}).json()

    assert (refused.status_code, refused.json()["reason"]) == (422, "SIZE_INVALID")
    assert pixels(drawn["images"][0]).shape == (60, 100, 3)
