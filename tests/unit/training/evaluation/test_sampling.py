"""Denoising with several models is the product's, shares what can be shared, and gives each image its own noise."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, PNDMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from training.core.diffusion import build_scheduler
from training.distillation.lcm import guidance_embedding
from training.evaluation import sampling
from training.models.plan_table import make_plan

STEPS = 6
SHAPE = (4, 8, 8)
WIDTH = 6


def make_unet(seed: int, **options: Any) -> UNet2DConditionModel:
    """A U-Net of two levels with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
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
    return unet.requires_grad_(False).eval()


def noise(batch: int = 2) -> Tensor:
    return sampling.initial_noise(5, range(batch), SHAPE)


def embeddings(rows: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, 3, WIDTH), dtype=np.float32))


class Counting:
    """A model of one number that counts its calls."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.calls: list[float] = []

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        self.calls.append(timestep)
        return self.weight * latents


@pytest.fixture(scope="module")
def plan() -> Any:
    return make_plan(build_scheduler().config, "dpmpp_2m", STEPS)


def test_a_hand_over_equals_one_scheduler_with_two_models(plan: Any) -> None:
    """Swapping the U-Net under a running diffusers scheduler gives the same latents."""
    large, small = make_unet(1), make_unet(2)
    embeds = embeddings(4)
    finished = sampling.denoise_splits(
        plan,
        noise(),
        [sampling.predictor(unet, embeds, 3.0) for unet in (large, small)],
        [(STEPS, 0), (2, 4), (0, STEPS)],
    )

    scheduler = build_scheduler()
    scheduler.set_timesteps(STEPS)
    latents = noise()
    for index, timestep in enumerate(scheduler.timesteps):
        guided = sampling.predict_guided(large if index < 2 else small, latents, float(timestep), embeds, 3.0)
        latents = scheduler.step(guided, timestep, latents).prev_sample

    assert list(finished) == [(STEPS, 0), (2, 4), (0, STEPS)]
    torch.testing.assert_close(finished[2, 4], latents, rtol=1e-4, atol=1e-4)
    assert (finished[0, STEPS] - latents).abs().max() > 1e-2


def test_an_lcm_hand_over_equals_diffusers_with_the_same_noise() -> None:
    """A stochastic plan with guidance-embedded U-Nets is LCMScheduler's own, noise for noise."""
    large, small = make_unet(3, time_cond_proj_dim=16), make_unet(4, time_cond_proj_dim=16)
    embeds = embeddings(2)
    lcm = make_plan(build_scheduler().config, "lcm", 4)

    def drawn(call: int) -> Tensor:
        return sampling.call_noise(5, range(2), call, SHAPE)

    finished = sampling.denoise_splits(
        lcm,
        noise(),
        [sampling.predictor(unet, embeds, 7.0) for unet in (large, small)],
        [(2, 2)],
        draw_noise=drawn,
    )

    base = build_scheduler().config
    scheduler = LCMScheduler(trained_betas=base.trained_betas, prediction_type=base.prediction_type)
    scheduler.set_timesteps(4)
    condition = guidance_embedding(torch.full((2,), 6.0), 16)
    latents = noise()
    for index, timestep in enumerate(scheduler.timesteps):
        unet = large if index < 2 else small
        output = unet(latents, timestep, embeds, timestep_cond=condition).sample
        result = scheduler.step(output, timestep, latents)
        alpha = scheduler.alphas_cumprod[scheduler.timesteps[index + 1]] if index < 3 else torch.tensor(1.0)
        latents = alpha.sqrt() * result.denoised + (1 - alpha).sqrt() * (drawn(index) if index < 3 else 0)

    torch.testing.assert_close(finished[2, 2], latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "pndm"])
def test_equal_models_make_every_split_the_same(name: str) -> None:
    """Where all models are one, it does not matter who does which step, nor how many there are."""
    made = make_plan(build_scheduler().config, name, STEPS)
    models = [Counting(0.3)] * 3
    finished = sampling.denoise_splits(made, noise(), models, [(6, 0, 0), (1, 2, 3), (0, 0, 6), (0, 6, 0), (2, 4, 0)])
    whole = finished[6, 0, 0]

    for latents in finished.values():
        torch.testing.assert_close(latents, whole, rtol=0, atol=0)


