"""The evaluation of the demo family: parts join to the whole, splits are told apart, and the table says what it saw."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor

from training.data.scenes import render, sample_scene, to_model_range
from training.evaluation import evaluate, judging, quality
from training.evaluation.classifier import Classifier
from training.evaluation.family_files import Family, FamilyFiles
from training.evaluation.metrics import frechet_distance

pytestmark = pytest.mark.slow

WIDTH = 6
SETTING = judging.Setting(scheduler="dpmpp_2m", steps=2, splits=(2, 1, 0), guidance=2.0)
LCM_SETTING = judging.Setting(scheduler="lcm", steps=2, splits=(2, 1, 0), guidance=2.0, large="lcm", small="lcm_small")


def make_unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=2,
        **options,
    )


def embed(texts: list[str]) -> Tensor:
    rows = [np.random.default_rng(list(text.encode()) or 0).standard_normal((3, WIDTH)) for text in texts]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def make_family(**options: Any) -> Family:
    """Random networks, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = [
            make_unet(**options),
            make_unet(**options),
            AutoencoderKL(
                block_out_channels=(8,) * 4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=4,
                norm_num_groups=2,
                scaling_factor=1.5,
                mid_block_add_attention=False,
            ),
            AutoencoderTiny(
                encoder_block_out_channels=(4,) * 4,
                decoder_block_out_channels=(4,) * 4,
                num_encoder_blocks=(1,) * 4,
                num_decoder_blocks=(1,) * 4,
            ),
            Classifier(width=8),
        ]
    large, small, vae, tiny, judge = (network.requires_grad_(False).eval() for network in networks)
    assert isinstance(judge, Classifier)
    return Family(large=large, small=small, vae=vae, tiny=tiny, judge=judge, embed=embed)


@pytest.fixture(scope="module")
def loaded() -> Family:
    return make_family()


