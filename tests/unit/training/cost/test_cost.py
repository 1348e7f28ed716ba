"""Cost: what is counted, that the published figures come out, and what each split costs."""

import csv
import io
import json
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch import nn

from training.core.diffusion import build_unet
from training.cost.cost import TOTAL, WHOLE, Cost, compare, costs, layer_times, layers, unet_inputs
from training.cost.cost_report import (
    REFERENCE,
    ModelCost,
    SplitCost,
    as_csv,
    as_json,
    comparison_markdown,
    conventions,
    model_costs,
    models_markdown,
    split_costs,
    splits_markdown,
)
from training.models import shapes
from training.pruning.depth import drop, source_of, sources

pytestmark = pytest.mark.slow

STEPS = 25


def elementwise_flops(unet: nn.Module, inputs: dict[str, Any]) -> int:
    """Counts what the published FLOPs hold beside 2 MACs: 5 an element of a norm, 1 of an activation or a bias.

    Of biases, only those of convolutions; this is how the reference's tool, calflops, counts.
    """
    weights = {nn.GroupNorm: 5, nn.LayerNorm: 5, nn.SiLU: 1, GEGLU: 1, nn.Conv2d: 1}
    total = 0

    def hook(part: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += weights[type(part)] * output.numel()

    handles = [part.register_forward_hook(hook) for part in unet.modules() if type(part) in weights]
    with torch.no_grad():
        unet(**inputs)
    for handle in handles:
        handle.remove()
    return total


@pytest.fixture(scope="module")
def unets() -> dict[str, UNet2DConditionModel]:
    """Stable Diffusion 1.4's U-Net and its prunings, on meta."""
    sd14 = shapes.sd14()
    return {
        "SD 1.4": sd14,
        "Small": drop(sd14),
        "Tiny": drop(sd14, levels=3),
        "224M": shapes.narrow(drop(sd14, levels=3)),
    }


@pytest.fixture(scope="module")
def step(unets: dict[str, UNet2DConditionModel]) -> dict[str, Cost]:
    """What one step of one guided image of 512x512 costs with each."""
    return {name: costs(unet, guided_inputs(unet))[WHOLE] for name, unet in unets.items()}


@pytest.fixture(scope="module")
def demo() -> UNet2DConditionModel:
    """A U-Net with weights, for latents of 16x16 and 8 tokens of 24."""
    torch.manual_seed(0)
    return build_unet((32, 32, 32), layers=2, cross_attention_dim=24, mid=True).eval()


def guided_inputs(unet: UNet2DConditionModel) -> dict[str, Any]:
    """For an image of 512x512."""
    return unet_inputs(unet.config, batch=2, height=64, width=64, device="meta")


def demo_inputs(unet: UNet2DConditionModel) -> dict[str, Any]:
    """Real tensors."""
    return unet_inputs(unet.config, batch=1, height=16, width=16, tokens=8)


@pytest.mark.slow
def test_sd14_costs_what_is_known(step: dict[str, Cost]) -> None:
    """Parameters are exact; half of the published FLOPs of a step, 677.8 G, holds 0.1% that are not MACs."""
    assert step["SD 1.4"].parameters == 859_520_964
    assert step["SD 1.4"].macs == 677_221_171_200
    assert step["SD 1.4"].macs == pytest.approx(677.8e9, rel=0.001)


def test_bk_sdm_costs_what_the_reference_holds(step: dict[str, Cost]) -> None:
    """Its constants for BK-SDM-Tiny and -Small come out to the last digit, and attention beside them."""
    assert step["Tiny"] == Cost(parameters=323_384_964, macs=409_905_397_760, attention_macs=75_603_640_320)
    assert step["Small"].parameters == 482_346_884
    assert step["Small"].macs == 435_290_767_360


def test_the_synthetic_configuration_costs_what_is_known(step: dict[str, Cost]) -> None:
    """It has 224,490,116 parameters and 302.572 GMAC a step."""
    assert step["224M"].parameters == 224_490_116
    assert round(step["224M"].macs / 1e9, 3) == 302.572


def test_published_flops_are_two_macs_and_elementwise_operations(
    unets: dict[str, UNet2DConditionModel], step: dict[str, Cost]
) -> None:
    """Figures for 25 steps come out to two decimals, and those of splits are sums of theirs."""
    tera = {
        name: (2 * step[name].macs + elementwise_flops(unet, guided_inputs(unet))) / 1e12
        for name, unet in unets.items()
    }
    published = {"SD 1.4": 33.89, "Small": 21.78, "Tiny": 20.51, "224M": 15.14}
    assert {name: round(STEPS * flops, 2) for name, flops in tera.items()} == published
    assert round(10 * tera["SD 1.4"] + 15 * tera["224M"], 2) == 22.64
    assert round(5 * tera["SD 1.4"] + 20 * tera["224M"], 2) == 18.89


def test_attention_is_counted_once_whichever_way_it_is_computed(demo: UNet2DConditionModel) -> None:
    """Its matrix products follow the closed form: 2 x queries x keys x channels for each of the two attentions."""
    cost = costs(demo, unet_inputs(demo.config, batch=3, height=16, width=16, tokens=8))
    attention = cost["up_blocks.1.attentions.0.transformer_blocks.0"]
    pixels, channels = 8 * 8, 32
    assert attention.attention_macs == 3 * 2 * channels * pixels * (pixels + 8)
    assert cost["up_blocks.1.attentions.0.transformer_blocks.0.attn1"].attention_macs == 3 * 2 * channels * pixels**2
    assert cost["down_blocks.0"].attention_macs == 0


def test_counting_needs_no_weights_and_leaves_the_model_alone(demo: UNet2DConditionModel) -> None:
    """A model on the CPU costs what it costs on meta, in any dtype, and computes the same afterwards."""
    inputs = demo_inputs(demo)
    with torch.no_grad():
        before = demo(**inputs).sample
        counted = costs(demo, inputs)
        assert torch.equal(demo(**inputs).sample, before)
    with torch.device("meta"):
        copy = build_unet((32, 32, 32), layers=2, cross_attention_dim=24, mid=True)
    assert costs(copy, inputs) == counted
    halved = unet_inputs(demo.config, batch=1, height=16, width=16, tokens=8, dtype=torch.bfloat16)
    assert costs(copy.to(torch.bfloat16), halved) == counted


@pytest.mark.slow
def test_layers_are_all_of_a_model() -> None:
    """The costs of the layers sum up to that of the whole: SDXL's U-Net, both decoders, the text encoder."""
    unet = shapes.sdxl()
    latents = [torch.zeros(1, 4, 64, 64)]
    for model, inputs in (
        (unet, unet_inputs(unet.config, batch=1, height=32, width=32, device="meta")),
        (shapes.vae().decoder, latents),
        (shapes.tiny_vae().decoder, latents),
        (shapes.text_encoder(), {"input_ids": torch.zeros(1, 77, dtype=torch.long)}),
    ):
        cost = costs(model, inputs)
        parts = [cost[path] for path in layers(model)]
        assert sum(part.parameters for part in parts) == cost[WHOLE].parameters
        assert sum(part.macs for part in parts) == cost[WHOLE].macs
        assert sum(part.attention_macs for part in parts) == cost[WHOLE].attention_macs


def test_layers_are_resnets_attentions_and_the_like(demo: UNet2DConditionModel) -> None:
    """A resnet is one layer, and self-attention, cross-attention and feed-forward are three."""
    found = layers(demo)
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert {"down_blocks.0.resnets.1", f"{block}.attn1", f"{block}.attn2", f"{block}.ff", "conv_in"} <= set(found)
    assert "up_blocks.0.upsamplers.0" in found
    assert not any(path.endswith("conv1") for path in found)


def test_inputs_fit_every_kind_of_unet(demo: UNet2DConditionModel) -> None:
    """SDXL gets its sizes and summary, a latent consistency model its guidance embedding, of the right shapes."""
    assert set(unet_inputs(demo.config, batch=1, height=16, width=16)) == {
        "sample",
        "timestep",
        "encoder_hidden_states",
    }
    xl = unet_inputs(shapes.sdxl().config, batch=2, height=128, width=96, device="meta")
    assert tuple(xl["sample"].shape) == (2, 4, 128, 96)
    assert tuple(xl["encoder_hidden_states"].shape) == (2, 77, 2048)
    assert tuple(xl["added_cond_kwargs"]["text_embeds"].shape) == (2, 1280)
    consistent = UNet2DConditionModel.from_config({**demo.config, "time_cond_proj_dim": 256})
    with torch.no_grad():
        assert consistent(**demo_inputs(consistent)).sample.shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match="class_embed_type of the U-Net is 'timestep'"):
        unet_inputs({**demo.config, "class_embed_type": "timestep"}, batch=1, height=8, width=8)