def test_what_splits_have_in_common_is_run_once(plan: Any) -> None:
    """The first model makes as many calls as its longest part, a later one as its parts differ."""
    large, middle, small = Counting(0.1), Counting(0.2), Counting(0.3)
    sampling.denoise_splits(plan, noise(), [large, middle, small], [(4, 2, 0), (4, 1, 1), (2, 0, 4), (2, 4, 0)])

    assert len(large.calls) == 4
    assert len(middle.calls) == 2 + 4  # after 4 steps two, shared by both splits; after 2 steps four
    assert len(small.calls) == 1 + 4
    assert small.calls[-1] == plan.rows[-1].timestep


@pytest.mark.parametrize("split", [(3, 2), (7, -1), (6,), (2, 2, 2)])
def test_a_split_that_does_not_fit_is_refused(plan: Any, split: tuple[int, ...]) -> None:
    """The message names the split and what it must add up to."""
    with pytest.raises(ValueError, match="add up to 6"):
        sampling.denoise_splits(plan, noise(), [Counting(0.1)] * 2, [split])


def test_a_stochastic_plan_needs_noise() -> None:
    """Without a source of noise the call is named."""
    made = make_plan(build_scheduler().config, "lcm", 2)
    with pytest.raises(ValueError, match="call 0 of the plan draws noise"):
        sampling.denoise_splits(made, noise(), [Counting(0.1)], [(2,)])


def test_noise_belongs_to_the_picture() -> None:
    """An image's noise does not depend on who shares its batch; calls, seeds and images all differ."""
    together = sampling.call_noise(9, [3, 4], 0, SHAPE)
    draws = [
        sampling.initial_noise(9, [4], SHAPE),
        sampling.call_noise(9, [4], 0, SHAPE),
        sampling.call_noise(9, [4], 1, SHAPE),
        sampling.call_noise(10, [4], 0, SHAPE),
        sampling.call_noise(9, [5], 0, SHAPE),
    ]

    assert torch.equal(together[1], draws[1][0])
    assert len({float(draw[0, 0, 0, 0]) for draw in draws}) == len(draws)


class Recording(nn.Module):
    """Stands for a U-Net: remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.seen: list[Any] = []

    def forward(self, sample: Tensor, timestep: Tensor, **options: Any) -> tuple[Tensor]:
        self.seen.append((sample, timestep, options))
        return (sample + options["encoder_hidden_states"].mean(dim=(1, 2))[:, None, None, None],)


def test_guidance_is_one_call_of_pairs_and_none_at_1() -> None:
    """Unconditional rows come first, in one batch of 2B; a guidance of 1 runs B conditional rows."""
    unet, embeds = Recording(), torch.cat([torch.zeros(2, 3, WIDTH), torch.ones(2, 3, WIDTH)])
    added = {"text_embeds": torch.arange(4.0)[:, None], "time_ids": torch.zeros(4, 6)}
    guided = sampling.predict_guided(unet, noise(), 7.0, embeds, 3.0, added)
    plain = sampling.predict_guided(unet, noise(), 7.0, embeds, 1.0, added)
    (pair, times, options), (single, _, alone) = unet.seen

    assert pair.shape[0] == 4
    assert single.shape[0] == 2
    assert times.tolist() == [7.0] * 4
    torch.testing.assert_close(guided, noise() + 3.0)
    torch.testing.assert_close(plain, noise() + 1.0)
    assert options["added_cond_kwargs"]["text_embeds"][:, 0].tolist() == [0, 1, 2, 3]
    assert alone["added_cond_kwargs"]["text_embeds"][:, 0].tolist() == [2, 3]
    assert pair.dtype == torch.float64  # the network's own
    assert guided.dtype == torch.float32
    assert torch.equal(sampling.predict_guided(unet, noise(), 7.0, embeds[2:], 1.0), plain)


@pytest.mark.parametrize(
    ("rows", "guidance", "message"), [(4, 0.5, "choose 1"), (2, 2.0, "guidance needs 4"), (3, 1.0, "3 rows")]
)
def test_conditions_that_do_not_fit_are_refused(rows: int, guidance: float, message: str) -> None:
    """Guidance below 1, and rows that are neither B nor 2B."""
    with pytest.raises(ValueError, match=message):
        sampling.predict_guided(Recording(), noise(), 7.0, embeddings(rows), guidance)


def test_a_plain_unet_takes_no_guidance_embedding() -> None:
    """predict_lcm says what to do instead, and predictor chooses by itself."""
    unet = make_unet(1)
    with pytest.raises(ValueError, match="use predict_guided"):
        sampling.predict_lcm(unet, noise(), 7.0, embeddings(4), 3.0)

    chosen = sampling.predictor(unet, embeddings(4), 3.0)(noise(), 7.0)
    assert torch.equal(chosen, sampling.predict_guided(unet, noise(), 7.0, embeddings(4), 3.0))


def test_models_run_under_the_given_context_and_the_solver_in_float32(plan: Any) -> None:
    """Under bfloat16 autocast the result is close to, and not, the float32 one; the latents stay float32."""
    unet, embeds = make_unet(1), embeddings(4)
    run: Callable[..., Any] = lambda **options: sampling.denoise_splits(  # noqa: E731
        plan, noise(), [sampling.predictor(unet, embeds, 2.0)], [(STEPS,)], **options
    )[STEPS,]
    exact, rounded = run(), run(context=sampling.autocast(torch.device("cpu")))

    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_timesteps_are_those_of_the_reference() -> None:
    """SD 1.4's own scheduler, read as another class, gives the grids of hybrid-sd.md, appendix C."""
    config = PNDMScheduler.from_config(
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
        }
    ).config
    dpm = [int(row.timestep) for row in make_plan(config, "dpmpp_2m", 25).rows]
    lcm = [int(row.timestep) for row in make_plan(config, "lcm", 8).rows]

    assert dpm[:3] == [999, 959, 919]
    assert dpm[12:15] == [519, 480, 440]
    assert dpm[-1] == 40
    assert lcm == [999, 879, 759, 639, 499, 379, 259, 139]


