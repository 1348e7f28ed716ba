"""AUTOMATIC1111's API by a client that nobody here wrote: images, infos, progress and interrupt by caller."""

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from webuiapi import WebUIApi
from webuiapi.webuiapi import raw_b64_img

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.images.files import read_text
from edge_client.inference.models import Models
from hybridsd import schedulers
from tests.integration.web.conftest import (
    TOKENS,
    Gate,
    GatewayServer,
    finish,
    picture,
    pixels,
    serving,
    wait_for,
    watching,
)
from tests.support.fake_cloud import FakeCloud
from tests.support.patience import HANG_S

WANTED = {"eta": 0, "prompt": "a red fox", "seed": 5, "steps": 6, "cfg_scale": 3.0, "width": 32, "height": 32}


def webui(server: GatewayServer, token: str | None = None) -> WebUIApi:
    where = urlsplit(server.url)
    user = None if token is None else "anybody"
    api = WebUIApi(host=where.hostname, port=where.port, sampler="DDIM", steps=6, username=user, password=token)
    api.session.trust_env = False
    return api


@pytest.fixture
def api(server: GatewayServer) -> Iterator[WebUIApi]:
    api = webui(server)
    with api.session:
        yield api


@pytest.fixture
def two(
    tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud
) -> Iterator[tuple[GatewayServer, WebUIApi, WebUIApi]]:
    """Two callers of one gateway, each with a token of its own."""
    with serving(tmp_path, bundle, models, cloud, tokens=TOKENS) as server:
        first, second = (webui(server, token) for token in TOKENS)
        with first.session, second.session:
            yield server, first, second


