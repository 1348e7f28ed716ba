"""An edge with the cloud's text encoders encodes for itself; where it cannot, or it does not come out alike, it is sent
embeddings: the image is there, and the same as far as arithmetic is.
"""

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel

from cloud_server.models.denoiser import Encoded
from cloud_server.models.devices import place
from cloud_server.models.load import Model, load_model
from cloud_server.models.loras import LoraSource
from cloud_server.rpc import read_request
from edge_client.bundles.bundle import Bundle, open_bundle
from edge_client.cloud.client import Cloud, RemoteJob
from edge_client.cloud.pool import Pool
from edge_client.generation.events import Retrying, StepDone
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.inference.text_encoder import TextEncoders
from edge_client.request import Request
from hybridsd import codec, text_identity
from hybridsd.errors import Reason
from hybridsd.prompting import TextOptions
from tests.integration.conftest import Connect, running_server
from tests.integration.test_clouds import OpenPool, draw, open_pool, prefer
from tests.integration.test_hybrid import stop_hard
from tests.support.engine_fakes import GatedDenoiser
from tests.support.tiny_bundle import write_bundle
from tests.support.tiny_pipeline import LATENT_SPACE, write_tiny_pipeline
from tests.support.tiny_texts import share_texts

__all__ = ["open_pool"]

PROMPT, NEGATIVE = "a red fox under a donut", "blurry text"
Events = list[Any]


@dataclass(frozen=True)
class Pair:
    """A cloud's model, and an edge with its text encoders."""

    model: Model
    bundle: Bundle
    models: Models
    pipeline: Path | None = None
    """Of the model."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
    return make_pair(root, write_tiny_pipeline(root / "large"))


def make_pair(root: Path, pipeline: Path, *, bundle_kind: Any = "sd") -> Pair:
    write_bundle(root / "edge", latent_space=LATENT_SPACE, kind=bundle_kind)
    manifest = share_texts(root / "edge", pipeline)
    models = Models(root / "edge", manifest, provider="cpu", threads=1)
    return Pair(load_model(str(pipeline), place("cpu", "fp32")), open_bundle(root / "edge"), models, pipeline)


def ask(**changes: Any) -> Request:
    fields: dict[str, Any] = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "mode": "hybrid", "num_inference_steps": 6, "cloud_steps": 3,
        "guidance_scale": 3.0, "seed": 11, "width": 64, "height": 64, "codec": "fp32", "fallback": False,
        "scheduler": "ddim",
    }  # fmt: skip
    return Request(**{**fields, **changes})


def run(asked: Request, pair: Pair, cloud: Cloud | Pool | None, bundle: Bundle | None = None) -> tuple[Result, Events]:
    events = list(generate(resolve(asked, pair.bundle.manifest), bundle or pair.bundle, pair.models, cloud))
    return events[-1].result, events


@pytest.fixture
def silent(pair: Pair, tmp_path: Path) -> Bundle:
    """The same bundle without its digest: an edge of an older version."""
    files = {role: file for role, file in pair.bundle.manifest.files.items() if role != "text_encoder_digest"}
    return Bundle(pair.bundle.folder, replace(pair.bundle.manifest, files=files))


def test_the_digest_of_the_bundle_is_that_of_the_cloud(pair: Pair) -> None:
    assert len(pair.bundle.text_encoder_digest()) == 32
    assert pair.bundle.text_encoder_digest() == pair.model.info.text_encoder_digest


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"negative_prompt": ""},
        {"guidance_scale": 1.0, "negative_prompt": ""},
        {"prompt": "a (red:1.4) fox [under] a donut", "text_options": TextOptions(weighting=True)},
        {"prompt": "fox and cat and dog", "text_options": TextOptions(long_prompt="chunk")},
        {"prompt": " ".join(["fox"] * 40)},
        {"prompt": "狐 🦊 é"},
    ],
)
def test_the_image_is_that_of_sent_embeddings(
    pair: Pair, silent: Bundle, connect: Connect, texts: dict[str, Any]
) -> None:
    with running_server(pair.model) as server:
        run(ask(prompt="a"), pair, connect(server))  # the plan is in the cache now
        own, events = run(ask(**texts), pair, connect(server))
        sent, _ = run(ask(**texts), pair, connect(server), silent)

    assert (own.embeddings_from, sent.embeddings_from) == ("edge", "cloud")
    assert not [event for event in events if isinstance(event, Retrying)]
    np.testing.assert_allclose(own.latents, sent.latents, atol=1e-4)
    assert own.num_dropped_tokens == sent.num_dropped_tokens
    assert own.received_bytes < sent.received_bytes - 250  # 16 values for 96


@pytest.mark.slow
def test_sdxl_has_both_encoders_and_pooled_texts(tmp_path: Path, connect: Connect) -> None:
    pipeline = write_tiny_pipeline(tmp_path / "xl", kind="sdxl")
    pair = make_pair(tmp_path, pipeline, bundle_kind="sdxl")
    with running_server(pair.model) as server:
        for negative in ("", NEGATIVE):  # the empty one is zeros
            result, events = run(ask(negative_prompt=negative), pair, connect(server))
            assert result.embeddings_from == "edge"
            assert not [event for event in events if isinstance(event, Retrying)]


def test_embeddings_that_are_known_need_no_encoder(pair: Pair, silent: Bundle, connect: Connect) -> None:
    with running_server(pair.model) as server:
        run(ask(), pair, connect(server), silent)  # they are in the cache now
        assert run(ask(seed=12), pair, connect(server))[0].embeddings_from == "cache"
        assert run(ask(prompt="a cat"), pair, connect(server))[0].embeddings_from == "edge"


def test_a_lie_costs_bytes_and_no_image(
    pair: Pair, silent: Bundle, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests agree, the encoders do not: the edge sees it by the sample, says so once, and asks for embeddings."""
    lie(monkeypatch)
    with running_server(pair.model) as server:
        result, events = run(ask(), pair, connect(server))
        sent, _ = run(ask(), pair, connect(server), silent)

    assert result.embeddings_from == "cloud"
    assert len([event for event in events if isinstance(event, Retrying)]) == 1
    np.testing.assert_array_equal(result.latents, sent.latents)
    assert result.usage is not None
    assert result.usage.num_calls == 3


