"""Adapters act as W + weight * B A, several at once, and leave no trace when they are not chosen."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from cloud_server.models.devices import place
from cloud_server.models.load import load_model
from cloud_server.models.loras import install, parse_source
from cloud_server.models.sources import ModelError
from hybridsd.prompting import TextOptions
from tests.support import tiny_loras
from tests.support.tiny_pipeline import write_tiny_pipeline

CPU = place("cpu", "fp32")


def write_lora(folder: Path, unet: Any, seed: int, targets: tuple[str, ...] = ("to_k", "to_q", "conv1")) -> Path:
    """Writes a random adapter of a U-Net; returns its folder."""
    network = copy.deepcopy(unet)
    torch.manual_seed(seed)
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(targets), init_lora_weights=False))
    layers = get_peft_model_state_dict(network)
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline(tmp_path_factory.mktemp("loras") / "tiny")


def predict(model: Any, loras: tuple[tuple[str, float], ...]) -> torch.Tensor:
    encoded = model.denoiser.encode("a fox", TextOptions(), loras)
    conditions = model.denoiser.conditions([encoded], size=(64, 64), guidance_scale=1.0)
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.denoiser.predict(sample, torch.tensor([500.0]), conditions, loras)


def test_several_adapters_add_up_and_leave_no_trace(pipeline: Path, tmp_path: Path) -> None:
    """Two weighted adapters add up with the weights; none at all is the plain model, bit for bit."""
    plain = load_model(f"tiny={pipeline}", CPU)
    folders = [write_lora(tmp_path / name, plain.denoiser._unet, seed) for seed, name in enumerate(("one", "two"))]
    sources = [parse_source(f"{folder.name}={folder}") for folder in folders]
    model = load_model(f"tiny={pipeline}", CPU, loras=sources)
    by_hand = load_model(f"tiny={pipeline}", CPU)
    weights = (("one", 0.5), ("two", -1.5))

    for folder, (_, weight) in zip(folders, weights, strict=True):
        tensors = load_file(folder / "pytorch_lora_weights.safetensors")
        for key, down in tensors.items():
            if "lora_A" not in key:
                continue
            up = tensors[key.replace("lora_A", "lora_B")]
            layer = by_hand.denoiser._unet.get_submodule(key.removeprefix("unet.").partition(".lora_A")[0])
            product = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
            layer.weight.data += weight * product

    before = predict(model, ())
    torch.testing.assert_close(predict(model, weights), predict(by_hand, ()), rtol=1e-4, atol=1e-5)
    assert not torch.equal(predict(model, weights), before)
    assert torch.equal(predict(model, ()), before)
    assert torch.equal(before, predict(plain, ()))
    assert [info.name for info in model.info.loras] == ["one", "two"]
    assert all(info.num_parameters > 0 for info in model.info.loras)


def test_an_adapter_of_another_base_is_refused(pipeline: Path, tmp_path: Path) -> None:
    """Another width of the text says which base it is; a path that is not there is no adapter."""
    wide = write_tiny_pipeline(tmp_path / "wide", embed_dim=16)
    model = load_model(f"wide={wide}", CPU)
    folder = write_lora(tmp_path / "other", model.denoiser._unet, 3)

    with pytest.raises(ModelError, match=r"16 features.*this model has 8"):
        load_model(f"tiny={pipeline}", CPU, loras=[parse_source(f"x={folder}")])
    with pytest.raises(ModelError, match="neither a file"):
        load_model(f"tiny={pipeline}", CPU, loras=[parse_source(f"x={tmp_path / 'nowhere'}")])


@pytest.mark.parametrize("text", ["", "x", "=path", "a b=path", "name="])
def test_sources_have_one_form(text: str) -> None:
    """What is no NAME=PATH is refused with the form."""
    with pytest.raises(ModelError, match="NAME=PATH"):
        parse_source(text)
    assert parse_source("sd:style=/x/y.safetensors").model == "sd"


@pytest.mark.parametrize("case", ["peft", "peft-ranks", "kohya", "kohya-alphas", "header"])
def test_every_format_acts_as_its_numbers_say(case: str, tmp_path: Path) -> None:
    """Unet and text layers, ranks and alphas that differ from layer to layer: W + weight * alpha / rank * B A."""
    unet, text = tiny_loras.networks()
    path, deltas = tiny_loras.write(case, tmp_path / "style.safetensors", unet, text)
    expected = [tiny_loras.by_hand(network, delta, 0.7) for network, delta in zip((unet, text), deltas, strict=True)]
    before = tiny_loras.outputs(unet, text)
    adapters = install(unet, [text], [parse_source(f"v1.5={path}")])  # a dot, which peft's own names cannot have

    assert all(map(torch.equal, tiny_loras.outputs(unet, text), before))
    adapters.select((("v1.5", 0.7),))
    for actual, wanted in zip(tiny_loras.outputs(unet, text), tiny_loras.outputs(*expected), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    adapters.select(())
    assert all(map(torch.equal, tiny_loras.outputs(unet, text), before))


@pytest.mark.parametrize(("wrong", "says"), tiny_loras.WRONG.items())
def test_what_does_not_fit_as_a_whole_is_refused(wrong: str, says: str, tmp_path: Path) -> None:
    """One layer too many, a second text encoder, another kind of adapter or another width: never a part of it."""
    unet, text = tiny_loras.networks()
    path = tiny_loras.write_wrong(wrong, tmp_path / "wrong.safetensors", unet, text)

    with pytest.raises(ModelError, match=says):
        install(unet, [text], [parse_source(f"x={path}")])


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_attention_processors_of_old_diffusers_are_read(prefix: str, tmp_path: Path) -> None:
    """Their layers act as the same ones by today's names."""
    now, old = tmp_path / "now.safetensors", tmp_path / "old.safetensors"
    unet, text = tiny_loras.networks()
    attention = next(name for name, _ in unet.named_modules() if name.endswith(".attn2"))
    wide = unet.get_submodule(attention)
    state, renamed = {}, {}
    for part, layer in (("q", wide.to_q), ("v", wide.to_v), ("out", wide.to_out[0])):
        down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
        path = f"unet.{attention}.to_{'out.0' if part == 'out' else part}"
        state |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
        path = f"{prefix}{attention}.processor.to_{part}_lora"
        renamed |= {f"{path}.down.weight": down, f"{path}.up.weight": up}
    save_file(state, now)
    save_file(renamed, old)
    results = []
    for path in (now, old):
        network = copy.deepcopy(unet)
        install(network, [text], [parse_source(f"x={path}")]).select((("x", 1.0),))
        results.append(tiny_loras.outputs(network, text)[0])

    assert torch.equal(*results)
    assert not torch.equal(results[0], tiny_loras.outputs(unet, text)[0])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bundle_emb.word.string_to_param.*", "embeddings of words"),
        ("lora_unet_mid_block.oft_blocks", "OFT"),
        ("lora_unet_conv_in.diff", "difference of whole weights"),
    ],
)
def test_what_is_beside_or_instead_of_a_lora_is_said(name: str, says: str, tmp_path: Path) -> None:
    """It is the file that cannot be used, whatever the model: another model is not advised."""
    unet, text = tiny_loras.networks()
    path, _ = tiny_loras.write("kohya", tmp_path / "style.safetensors", unet, text)
    save_file({**load_file(path), name: torch.ones(2, 2)}, path)
    with pytest.raises(ModelError, match=says) as refused:
        install(unet, [text], [parse_source(f"x={path}")])
    assert "made for it" not in str(refused.value)


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    """A name means one adapter."""
    unet, text = tiny_loras.networks()
    path, _ = tiny_loras.write("peft", tmp_path / "a.safetensors", unet, text)

    with pytest.raises(ModelError, match="two loras have the name a"):
        install(unet, [text], [parse_source(f"a={path}")] * 2)


