"""Metrics: the numbers are those of the formulas, and what cannot be measured says what is missing."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from training.evaluation import backbones, metrics


def features(count: int, seed: int, shift: float = 0.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).standard_normal((6, 6))
    return (rng.standard_normal((count, 6)) @ mixing + shift).astype(np.float32)


def closed_form(a: Any, b: Any) -> float:
    """The Frechet distance with scipy's matrix square root."""
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    trace = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.trace(root.real)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + trace)


class TinyInception(nn.Module):
    """Six features and three logits, from the colours of an image."""

    name = "tiny"

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.see = nn.Linear(12, 6)
            self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert images.dtype == torch.uint8
        seen = self.see(nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1))
        return seen, 30 * self.head(seen)


def pictures(count: int, seed: int, size: int = 16) -> Tensor:
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, size=(count, 3, 1, 1))
    return torch.from_numpy(
        (colours + rng.integers(-20, 20, size=(count, 3, size, size))).clip(0, 255).astype(np.uint8)
    )


def test_the_frechet_distance_is_scipys() -> None:
    """Torchmetrics' eigenvalues and the matrix square root agree; equal sets have none."""
    a, b = features(50, 1), features(70, 2, shift=0.3)

    assert metrics.frechet_distance(a, b) == pytest.approx(closed_form(a, b), rel=1e-6)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_fid_against_statistics_is_fid_against_the_pictures(tmp_path: Path) -> None:
    """An .npz of mu and sigma stands for the real images, added in parts or not."""
    a, b = features(50, 1), features(70, 2, shift=0.3)
    np.savez(tmp_path / "real.npz", mu=b.mean(0), sigma=np.cov(b, rowvar=False))
    meter = metrics.Frechet(6)
    meter.set_reference(metrics.load_statistics(tmp_path / "real.npz"))
    meter.add(a[:20], real=False)
    meter.add(torch.from_numpy(a[20:]), real=False)

    assert meter.distance() == pytest.approx(closed_form(a, b), rel=1e-5)
    own = meter.statistics(real=False)
    np.testing.assert_allclose(own.sigma, np.cov(a, rowvar=False), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(own.mu, a.mean(0), rtol=1e-5, atol=1e-6)


def test_statistics_of_something_else_are_refused(tmp_path: Path) -> None:
    """A file without sigma, and one of another network."""
    np.savez(tmp_path / "half.npz", mu=np.zeros(6))
    with pytest.raises(ValueError, match="has no sigma"):
        metrics.load_statistics(tmp_path / "half.npz")
    np.savez(tmp_path / "other.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match="4 features, the network 6"):
        metrics.Frechet(6).set_reference(metrics.load_statistics(tmp_path / "other.npz"))


def test_the_jackknife_interval_holds_the_value() -> None:
    """More captions are surer; few have no interval; the value is the distance to all real images."""

    def score(count: int) -> metrics.Score:
        return metrics.frechet_score("d", features(count, 4, shift=0.5), features(3 * count, 3).reshape(count, 3, 6))

    few, many = score(40), score(400)
    assert score(19).low is None
    assert few.low is not None
    assert few.high is not None
    assert many.low is not None
    assert many.high is not None
    assert few.value == metrics.frechet_distance(features(40, 4, shift=0.5), features(120, 3))
    assert few.low < few.value < few.high
    assert many.high - many.low < few.high - few.low


def test_the_inception_score_is_its_formula_and_repeats() -> None:
    """exp of the mean KL of one part; the same at every call, whatever torch's global generator does."""
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 5)) * 3)
    p = logits.softmax(1)
    expected = float((p * (p.log() - p.mean(0).log())).sum(1).mean().exp())
    torch.manual_seed(1)
    first = metrics.inception_score([logits[:7], logits[7:]])
    torch.manual_seed(2)

    assert metrics.inception_score([logits], parts=1) == (pytest.approx(expected), 0.0)
    assert metrics.inception_score([logits]) == first
    assert first[1] > 0