def test_a_lie_of_a_cloud_that_is_lost_then_is_no_failure(
    pair: Pair, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie(monkeypatch)
    monkeypatch.setattr(RemoteJob, "send_texts", fail)
    with running_server(pair.model) as server:
        result, _ = run(ask(fallback=True), pair, connect(server))
    assert result.embeddings_from == "edge"


def lie(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = text_identity.sample
    monkeypatch.setattr(text_identity, "sample", lambda *parts: [2 * value for value in honest(*parts)])


def fail(_job: RemoteJob) -> None:
    raise Reason.UNAVAILABLE.error("gone")


def write_lora(path: Path, layer: str, out: int, into: int) -> Path:
    """Writes an adapter of one layer."""
    generator = torch.Generator().manual_seed(2)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, into), (out, 2)))
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, path)
    return path


def test_an_adapter_of_the_text_encoder_has_embeddings_sent(pair: Pair, tmp_path: Path, connect: Connect) -> None:
    loras = [
        LoraSource(name, str(write_lora(tmp_path / f"{name}.safetensors", layer, 8, 8)))
        for name, layer in (
            ("words", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
            ("paint", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"),
        )
    ]
    model = load_model(str(pair.pipeline), place("cpu", "fp32"), loras=loras)
    assert model.info.text_encoder_digest == pair.model.info.text_encoder_digest
    with running_server(model) as server:
        cloud = connect(server)
        for asked, expected in (
            ((), "edge"),
            (("paint",), "edge"),
            (("words",), "cloud"),
            (("paint", "words"), "cloud"),
        ):
            changes = {"loras": tuple((name, 1.0) for name in asked)}
            assert run(ask(**changes), pair, cloud)[0].embeddings_from == expected, asked


def test_another_encoder_has_embeddings_sent(pair: Pair, connect: Connect, tmp_path: Path) -> None:
    other = load_model(str(write_tiny_pipeline(tmp_path / "other", seed=1)), place("cpu", "fp32"))
    assert other.info.text_encoder_digest != pair.model.info.text_encoder_digest
    with running_server(other) as server:
        assert run(ask(), pair, connect(server))[0].embeddings_from == "cloud"


class OldDenoiser(GatedDenoiser):
    """Of a server that knows nothing of digests."""

    def encode(self, *given: Any, **options: Any) -> Encoded:
        return replace(super().encode(*given, **options), encoder_digest=b"")


@pytest.mark.parametrize("kinds", [(OldDenoiser, GatedDenoiser), (GatedDenoiser, OldDenoiser)])
def test_two_clouds_of_which_one_is_old(
    pair: Pair, connect: Connect, open_pool: OpenPool, kinds: tuple[type[GatedDenoiser], type[GatedDenoiser]]
) -> None:
    """Where one stands in for the other, the image is the same."""
    denoiser = pair.model.denoiser
    with (
        running_server(pair.model, kinds[0](denoiser, calls=2)) as dying,
        running_server(pair.model, kinds[1](denoiser, calls=9)) as other,
    ):
        pool = open_pool(dying, other)
        prefer(pool, dying.port)

        def kill(event: StepDone) -> None:
            if event.step == 1:
                stop_hard(dying)

        result = draw(ask(cloud_steps=5), pair.bundle, pair.models, pool, kill)
    expected, _ = run(ask(cloud_steps=5, mode="hybrid", fallback=True), pair, None)

    assert len(result.clouds) == 2
    assert result.embeddings_from in ("edge", "cloud")
    assert result.conditioning is not None
    assert expected.conditioning is not None
    np.testing.assert_allclose(result.conditioning.prompt_embeds, expected.conditioning.prompt_embeds, atol=1e-4)


def test_takeover_before_anything_is_heard(pair: Pair, connect: Connect) -> None:
    with running_server(pair.model, GatedDenoiser(pair.model.denoiser, calls=0)) as server:
        cloud = connect(server)
    result, _ = run(ask(fallback=True), pair, cloud)  # it is gone
    assert (result.actual_cloud_steps, result.embeddings_from) == (0, "edge")


def test_an_image_of_the_cloud_alone_needs_no_encoder(
    pair: Pair, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEncoders, "encode", lambda *_, **__: pytest.fail("nobody needs it"))
    with running_server(pair.model) as server:
        result, _ = run(ask(mode="cloud", cloud_steps=None), pair, connect(server))
    assert (result.embeddings_from, result.conditioning) == ("", None)


def test_low_memory_has_the_unet_ready_again(pair: Pair, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoder took its place while the cloud drew; the first step here does not pay for it."""
    warmed, warm_up = [], Models.warm_up

    def note(models: Models) -> None:
        warmed.append(threading.current_thread().name)
        warm_up(models)

    monkeypatch.setattr(Models, "warm_up", note)
    models = Models(pair.bundle.folder, pair.bundle.manifest, provider="cpu", threads=1, low_memory=True)
    with running_server(pair.model) as server:
        result, _ = run(ask(), replace(pair, models=models), connect(server))
    assert result.embeddings_from == "edge"
    for thread in threading.enumerate():
        if thread.name == "hybridsd-text":
            thread.join()
    assert "hybridsd-text" in warmed


def test_a_server_that_does_not_know_the_codec_is_asked_for_a_simpler_one(
    pair: Pair, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(pair.model) as server:
        new, _ = run(ask(codec="int8z"), pair, connect(server))
        monkeypatch.setattr(read_request, "KNOWN_ENCODINGS", (codec.FLOAT32, codec.FLOAT16, codec.INT8))
        old, _ = run(ask(codec="int8z"), pair, connect(server))
        plain, _ = run(ask(codec="int8"), pair, connect(server))
    np.testing.assert_array_equal(new.latents, plain.latents)
    np.testing.assert_array_equal(old.latents, plain.latents)


@pytest.mark.slow
def test_the_committed_bundle_says_the_truth(connect: Connect) -> None:
    """Its digest is that of deploy/demo/large, whose weights its text encoder has, to the last bit."""
    onnx = pytest.importorskip("onnx")
    demo = Path(__file__).parents[2] / "deploy" / "demo"
    model, bundle = load_model(str(demo / "large"), place("cpu", "fp32")), open_bundle(demo / "edge")
    assert bundle.text_encoder_digest() == model.info.text_encoder_digest
    assert (demo / "large/tokenizer/tokenizer.json").read_bytes() == (demo / "edge/tokenizer.json").read_bytes()
    graph = onnx.load(str(demo / "edge" / "text_encoder.onnx")).graph
    stored = {onnx.numpy_helper.to_array(each).astype(np.float16).tobytes() for each in graph.initializer}
    stored |= {onnx.numpy_helper.to_array(each).T.astype(np.float16).tobytes() for each in graph.initializer}
    network = CLIPTextModel.from_pretrained(demo / "large" / "text_encoder", dtype=torch.float16)
    assert {weights.numpy().tobytes() for weights in network.state_dict().values()} <= stored

    models = Models(bundle.folder, bundle.manifest, provider="cpu", threads=1)
    asked = Request(prompt="a large red apple", mode="hybrid", num_inference_steps=4, cloud_steps=2, seed=1)
    with running_server(model) as server:
        result, events = run(asked, Pair(model, bundle, models), connect(server))
    assert result.embeddings_from == "edge"
    assert not [event for event in events if isinstance(event, Retrying)]
