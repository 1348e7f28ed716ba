"""Two hundred clients at once, of all APIs: each gets its own image, nobody is lost, and nobody waits for ever."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.inference.models import Models
from tests.integration.web.conftest import GatewayServer, finish, pixels, serving

NUM_CLIENTS = 200
BOUND_S = 120.0
"""No measurement: whoever is not served by then is taken for lost."""
WORDS = ("fox", "cat", "dog", "donut")
COMMON: dict[str, Any] = {"negative_prompt": "blurry", "guidance_scale": 3.0, "hybrid": {"split": "2,2"}}


def prompt_of(seed: int) -> str:
    """Returns the prompt of a client: words that the tiny tokenizer tells apart, and a number that it does not."""
    return f"a {WORDS[seed % 4]} {('left', 'right')[seed // 4 % 2]} {seed}"


async def native(client: httpx.AsyncClient, seed: int) -> bytes:
    """Asks for a job, watches its events to the end, and fetches the image."""
    body = {**COMMON, "prompt": prompt_of(seed), "seed": seed, "scheduler": "ddim", "width": 32, "height": 32}
    created = await client.post("/v1/jobs", json={**body, "id": f"client-{seed}", "previews": 0})
    assert created.status_code == 202, created.text
    steps, numbers, name, data = [], [], "", {}
    async with client.stream("GET", f"/v1/jobs/client-{seed}/events") as response:
        async for line in response.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "id":
                numbers.append(int(value))
            elif field == "event":
                name = value
            elif field == "data":
                data = json.loads(value)
                steps += [data["step"]] if name == "step" else []
    assert numbers == sorted(set(numbers))
    assert (name, steps) == ("completed", [0, 1, 2, 3])
    assert data["job"]["id"] == f"client-{seed}"
    return (await client.get(data["job"]["images"][0]["url"])).content


async def openai(client: httpx.AsyncClient, seed: int) -> bytes:
    """Asks as OpenAI's SDK does; every other one with a stream."""
    is_stream = seed % 2 == 0
    body = {**COMMON, "prompt": prompt_of(seed), "seed": seed, "size": "32x32", "scheduler": "ddim"}
    response = await client.post(
        "/v1/images/generations", json={**body, "stream": is_stream, "partial_images": 2 * is_stream}
    )
    assert response.status_code == 200, response.text
    if not is_stream:
        return base64.b64decode(response.json()["data"][0]["b64_json"])
    said = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    assert [each["type"] for each in said].count("image_generation.completed") == 1
    assert said[-1]["type"] == "image_generation.completed"
    return base64.b64decode(said[-1]["b64_json"])


async def sdapi(client: httpx.AsyncClient, seed: int) -> bytes:
    """Asks as a client of AUTOMATIC1111's does, and asks for its progress meanwhile."""
    body = {
        "prompt": prompt_of(seed), "negative_prompt": "blurry", "seed": seed, "steps": 4, "cfg_scale": 3.0, "width": 32,
        "height": 32, "sampler_name": "DDIM", "refiner_switch_at": 0.5, "force_task_id": f"client-{seed}",
    }  # fmt: skip
    drawing = asyncio.ensure_future(client.post("/sdapi/v1/txt2img", json=body))
    progress = await client.get("/sdapi/v1/progress", params={"id_task": f"client-{seed}"})
    assert progress.json()["current_task"] in (None, f"client-{seed}")
    response = await drawing
    assert response.status_code == 200, response.text
    info = json.loads(response.json()["info"])
    assert (info["all_seeds"], info["prompt"]) == ([seed], prompt_of(seed))
    return base64.b64decode(response.json()["images"][0])


APIS = (native, openai, sdapi)


@pytest.fixture
def server(tmp_path: Path, bundle: Bundle, models: Models, cloud: Cloud) -> Iterator[GatewayServer]:
    with serving(tmp_path, bundle, models, cloud, max_queue=NUM_CLIENTS, workers=2) as server:
        yield server


async def everybody(url: str) -> list[bytes]:
    # each request has a connection of its own: a kept one may be closed by the server just when it is used again
    limits = httpx.Limits(max_connections=2 * NUM_CLIENTS, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=BOUND_S, limits=limits, trust_env=False, verify=False) as client:
        async with asyncio.timeout(BOUND_S):
            return await asyncio.gather(*(APIS[seed % 3](client, seed) for seed in range(NUM_CLIENTS)))


@pytest.mark.slow
def test_two_hundred_clients(server: GatewayServer, client: httpx.Client) -> None:
    """Each image is that of its own seed and prompt: it says so, and is like no other; some are drawn again."""
    alone = {
        seed: finish(
            client, **COMMON, prompt=prompt_of(seed), seed=seed, num_inference_steps=4
        )["images"][0]["url"]
        for seed in range(0, NUM_CLIENTS, 23)
    }  # fmt: skip
    expected = {seed: pixels(client.get(url).content).tobytes() for seed, url in alone.items()}
    pictures = asyncio.run(everybody(server.url))

    assert len({pixels(each).tobytes() for each in pictures}) == NUM_CLIENTS
    for seed, content in enumerate(pictures):
        with Image.open(io.BytesIO(content)) as image:
            known = json.loads(image.text["hybridsd"])  # type: ignore[attr-defined]
        assert (known["seed"], known["prompt"], known["negative_prompt"]) == (seed, prompt_of(seed), "blurry")
        if seed in expected:
            assert pixels(content).tobytes() == expected[seed]
    jobs = client.get("/v1/jobs", params={"limit": 200}).json()
    assert {job["state"] for job in jobs["jobs"]} == {"completed"}
    more = client.get("/v1/jobs", params={"limit": 200, "before": jobs["next"]}).json()
    assert len(jobs["jobs"]) + len(more["jobs"]) == NUM_CLIENTS + len(alone)
    assert client.get("/readyz").json()["num_waiting"] == 0