def array(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB"))


def text_of(image: Image.Image) -> str:
    image.load()
    return str(image.info["parameters"])


def test_a_batch(api: WebUIApi, client: httpx.Client) -> None:
    """Image i has seed + i, as that web UI counts, and is the image of that seed alone; info says all of it."""
    result = api.txt2img(**WANTED, batch_size=2, n_iter=2, negative_prompt="blurry")

    assert len(result.images) == 4
    assert all(image.size == (32, 32) for image in result.images)
    info = result.info
    assert (info["seed"], info["all_seeds"], info["batch_size"]) == (5, [5, 6, 7, 8], 4)
    assert info["all_prompts"] == ["a red fox"] * 4
    assert info["all_negative_prompts"] == ["blurry"] * 4
    assert (info["sampler_name"], info["steps"], info["cfg_scale"]) == ("DDIM", 6, 3.0)
    assert (info["width"], info["height"], info["sd_model_name"]) == (32, 32, "fake-large")
    assert info["infotexts"] == [text_of(image) for image in result.images]
    for index, text in enumerate(info["infotexts"]):
        assert text.startswith("a red fox\nNegative prompt: blurry\nSteps: 6, Sampler: DDIM, CFG scale: 3")
        assert f"Seed: {5 + index}," in text
        assert "Size: 32x32" in text
    alone = api.txt2img(**{**WANTED, "seed": 7}, negative_prompt="blurry")
    assert np.array_equal(array(alone.image), array(result.images[2]))
    assert len({array(image).tobytes() for image in result.images}) == 4
    native = finish(client, seed=6, guidance_scale=3.0, negative_prompt="blurry")
    assert np.array_equal(pixels(client.get(native["images"][0]["url"]).content), array(result.images[1]))


def test_a_random_seed_can_be_read_from_info(api: WebUIApi) -> None:
    first = api.txt2img(**{**WANTED, "seed": -1})
    second = api.txt2img(**{**WANTED, "seed": first.info["seed"]})

    assert first.info["seed"] >= 0
    assert np.array_equal(array(first.image), array(second.image))


def test_img2img_with_a_mask(api: WebUIApi) -> None:
    """White is drawn anew, black stays; inverted it is the other way round."""
    image = Image.open(io.BytesIO(picture()))
    mask = Image.fromarray(np.repeat(np.repeat([[255, 0]], 16, axis=1), 32, axis=0).astype(np.uint8))
    fields = {
        **WANTED,
        "images": [image],
        "mask_image": mask,
        "mask_blur": 0,
        "inpaint_full_res": False,
        "denoising_strength": 0.9,
    }
    result, inverted = api.img2img(**fields), api.img2img(**fields, inpainting_mask_invert=1)
    changed = [np.abs(array(each.image).astype(int) - array(image)).max(axis=(0, 2)) for each in (result, inverted)]

    assert result.info["denoising_strength"] == 0.9
    assert changed[0][16:].max() <= 1 < changed[0][:16].max()
    assert changed[1][:16].max() <= 1 < changed[1][16:].max()
    assert set(result.parameters) >= {"prompt", "steps", "denoising_strength"}
    assert "init_images" not in result.parameters


def test_resize_modes(api: WebUIApi) -> None:
    """A wide image is stretched, cropped or padded to a square: three different beginnings."""
    wide = Image.open(io.BytesIO(picture((64, 32))))
    drawn = [
        array(api.img2img(**WANTED, images=[wide], denoising_strength=0.2, resize_mode=mode).image).tobytes()
        for mode in (0, 1, 2)
    ]

    assert len(set(drawn)) == 3


def test_png_info(api: WebUIApi) -> None:
    """What an image says comes back as text and as fields, so that it can be made again."""
    result = api.txt2img(**WANTED, negative_prompt="blurry")
    said = api.png_info(result.image)
    known = api.session.post(f"{api.baseurl}/png-info", json={"image": raw_b64_img(result.image)}).json()

    assert said.info == result.info["infotexts"][0]
    assert known["parameters"]["Seed"] == "5"
    assert known["parameters"]["Prompt"] == "a red fox"
    assert known["parameters"]["Negative prompt"] == "blurry"
    assert json.loads(known["items"]["hybridsd"])["seed"] == 5
    again = api.txt2img(
        **{**WANTED, "seed": int(known["parameters"]["Seed"]), "steps": int(known["parameters"]["Steps"])},
        negative_prompt="blurry", sampler_name=known["parameters"]["Sampler"],
    )  # fmt: skip
    assert np.array_equal(array(again.image), array(result.image))
    plain = api.session.post(f"{api.baseurl}/png-info", json={"image": base64.b64encode(picture()).decode()}).json()
    assert (plain["info"], plain["parameters"]) == ("", {})


def test_what_there_is_to_choose(api: WebUIApi) -> None:
    """Samplers, schedules, models and options, as that client reads them; a chosen model is used."""
    samplers = api.util_get_sampler_names()

    assert {"Euler", "DDIM", "DPM++ 2M"} <= set(samplers)
    assert len(samplers) == len(schedulers.SCHEDULERS)
    assert {"automatic", "karras"} <= set(api.util_get_scheduler_names())
    assert api.util_get_model_names() == ["fake-large"]
    assert api.util_get_current_model() == "fake-large"
    assert [lora["name"] for lora in api.get_loras()] == ["ink", "style"]
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    api.util_set_model("fake-large", find_closest=False)
    assert api.txt2img(**WANTED).info["sd_model_name"] == "fake-large"
    refused = api.session.post(f"{api.baseurl}/options", json={"sd_model_checkpoint": "other"})
    assert (refused.status_code, refused.json()["reason"]) == (409, "MODEL_UNKNOWN")


def test_schedules_of_samplers(api: WebUIApi) -> None:
    """Each sampler says which noise schedules it takes; those exist, and others are refused with what there is."""
    samplers = api.session.get(f"{api.baseurl}/samplers").json()
    offered = {each["label"] for each in api.session.get(f"{api.baseurl}/schedulers").json()}
    for sampler in samplers:
        taken = sampler["options"]["schedulers"].split(", ")
        assert set(taken) <= offered
        assert all(schedulers.find(f"{sampler['name']} {label}") for label in taken if label != "Automatic")
    assert set().union(*(each["options"]["schedulers"].split(", ") for each in samplers)) == offered
    for schedule in ("karras", "no such"):
        refused = api.session.post(
            f"{api.baseurl}/txt2img", json={"prompt": "a fox", "sampler_name": "LCM", "scheduler": schedule}
        )
        assert (refused.status_code, refused.json()["field"]) == (422, "scheduler")
        assert "Automatic" in refused.json()["detail"]


def test_options_that_would_change_images_are_refused(api: WebUIApi) -> None:
    """All of a request, or nothing."""
    url = f"{api.baseurl}/options"
    refused = api.session.post(url, json={"sd_model_checkpoint": "fake-large", "CLIP_stop_at_last_layers": 2})
    known = api.session.post(url, json={"CLIP_stop_at_last_layers": 1, "samples_save": False})

    assert (refused.status_code, refused.json()["field"]) == (422, "CLIP_stop_at_last_layers")
    assert known.status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples_format", ["png"]), ("samples_format", {"a": 1}), ("samples_format", 0),
        ("jpeg_quality", 0), ("jpeg_quality", True), ("jpeg_quality", [80]),
        ("sd_model_checkpoint", ["fake-large"]), ("sd_vae", "other"), ("CLIP_stop_at_last_layers", [1]),
    ],
)  # fmt: skip
def test_settings_of_a_wrong_kind(name: str, value: Any, api: WebUIApi) -> None:
    """Are refused by name, in plain words; none is taken for another value, and none is our bug."""
    body = {**WANTED, "override_settings": {name: value}}
    refused = api.session.post(f"{api.baseurl}/txt2img", json=body)

    assert (refused.status_code, refused.json()["field"]) == (422, f"override_settings.{name}")
    assert name in refused.json()["detail"]
    assert "`" not in refused.json()["detail"]


