"""A subject learnt from five pictures: trained, served by a real cloud, asked for by name, fused for the edge."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor

from cloud_server.models.devices import place
from cloud_server.models.load import load_model
from cloud_server.models.loras import parse_source
from edge_client.bundles.bundle import Bundle
from edge_client.cloud.client import Cloud
from edge_client.generation.events import Finished
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.request import Request
from hybridsd.errors import HybridSDError, Reason
from tests.integration.conftest import Connect, serving
from tests.support.tiny_pipeline import write_tiny_pipeline
from tests.support.toy import run
from training import recipes
from training.core.loop import Run, train
from training.core.overrides import override
from training.distillation.lora import fuse_files
from training.evaluation.previews import CaptionSampler
from training.models.components import load_components
from training.models.lora import LORA_NAME
from training.models.pruned_unet import layers, load_unet, save_unet
from training.pruning.widths import cut

pytestmark = pytest.mark.slow

SUBJECT = "a sks ball"
SEEDS = 4


@dataclass(frozen=True)
class Trained:
    """What came out of one run."""

    pipeline: Path
    file: Path
    losses: list[float]
    before: Tensor
    """Distances of pictures to the subject, in latents, on seeds that were not trained on; [4]."""
    after: Tensor


def settings(folder: Path, **more: str) -> list[str]:
    """A recipe for tiny networks, which have too few layers to do without convolutions."""
    return [
        f"model={folder / 'pipeline'}", f"data.spec=imagefolder:{folder / 'pictures'}", "data.resolution=64",
        "data.loader_workers=0", f"prompt={SUBJECT}", "layers=all", "rank=8", "snr_gamma=None", "schedule.lr=1e-2",
        "schedule.precision=no", "schedule.preview_every=0", *(f"{name}={value}" for name, value in more.items()),
    ]  # fmt: skip


def draw_pictures(folder: Path) -> None:
    """Five pictures of a ball."""
    folder.mkdir()
    rows, columns = np.mgrid[:64, :64] - 31.5
    for number in range(5):
        picture = np.full((64, 64, 3), (200, 0, 40), np.uint8)
        picture[rows**2 + columns**2 < (14 + 2 * number) ** 2] = (30, 220, 90)
        Image.fromarray(picture).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Learns the ball in 150 steps, interrupted in the middle and taken up by new objects."""
    folder = tmp_path_factory.mktemp("lora")
    write_tiny_pipeline(folder / "pipeline")
    draw_pictures(folder / "pictures")
    recipe = override(recipes.find("sd-lora")(), settings(folder, **{"schedule.steps": "150"}))
    losses: list[float] = []
    for stop in (60, None):
        task, data = recipe.build(folder)
        learning = Run(task, data, recipe.schedule)
        assert learning.resume(folder / recipe.folder) == (stop is None)
        for record in train(learning, folder / recipe.folder):
            losses.append(record.loss)
            learning.stop = record.step == stop

    plain = load_components(str(folder / "pipeline"))
    sample = CaptionSampler(
        plain.text, plain.scheduler_config, [SUBJECT] * SEEDS, size=(64, 64), scheduler="ddim", steps=12, guidance=1.0,
        seed=123,
    )  # fmt: skip
    pictures = next(data.batches(batch_size=5, start=0, rank=0, workers=1))
    subject = task.conditioner.encode(pictures, np.random.default_rng(0)).x0.mean(0)
    before, after = ((sample(unet) - subject).square().mean(dim=(1, 2, 3)).sqrt() for unet in (plain.unet, task.unet))
    return Trained(folder / "pipeline", folder / recipe.folder / LORA_NAME, losses, before, after)


def test_the_subject_is_learnt(trained: Trained) -> None:
    """The loss falls over the interruption, and pictures of seeds that were not trained on come nearer, each."""
    assert len(trained.losses) == 150
    assert np.mean(trained.losses[-20:]) < 0.9 * np.mean(trained.losses[:20])
    assert (trained.after < 0.9 * trained.before).all()


def ask(**changes: Any) -> Request:
    fields: dict[str, Any] = {
        "prompt": SUBJECT, "scheduler": "ddim", "num_inference_steps": 6, "guidance_scale": 3.0, "seed": 4,
        "width": 64, "height": 64, "codec": "fp32", "cloud_steps": 3, "fallback": False,
    }  # fmt: skip
    return Request(**{**fields, **changes})