def test_decoders_cost_what_is_known() -> None:
    """The reference counts two images without attention, we one with it."""
    decoders = {"SD": shapes.vae().decoder, "tiny": shapes.tiny_vae().decoder}
    reference, ours = conventions(guidance=True)
    rows = model_costs({}, decoders, [reference, ours])
    assert [(row.model, row.convention) for row in rows] == [
        ("SD", "reference"),
        ("tiny", "reference"),
        ("SD", "real"),
        ("tiny", "real"),
    ]
    assert [row.parameters for row in rows[:2]] == [49_490_179, 1_222_531]
    assert [round(row.macs / 2e9, 1) for row in rows[:2]] == [1240.1, 70.7]
    attention = 2 * 512 * 4096**2  # one attention of 512 channels over 64x64
    assert [row.macs for row in rows[2:]] == [rows[0].macs // 2 + attention, rows[1].macs // 2]


def test_a_call_without_guidance_is_half_in_ours_and_the_same_in_the_reference(demo: UNet2DConditionModel) -> None:
    """Our convention counts the batch that is run; the reference's always two."""
    (reference, once), (reference_guided, twice) = (
        [row.macs for row in model_costs({"demo": demo}, {}, conventions(guidance=guidance))]
        for guidance in (False, True)
    )
    assert reference == reference_guided
    assert 2 * once == twice
    assert twice > reference


@pytest.mark.slow
def test_the_cloud_is_relieved_of_two_thirds_with_latent_consistency_models(
    unets: dict[str, UNet2DConditionModel],
) -> None:
    """The published claims: 66% of the cloud's cost, at 4 + 4 steps with the decoding moved, and 225.8M at the edge."""
    small = shapes.narrow(drop(unets["SD 1.4"], levels=3))
    small.register_to_config(time_cond_proj_dim=256)
    small.time_embedding.cond_proj = nn.Linear(256, 320, bias=False, device="meta")
    (row,) = split_costs(
        unets["SD 1.4"],
        small,
        shapes.tiny_vae().decoder,
        num_inference_steps=8,
        splits=[4],
        counted=[REFERENCE],
        cloud_decoder=shapes.vae().decoder,
    )
    assert round(1 - row.cloud_relative, 3) == 0.657
    assert row.edge_parameters == 225_794_567


@pytest.mark.slow
def test_splits_share_the_work_between_cloud_and_edge(demo: UNet2DConditionModel) -> None:
    """Every step is run at one place, the edge decodes, and the text encoder runs once where the steps begin."""
    small, decoder, text_encoder = drop(demo), shapes.tiny_vae().decoder, shapes.text_encoder()
    unet_size, small_size, text_size = (
        sum(parameter.numel() for parameter in model.parameters()) for model in (demo, small, text_encoder)
    )
    counted = conventions(guidance=True, height=16, width=16, tokens=8)
    rows = split_costs(
        demo,
        small,
        decoder,
        num_inference_steps=STEPS,
        splits=[0, 10, 25],
        counted=counted,
        text_encoders=[text_encoder],
    )
    assert [(row.convention, row.cloud_steps, row.edge_steps) for row in rows] == [
        (name, k, STEPS - k) for name in ("reference", "real") for k in (0, 10, 25)
    ]
    for convention, (edge, mixed, cloud) in zip(counted, (rows[:3], rows[3:]), strict=True):
        once = model_costs({"large": demo, "small": small}, {"decoder": decoder}, [convention])
        by_large, by_small, decoding = (row.macs for row in once)
        text = convention.text_macs([text_encoder])
        assert (text == 0) == (convention == REFERENCE)
        assert (edge.cloud_macs, edge.edge_macs) == (0, 25 * by_small + decoding + text)
        assert (mixed.cloud_macs, mixed.edge_macs) == (10 * by_large + text, 15 * by_small + decoding)
        assert (cloud.cloud_macs, cloud.edge_macs) == (25 * by_large + text, decoding)
        assert cloud.relative == 1
        assert mixed.total_macs == mixed.cloud_macs + mixed.edge_macs
        assert mixed.relative == mixed.total_macs / cloud.total_macs
        assert mixed.cloud_share + mixed.edge_share == pytest.approx(1)
        assert (edge.cloud_parameters, cloud.cloud_parameters) == (0, unet_size + text_size)
        assert cloud.edge_parameters == 1_222_531
        assert mixed.edge_parameters == small_size + 1_222_531
        assert edge.edge_parameters == mixed.edge_parameters + text_size


def test_a_split_must_be_among_the_steps(demo: UNet2DConditionModel) -> None:
    """A split beyond the last step is refused by name."""
    with pytest.raises(ValueError, match="split 9 is out of range; the cloud can run 0 to 8"):
        split_costs(demo, demo, nn.Conv2d(4, 3, 1), num_inference_steps=8, splits=[9], counted=[])


def test_times_are_of_layers_and_of_the_whole(demo: UNet2DConditionModel) -> None:
    """Every layer takes time, less than all calls together, and hooks are gone afterwards."""
    seconds = layer_times(demo, demo_inputs(demo), repeats=2)
    assert set(seconds) == {WHOLE, *layers(demo)}
    assert all(value > 0 for value in seconds.values())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in demo.modules())
    with pytest.raises(ValueError, match="repeats is 0"):
        layer_times(demo, {}, repeats=0)
    with pytest.raises(ValueError, match="meta device"):
        layer_times(shapes.tiny_vae(), {})