def _sdxl_networks() -> tuple[Any, Any, Any]:
    """Returns a U-Net with SDXL's blocks and both text encoders, narrow."""
    text = {
        "vocab_size": 100, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 12, "projection_dim": 12, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 99,
    }  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16, 32), layers_per_block=2, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2], cross_attention_dim=24, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=36,
    )  # fmt: skip
    first = CLIPTextModel(CLIPTextConfig(hidden_size=8, **text))
    return unet, first, CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, **text))


_SDXL_KOHYA = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        0, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "lora_unet_input_blocks_8_1_transformer_blocks_1_attn2_to_k": (
        0, "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k",
    ),
    "lora_unet_middle_block_1_proj_in": (0, "mid_block.attentions.0.proj_in"),
    "lora_unet_output_blocks_2_1_transformer_blocks_0_ff_net_0_proj": (
        0, "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj",
    ),
    "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_out_0": (
        0, "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    ),
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (1, "encoder.layers.0.self_attn.out_proj"),
    "lora_te2_text_model_encoder_layers_0_self_attn_out_proj": (2, "encoder.layers.0.self_attn.out_proj"),
    "lora_te2_text_model_encoder_layers_1_mlp_fc1": (2, "encoder.layers.1.mlp.fc1"),
}  # fmt: skip
"""kohya's name of a layer of SDXL, in the block numbers of the original code; where it is here."""


