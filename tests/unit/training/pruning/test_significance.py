"""Significance: what matters scores more than what does not, by the same noise for all, and in any number of pieces."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from training.core.diffusion import build_unet
from training.models.pruned_unet import layers
from training.pruning.significance import BROKEN, load_scores, save_scores, significance, variants
from training.pruning.widths import PHANTOM, RATIOS, Key, ratios_from_thresholds

ZEROED, STRONG = "down_blocks.0.resnets.0", "up_blocks.2.resnets.1"
ZEROED_ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """A U-Net with a resnet and an attention that write nothing, and a resnet that writes much."""
    torch.manual_seed(0)
    unet = build_unet((64, 64, 64), layers=1, cross_attention_dim=16, mid=False, sample_size=8).eval()
    with torch.no_grad():
        unet.get_submodule(ZEROED).conv2.weight.zero_()
        unet.get_submodule(ZEROED_ATTENTION).to_out[0].weight.zero_()
        unet.get_submodule(STRONG).conv2.weight.mul_(20)
    return unet


class Sampler:
    """Two steps of a crude sampler for five captions, that counts its calls."""

    def __init__(self) -> None:
        self.draws: list[int] = []

    def __call__(self, unet: UNet2DConditionModel, draw: int) -> Tensor:
        assert not torch.is_grad_enabled()
        self.draws.append(draw)
        noise = torch.Generator().manual_seed(100 + draw)
        latents = torch.randn(5, 4, 8, 8, generator=noise)
        text = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))  # the captions stay the same
        for timestep in (999, 500):
            latents = latents - 0.5 * unet(latents, timestep, text).sample
        return latents


def every_score(unet: UNet2DConditionModel, *, compat: bool = False) -> dict[Key, float]:
    return dict(significance(unet, Sampler(), compat=compat))


@pytest.fixture(scope="module")
def scores(unet: UNet2DConditionModel) -> dict[Key, float]:
    """Of every layer and ratio."""
    return every_score(unet)


def test_what_writes_nothing_scores_nothing(unet: UNet2DConditionModel, scores: Mapping[Key, float]) -> None:
    """A layer whose output is zero anyway can be cut for free; one that matters scores most."""
    assert set(scores) == {(layer.name, ratio) for layer in layers(unet) for ratio in RATIOS}
    at_half = {name: score for (name, ratio), score in scores.items() if ratio == 0.5}
    assert at_half[ZEROED] < 1e-4
    assert at_half[ZEROED_ATTENTION] < 1e-4
    assert max(at_half, key=at_half.__getitem__) == STRONG
    assert at_half[STRONG] > 1
    others = {name: score for name, score in at_half.items() if name not in (ZEROED, ZEROED_ATTENTION)}
    assert min(others.values()) > 1e-3


def test_a_score_is_the_distance_of_means_and_deviations(
    unet: UNet2DConditionModel, scores: Mapping[Key, float]
) -> None:
    """Over captions, for each value of a latent."""
    from training.pruning.widths import cut

    with torch.no_grad():
        x0, x = (Sampler()(network, 0).double() for network in (unet, cut(unet, {STRONG: 0.5})))
    mean, deviation = (x.mean(0) - x0.mean(0)).norm(), (x.std(0, correction=0) - x0.std(0, correction=0)).norm()
    assert scores[STRONG, 0.5] == pytest.approx(float(mean + deviation), rel=1e-4)


def test_every_variant_sees_the_same_noise(unet: UNet2DConditionModel) -> None:
    """Nothing cut is exactly 0; the uncut U-Net is sampled once, equal widths once, and no cut not at all."""
    sampler = Sampler()
    scores = dict(significance(unet, sampler, ratios=(0.25, 0.5, 1.0)))
    assert all(score == 0 for (_, ratio), score in scores.items() if ratio == 1)
    assert all(scores[layer.name, 0.25] == scores[layer.name, 0.5] for layer in layers(unet))  # 32 of 64, 1 of 2 heads
    assert sampler.draws == [0] * (1 + len(layers(unet)))


@pytest.mark.slow
def test_compat_ranks_noise(unet: UNet2DConditionModel) -> None:
    """Every variant has other noise, so that what changes nothing scores as well, a phantom among them."""
    sampler = Sampler()
    scores = dict(significance(unet, sampler, compat=True))
    assert sampler.draws == list(range(1 + 3 * (len(layers(unet)) + 1)))
    # nothing of 64 channels or 2 heads is cut by the published rule: all of these are noise
    assert all(score > 1 for score in scores.values())
    assert (PHANTOM, 0.5) in scores
    assert PHANTOM not in ratios_from_thresholds(scores, layers(unet), 5, 7, compat=True)
    assert scores == every_score(unet, compat=True)


def test_scoring_goes_on_where_it_stopped(
    unet: UNet2DConditionModel, scores: Mapping[Key, float], tmp_path: Path
) -> None:
    """What is known is neither sampled nor given again, and the rest is as if nothing had happened."""
    path = tmp_path / "scores" / "part.json"
    assert load_scores(path) == {}
    interrupted = significance(unet, Sampler())
    save_scores(path, dict(next(interrupted) for _ in range(7)))
    interrupted.close()
    done = load_scores(path)
    sampler = Sampler()
    rest = dict(significance(unet, sampler, done=done))

    assert len(done) == 7
    assert not set(done) & set(rest)
    assert {**done, **rest} == scores
    assert len(sampler.draws) < 1 + len(layers(unet))
    sampler = Sampler()
    assert not list(significance(unet, sampler, done=scores))
    assert not sampler.draws


@pytest.mark.slow
@pytest.mark.parametrize("compat", [False, True])
def test_workers_share_the_scores(unet: UNet2DConditionModel, scores: Mapping[Key, float], compat: bool) -> None:
    """Together they give what one gives alone, and none gives what another does."""
    parts = [dict(significance(unet, Sampler(), compat=compat, rank=rank, workers=3)) for rank in range(3)]
    alone = every_score(unet, compat=True) if compat else scores
    assert sum(len(part) for part in parts) == len(alone)
    assert {key: score for part in parts for key, score in part.items()} == alone
    with pytest.raises(ValueError, match="rank is 3 of 3 workers"):
        next(significance(unet, Sampler(), rank=3, workers=3))


def test_the_unet_is_as_it_was(unet: UNet2DConditionModel) -> None:
    """After every score, and when sampling fails, its modules are the ones that they were."""
    before = list(unet.named_modules())

    def failing(_unet: UNet2DConditionModel, _draw: int) -> Tensor:
        if failing_after:
            failing_after.pop()
            return torch.zeros(2, 4, 8, 8)
        assert list(unet.named_modules()) != before  # one is cut
        raise RuntimeError("out of memory")

    for _ in significance(unet, Sampler(), ratios=(0.5,)):
        assert list(unet.named_modules()) == before
    failing_after = [1]
    with pytest.raises(RuntimeError, match="out of memory"):
        list(significance(unet, failing))
    assert list(unet.named_modules()) == before


def test_latents_that_overflow_are_the_worst(unet: UNet2DConditionModel) -> None:
    """A cut that breaks the U-Net has a score that can be ranked and saved; a broken U-Net has none."""
    calls = []

    def overflowing(_unet: UNet2DConditionModel, _draw: int) -> Tensor:
        calls.append(1)
        return torch.full((2, 4, 8, 8), 0.0 if len(calls) == 1 else float("inf"))

    assert next(significance(unet, overflowing))[1] == BROKEN
    with pytest.raises(ValueError, match="uncut U-Net are not finite"):
        next(significance(unet, overflowing))


def test_scores_of_another_unet_are_refused(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    """Nor is a file read that holds none."""
    with pytest.raises(ValueError, match=r"score of 'mid_block\.resnets\.0', which the U-Net does not have"):
        next(significance(unet, Sampler(), done={("mid_block.resnets.0", 0.5): 1.0}))
    path = tmp_path / "scores.json"
    for text in ("{", "[1]", '{"a": 1}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="does not hold scores"):
            load_scores(path)


def test_variants_can_be_counted_beforehand(unet: UNet2DConditionModel, scores: Mapping[Key, float]) -> None:
    """They name all the keys."""
    assert {key for variant in variants(unet) for key in variant.keys} == set(scores)
