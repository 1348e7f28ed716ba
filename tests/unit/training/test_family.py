"""The whole chain at toy scale, by the one command: what every stage leaves, and who can load it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard

from cloud_server.models.devices import place
from cloud_server.models.load import load_model
from edge_client.inference.models import Models
from edge_client.types import Conditioning
from hybridsd.manifest import read_manifest, verify_files
from hybridsd.prompting import TextOptions
from tests.support.patience import HANG_S
from tests.support.toy import TOY_SCENES, ToyFamily, run
from training import recipes
from training.cli.demo import STAGES
from training.cli.main import main
from training.data.latents import CachedScenes, decode, encode, image_of, load_latents, scene_of
from training.data.scenes import BACKGROUNDS, QUADRANTS, to_model_range
from training.data.text import CLASSES
from training.evaluation.classifier import LABELS, load_classifier, scenes_and_images
from training.models.pruned_unet import load_unet
from training.models.tiny_vae_layouts import read_tiny_vae
from training.recipes.unet import SCENES_SEED
from training.vae.kl_vae import load_vae

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_every_stage_is_done_and_not_done_again(family: ToyFamily) -> None:
    """The second time, the command finds everything there and changes nothing."""
    before = {path: path.stat().st_mtime_ns for path in family.folder.rglob("*") if path.is_file()}
    result = run("demo", "--out", str(family.folder), "--scale", "toy")
    after = {path: path.stat().st_mtime_ns for path in family.folder.rglob("*") if path.is_file()}

    assert [line for line in result.output.splitlines() if line.endswith("done before")] == [
        f"{stage}: done before" for stage in STAGES
    ]
    assert after == before


def test_other_settings_are_refused(family: ToyFamily) -> None:
    """What was made at one scale is not taken for another's."""
    result = run("demo", "--out", str(family.folder), "--scale", "quick")

    assert result.exit_code == 1
    assert "was made with other settings than scale quick's; choose another --out" in result.output


def test_dry_run_shows_the_stages(family: ToyFamily, tmp_path: Path) -> None:
    """All are done here, and open elsewhere; nothing is written."""
    done = run("demo", "--out", str(family.folder), "--scale", "toy", "--dry-run").output.splitlines()
    opened = run("demo", "--out", str(tmp_path), "--dry-run").output.splitlines()

    assert [line.split()[:2] for line in done] == [["done", stage] for stage in STAGES]
    assert [line.split()[:2] for line in opened] == [["open", stage] for stage in STAGES]
    assert list(tmp_path.iterdir()) == []


def test_every_model_has_a_card(family: ToyFamily) -> None:
    """Each network that was trained and each export, with its licence and its recipe; judges and texts have none."""
    for name in ("vae", "unet", "small_unet", "tiny_vae", "lcm", "models/large", "models/small_unet", "models/edge"):
        card = ModelCard.load(family.folder / name / "README.md")
        assert card.data.license == "apache-2.0"
        assert str(family.folder) not in card.content
        if not name.startswith("models/"):
            recipe = next(one for one in recipes.SCENES if recipes.find(one)("toy").folder == name)
            assert f"By `python -m training {recipe}`" in card.content
    edge = ModelCard.load(family.folder / "models" / "edge" / "README.md")

    assert edge.data.library_name == "onnx"
    assert "| cloud steps | edge steps | semantic accuracy |" in edge.content
    assert (family.folder / "pruned_unet" / "README.md").is_file()
    assert not (family.folder / "text" / "README.md").exists()
    assert not (family.folder / "classifier" / "README.md").exists()


def test_the_cloud_loads_what_was_made(family: ToyFamily) -> None:
    """The exported pipeline, and the same with the pruned U-Net in its place."""
    large = family.folder / "models" / "large"
    model = load_model(str(large), place("cpu", "fp32"))
    encoded = model.denoiser.encode("a fox", TextOptions())
    conditions = model.denoiser.conditions([encoded], size=(128, 128), guidance_scale=1.0)
    noise_pred = model.denoiser.predict(torch.zeros(1, 4, 16, 16), torch.tensor([500.0]), conditions)

    assert noise_pred.shape == (1, 4, 16, 16)
    assert model.info.latent_space == read_manifest(family.folder / "models" / "edge").latent_space


