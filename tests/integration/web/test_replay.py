"""What an image says of itself is enough to make it again, on every interface, to the last pixel."""

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest

from edge_client.generation.serialize import replay
from edge_client.images.files import read_text
from tests.integration.web.conftest import ask, picture, pixels, wait_for
from tests.support.fake_cloud import FakeCloud

WHITE_LEFT = base64.b64encode(picture((16, 32), seed=3)).decode()
"""A mask of many greys."""
LONG = "a red fox to the left of a blue donut on a green background under the cat"
HERE = {"mode": "hybrid", "private": True}
"""Texts are encoded here: the toy cloud knows no weights and no chunks."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "negative": {"negative_prompt": "blurry (text)", "guidance_scale": 3.1234567, "hybrid": HERE},
    "edge": {"hybrid": {"mode": "edge"}},
    "cloud": {"hybrid": {"mode": "cloud", "codec": "fp32"}},
    "split": {"hybrid": {"split": "2,4", "codec": "int8"}},
    "fine states": {"hybrid": {"split": "2,4", "state_psnr": 90.0, "max_state_bytes": 5000}},
    "fine states of nobody": {"hybrid": {"mode": "edge", "state_psnr": 90.0}},
    "private": {"hybrid": HERE},
    "skip": {"hybrid": {"mode": "cloud", "cloud_skip": "2,1,0.25"}},
    "adaptive": {"hybrid": {"split": "3,3", "cloud_skip": "adaptive:0.5", "edge_skip": "adaptive:1.0,3,2"}},
    "segments": {"hybrid": {"segments": ":2@edge,:2@cloud(guidance=2.5),:2@edge"}},
    "rescaled": {"guidance_scale": 7.0, "guidance_rescale": 0.7, "hybrid": {"mode": "edge"}},
    "rescaled segment": {"hybrid": {"segments": ":2@edge(guidance=7,rescale=0.35),:4@edge"}},
    "two schedules": {
        "hybrid": {"segments": ":3@cloud,:*@edge(scheduler=dpmpp_2m,steps=6)"}, "num_inference_steps": 6
    },
    "weights": {"prompt": "a (red:1.8) fox [donut", "prompt_weighting": True, "hybrid": HERE},
    "brackets": {"prompt": r"a (red) \[fox\]: 1, 2" + "\nof it", "hybrid": HERE},
    "long": {"prompt": LONG, "long_prompt": "chunk", "hybrid": HERE},
    "cut": {"prompt": LONG, "hybrid": HERE},
    "adapters": {"loras": [{"name": "style", "weight": 0.75}, {"name": "ink", "weight": -1}]},
    "solver": {"scheduler": "dpmpp_2m"},
    "second": {"image_index": 1},
    "size": {"width": 50, "height": 20, "fit_size": True},
    "image": {"image": base64.b64encode(picture((48, 32))).decode(), "strength": 0.5, "fit": "pad"},
    "mask": {
        "image": base64.b64encode(picture((32, 32))).decode(), "mask": WHITE_LEFT, "mask_blur": 1.5, "strength": 0.7,
        "invert_mask": True, "fit": "stretch",
    },
}  # fmt: skip


def draw(client: httpx.Client, **changes: Any) -> bytes:
    response = client.post("/v1/jobs", json=ask(**changes))
    assert response.status_code == 202, response.text
    job = wait_for(client, response.json()["id"]).data["job"]
    assert job["state"] == "completed", job["error"]
    return client.get(job["images"][0]["url"]).content


@pytest.mark.parametrize("name", OPTIONS)
def test_replay(name: str, client: httpx.Client) -> None:
    """The native API by the record, AUTOMATIC1111's by the text; nothing else is known but the images given."""
    options = OPTIONS[name]
    first = draw(client, **options)
    text = read_text(first)
    record = json.loads(text["hybridsd"])
    given = {key: options[key] for key in ("image", "mask") if key in options}

    again = client.post("/v1/jobs", json={**replay(record), **given})
    assert again.status_code == 202, again.text
    job = wait_for(client, again.json()["id"]).data["job"]
    assert job["error"] is None
    second = client.get(job["images"][0]["url"]).content
    assert np.array_equal(pixels(second), pixels(first))
    said, known = json.loads(read_text(second)["hybridsd"]), {"stages": record["stages"]}  # the model is named now
    assert said | known == record
    assert read_text(second)["parameters"] == text["parameters"]

    where = "img2img" if given else "txt2img"
    images = {"init_images": [given["image"]], "mask": given.get("mask")} if given else {}
    answer = client.post(f"/sdapi/v1/{where}", json={"infotext": text["parameters"], **images})
    assert answer.status_code == 200, answer.text
    assert np.array_equal(pixels(answer.json()["images"][0]), pixels(first))


def test_an_adapter_is_in_the_text(client: httpx.Client, fake: FakeCloud) -> None:
    """As AUTOMATIC1111 writes it, and it is asked for again."""
    text = read_text(draw(client, **OPTIONS["adapters"]))["parameters"]
    client.post("/sdapi/v1/txt2img", json={"infotext": text}).raise_for_status()

    assert text.startswith("a red fox <lora:style:0.75> <lora:ink:-1>\n")
    assert [[(lora.name, lora.weight) for lora in request.loras] for request in fake.requests] == [
        [("style", 0.75), ("ink", -1.0)]
    ] * 2


def test_what_a_lost_cloud_left_is_made_again(client: httpx.Client, fake: FakeCloud) -> None:
    """The record has the steps that the cloud really ran."""
    fake.die_after_call, fake.die_times = 2, 99
    first = draw(client, hybrid={"split": "4,2"})
    record = json.loads(read_text(first)["hybridsd"])
    fake.die_after_call, fake.die_times = None, 0
    body = replay(record)
    again = draw(client, **body)

    assert record["handoff"] == {"planned": 4, "actual": body["hybrid"]["cloud_steps"], "reason": "UNAVAILABLE"}
    assert np.array_equal(pixels(again), pixels(first))


def test_every_format_says_the_same(client: httpx.Client) -> None:
    """So that a JPEG or WebP file can be made again, too."""
    job_id = client.post("/v1/jobs", json=ask(prompt="ein Füchslein 🦊, <b>&amp;</b>")).json()["id"]
    image = wait_for(client, job_id).data["job"]["images"][0]
    said = {
        kind: read_text(client.get(image["url"], params={"format": kind}).content) for kind in ("png", "jpeg", "webp")
    }

    assert said["jpeg"] == said["webp"] == said["png"]
    for kind in ("png", "jpeg", "webp"):
        content = client.get(image["url"], params={"format": kind}).content
        info = client.post("/sdapi/v1/png-info", json={"image": base64.b64encode(content).decode()}).json()
        assert info["info"] == image["parameters"]
        assert info["parameters"]["Seed"] == "5"
