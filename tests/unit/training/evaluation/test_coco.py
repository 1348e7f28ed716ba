"""The COCO protocol: images depend on seed and place alone, are made once, and are measured split by split."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from training.core.diffusion import build_scheduler
from training.evaluation import coco, coco_scores

SIZES = (32, 16)
CAPTIONS = [coco.Caption(f"{index}.jpg", f"thing {index}", "bad" * (index % 2)) for index in range(5)]


class Text:
    """One number a caption, so that a caption and its negative are seen in the image."""

    networks: tuple[nn.Module, ...] = ()

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def embed(self, captions: Any) -> tuple[Tensor, ...]:
        self.asked.append(list(captions))
        return (torch.tensor([[[len(one) / 10 + sum(map(ord, one)) % 7 / 7]] for one in captions]),)

    def unet_kwargs(self, embeds: Any, size: tuple[int, int]) -> dict[str, Any]:
        assert size == (SIZES[0], SIZES[0])
        return {"encoder_hidden_states": embeds[0]}


class Unet(nn.Module):
    """Predicts a share of what it sees, and its caption; may be a latent consistency model."""

    def __init__(self, share: float, time_cond_proj_dim: int | None = None) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share), requires_grad=False)
        self.config = SimpleNamespace(in_channels=4, time_cond_proj_dim=time_cond_proj_dim)
        self.calls = 0

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any) -> tuple[Tensor]:
        del timestep, options
        self.calls += 1
        return (self.share * sample + 0.1 * encoder_hidden_states[:, :1, :1, None],)


class Vae(nn.Module):
    """Repeats latents as pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)
        self.config: Any = {"block_out_channels": (1, 1, 1, 1), "scaling_factor": 1.0}
        self.config = type("Config", (dict,), {"__getattr__": dict.__getitem__})(self.config)

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        return (latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3) / 3,)


def make_models(**options: Any) -> coco.Models:
    return coco.Models(
        unets=(Unet(0.6, **options), Unet(0.3, **options)),
        text=Text(),
        vae=Vae(),
        scheduler_config=build_scheduler().config,
        sources=("sd", "sd", "small", "sd"),
    )


