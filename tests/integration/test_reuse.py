"""What is computed once: texts for all images of a prompt, and images that were drawn before."""

import json
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
from edge_client.generation.resolve import resolve
from edge_client.generation.serialize import png_text, replay, result_json
from edge_client.inference import text_encoder
from edge_client.inference.models import Models
from edge_client.types import ApproximateReuse
from edge_client.web.app import create_app
from edge_client.web.settings import Settings
from hybridsd.errors import InternalError, InvalidRequest
from hybridsd.skipping import CallSkipping
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


def draw_by_rest(app: Any, prompt: str = "a fox", **hybrid: Any) -> list[dict[str, Any]]:
    body = {"prompt": prompt, "num_inference_steps": 4, "seed": 5, "n": N, "hybrid": hybrid}
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


NEAR = ApproximateReuse(max_calls=2, min_similarity=0.1)


def test_steps_of_a_near_text_are_told_wherever_the_image_is(
    model: Model, bundle: Bundle, models: Models, connect: Connect, tmp_path: Path
) -> None:
    """In the result, the file, both its texts, and REST; never the other text. A file that says so can be replayed."""
    with running_server(model, prefix_cache_mib=1) as server:
        cloud = connect(server)
        first, _ = run(request("dpmpp_2m", 4, prompt="a fox secret", approximate_reuse=NEAR), bundle, models, cloud)
        near, _ = run(request("dpmpp_2m", 4, approximate_reuse=NEAR), bundle, models, cloud)
        exact, _ = run(request("dpmpp_2m", 4), bundle, models, cloud)
        app = create_app(Settings(data_dir=tmp_path / "data"), bundle, models, cloud)
        rest = [
            image
            for prompt in ("a fox one", "a fox two")
            for image in draw_by_rest(app, prompt, mode="hybrid", cloud_steps=3, approximate_reuse="2,0.1")
        ]

    assert (first.reused_cloud_steps, first.reuse_similarity) == (0, None)
    assert near.reused_cloud_steps == 2
    assert near.reuse_similarity is not None
    assert 0.1 <= near.reuse_similarity <= 1
    assert not np.array_equal(near.latents, exact.latents)
    assert (exact.reused_cloud_steps, exact.reuse_similarity) == (0, None)
    for result in (first, exact):
        assert "pproximate" not in json.dumps(png_text(result))
    record = json.loads(png_text(near)["hybridsd"])
    assert record["approximate_reuse"] == {"steps": 2, "similarity": round(near.reuse_similarity, 6)}
    assert f"2 steps of a text near by {near.reuse_similarity:.3f}" in png_text(near)["parameters"]
    assert result_json(near)["reuse_similarity"] == near.reuse_similarity
    assert "secret" not in json.dumps([png_text(near), result_json(near)])
    assert replay(record)["prompt"] == near.prompt
    assert [image["reused_cloud_steps"] for image in rest] == [0] * N + [2] * N
    assert all(0.1 <= image["reuse_similarity"] <= 1 for image in rest[N:])


def test_the_command_line_asks_for_it(model: Model, bundle: Bundle, tmp_path: Path) -> None:
    """And says in its summary what was taken over."""
    with running_server(model, prefix_cache_mib=1) as server:
        address, told = f"127.0.0.1:{server.port}", []
        for prompt in ("a fox", "the fox"):
            words = ["--server", address, "--steps", "4", "--cloud-steps", "3", "--seed", "5", "--no-fallback"]
            output = ["--output", str(tmp_path / f"{len(told)}.png"), "--bundle", str(bundle.folder)]
            done = CliRunner().invoke(
                main, ["generate", prompt, "--mode", "hybrid", "--approximate-reuse", "2,0.1", *words, *output]
            )
            assert done.exit_code == 0, done.output
            told.append("2 of them kept there for a text near by" in done.output)
        unasked = CliRunner().invoke(
            main, ["generate", "a fox", "--mode", "edge", "--approximate-reuse", "2", "--bundle", str(bundle.folder)]
        )
    assert told == [False, True]
    assert unasked.exit_code == 2
    assert "--approximate-reuse" in unasked.output


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"num_reused_calls": 1, "reuse_similarity": 0.99}, None),
        ({"num_reused_calls": 1, "reuse_similarity": 0.05}, NEAR),
        ({"num_reused_calls": 3, "reuse_similarity": 0.5}, NEAR),
        ({"num_reused_calls": 1, "reuse_similarity": float("nan")}, NEAR),
        ({"num_reused_calls": 9}, NEAR),
        ({"num_reused_calls": -1}, None),
    ],
    ids=["unasked", "too far", "too many", "no number", "more than there are", "less than none"],
)
def test_a_cloud_that_takes_over_what_it_may_not_is_refused(
    changes: dict[str, Any], allowed: ApproximateReuse | None, model: Model, bundle: Bundle, models: Models,
    connect: Connect, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The edge checks it against what it asked for, before it takes anything."""
    write = write_response.response

    def lie(*args: Any, **options: Any) -> pb.DenoiseResponse:
        message = write(*args, **options)
        if message.HasField("started"):
            message.started.MergeFrom(pb.Started(**changes))
        return message

    monkeypatch.setattr(write_response, "response", lie)
    with running_server(model) as server, pytest.raises(InternalError, match=r"reused calls|near"):
        run(request("dpmpp_2m", 4, approximate_reuse=allowed), bundle, models, connect(server))


@pytest.mark.parametrize("given", ["0,0.9", "4,0.9", "2,0", "2,1.5", "2,nan"])
def test_what_may_be_taken_over_has_bounds(given: str, bundle: Bundle) -> None:
    """Calls and similarity; and skipped calls cannot be had beside it."""
    reuse = ApproximateReuse.parse(given)
    with pytest.raises(InvalidRequest, match="`approximate_reuse` is"):
        resolve(request("dpmpp_2m", 3, approximate_reuse=reuse), bundle.manifest)
    with pytest.raises(InvalidRequest, match="exclude"):
        resolve(request("dpmpp_2m", 3, approximate_reuse=NEAR, call_skipping=CallSkipping()), bundle.manifest)
    for text in ("", "a", "1,2,3", "1,b"):
        with pytest.raises(InvalidRequest, match="give CALLS"):
            ApproximateReuse.parse(text)
    assert ApproximateReuse.parse(NEAR.describe()) == NEAR