def generated(request: Request, bundle: Bundle, models: Models, cloud: Cloud) -> Result:
    last = list(generate(resolve(request, bundle.manifest), bundle, models, cloud))[-1]
    assert isinstance(last, Finished)
    return last.result


@pytest.fixture
def cloud(trained: Trained, connect: Connect) -> Iterator[Cloud]:
    """A real cloud that serves the file by name."""
    model = load_model(f"tiny={trained.pipeline}", place("cpu", "fp32"), loras=[parse_source(f"me={trained.file}")])
    with serving({"tiny": model}) as server:
        yield connect(server)


def test_the_cloud_serves_it_by_name(
    trained: Trained, cloud: Cloud, connect: Connect, bundle: Bundle, models: Models
) -> None:
    """Asked for by name the picture is another one; not asked for it is that of a cloud that has no adapter."""
    plain = load_model(f"tiny={trained.pipeline}", place("cpu", "fp32"))
    asked = generated(ask(loras=(("me", 1.0),)), bundle, models, cloud)
    without = generated(ask(), bundle, models, cloud)
    with serving({"tiny": plain}) as server:
        other = connect(server)
        removed = generated(ask(), bundle, models, other)
        with pytest.raises(HybridSDError, match="has no lora") as caught:
            generated(ask(loras=(("me", 1.0),)), bundle, models, other)

    assert asked.loras == (("me", 1.0),)
    assert np.abs(asked.latents - without.latents).max() > 0.05
    np.testing.assert_array_equal(without.latents, removed.latents)
    assert caught.value.reason is Reason.LORA_UNKNOWN


def test_the_edge_learns_it_too(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command teaches a pruned U-Net, whose widths the cloud's file does not fit; its bundle takes that in."""
    large = load_unet(str(trained.pipeline))
    save_unet(cut(large, {layer.name: 0.5 for layer in layers(large)}), tmp_path / "narrow")
    (tmp_path / "pipeline").symlink_to(trained.pipeline)
    draw_pictures(tmp_path / "pictures")
    wanted = settings(tmp_path, unet="narrow", **{"schedule.steps": "5"})
    taught = run("sd-lora", "--out", str(tmp_path), "--track", "none", *(f"--set={each}" for each in wanted))
    assert taught.exit_code == 0, taught.output
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    recipe = override(recipes.find("sd-lora")(), wanted)
    task, data = recipe.build(tmp_path)
    assert Run(task, data, recipe.schedule).resume(tmp_path / "lora")
    plain, fused = load_unet(tmp_path / "narrow"), load_unet(tmp_path / "narrow")
    exported: dict[str, Any] = {}

    def export_bundle(folder: Path, **given: Any) -> list[Any]:  # compiling all plans takes most of a minute
        exported.update(given)
        folder.mkdir()
        (folder / "model.json").write_text('{"files": {}}')
        return []

    monkeypatch.setattr("training.export.bundles.export_bundle", export_bundle)
    command = (
        "export-bundle", "--model", str(trained.pipeline), "--unet", str(tmp_path / "narrow"), "--vae",
        str(trained.pipeline), "--to", str(tmp_path / "bundle"), "--latent-space", "tiny", "--lora",
    )  # fmt: skip
    refused = run(*command, str(trained.file))
    assert run(*command, str(tmp_path / "lora" / LORA_NAME)).exit_code == 0

    assert fuse_files(fused, (), [(tmp_path / "lora" / LORA_NAME, 1.0)]) > 0
    torch.testing.assert_close(predict(exported["unet"]), predict(fused))
    torch.testing.assert_close(predict(fused), predict(task.unet), rtol=1e-3, atol=1e-3)  # float16 in the file
    assert (predict(plain) - predict(fused)).abs().max() > 0.01
    assert refused.exit_code == 1
    assert "does not fit these networks" in refused.output
    assert card.data.to_dict()["instance_prompt"] == SUBJECT
    assert "LoRA for the U-Net narrow" in card.content
    assert "By `python -m training sd-lora`, 5 steps" in card.content
    assert str(tmp_path) not in card.content


def predict(unet: Any) -> Tensor:
    """What a U-Net makes of fixed noise."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        predicted: Tensor = unet(noise, 500.0, torch.ones(1, 12, 8)).sample
    return predicted