def generate(out: Path, models: coco.Models | None = None, **options: Any) -> list[int]:
    settings: dict[str, Any] = {"splits": [(4, 0), (2, 2), (0, 4)], "sizes": SIZES, "batch": 2, "seed": 3, **options}
    return list(coco.generate(models or make_models(), CAPTIONS, out, **settings))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of every caption; tests must not write to it."""
    out = tmp_path_factory.mktemp("coco")
    assert generate(out) == [2, 4, 5]
    return out


def test_the_folder_has_both_sizes_of_every_picture_as_jpeg_75(made: Path) -> None:
    """im512 and im256 of each split, quality 75, the small one resized (bicubic) from the large JPEG."""
    large, small = coco.image_paths(made, (2, 2), "1.jpg", SIZES)
    with Image.open(large) as image, Image.open(small) as other:
        assert image.size == (32, 32)
        assert other.size == (16, 16)
        fresh = io.BytesIO()
        image.resize((16, 16), Image.Resampling.BICUBIC).save(fresh, "JPEG", quality=75)
        assert fresh.getvalue() == small.read_bytes()
        again = io.BytesIO()
        image.save(again, "JPEG", quality=75)
        with Image.open(again) as tables:
            assert image.quantization == tables.quantization  # type: ignore[attr-defined]
    assert len(contents(made)) == 3 * 2 * 5 + 1
    assert large != coco.image_paths(made, (4, 0), "1.jpg", SIZES)[0]
    assert large.read_bytes() != coco.image_paths(made, (4, 0), "1.jpg", SIZES)[0].read_bytes()


def test_pictures_do_not_depend_on_batch_order_or_process(made: Path, tmp_path: Path) -> None:
    """Three processes in another batch size make the same bytes; so does each split by itself."""
    for rank in (2, 0, 1):
        generate(tmp_path / "ranks", batch=3, rank=rank, workers=3)
    assert contents(tmp_path / "ranks") == contents(made)

    generate(tmp_path / "alone", splits=[(2, 2)])
    alone = contents(tmp_path / "alone")
    assert alone == {name: value for name, value in contents(made).items() if name in alone}


def test_a_run_goes_on_where_it_was_stopped(made: Path, tmp_path: Path) -> None:
    """What is there is neither made nor written again; a half-written image is not there."""
    models = make_models()
    text = models.text
    assert isinstance(text, Text)
    running = coco.generate(models, CAPTIONS, tmp_path, splits=[(4, 0), (2, 2), (0, 4)], sizes=SIZES, batch=2, seed=3)
    assert next(running) == 2
    running.close()
    untouched = coco.image_paths(tmp_path, (2, 2), "0.jpg", SIZES)[0]
    before = untouched.stat().st_mtime_ns
    coco.image_paths(tmp_path, (0, 4), "1.jpg", SIZES)[1].unlink()
    text.asked.clear()

    assert generate(tmp_path, models) == [3, 5]
    assert [asked[-1] for asked in text.asked] == ["thing 2", "thing 4"]
    assert contents(tmp_path) == contents(made)
    assert untouched.stat().st_mtime_ns == before
    assert generate(tmp_path, models) == []


def test_splits_share_the_large_models_steps(tmp_path: Path) -> None:
    """Three splits of four steps take four calls of the large model and six of the small one for a batch."""
    models = make_models()
    generate(tmp_path, models, batch=5)
    large, small = models.unets
    assert isinstance(large, Unet)
    assert isinstance(small, Unet)

    assert large.calls == 4
    assert small.calls == 2 + 4


def test_latent_consistency_models_take_noise_of_their_own(tmp_path: Path) -> None:
    """LCM splits run too, the same in any batch, and differ by seed."""
    options: dict[str, Any] = {"scheduler": "lcm", "splits": [(2, 0), (1, 1)]}
    make = lambda: make_models(time_cond_proj_dim=8)  # noqa: E731
    generate(tmp_path / "a", make(), **options, batch=2)
    generate(tmp_path / "b", make(), **options, batch=5)
    generate(tmp_path / "c", make(), **options, batch=5, seed=4)
    a, b, c = (contents(tmp_path / name) for name in "abc")

    assert a == b
    assert a["1-1/im16/0.jpg"] != c["1-1/im16/0.jpg"]


def test_models_in_diffusers_layout_are_loaded_and_paint(tmp_path: Path) -> None:
    """A pipeline gives text, schedule and VAE; U-Nets are folders of their own; so may a tiny VAE be."""
    from diffusers import AutoencoderTiny

    from tests.support.tiny_pipeline import write_tiny_pipeline

    large = write_tiny_pipeline(tmp_path / "sd", seed=1)
    small = write_tiny_pipeline(tmp_path / "small", seed=2) / "unet"
    AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(tmp_path / "tiny_vae")
    options: dict[str, Any] = {"splits": [(2, 0), (1, 1)], "sizes": (64, 32)}
    for name, vae in (("kl", None), ("tiny", str(tmp_path / "tiny_vae"))):
        models = coco.load_models(str(large), [str(large), str(small)], vae=vae)
        assert models.vae_scale_factor == 8
        assert generate(tmp_path / name, models, **options) == [2, 4, 5]
    kl, tiny = (contents(tmp_path / name) for name in ("kl", "tiny"))

    assert len(kl) == len(tiny) == 2 * 2 * 5 + 1
    assert kl["1-1/im64/0.jpg"] != kl["2-0/im64/0.jpg"]
    assert kl["1-1/im64/0.jpg"] != tiny["1-1/im64/0.jpg"]
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel"):
        coco.load_models(str(large), [str(large)], vae=str(small))


def test_pictures_of_two_runs_are_not_mixed(made: Path) -> None:
    """Another seed, caption or model in the same folder is refused; description.json says what was made."""
    with pytest.raises(ValueError, match="another run: seed differ"):
        generate(made, seed=4)
    with pytest.raises(ValueError, match="guidance_scale"):
        generate(made, guidance=2.0)
    with pytest.raises(ValueError, match="captions_sha256"):
        list(coco.generate(make_models(), [coco.Caption("0.jpg", "else")], made, splits=[(4, 0)], sizes=SIZES, seed=3))


def write_csv(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(("file_name,text", *rows)) + "\n", encoding="utf-8")
    return path


def test_metadata_is_read_with_and_without_negatives(tmp_path: Path) -> None:
    """The header is skipped, quoted commas are the caption's, a third column is the negative caption."""
    path = write_csv(tmp_path / "metadata.csv", 'a.jpg,"A cat, a dog",ugly', "b.jpg,A bird", "c.jpg,One more")

    assert coco.read_captions(path, 2) == [
        coco.Caption("a.jpg", "A cat, a dog", "ugly"),
        coco.Caption("b.jpg", "A bird"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.jpg"], "row 2: no caption"),
        (["a.jpg,x", "a.jpg,y"], "row 3"),
        (["../a.jpg,x"], "has folders"),
        ([], "no captions"),
    ],
)
def test_bad_metadata_is_named_by_row(tmp_path: Path, rows: list[str], message: str) -> None:
    """A missing caption, a name used twice, one that leaves the folder, and an empty file."""
    with pytest.raises(ValueError, match=message):
        coco.read_captions(write_csv(tmp_path / "metadata.csv", *rows))