def test_the_edge_predicts_what_the_small_unet_does(family: ToyFamily) -> None:
    """The bundle is whole, and its U-Net is the distilled one, rounded to half precision."""
    folder = family.folder / "models" / "edge"
    manifest = read_manifest(folder)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(4, 16, 16)).astype(np.float32)
    embeds = rng.normal(size=(manifest.context_length, manifest.embed_dim)).astype(np.float32)
    models = Models(folder, manifest, threads=1)
    actual = models.predict_noise(
        latents, 500.0, Conditioning(prompt_embeds=embeds, negative_prompt_embeds=None), guidance_scale=1.0
    )
    unet = load_unet(family.folder / "small_unet")
    with torch.inference_mode():
        expected = unet(torch.from_numpy(latents)[None], 500.0, torch.from_numpy(embeds)[None]).sample[0].numpy()

    assert verify_files(manifest, folder) == []
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_the_specialist_is_exported_with_its_level(family: ToyFamily, tmp_path: Path) -> None:
    """As its recipe says it, where the U-Net was saved; the generalist draws what is above."""
    run(
        "export", "--out", str(family.folder), "--to", str(tmp_path), "--small", "specialist_unet",
        "--high-noise", "small_unet",
    )  # fmt: skip
    manifest = read_manifest(tmp_path / "edge")

    assert (manifest.name, manifest.max_timestep) == ("scenes-specialist", 779)
    assert verify_files(manifest, tmp_path / "edge") == []
    report = json.loads((tmp_path / "edge" / "parity.json").read_text())
    assert {"unet", "unet_high_noise"} <= {entry["role"] for entry in report}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "edge", "judge", "large", "small_unet", "specialist_unet",
    ]  # fmt: skip


def test_the_curve_is_in_the_manifest(family: ToyFamily) -> None:
    """Accuracy and likeness by split, as evaluate measured them."""
    manifest = read_manifest(family.folder / "models" / "edge")
    results = json.loads((family.folder / "evaluation" / "evaluation.json").read_text())
    measured = {row["large_steps"]: row["all_correct"] for row in results["rows"] if row["large_steps"] is not None}
    published = {point.cloud_steps: point.value for point in manifest.quality if point.metric == "semantic_accuracy"}

    assert published == pytest.approx(measured)
    assert set(published) == {0, 2, 4}
    assert {"semantic_accuracy", "psnr", "judge_distance"} <= {point.metric for point in manifest.quality}
    assert results["others"][0]["scheduler"] == "lcm"
    assert (family.folder / "evaluation" / "quality.csv").is_file()


def test_two_processes_judge_what_one_does(family: ToyFamily, tmp_path: Path) -> None:
    """Each judges its captions, the first joins them, and the others wait for it; the results are those of one."""
    copy = tmp_path / "family"
    shutil.copytree(family.folder, copy, ignore=shutil.ignore_patterns("checkpoint-*", "models", "latents"))
    before = json.loads((copy / "evaluation" / "evaluation.json").read_text())
    shutil.rmtree(copy / "evaluation")
    settings = ["--captions", "4", "--steps", "4", "--splits", "4,2,0", "--lcm-steps", "4", "--lcm-splits", "4,2,0"]
    command = [sys.executable, "-m", "training", "--processes", "2", "evaluate", "--out", str(copy), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)

    assert done.returncode == 0, done.stderr
    after = json.loads((copy / "evaluation" / "evaluation.json").read_text())
    assert after["captions"] == before["captions"] == 4
    assert [row["configuration"] for row in after["rows"]] == [row["configuration"] for row in before["rows"]]
    assert len(list((copy / "evaluation").glob("part-dpmpp_2m-*.npz"))) == 2


def test_what_is_exported_can_be_judged_as_it_is(family: ToyFamily, tmp_path: Path) -> None:
    """With the judge beside it, by the edge's own ONNX files: the numbers are those of the training folder."""
    models = tmp_path / "demo"
    shutil.copytree(family.folder / "models", models, ignore=shutil.ignore_patterns("small_unet"))
    settings = ["--captions", "3", "--steps", "4", "--splits", "4,2,0", "--family"]
    folders = {"torch": family.folder, "onnx": models}
    for name, folder in folders.items():
        run("evaluate", "--out", str(tmp_path / name), *settings, str(folder))
        run("noise-levels", "--out", str(tmp_path / name), "--family", str(folder), "--scenes", "2", "--gate", "0")
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name in folders:
        with np.load(tmp_path / name / "evaluation" / "part-dpmpp_2m-00.npz") as arrays:
            parts[name] = dict(arrays)
    found = {name: json.loads((tmp_path / name / "evaluation" / "evaluation.json").read_text()) for name in folders}
    levels = {
        name: json.loads((tmp_path / name / "noise_levels" / "noise_levels.json").read_text()) for name in folders
    }

    assert (models / "judge" / "classifier.safetensors").stat().st_size < 3e6
    for name in ("large", "small", "hybrid 2,2"):
        np.testing.assert_allclose(
            parts["onnx"][f"images/{name}"].astype(int), parts["torch"][f"images/{name}"].astype(int), atol=16
        )  # of bfloat16 in torch
    assert found["onnx"]["judge"] == found["torch"]["judge"]
    assert found["onnx"]["command"].endswith(f"--splits 4,2,0 --family {models}")
    assert {row["configuration"] for row in found["onnx"]["rows"]} == {
        "large",
        "hybrid 2,2",
        "small",
        "large, KL decoder",
    }
    for onnx, torch_ in zip(levels["onnx"]["levels"], levels["torch"]["levels"], strict=True):
        assert onnx["ratio"] == pytest.approx(torch_["ratio"], rel=0.02)
    refused = run("evaluate", "--out", str(tmp_path), *settings, str(models), "--small", "scratch_unet")
    assert refused.exit_code == 1
    assert f"no scratch_unet in {models}, an exported family" in refused.output