def test_fields_that_contradict_each_other(api: WebUIApi) -> None:
    """None wins silently."""
    url, hybrid = f"{api.baseurl}/txt2img", {"hybrid": {"cloud_steps": 2, "model": "fake-large"}}
    for more, field in (
        ({"refiner_switch_at": 0.5}, "refiner_switch_at"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, "override_settings.sd_model_checkpoint"),
    ):
        refused = api.session.post(url, json={**WANTED, **hybrid, **more})
        assert (refused.status_code, refused.json()["field"]) == (422, field)


def test_the_share_of_the_cloud_in_an_edit(api: WebUIApi) -> None:
    """Is one of the steps that are run."""
    body = {**WANTED, "init_images": [base64.b64encode(picture()).decode()], "denoising_strength": 0.5}
    answer = api.session.post(
        f"{api.baseurl}/img2img", json={**body, "sampler_name": "DDIM", "refiner_switch_at": 0.67}
    )
    info = json.loads(answer.json()["info"])
    (record,) = info["hybrid"]

    assert (record["num_inference_steps"], record["planned_cloud_steps"]) == (3, 2)
    assert info["steps"] == 6


def test_without_a_cloud(tmp_path: Path, bundle: Bundle, models: Models) -> None:
    """Its models and adapters are refused, not left out."""
    with serving(tmp_path, bundle, models, None) as server, server.client() as client:
        answers = [
            client.post("/sdapi/v1/txt2img", json={**WANTED, **more})
            for more in (
                {"override_settings": {"sd_model_checkpoint": "sd-9"}}, {"prompt": "a fox <lora:style:1>"},
                {"override_settings": {"sd_model_checkpoint": bundle.manifest.name}},
            )
        ]  # fmt: skip
        unknown = client.post("/v1/images/generations", json={"prompt": "a fox", "model": "sd-9"})

    assert [answer.status_code for answer in answers] == [409, 422, 200]
    assert [answer.json().get("field") for answer in answers] == ["sd_model_checkpoint", "loras", None]
    assert unknown.status_code == 404


