"""What is computed once: texts for all images of a prompt, and images that were drawn before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient

from cloud_server.models.load import Model
from cloud_server.rpc import write_response
from edge_client.bundles.bundle import Bundle
from edge_client.cli.main import main
from edge_client.generation.serialize import png_text, result_json
from edge_client.inference import text_encoder
from edge_client.inference.models import Models
from edge_client.web.app import create_app
from edge_client.web.settings import Settings
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.integration.conftest import Connect, running_server
from tests.integration.test_hybrid import request, run
from tests.support.exposition import exposition_of

N = 4


def draw_by_cli(bundle: Bundle, folder: Path, *words: str) -> None:
    command = ["generate", "a fox", "--num-images", str(N), "--steps", "4", "--seed", "5", "--bundle"]
    output = ["--output", str(folder / "image-{index}.png")]
    done = CliRunner().invoke(main, [*command, str(bundle.folder), *output, *words])
    assert done.exit_code == 0, done.output


def draw_by_rest(app: Any, **hybrid: Any) -> list[dict[str, Any]]:
    body = {"prompt": "a fox", "num_inference_steps": 4, "seed": 5, "n": N, "hybrid": hybrid}
    with TestClient(app) as client:
        job = client.post("/v1/jobs", json=body).json()
        with client.stream("GET", f"/v1/jobs/{job['id']}/events") as events:
            assert any(line == "event: completed" for line in events.iter_lines())
        images: list[dict[str, Any]] = client.get(f"/v1/jobs/{job['id']}").json()["images"]
    assert len(images) == N
    return images


@pytest.fixture
def embeds_sent(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each text of each answer came with its embeddings."""
    sent: list[bool] = []
    write = write_response.response

    def spy(*args: Any, **options: Any) -> pb.DenoiseResponse:
        message = write(*args, **options)
        if message.HasField("started"):
            texts = (message.started.prompt, message.started.negative_prompt)
            sent.extend(text.HasField("embeds") for text in texts)
        return message

    monkeypatch.setattr(write_response, "response", spy)
    return sent


@pytest.mark.parametrize("interface", ["cli", "rest"])
def test_the_cloud_encodes_a_text_once_for_all_images_and_sends_it_once(
    interface: str, model: Model, bundle: Bundle, models: Models, connect: Connect, tmp_path: Path,
    embeds_sent: list[bool], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Prompt and negative prompt are new with the first of four images, and named by their digests later."""
    monkeypatch.setenv("HYBRIDSD_EDGE_CACHE", str(tmp_path / "cache"))
    with running_server(model) as server:
        if interface == "cli":
            address = f"127.0.0.1:{server.port}"
            draw_by_cli(bundle, tmp_path, "--mode", "hybrid", "--cloud-steps", "2", "--server", address)
        else:
            app = create_app(Settings(data_dir=tmp_path / "data"), bundle, models, connect(server))
            images = draw_by_rest(app, mode="hybrid", cloud_steps=2)
            assert all(image["actual_cloud_steps"] == 2 for image in images)
        seen = exposition_of(server.metrics.registry)

    counted = {
        result: seen.value("hybridsd_cloud_cache_requests_total", cache="texts", result=result)
        for result in ("miss", "hit")
    }
    assert counted == {"miss": 2, "hit": 2 * (N - 1)}
    assert embeds_sent == [True, True] + [False] * 2 * (N - 1)


@pytest.mark.parametrize("interface", ["cli", "rest"])
def test_the_edge_encodes_a_text_once_for_all_images(
    interface: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it draws alone, its own encoder runs for prompt and negative prompt, and not again."""
    texts: list[str] = []
    encode: Callable[..., Any] = text_encoder.prompting.encode

    def spy(text: str, *args: Any, **options: Any) -> Any:
        texts.append(text)
        return encode(text, *args, **options)

    monkeypatch.setattr(text_encoder.prompting, "encode", spy)
    if interface == "cli":
        draw_by_cli(bundle, tmp_path, "--mode", "edge")
    else:
        models = Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)
        draw_by_rest(create_app(Settings(data_dir=tmp_path / "data"), bundle, models, None), mode="edge")

    assert sorted(texts) == ["", "a fox"]


def test_kept_texts_are_the_ones_of_before_and_as_few_as_may_be(bundle: Bundle) -> None:
    """Bit for bit, whatever was encoded between; and none is counted as encoded again."""
    models, encoded = Models(bundle.folder, bundle.manifest, provider="cpu", threads=1), []
    first, _ = models.encode_pair("a fox", "")
    for index in range(text_encoder.MAX_TEXTS + 1):
        models.encode_text(f"a fox {index}")
    again, _ = models.encode_pair("a fox", "", on_encode=lambda: encoded.append("late"))
    kept, _ = models.encode_pair("a fox", "", on_encode=lambda: encoded.append("kept"))

    assert encoded == ["late", "late"]
    assert np.array_equal(first.prompt_embeds, again.prompt_embeds)
    assert kept.prompt_embeds is again.prompt_embeds


def test_an_image_that_was_drawn_before_is_told_and_the_same(
    model: Model, bundle: Bundle, models: Models, connect: Connect
) -> None:
    """The cloud runs nothing for the second, and what it took is 0; the files are equal to the byte."""
    with running_server(model, prefix_cache_mib=1) as server:
        cloud = connect(server)
        first, _ = run(request("dpmpp_2m", 3), bundle, models, cloud)
        longer, _ = run(request("dpmpp_2m", 5), bundle, models, cloud)
        again, _ = run(request("dpmpp_2m", 3), bundle, models, cloud)
        steps = exposition_of(server.metrics.registry).total("hybridsd_cloud_steps_total")

    assert [each.reused_cloud_steps for each in (first, longer, again)] == [0, 3, 3]
    assert [each.actual_cloud_steps for each in (first, longer, again)] == [3, 5, 3]
    assert steps == 5
    assert np.array_equal(first.image_u8, again.image_u8)
    assert png_text(first) == png_text(again)
    assert result_json(again)["reused_cloud_steps"] == 3
    assert again.energy["cloud"] is not None
    assert again.energy["cloud"].joules == 0.0
    assert again.usage is not None
    assert (again.usage.num_calls, again.usage.num_reused_calls) == (0, 3)