def test_kohya_files_of_sdxl_reach_the_layers_that_they_name(tmp_path: Path) -> None:
    """Block numbers of the original SDXL code and both text encoders: each layer gets its own product."""
    networks = _sdxl_networks()
    generator, state, products = torch.Generator().manual_seed(0), {}, []
    for key, (index, name) in _SDXL_KOHYA.items():
        (layer,) = [part for path, part in networks[index].named_modules() if path.endswith(name)]
        down = torch.randn(2, layer.weight.shape[1], generator=generator)
        up = torch.randn(layer.weight.shape[0], 2, generator=generator)
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
        products.append((index, name, 0.5 * up @ down))
    save_file(state, tmp_path / "style.safetensors")
    install(networks[0], networks[1:], [parse_source(f"style={tmp_path / 'style.safetensors'}")])

    for index, name, product in products:
        (layer,) = [part for path, part in networks[index].named_modules() if path.endswith(name)]
        assert torch.allclose(layer.get_delta_weight("lora_0"), product, atol=1e-6), name


def test_a_hub_id_is_fetched_and_a_path_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """owner/name is asked of the hub, in the file name that diffusers writes; ./name never is."""
    unet, text = tiny_loras.networks()
    path, _ = tiny_loras.write("peft", tmp_path / "some.safetensors", unet, text)
    asked: list[tuple[str, str]] = []

    def download(repo: str, name: str) -> str:
        asked.append((repo, name))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = install(unet, [text], [parse_source("style=someone/style")])

    assert [info.name for info in found.infos] == ["style"]
    with pytest.raises(ModelError, match="neither a file"):
        install(unet, [text], [parse_source("other=./style")])
    assert asked == [("someone/style", "pytorch_lora_weights.safetensors")]


def test_an_adapter_of_the_whole_model_does_not_fit_a_pruned_one(tmp_path: Path) -> None:
    """Channels that pruning took away cannot be adapted: the file is refused, with the layer's shapes."""
    unet, text = tiny_loras.networks()
    path, _ = tiny_loras.write("peft", tmp_path / "style.safetensors", unet, text)
    layer = unet.mid_block.resnets[0].conv1
    unet.mid_block.resnets[0].conv1 = torch.nn.Conv2d(layer.in_channels, layer.out_channels // 2, 3, padding=1)

    with pytest.raises(ModelError, match=r"lora style: .* does not fit this model"):
        install(unet, [text], [parse_source(f"style={path}")])