def test_every_list_of_that_client(api: WebUIApi) -> None:
    """Is one, so that it shows something else than our problems."""
    for name in (
        "samplers", "sd_vae", "upscalers", "latent_upscale_modes", "loras", "sd_models", "hypernetworks", "schedulers",
        "face_restorers", "realesrgan_models", "prompt_styles",
    ):  # fmt: skip
        assert isinstance(getattr(api, f"get_{name}")(), list), name
    assert api.get_embeddings()["loaded"] == {}
    assert set(api.get_memory()) == {"ram", "cuda"}
    assert api.get_cmd_flags()["api"]
    wide = api.extra_single_image(Image.open(io.BytesIO(picture((8, 8)))), upscaler_1="Lanczos", upscaling_resize=3)
    assert wide.image.size == (24, 24)
    for call in (api.refresh_checkpoints, api.skip, api.interrupt):
        call()


def test_formats_of_answers(api: WebUIApi) -> None:
    """`samples_format` is followed; the file says how it was made, as a PNG does."""
    answer = api.session.post(
        f"{api.baseurl}/txt2img",
        json={**WANTED, "sampler_name": "DDIM", "override_settings": {"samples_format": "jpg", "jpeg_quality": 90}},
    ).json()
    content = base64.b64decode(answer["images"][0])

    assert content.startswith(b"\xff\xd8")
    assert read_text(content)["parameters"] == json.loads(answer["info"])["infotexts"][0]


@pytest.mark.parametrize(("share", "cloud_steps"), [(0.0, 0), (0.34, 2), (0.5, 3), (1.0, 6)])
def test_refiner_switch_at_is_the_share_of_the_cloud(
    share: float, cloud_steps: int, api: WebUIApi, fake: FakeCloud
) -> None:
    """The cloud's model begins, this device's refines."""
    result = post(api, refiner_switch_at=share)

    assert result["hybrid"][0]["planned_cloud_steps"] == cloud_steps
    assert result["hybrid"][0]["actual_cloud_steps"] == cloud_steps
    assert [request.handoff_step for request in fake.requests] == ([cloud_steps] if cloud_steps else [])
    assert [step["place"] for step in result["hybrid"][0]["steps"]] == ["cloud"] * cloud_steps + ["edge"] * (
        6 - cloud_steps
    )


def post(api: WebUIApi, **more: Any) -> dict[str, Any]:
    """Sends what that client has no argument for; returns the info."""
    result = api.post_and_get_api_result(
        f"{api.baseurl}/txt2img", {**WANTED, "sampler_name": "DDIM", **more}, use_async=False
    )
    info: dict[str, Any] = result.info
    return info


def test_force_task_id_is_the_id_of_the_job(api: WebUIApi, client: httpx.Client) -> None:
    info = post(api, force_task_id="task-7")

    assert info["task_id"] == "task-7"
    job = client.get("/v1/jobs/task-7").json()
    assert (job["api"], job["state"], job["images"][0]["seed"]) == ("sdapi", "completed", 5)
    progress = api.session.get(f"{api.baseurl}/progress", params={"id_task": "task-7"}).json()
    assert (progress["progress"], progress["current_task"]) == (0.0, None)