def test_a_decoder_gets_raw_latents_in_its_own_dtype() -> None:
    """The scaling factor is divided out; images come back as float32 in [-1, 1]."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
            self.config = DDIMScheduler().config.__class__(scaling_factor=0.5)

        def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
            assert latents.dtype == torch.bfloat16
            assert not return_dict
            return (latents[:, :3],)

    latents = torch.full((9, 4, 2, 2), 0.25)
    images = sampling.decode_latents(Decoder(), latents)

    assert images.dtype == torch.float32
    assert torch.equal(images, torch.full((9, 3, 2, 2), 0.5))


def test_an_edges_model_is_told_the_guidance() -> None:
    """A U-Net that embeds guidance in its graph gets the scale itself, one row each, and the conditional text."""
    told: dict[str, Any] = {}

    class Graph(nn.Module):
        takes_guidance = True

        def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, *, guidance_scale: Tensor) -> tuple[Tensor]:
            told.update(timestep=timestep, text=text, guidance_scale=guidance_scale)
            return (2 * sample,)

    pairs = embeddings(4)
    output = sampling.predictor(Graph(), pairs, 4.0)(noise(), 500.0)

    assert torch.equal(output, 2 * noise())
    assert told["guidance_scale"].tolist() == [4.0, 4.0]
    assert told["timestep"].tolist() == [500.0, 500.0]
    assert torch.equal(told["text"], pairs[2:])


def test_a_hand_over_is_coded_once_and_only_where_there_is_one() -> None:
    """All arrays of the solver's memory cross; a model alone hands nothing over; an unknown codec is refused."""
    plan = make_plan(build_scheduler().config, "dpmpp_2m", STEPS)
    crossed: list[int] = []

    def cross(state: list[Tensor]) -> list[Tensor]:
        crossed.append(len(state))
        return sampling.coded("int8")(state)

    splits = [(6, 0), (4, 2), (2, 4), (0, 6)]
    predictors = [Counting(0.1), Counting(0.2)]
    plain = sampling.denoise_splits(plan, noise(), predictors, splits)
    coded = sampling.denoise_splits(plan, noise(), predictors, splits, cross=cross)

    assert crossed == [2, 2]
    for split in ((6, 0), (0, 6)):
        assert torch.equal(plain[split], coded[split])
    for split in ((4, 2), (2, 4)):
        assert 0 < float((plain[split] - coded[split]).abs().max()) < 0.1
    exact = sampling.denoise_splits(plan, noise(), predictors, splits, cross=sampling.coded("fp32"))
    assert all(torch.equal(plain[split], exact[split]) for split in splits)
    with pytest.raises(ValueError, match="'fp8'; choose one of fp32, fp16, int8"):
        sampling.coded("fp8")