def test_layers_that_were_dropped_cost_nothing_after(demo: UNet2DConditionModel) -> None:
    """Dropped layers have rows of 0, others are found where they went, and the total is that of the models."""
    small = drop(demo)
    inputs = demo_inputs(demo)
    rows = {
        row.layer: row
        for row in compare(demo, small, inputs, repeats=1, source=partial(source_of, prefixes=sources(small, demo)))
    }
    assert list(rows) == [*layers(demo), TOTAL]
    dropped = rows["mid_block.resnets.0"]
    assert (dropped.parameters_after, dropped.macs_after, dropped.seconds_after) == (0, 0, 0)
    assert rows["up_blocks.0.resnets.1"].macs_after == 0
    kept = rows["up_blocks.0.resnets.2"]  # resnets.1 of the small one
    assert kept.macs_before == kept.macs_after > 0
    assert kept.seconds_after
    total = rows[TOTAL]
    assert total.parameters_after == sum(parameter.numel() for parameter in small.parameters())
    assert total.macs_after == sum(row.macs_after for row in rows.values()) - total.macs_after


def test_tables_hold_every_row() -> None:
    """JSON and CSV keep exact numbers, Markdown has a line a row; times that were not measured have no column."""
    rows = [ModelCost(model=name, convention="real", parameters=1_234_567, macs=45_600_000) for name in "mn"]
    assert [ModelCost(**row) for row in json.loads(as_json(rows))] == rows
    (first, _) = csv.DictReader(io.StringIO(as_csv(rows)))
    assert int(first["macs"]) == rows[0].macs
    assert models_markdown(rows[:1]) == (
        "| model | MACs are | parameters, M | GMAC a call |\n"
        "| --- | --- | ---: | ---: |\n"
        "| m | real | 1.23 | 0.0456 |\n"
    )
    split = SplitCost(
        convention="real",
        cloud_steps=10,
        edge_steps=15,
        cloud_parameters=5_000_000,
        edge_parameters=1_500_000,
        cloud_macs=3 * 10**12,
        edge_macs=10**12,
        total_macs=4 * 10**12,
        cloud_share=0.75,
        edge_share=0.25,
        relative=0.8,
        cloud_relative=0.6,
    )
    assert splits_markdown([split]).splitlines()[2] == (
        "| real | 10 + 15 | 5.00 | 1.50 | 3,000.00 | 1,000.00 | 4,000.00 | 75.0% | 25.0% | 80.0% | 60.0% |"
    )
    compared = compare(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), nn.Linear(4, 8), [torch.ones(1, 4)], repeats=0)
    lines = comparison_markdown(compared).splitlines()
    assert len(lines) == 2 + len(compared)
    assert lines[-1].startswith(f"| {TOTAL} |")
    assert "ms" not in lines[0]
    assert json.loads(as_json(compared))[0]["seconds_before"] is None