@pytest.mark.parametrize(
    "more",
    [
        {"enable_hr": True}, {"restore_faces": True}, {"tiling": True}, {"script_name": "x/y/z plot"},
        {"subseed_strength": 0.5}, {"refiner_checkpoint": "other", "refiner_switch_at": 0.5},
        {"batch_size": 4, "n_iter": 3}, {"sampler_name": "no such"}, {"steps": 0}, {"width": 33},
        {"force_task_id": "a b"}, {"hybrid": {"nothing": 1}},
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(more: dict[str, Any], api: WebUIApi, client: httpx.Client) -> None:
    """An image is never made in another way than it was asked for."""
    before = client.get("/v1/jobs", params={"limit": 1}).json()["jobs"]
    with pytest.raises(RuntimeError) as caught:
        post(api, **more)

    assert caught.value.args[0] == 422
    said = json.loads(caught.value.args[1])
    assert said["field"].partition(".")[0] in {*more, "n_iter", "scheduler"}
    assert client.get("/v1/jobs", params={"limit": 1}).json()["jobs"] == before


def test_progress_and_interrupt(api: WebUIApi, server: GatewayServer, client: httpx.Client, gate: Gate) -> None:
    """Progress says how far the image is and shows it; interrupt ends it with what there is."""
    assert api.get_progress()["progress"] == 0.0
    gate.close(call=4)
    with ThreadPoolExecutor(1) as pool, webui(server).session:
        drawing = pool.submit(post, api, steps=6, hybrid={"split": "6,0"}, force_task_id="watched")
        gate.wait()
        wait_for_step(client, "watched", step=2)
        progress = api.get_progress()
        api.interrupt()
        info = drawing.result(HANG_S)

    assert progress["current_task"] == "watched"
    assert progress["progress"] == pytest.approx(3 / 6, abs=1e-3)
    assert (progress["state"]["sampling_step"], progress["state"]["sampling_steps"]) == (3, 6)
    assert (progress["state"]["job"], progress["state"]["job_count"]) == ("watched", 1)
    assert pixels(progress["current_image"]).shape == (32, 32, 3)
    assert info["interrupted"]
    after = api.get_progress()
    assert (after["progress"], after["state"]["interrupted"]) == (0.0, True)


def wait_for_step(client: httpx.Client, job_id: str, step: int) -> None:
    with watching(client, job_id) as events:
        next(event for event in events if event.name == "step" and event.data["step"] == step)


def test_two_callers_have_nothing_to_do_with_each_other(
    two: tuple[GatewayServer, WebUIApi, WebUIApi], gate: Gate
) -> None:
    """Each sees its own progress and interrupts its own image, though neither names it."""
    server, first, second = two
    gate.close(call=3)
    clients = [server.client(auth=("anybody", token)) for token in TOKENS]
    with ThreadPoolExecutor(2) as pool, clients[0] as one, clients[1] as other:
        drawings = [
            pool.submit(post, api, prompt=prompt, force_task_id=name, hybrid={"split": "6,0"})
            for api, prompt, name in ((first, "a red fox", "first"), (second, "a blue cat", "second"))
        ]
        gate.wait(jobs=2)
        for caller, name in ((one, "first"), (other, "second")):
            wait_for_step(caller, name, step=1)
        assert [webui.get_progress()["current_task"] for webui in (first, second)] == ["first", "second"]
        assert get_progress(first, "second")["current_task"] is None
        second.session.post(f"{second.baseurl}/interrupt", params={"id_task": "first"})  # is not there for this caller
        first.interrupt()
        assert wait_for(one, "first").name == "cancelled"
        assert second.get_progress()["current_task"] == "second"
        gate.open()
        infos = [drawing.result(HANG_S) for drawing in drawings]

    assert [info["interrupted"] for info in infos] == [True, False]
    assert infos[1]["prompt"] == "a blue cat"


def get_progress(api: WebUIApi, task: str) -> dict[str, Any]:
    answer: dict[str, Any] = api.session.get(f"{api.baseurl}/progress", params={"id_task": task}).json()
    return answer


def test_a_wrong_password(two: tuple[GatewayServer, WebUIApi, WebUIApi]) -> None:
    """Is refused, in the way that such clients understand; any name goes with the right one."""
    server, first, _ = two
    api = webui(server, "wrong")
    with api.session:
        response = api.session.get(f"{api.baseurl}/samplers")
    assert response.status_code == 401
    assert "Basic" in response.headers["www-authenticate"]
    assert first.session.get(f"{first.baseurl}/samplers").status_code == 200


def test_a_caller_who_goes_away(api: WebUIApi, client: httpx.Client, gate: Gate) -> None:
    """Cancels its job, for nobody waits for the image."""
    gate.close(call=2)
    with pytest.raises(OSError, match="timed out"):
        api.session.post(f"{api.baseurl}/txt2img", json={**WANTED, "force_task_id": "left"}, timeout=0.5)

    assert wait_for(client, "left").name == "cancelled"