@pytest.fixture
def folder(tmp_path: Path, loaded: Family, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A family directory, whose networks are the random ones."""
    monkeypatch.setenv("HYBRIDSD_EVAL_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(FamilyFiles, "load", lambda *args, **options: loaded)
    for name in ("unet", "small_unet"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path


def judge(folder: Path, workers: int, **options: Any) -> None:
    for rank in range(workers):
        settings: dict[str, Any] = {"setting": SETTING, "captions": 4, "seed": 3, "keep": 2, "renders": 2, **options}
        evaluate.judge_part(folder, rank=rank, workers=workers, dtype=torch.float32, **settings)


def test_parts_of_workers_join_to_the_whole(folder: Path) -> None:
    """Three workers' parts are, in order, what one worker gives."""
    judge(folder, 1)
    whole = evaluate.join_parts(folder, SETTING, 1)
    judge(folder, 3)
    joined = evaluate.join_parts(folder, SETTING, 3)

    assert joined.captions == whole.captions
    assert list(joined.right) == list(whole.right) == ["large", "hybrid 1,1", "small", "large, KL decoder"]
    assert joined.images["large"].shape[1:] == (128, 128, 3)
    assert joined.renders is not None
    assert whole.renders is not None
    np.testing.assert_allclose(joined.renders, whole.renders, rtol=1e-4, atol=1e-5)
    for name in whole.right:
        np.testing.assert_array_equal(joined.right[name], whole.right[name])
        np.testing.assert_allclose(joined.features[name], whole.features[name], rtol=1e-3, atol=1e-4)
    for metric in ("psnr", "ssim", "judge_distance"):
        np.testing.assert_allclose(
            joined.similar["small"][metric], whole.similar["small"][metric], rtol=1e-3, atol=1e-4
        )


def test_what_the_large_model_did_first_makes_pictures_more_like_its_own(loaded: Family) -> None:
    """A hybrid is between the models; every configuration but the large one is compared with it."""
    setting = judging.Setting(scheduler="dpmpp_2m", steps=4, splits=(4, 3, 0), guidance=2.0)
    judged = judging.judge_captions(loaded, range(3), setting=setting, seed=1, keep=1)
    hybrid, small = judged.similar["hybrid 3,1"], judged.similar["small"]

    assert set(judged.similar) == {"hybrid 3,1", "small", "large, KL decoder"}
    assert hybrid["psnr"].mean() > small["psnr"].mean()
    assert hybrid["judge_distance"].mean() < small["judge_distance"].mean()
    assert judged.images["small"].shape == (1, 128, 128, 3)
    assert judged.missing == {"lpips": "not looked for", "real_fid": "not looked for"}
    assert judged.features["small"].shape == (3, 256)


def test_latent_consistency_models_are_judged_with_the_same_machinery() -> None:
    """Noise belongs to the caption: a batch of one and of three give the same images."""
    family = make_family(time_cond_proj_dim=8)
    together, alone = (
        judging.judge_captions(family, range(3), setting=LCM_SETTING, seed=1, keep=3, batch=batch) for batch in (3, 1)
    )

    assert list(together.right) == ["large", "hybrid 1,1", "small", "large, KL decoder"]
    for name, images in together.images.items():
        assert np.abs(images.astype(int) - alone.images[name].astype(int)).max() <= 1


def test_the_kl_vae_can_decode_all(loaded: Family) -> None:
    """Then nothing is decoded twice, and a family without the large model alone has nothing to be compared with."""
    setting = judging.Setting(scheduler="dpmpp_2m", steps=2, splits=(1, 0), guidance=1.0)
    judged = judging.judge_captions(loaded, range(1), setting=setting, seed=1, decoder="kl")

    assert list(judged.right) == ["hybrid 1,1", "small"]
    assert judged.similar == {}


def test_the_small_model_can_begin(loaded: Family) -> None:
    """Then the large one does the last steps; either alone is what it is in the usual order, for the same noise."""
    usual, other = (
        judging.judge_captions(loaded, range(2), setting=replace(SETTING, small_first=first), seed=1, keep=2)
        for first in (False, True)
    )

    assert list(other.right) == ["large", "reversed 1,1", "small", "large, KL decoder"]
    for name in ("large", "small"):
        np.testing.assert_array_equal(usual.images[name], other.images[name])
    assert (usual.images["hybrid 1,1"] != other.images["reversed 1,1"]).any()


def test_without_text_the_caption_does_not_matter(loaded: Family) -> None:
    """The models see the empty caption; what they should have shown is still known."""
    seen: list[str] = []

    def note(texts: list[str]) -> Tensor:
        seen.extend(texts)
        return embed(texts)

    family = replace(loaded, embed=note)
    judged = judging.judge_captions(family, range(2), setting=replace(SETTING, empty_text=True), seed=1)

    assert set(seen) == {""}
    assert judged.truth is not None
    assert (judged.truth[:, [0, 3, 6, 9]] > 0).sum() == 6


def test_codecs_of_the_hand_over_are_configurations(loaded: Family) -> None:
    """What is sent exactly changes nothing; coarser codes are less like it; the ends have no hand-over."""
    setting = replace(SETTING, codecs=("fp32", "fp16", "int8"))
    judged = judging.judge_captions(loaded, range(2), setting=setting, seed=1, keep=2)
    to_plain = {name: found[judging.TO_PLAIN].mean() for name, found in judged.similar.items() if "1,1, " in name}
    plain = judging.judge_captions(loaded, range(2), setting=SETTING, seed=1, keep=2)

    assert list(judged.right) == [
        "large", "hybrid 1,1", "hybrid 1,1, fp16", "hybrid 1,1, int8", "small", "large, KL decoder",
    ]  # fmt: skip
    np.testing.assert_array_equal(judged.images["hybrid 1,1"], plain.images["hybrid 1,1"])
    assert to_plain["hybrid 1,1, fp16"] > to_plain["hybrid 1,1, int8"] > 20
    with pytest.raises(ValueError, match="choose of fp32, fp16, int8"):
        replace(SETTING, codecs=("fp8",))


def test_what_was_read_is_kept(loaded: Family) -> None:
    """The labels of caption and image are there, and the flags are made of them."""
    judged = judging.judge_captions(loaded, range(3), setting=SETTING, seed=1)
    results = evaluate.summary(judged, setting=SETTING, seed=1)
    row = results["rows"][0]

    assert judged.truth is not None
    expected = [bool((read == truth).all()) for read, truth in zip(judged.read["large"], judged.truth, strict=True)]
    assert row["flags"] == "".join("01"[right] for right in expected)
    assert sum(part["objects"] for part in row["kinds"].values()) == 9
    assert set(row["mistakes"]) == {"missing", "neither", "kind", "attribute", "extra"}


def test_the_judges_distances_grow_with_what_changed(loaded: Family) -> None:
    """None between equals, more with every degree of blur, of an image and of a set of images."""
    scenes = [sample_scene(np.random.default_rng(index), held_out=True) for index in range(24)]
    drawn = np.stack([render(scene, np.random.default_rng(index)) for index, scene in enumerate(scenes)])
    sharp = torch.from_numpy(to_model_range(drawn))
    of_pictures, of_sets = [], []
    for factor in (1, 2, 4, 8, 16):
        small = torch.nn.functional.avg_pool2d(sharp, factor)
        blurred = torch.nn.functional.interpolate(small, size=(128, 128), mode="nearest")
        of_pictures.append(float(judging.judge_distance(loaded.judge, blurred, sharp).mean()))
        features = [judging.judge_features(loaded.judge, images) for images in (blurred, sharp)]
        of_sets.append(frechet_distance(*features))

    assert of_pictures[0] == 0
    assert of_sets[0] == pytest.approx(0, abs=1e-4)
    assert of_pictures == sorted(of_pictures)
    assert of_sets[:4] == sorted(of_sets[:4])  # of the coarsest, an untrained judge sees hardly more
    assert of_sets[-1] > 10 * of_sets[0] + 0.01


def test_renders_are_of_the_captions_scenes(loaded: Family) -> None:
    """Render k of caption i is of the caption's scene, placed again; which worker draws it does not matter."""
    see = partial(judging.judge_features, loaded.judge)
    together, alone = (judging.render_features(see, chosen, 1, 3) for chosen in (range(4), range(2, 4)))
    scene, _ = judging.held_out_scene(1, 2)
    drawn = np.stack([render(scene, np.random.default_rng((1, 2, k + 1))) for k in range(3)])
    expected = judging.judge_features(loaded.judge, torch.from_numpy(to_model_range(drawn)))

    np.testing.assert_allclose(alone, together[2:], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(alone[0], expected, rtol=1e-3, atol=1e-4)
    assert len({float(render_features[0]) for render_features in alone[0]}) == 3


def test_one_run_gives_results_curve_and_reasons(folder: Path) -> None:
    """evaluation.json, the table and a plot; what is not there, LPIPS and the LCMs, is named."""
    judge(folder, 2)
    results, judged = evaluate.collect(folder, settings=(SETTING, LCM_SETTING), seed=3, workers=2)
    saved = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    measured = quality.read_csv(folder / "evaluation" / "quality.csv")
    table = evaluate.markdown(results)
    rows = {row["configuration"]: row for row in results["rows"]}
    scores = {score["metric"]: score for score in rows["small"]["scores"]}

    assert saved["captions"] == 4
    assert "no lcm and no lcm_small" in saved["absent"]["lcm"]
    assert {one.cloud_steps for one in measured} == {2, 1, 0}
    assert (folder / "evaluation" / "quality-dpmpp_2m-2.png").is_file()
    assert list(scores) == ["semantic_accuracy", "judge_fid", "real_fid", "psnr", "ssim", "judge_distance", "lpips"]
    assert scores["lpips"]["value"] is None
    assert "vgg16" in scores["lpips"]["note"]
    assert judged.renders is not None
    assert judged.renders.shape == (4, 3, 256)
    real = judged.renders[:, 1:].reshape(8, 256)
    assert scores["judge_fid"]["value"] == frechet_distance(judged.features["small"], real)
    assert results["real_fid_of_renders"] > 0
    assert results["judge_fid_of_renders"] == frechet_distance(judged.renders[:, 0], real)
    assert [score["metric"] for score in rows["large"]["scores"]] == ["semantic_accuracy", "judge_fid", "real_fid"]
    assert rows["large, KL decoder"]["large_steps"] is None
    assert "lpips: not measured: fetch vgg16" in table


def test_both_solvers_have_a_curve_where_both_are_there(folder: Path) -> None:
    """The LCM's results stand beside the first ones, and their curve is told apart by its scheduler."""
    for name in ("lcm", "lcm_small"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    judge(folder, 1, captions=1)
    judge(folder, 1, captions=1, setting=LCM_SETTING)
    results, _ = evaluate.collect(folder, settings=(SETTING, LCM_SETTING), seed=3)
    curves = quality.measured_of(results)

    assert [part["scheduler"] for part in results["others"]] == ["lcm"]
    assert {one.scheduler for one in curves} == {"dpmpp_2m", "lcm"}
    assert "judge_fid_of_renders" not in results  # of one image there is no covariance


def test_a_family_without_the_models_is_refused(tmp_path: Path) -> None:
    """The message names the folder and what to do."""
    with pytest.raises(ValueError, match="no unet and no small_unet in"):
        FamilyFiles(tmp_path).load()


def test_splits_beyond_the_steps_are_refused() -> None:
    """A setting is checked when it is made."""
    with pytest.raises(ValueError, match="0 to 4"):
        judging.Setting(scheduler="lcm", steps=4, splits=(8, 0), guidance=2.0)


def test_the_table_says_what_was_judged() -> None:
    """All four parts must be right for an image to count, and differences are to the small model."""
    good = np.ones((4, 4), bool)
    half = good.copy()
    half[:2, 1] = False
    judged = judging.Judged(captions=("a",) * 4, right={"large": good, "small": half}, images={})
    results = evaluate.summary(judged, setting=judging.DPM, seed=1)
    large, small = results["rows"]

    assert large["all_correct"] == 1
    assert small["all_correct"] == 0.5
    assert small["tint"] == 0.5
    assert small["kind"] == 1
    assert large["minus_small"][0] == 0.5
    assert (large["large_steps"], small["large_steps"]) == (25, 0)
    assert "| large | **100.0%** |" in evaluate.markdown(results)


def test_the_grid_has_a_row_for_each_configuration(tmp_path: Path) -> None:
    """The first captions side by side, configurations below each other."""
    from PIL import Image

    images = {"large": np.zeros((3, 128, 128, 3), np.uint8), "small": np.full((3, 128, 128, 3), 255, np.uint8)}
    judged = judging.Judged(captions=("a",) * 3, right={}, images=images)
    evaluate.grid(judged, tmp_path / "new" / "grid.png", columns=2)

    with Image.open(tmp_path / "new" / "grid.png") as drawn:
        assert drawn.size == (256, 256)
        assert drawn.getpixel((0, 200)) == (255, 255, 255)