class Eyes(nn.Module):
    """Sees mean colours."""

    name = "eyes"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.float().mean(dim=(2, 3)) / 255, images.float().mean(dim=(2, 3))


def test_every_split_is_measured(made: Path, tmp_path: Path) -> None:
    """FID against a folder of real images; likeness to the large model's images; reasons where nothing is there."""
    real = tmp_path / "real"
    real.mkdir()
    rng = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(real / f"{index}.png")
    eyes = (Eyes(), "eyes")
    found = list(
        coco_scores.measure(
            made,
            CAPTIONS,
            splits=[(4, 0), (2, 2)],
            scheduler="dpmpp_2m",
            inception=eyes,
            clip=(None, "fetch clip"),
            perceptual=(None, "fetch vgg"),
            reference=coco_scores.find_reference(real, eyes),
            sizes=SIZES,
            batch=2,
        )
    )
    large = {one.score.metric: one.score for one in found if one.cloud_steps == 4}
    hybrid = {one.score.metric: one.score for one in found if one.cloud_steps == 2}

    assert set(large) == {"fid", "inception_score", "clip_score"}
    assert set(hybrid) == {*large, "psnr", "ssim", "lpips"}
    assert large["fid"].value is not None
    assert large["fid"].value != hybrid["fid"].value
    assert (hybrid["clip_score"].value, hybrid["clip_score"].note) == (None, "fetch clip")
    assert (hybrid["lpips"].value, hybrid["lpips"].note) == (None, "fetch vgg")
    assert hybrid["psnr"].value is not None
    assert {one.num_inference_steps for one in found} == {4}


def test_missing_pictures_and_references_are_said(made: Path, tmp_path: Path) -> None:
    """Unfinished splits are refused with a count; a reference that is not there names the file of val2014."""
    nothing = (None, "no network")
    measure: Callable[..., Any] = lambda splits: list(  # noqa: E731
        coco_scores.measure(
            made,
            CAPTIONS,
            splits=splits,
            scheduler="lcm",
            inception=nothing,
            clip=nothing,
            perceptual=nothing,
            reference=nothing,
            sizes=SIZES,
        )
    )
    with pytest.raises(ValueError, match="5 of 5 images of split 3,1 are missing"):
        measure([(3, 1)])
    statistics, reason = coco_scores.find_reference(tmp_path / "real_im256.npz", nothing)

    assert statistics is None
    assert "val2014, not val2017" in reason
    assert coco_scores.find_reference(made, nothing) == nothing