def test_pairs_of_pictures() -> None:
    """PSNR by hand; equal images have 100 dB, an SSIM of 1; each image has a number of its own."""
    targets = metrics.to_float(pictures(2, 1))
    images = targets.clone()
    images[1] = (targets[1] * 0.5).clamp(-1, 1)
    found = metrics.similarity(images, targets, (lambda a, b: (a - b).abs().mean(), "L1"))
    mse = float((images[1] - targets[1]).square().mean())

    assert found["psnr"] == pytest.approx([100, 10 * np.log10(4 / mse)], rel=1e-5)
    assert found["ssim"][0] == pytest.approx(1)
    assert found["ssim"][1] < 0.99
    assert found["lpips"] == pytest.approx([0, float((images[1] - targets[1]).abs().mean())])
    assert set(metrics.similarity(images, targets, (None, "not there"))) == {"psnr", "ssim"}


def test_pictures_on_a_wrong_scale_are_refused() -> None:
    """Bytes, or floats to 255, would be measured on another scale."""
    images = pictures(1, 1)
    with pytest.raises(ValueError, match=r"give floats in \[-1, 1\]"):
        metrics.psnr(images, images)
    with pytest.raises(ValueError, match=r"give floats in \[-1, 1\]"):
        metrics.ssim(images.float(), images.float())


class TinyProcessor(nn.Module):
    """Stands for CLIP: an image's mean colour against the length of its caption."""

    def __init__(self) -> None:
        super().__init__()
        self.config = None

    def process(self, text: Any = None, images: Any = None, **options: Any) -> dict[str, Tensor]:
        del options
        if images is not None:
            return {"pixel_values": torch.stack([image.float().mean(dim=(1, 2)) for image in images])}
        ids = torch.tensor([[len(one), 1, 0] for one in text])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return pixel_values

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        del attention_mask
        return input_ids.float()


def test_a_set_of_pictures_is_measured_with_what_there_is() -> None:
    """FID, IS and CLIP score, each the number of its formula, over batches."""
    eyes, images = TinyInception(), pictures(12, 3)
    real = metrics.reference_statistics([pictures(5, 4), pictures(7, 5)], eyes)
    captions = ["a" * (index + 1) for index in range(12)]
    found = metrics.measure_images(
        [(images[:5], captions[:5]), (images[5:], captions[5:])],
        inception=(eyes, "tiny"),
        clip=(TinyProcessor(), "tiny clip"),
        reference=(real, "twelve"),
    )
    scores = {score.metric: score for score in found}
    generated = eyes(images)[0].detach().numpy()
    both = torch.cat([pictures(5, 4), pictures(7, 5)])
    text = torch.tensor([[len(one), 1.0, 0.0] for one in captions])
    cosine = torch.cosine_similarity(images.float().mean(dim=(2, 3)), text).mean()

    assert scores["fid"].value == pytest.approx(closed_form(generated, eyes(both)[0].detach().numpy()), rel=1e-3)
    assert scores["clip_score"].value == pytest.approx(float(cosine), rel=1e-4)
    assert scores["inception_score"].value == pytest.approx(metrics.inception_score([eyes(images)[1].detach()])[0])
    assert "twelve" in scores["fid"].note


