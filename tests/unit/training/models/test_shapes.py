"""The published families at full size, on the meta device: what is counted, and the names and shapes of tensors."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from hybridsd import pruned_unet
from training.cost.cost import unet_inputs
from training.export.graphs import unet_graph
from training.models import shapes
from training.models.pruned_unet import build, layers

pytestmark = pytest.mark.slow

PUBLISHED = {
    "sd14": 859_520_964,
    "sd21": 865_910_724,
    "bk-sdm-base": 579_384_964,
    "bk-sdm-small": 482_346_884,
    "bk-sdm-tiny": 323_384_964,
    "small-sd": 579_384_964,
    "tiny-sd": 323_384_964,
    "hybrid-224m": 224_490_116,
    "lcm-sd14": 859_520_964 + 256 * 320,  # the projection of the guidance's embedding, without a bias
    "lcm-hybrid-224m": 224_490_116 + 256 * 320,
    "sdxl": 2_567_463_684,
    "lcm-sdxl": 2_567_463_684 + 256 * 320,
    "ssd-1b": 1_331_334_404,
    "koala-1b": 1_161_184_324,
    "koala-700m": 782_822_724,
}
# A tensor or two of each family that says which one it is: name => shape.
TELLING = {
    "sd21": {"mid_block.attentions.0.proj_in.weight": (1280, 1280)},
    "bk-sdm-tiny": {"down_blocks.2.resnets.0.conv1.weight": (1280, 640, 3, 3)},
    "hybrid-224m": {"up_blocks.0.resnets.1.conv1.weight": (640, 1920, 3, 3)},
    "lcm-sd14": {"time_embedding.cond_proj.weight": (320, 256)},
    "sdxl": {"add_embedding.linear_1.weight": (1280, 2816)},
    "ssd-1b": {"up_blocks.0.attentions.2.transformer_blocks.9.ff.net.2.weight": (1280, 5120)},
    "koala-700m": {"down_blocks.2.attentions.0.transformer_blocks.4.norm1.weight": (1280,)},
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def unets() -> dict[str, UNet2DConditionModel]:
    """All of them; they hold no weights."""
    return {name: shapes.unet(name) for name in shapes.UNETS}


@pytest.mark.slow
def test_parameters_are_as_many_as_published(unets: dict[str, UNet2DConditionModel]) -> None:
    """To the last one, for every family, and none takes memory."""
    assert {name: count(unet) for name, unet in unets.items()} == PUBLISHED
    assert all(parameter.is_meta for unet in unets.values() for parameter in unet.parameters())


def test_text_encoders_and_vaes_are_as_large_as_published() -> None:
    """CLIP ViT-L, OpenCLIP ViT-H without its last layer, OpenCLIP ViT-bigG with its projection; KL and tiny VAE."""
    assert count(shapes.text_encoder()) == 123_060_480
    assert count(shapes.text_encoder_sd2()) == 340_387_840
    assert count(shapes.text_encoder_2()) == 694_659_840
    assert count(shapes.vae()) == 83_653_863
    assert count(shapes.tiny_vae()) == 2_445_063


@pytest.mark.parametrize("name", TELLING)
def test_tensors_have_the_published_names(unets: dict[str, UNet2DConditionModel], name: str) -> None:
    """Those that tell the family from its neighbours."""
    found = unets[name].state_dict()

    assert {tensor: tuple(found[tensor].shape) for tensor in TELLING[name]} == TELLING[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_loader_rebuilds_each_from_config_and_shapes(unets: dict[str, UNet2DConditionModel], name: str) -> None:
    """From what config.json and the file of weights tell; pruned widths are read off the shapes."""
    unet = unets[name]
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    tensors = {tensor: torch.empty(value.shape, device="meta") for tensor, value in unet.state_dict().items()}
    rebuilt = build(config, tensors)

    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == {
        key: value.shape for key, value in tensors.items()
    }
    assert pruned_unet.is_pruned(layers(rebuilt)) == ("224m" in name)


@pytest.mark.parametrize("name", ["sd21", "lcm-hybrid-224m", "koala-700m", "ssd-1b"])
def test_each_takes_what_the_edge_feeds_it(unets: dict[str, UNet2DConditionModel], name: str) -> None:
    """The graph's inputs carry it through; the shape of the output is that of the latents."""
    unet = unets[name]
    graph = unet_graph(unet, context_length=77, shapes=((2, 16, 24),))
    feed = {key: value.to("meta") for key, value in graph.feeds[0].items()}
    with torch.inference_mode():
        output = graph.module(**feed)

    assert output.shape == (2, 4, 16, 24)
    wanted = {"sample", "timestep", "encoder_hidden_states"}
    wanted |= {"guidance_scale"} if name.startswith("lcm") else set()
    wanted |= {"text_embeds", "time_ids"} if name in ("koala-700m", "ssd-1b") else set()
    assert set(feed) == wanted
    assert (
        unet_inputs(unet.config, batch=1, height=8, width=8, device="meta")["encoder_hidden_states"].shape[-1]
        == (feed["encoder_hidden_states"].shape[-1])
    )