def test_results_are_made_by_one_command_that_goes_on(family: ToyFamily, tmp_path: Path) -> None:
    """What is missing is trained and measured, what is there is not; the page has its tables, its prose stays."""
    copy, page = tmp_path / "family", tmp_path / "docs" / "results.md"
    shutil.copytree(family.folder, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    page.parent.mkdir()
    page.write_text((ROOT / "docs" / "results.md").read_text())
    only = [
        "evaluation", "noise_levels", "seeds/1/small_unet", "results/small-1", "results/codecs", "scores_compat",
        "pruning/compat",
    ]  # fmt: skip
    words = ["results", "--out", str(copy), "--scale", "toy", "--seeds", "0,1", "--doc", str(page)]
    words, start = [*words, *(word for name in only for word in ("--only", name))], words
    done = run(*words)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.npz")}
    again = run(*words)
    listed = run(*words, "--dry-run").output.splitlines()

    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*.npz")}
    assert [line for line in again.output.splitlines() if line.startswith("results: results/")] == []
    assert page.read_text() == text
    for said in (
        "## What differs from the paper", "| hybrid 2,2 | int8 |", "| small-unet | 2 |", "`results/small-1`",
        "the published rule leaves", "| aim | | found |", "python -m training small-unet --out runs/demo --scale toy",
        "Not measured: `results/kl-decoder`: it was not run.", "| `python -m training unet --out runs/demo` | 30 | 0.0",
    ):  # fmt: skip
        assert said in text, said
    assert (page.parent / "images" / "demo-curve.png").is_file()
    assert (page.parent / "images" / "demo-family.png").is_file()
    assert (copy / "seeds" / "1" / "small_unet" / "config.json").is_file()
    assert sum(line.startswith("done") for line in listed) == 6
    # other weights are another result
    shutil.copyfile(copy / "seeds/1/small_unet" / WEIGHTS, copy / "small_unet" / WEIGHTS)
    assert "open evaluation " in run(*words, "--dry-run").output
    # and a training of other weights is refused
    shutil.copyfile(copy / "seeds/1/small_unet" / WEIGHTS, copy / "pruned_unet" / WEIGHTS)
    stale = run(*start, "--only", "seeds/1/small_unet")
    assert stale.exit_code == 1
    assert "of other weights or settings than now; remove that folder" in stale.output


def test_pruning_leaves_a_report(family: ToyFamily) -> None:
    """Every layer before and after; a third of the parameters is left, and the middle block is gone."""
    lines = (family.folder / "pruned_unet" / "report.csv").read_text().splitlines()
    large, small = load_unet(family.folder / "unet"), load_unet(family.folder / "pruned_unet")
    counts = [sum(parameter.numel() for parameter in unet.parameters()) for unet in (large, small)]

    assert any(line.startswith("mid_block.resnets.0,") for line in lines)
    assert small.mid_block is None
    assert counts[1] <= 0.6 * counts[0]


def test_the_published_thresholds_can_be_used(family: ToyFamily, tmp_path: Path) -> None:
    """By a,b in place of a budget, and a budget that cannot be met is refused with the smallest that can."""
    done = run("prune", "--out", str(family.folder), "--to", str(tmp_path / "small"), "--thresholds", "4,6")
    refused = run("prune", "--out", str(family.folder), "--to", str(tmp_path / "none"), "--parameters", "0.001")

    assert done.exit_code == 0, done.output
    assert load_unet(tmp_path / "small").num_parameters() < load_unet(family.folder / "unet").num_parameters()
    assert refused.exit_code == 1
    assert "still costs" in refused.output
    assert not (tmp_path / "none").exists()


def test_scoring_goes_on_where_it_was(family: ToyFamily) -> None:
    """With all scores there, the command scores nothing and leaves them as they are."""
    path = family.folder / "scores" / "part-00.json"
    before = path.read_text()
    output = run("score", "--out", str(family.folder), "--num-captions", "2", "--steps", "2").output

    changed = run("score", "--out", str(family.folder), "--num-captions", "3", "--steps", "2")

    assert "known" in output
    assert changed.exit_code == 1
    assert "were made with num_captions 2; give the same, or remove that folder" in changed.output
    assert " at 0.25: " not in output
    assert json.loads(path.read_text()) == json.loads(before)


def test_cached_latents_are_those_of_the_scenes(family: ToyFamily) -> None:
    """Latent i is scene i, encoded and scaled to unit variance, and comes with its captions."""
    latents = load_latents(family.folder / "latents")
    vae = load_vae(family.folder / "vae")
    images = torch.from_numpy(to_model_range(np.stack([image_of(SCENES_SEED, index) for index in (3, 40)])))
    batch = CachedScenes(latents, SCENES_SEED)(np.random.default_rng(0), 8)
    again = CachedScenes(latents, SCENES_SEED)(np.random.default_rng(0), 8)

    assert latents.shape == (TOY_SCENES, 4, 16, 16)
    assert np.allclose(latents[[3, 40]], encode(vae, images).numpy(), atol=0.02)  # bfloat16 rounds by the batch
    assert 0.7 < latents.astype(np.float32).std() < 1.4
    assert CachedScenes(latents, SCENES_SEED).scenes[5] == scene_of(SCENES_SEED, 5)
    assert batch.captions == again.captions
    assert torch.equal(batch.latents, again.latents)  # type: ignore[arg-type] # both have latents


def test_decoding_undoes_the_scale(family: ToyFamily) -> None:
    """The KL VAE gets raw latents: what encode multiplied, decode divides."""
    vae = load_vae(family.folder / "vae")
    raw = torch.randn(1, 4, 4, 4)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = vae.decode(raw).sample.float()

    assert vae.config.scaling_factor != 1
    assert torch.allclose(decode(vae, raw * vae.config.scaling_factor), expected, atol=1e-2)


def test_tiny_vae_speaks_the_same_latents(family: ToyFamily) -> None:
    """Both of its halves have the shapes of the KL VAE's, and its own scaling factor is 1."""
    tiny = read_tiny_vae(family.folder / "tiny_vae")
    with torch.inference_mode():
        latents = tiny.encode(torch.zeros(1, 3, 64, 64)).latents
        images = tiny.decode(latents).sample

    assert latents.shape == (1, 4, 8, 8)
    assert images.shape == (1, 3, 64, 64)
    assert tiny.config.scaling_factor == 1


def test_the_judge_answers_within_its_classes(family: ToyFamily) -> None:
    """One answer a question for every image; labels are within the classes too."""
    labels, images = scenes_and_images(np.random.default_rng(0), 6)
    answers = load_classifier(family.folder / "classifier").read(images)

    assert answers.shape == labels.shape == (6, len(LABELS))
    kind, *others = CLASSES
    quadrant = (kind + 1, *others)  # one more than the text knows: neither
    for index, classes in enumerate((*quadrant * len(QUADRANTS), len(BACKGROUNDS))):
        assert labels[:, index].max() < classes
        assert answers[:, index].max() < classes


def test_text_encoder_reports_what_its_heads_read(family: ToyFamily) -> None:
    """accuracy.json has one share for trained pairs and one for held-out pairs."""
    scores = json.loads((family.folder / "text" / "accuracy.json").read_text())

    assert set(scores) == {"trained_pairs", "held_out_pairs"}
    assert all(0 <= share <= 1 for share in scores.values())


@pytest.mark.parametrize("name", [name for name in recipes.SCENES if name in STAGES])
def test_recipes_leave_curve_and_checkpoint(family: ToyFamily, name: str) -> None:
    """All steps are in the curve, and it is drawn."""
    folder = family.folder / recipes.find(name)("toy").folder

    assert family.curve(name)[-1]["step"] == 30
    assert (folder / "loss.png").stat().st_size > 1000
    assert list((folder / "curves").rglob("events.out.tfevents.*"))


def test_noise_levels_refuse_a_family_whose_large_model_does_not_lead(family: ToyFamily, tmp_path: Path) -> None:
    """It measures what the recipes wrote, and says which noise levels are behind; a gate of 0 lets all pass."""
    for name in ("vae", "text", "unet", "small_unet"):
        (tmp_path / name).symlink_to(family.folder / name)
    arguments = ["noise-levels", "--out", str(tmp_path), "--scenes", "2", "--timesteps", "801,101"]
    open_, shut = (CliRunner().invoke(main, [*arguments, "--gate", gate]) for gate in ("0", "1000"))
    written = json.loads((tmp_path / "noise_levels" / "noise_levels.json").read_text())

    assert open_.exit_code == 0, open_.output
    assert "| t | 801 | 101 |" in open_.output
    assert shut.exit_code == 1
    assert "the large U-Net does not lead" in shut.output
    assert [level["timestep"] for level in written["levels"]] == [801, 101]
    assert written["gate"] == 1000