def test_what_is_not_on_the_machine_is_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    """Every metric appears; one without a network has no value, and says which file to put where."""
    monkeypatch.setenv(backbones.WEIGHTS_VARIABLE, str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(backbones, "_cached", lambda *names: None)
    inception, clip, lpips = backbones.find_inception(), backbones.find_clip(), backbones.find_lpips()
    found = metrics.measure_images(
        [(pictures(4, 1), ["a"] * 4)], inception=inception, clip=clip, reference=(None, "no reference")
    )
    rebuilt = metrics.measure_reconstruction(
        lambda images: images * 0.9, [metrics.to_float(pictures(4, 1))], perceptual=lpips, inception=inception
    )

    assert [score.metric for score in found] == ["fid", "inception_score", "clip_score"]
    assert [score.value for score in found] == [None] * 3
    for score, file in zip(found, (backbones.INCEPTION_FILE, backbones.FIDELITY_FILE, "ViT-g-14"), strict=True):
        assert file in score.note
        assert str(tmp_path) in score.note
    assert {score.metric: score.value is None for score in rebuilt} == {
        "psnr": False,
        "ssim": False,
        "lpips": True,
        "fid": True,
    }


def test_reconstructions_have_an_fid_where_inception_is() -> None:
    """The images themselves are the real ones: a perfect VAE has none."""
    images = metrics.to_float(pictures(12, 1))
    eyes = TinyInception()
    same, dull = (
        {
            score.metric: score.value
            for score in metrics.measure_reconstruction(
                lambda image, factor=factor: image * factor,  # type: ignore[misc]
                [images[:6], images[6:]],
                perceptual=(None, "-"),
                inception=(eyes, "tiny"),
            )
        }
        for factor in (1.0, 0.5)
    )

    assert same["fid"] == pytest.approx(0, abs=1e-5)
    assert same["psnr"] == 100
    assert dull["fid"] is not None
    assert dull["fid"] > 0.01


class FakeDetector(nn.Module):
    """Has the calling convention of inception-2015-12-05.pt, as three public evaluations use it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        x = self.layers((img.float() - 128) / 128)
        if return_features:
            return x
        bias = 0.0 if no_output_bias else 5.0
        return torch.softmax(x * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([bias, 0.0, 0.0]), dim=1)


def test_the_torchscript_inception_is_called_as_it_expects(tmp_path: Path) -> None:
    """Features come from the layers, of images resized to 299; logits are without bias and give its softmax back."""
    detector = FakeDetector().eval()
    torch.jit.script(detector).save(tmp_path / backbones.INCEPTION_FILE)  # type: ignore[no-untyped-call]
    network, name = backbones.find_inception(tmp_path)
    images = pictures(3, 1)
    assert network is not None
    found, logits = network(images)

    torch.testing.assert_close(found, 2 * images.float().mean(dim=(2, 3)) / 255 - 1, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits.softmax(1), detector(images, no_output_bias=True))
    assert "pytorch-fid" in name
    by_file, _ = backbones.find_inception(tmp_path / backbones.INCEPTION_FILE)
    assert by_file is not None


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    """A download that was cut off is a reason, not a crash."""
    (tmp_path / backbones.INCEPTION_FILE).write_bytes(b"not a network")
    network, reason = backbones.find_inception(tmp_path)
    folder = tmp_path / "CLIP-ViT-g-14-laion2B-s34B-b88K"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    clip, why = backbones.find_clip(tmp_path)

    assert network is None
    assert clip is None
    assert "fetch it again" in reason
    assert "cannot be loaded" in why


def test_torch_fidelitys_weights_are_used_where_the_package_is(tmp_path: Path, monkeypatch: Any) -> None:
    """With the file but without the package, the package is asked for; with both, its network sees."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / backbones.FIDELITY_FILE).touch()
    network, reason = backbones.find_inception(tmp_path)
    assert network is None
    assert "not the package torch-fidelity" in reason

    class Extractor(nn.Module):
        def __init__(self, name: str, layers: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert layers == ["2048", "logits_unbiased"]
            assert feature_extractor_weights_path == str(tmp_path / backbones.FIDELITY_FILE)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images.float().mean(dim=(2, 3)), images.float().amax(dim=(2, 3))

    module = type(sys)("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    network, name = backbones.find_inception(tmp_path)
    assert network is not None
    assert network(pictures(2, 1))[0].shape == (2, 3)
    assert "torch-fidelity" in name


def write_tiny_clip(folder: Path) -> None:
    """Writes a CLIPModel of a few thousand random weights, with its tokenizer and how it wants its images."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

    letters = [chr(code) for code in range(97, 123)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    shared = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        max_position_embeddings=10,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
        **shared,
    )
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **shared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    with torch.no_grad():  # towards one direction, so that the cosine is above 0, which torchmetrics does not go below
        network.visual_projection.weight.copy_(torch.eye(8))
        network.text_projection.weight.copy_(torch.eye(8))
        network.vision_model.post_layernorm.bias.fill_(1)
        network.text_model.final_layer_norm.bias.fill_(1)
    network.save_pretrained(folder)
    CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=10
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"crop_size": 8, "do_center_crop": true, "do_normalize": true, "do_resize": true, '
        '"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], '
        '"resample": 3, "size": 8}'
    )


def test_a_clip_folder_of_transformers_scores_captions_of_any_length(tmp_path: Path) -> None:
    """The second choice is found by its folder, prepares images as it was trained to, and cuts long captions."""
    write_tiny_clip(tmp_path / "clip-vit-large-patch14")
    clip, name = backbones.find_clip(tmp_path)
    found = metrics.measure_images(
        [(pictures(2, 1), ["a cat", "a dog " * 50])], inception=(None, "-"), clip=(clip, name), reference=(None, "-")
    )
    score = found[-1]
    assert clip is not None
    images = clip.process(images=list(pictures(2, 1)))["pixel_values"]
    texts = clip.process(text=["a cat", "a dog " * 50])
    embedded = clip.get_text_features(texts["input_ids"], texts["attention_mask"])

    assert score.note == "transformers openai/clip-vit-large-patch14"
    assert images.shape == (2, 3, 8, 8)
    assert float(images.abs().max()) <= 1
    assert score.value is not None
    assert score.value > 0
    assert score.value == pytest.approx(
        float(torch.cosine_similarity(clip.get_image_features(images), embedded).mean()), abs=1e-5
    )


def test_intervals() -> None:
    """Wilson's interval at known values; the bootstrap of a difference of equals is nothing."""
    low, high = metrics.wilson(81, 100)
    right = np.array([True, False] * 20)

    assert (low, high) == pytest.approx((0.7222, 0.8749), abs=1e-4)
    assert metrics.paired_difference(right, right) == (0, 0, 0)
    mean, low, high = metrics.paired_difference(np.ones(40, bool), right)
    assert mean == 0.5
    assert 0.3 < low < 0.5 < high < 0.7
    score = metrics.mean_score("psnr", np.array([1.0, 2.0, 3.0]))
    assert score.value == 2
    assert score.low == pytest.approx(2 - 1.96 / np.sqrt(3))


def test_the_frechet_distance_is_torchmetrics_one() -> None:
    """By singular values of few images with many features, or of many with few; two sets that are one are at 0."""
    rng = np.random.default_rng(0)
    for count, width in ((30, 100), (200, 8)):
        a = rng.normal(size=(count, width)).astype(np.float32)
        b = (0.5 + 2 * rng.normal(size=(2 * count, width))).astype(np.float32)
        both = metrics.Frechet(width)
        both.add(a, real=False)
        both.add(b, real=True)

        assert metrics.frechet_distance(a, b) == pytest.approx(both.distance(), rel=1e-3)
        assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="there are 1 and 200 images"):
        metrics.frechet_distance(a[:1], a)


def test_objects_of_one_caption_are_not_independent() -> None:
    """The interval of a difference over captions is wider where their objects go together."""
    apart = np.array([1.0, -1.0] * 50)
    together, counts = np.array([3.0, -3.0] * 50), np.full(100, 3)
    wide, narrow = metrics.clustered_difference(together, counts), metrics.clustered_difference(apart, counts)

    assert wide[0] == narrow[0] == 0
    assert wide[2] - wide[1] > 2 * (narrow[2] - narrow[1])
