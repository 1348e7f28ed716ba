"""The file of an adapter: every loader reads the same networks out of it, by kohya's names, and its header tells."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from torch import Tensor

from cloud_server.models.loras import install, parse_source
from tests.support.tiny_pipeline import Kind, write_tiny_pipeline
from training.core.conditioning import token_ids
from training.models import shapes
from training.models.components import Components, load_components
from training.models.lora import (
    TEXT_LAYERS,
    UNET_LAYERS,
    Layers,
    _original,
    add_adapter,
    base_version,
    kohya_state,
    lora_header,
    write_lora,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
RANK = 4


def adapted(folder: Path, layers: Layers, *, alpha: float) -> Components:
    """A pipeline's parts with adapters that do something, of numbers that float16 has."""
    parts = load_components(str(folder))
    torch.manual_seed(3)
    add_adapter(parts.unet, UNET_LAYERS[layers], rank=RANK, alpha=alpha)
    for encoder in list[Any](parts.text.networks):
        add_adapter(encoder, TEXT_LAYERS, rank=RANK, alpha=alpha)
    for network in (parts.unet, *parts.text.networks):
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = (0.3 * torch.randn_like(parameter)).half().float()
    return parts


def answer(unet: Any, networks: Any, tokenizer: Any) -> tuple[Tensor, ...]:
    """What the text encoders make of a text, and the U-Net of noise."""
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    width = unet.config.cross_attention_dim
    added = None
    if unet.config.addition_embed_type:
        added = {"text_embeds": torch.ones(1, 10), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        predicted = unet(sample, 300, torch.ones(1, 5, width), added_cond_kwargs=added).sample
        ids = token_ids(tokenizer, ["a fox"])
        return predicted, *(network(input_ids=ids).last_hidden_state for network in networks)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["attention", "transformer", "all"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_every_loader_makes_the_same_networks_of_it(kind: Kind, layers: Layers, tmp_path: Path) -> None:
    """Our cloud and diffusers' load_lora_weights, with text encoders and an alpha that is not the rank."""
    folder = write_tiny_pipeline(tmp_path / "pipeline", kind=kind)
    parts = adapted(folder, layers, alpha=2.0)
    path = tmp_path / "me.safetensors"
    write_lora(path, parts.unet, parts.text.networks, {})
    pipeline_class: Any = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    options = {} if kind == "sdxl" else {"safety_checker": None, "feature_extractor": None}
    pipeline = pipeline_class.from_pretrained(folder, **options)
    encoders = [pipeline.text_encoder, *([pipeline.text_encoder_2] if kind == "sdxl" else [])]
    cloud = copy.deepcopy((pipeline.unet, encoders))
    expected = answer(parts.unet, parts.text.networks, pipeline.tokenizer)
    plain = answer(pipeline.unet, encoders, pipeline.tokenizer)

    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    for found, wanted, before in zip(answer(pipeline.unet, encoders, pipeline.tokenizer), expected, plain, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert not torch.allclose(before, wanted, atol=1e-3)
    install(*cloud, [parse_source(f"me={path}")]).select((("me", 1.0),))
    for found, wanted in zip(answer(*cloud, pipeline.tokenizer), expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


def test_names_are_those_of_kohya(tmp_path: Path) -> None:
    """Of SD 1.x diffusers' with kohya's beginnings; each layer has two matrices in float16 and its alpha."""
    parts = adapted(write_tiny_pipeline(tmp_path), "attention", alpha=2.0)
    state = kohya_state(parts.unet, parts.text.networks)
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0"
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"

    assert {
        f"{name}.{part}" for name in (layer, text) for part in ("lora_down.weight", "lora_up.weight", "alpha")
    } <= set(state)
    assert state[f"{layer}.lora_down.weight"].dtype == torch.float16
    assert state[f"{layer}.lora_down.weight"].shape[0] == RANK
    assert float(state[f"{layer}.alpha"]) == 2.0


def test_names_of_sdxl_are_the_originals() -> None:
    """At full size: kohya's places of the transformers, and its names of a resnet, a step down and a step up."""
    unet = shapes.unet("sdxl")
    named = {_original(name, unet) for name, _ in unet.named_modules()}
    places = {name.rpartition(".transformer_blocks.0.attn1.to_k")[0] for name in named if name.endswith("0.attn1.to_k")}

    assert places == {
        *(f"input_blocks.{n}.1" for n in (4, 5, 7, 8)), "middle_block.1", *(f"output_blocks.{n}.1" for n in range(6)),
    }  # fmt: skip
    assert {
        "input_blocks.1.0.in_layers.2", "input_blocks.3.0.op", "input_blocks.6.0.op", "middle_block.2.out_layers.3",
        "output_blocks.2.2.conv", "output_blocks.5.2.conv", "output_blocks.8.0.emb_layers.1",
        "output_blocks.0.0.skip_connection", "input_blocks.4.1.proj_in",
    } <= named  # fmt: skip


def test_the_header_tells_what_tools_show(tmp_path: Path) -> None:
    """Rank, alpha, family, steps, trigger; what is not known is not there."""
    folder = write_tiny_pipeline(tmp_path / "pipeline")
    parts = adapted(folder, "attention", alpha=2.0)
    header = lora_header(
        family=("sd_v1", "stable-diffusion-v1"), title="me", base_model="owner/model", unet=None, rank=RANK, alpha=2.0,
        layers="all", steps=7, size=(512, 512), trigger="sks", prediction_type="v_prediction",
        timestep_range=(0, 1000), training={"learning_rate": 1e-4, "min_snr_gamma": None},
    )  # fmt: skip
    write_lora(tmp_path / "me.safetensors", parts.unet, parts.text.networks, header)
    with safe_open(tmp_path / "me.safetensors", framework="pt") as file:
        said = file.metadata()

    assert said["format"] == "pt"
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_steps"]) == ("4", "2.0", "7")
    assert (said["ss_base_model_version"], said["ss_sd_model_name"]) == ("sd_v1", "owner/model")
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (said["modelspec.trigger_phrase"], said["modelspec.prediction_type"]) == ("sks", "v")
    assert said["ss_learning_rate"] == "0.0001"
    assert "ss_min_snr_gamma" not in said
    assert base_version(parts.unet, parts.text.networks) is None  # 8 features: a family of its own


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"rank": 0}, "rank is 0; choose 1 or more"), ({"rank": 2, "alpha": -1.0}, "alpha is -1.0; choose more than 0")],
)
def test_numbers_out_of_range_are_refused(options: Any, complaint: str) -> None:
    """The error names the value and the range."""
    with pytest.raises(ValueError, match=complaint):
        add_adapter(torch.nn.Linear(2, 2), ("",), **options)
