"""Every published family at full size, on the meta device: what it is told to be, and every tensor that is loaded."""

from typing import Any

import pytest
from torch import nn

from cloud_server.models import architecture
from cloud_server.models.architecture import Architecture
from cloud_server.models.pruned_unet import build_unet
from cloud_server.models.sources import ModelError
from training.models import shapes


def config_of(network: Any) -> dict[str, Any]:
    """The content of a network's config.json."""
    config = network.config if isinstance(network.config, dict) else network.config.to_dict()
    return {**config, "_class_name": type(network).__name__, "architectures": [type(network).__name__]}


SD1 = [config_of(shapes.text_encoder())]
SD2 = [config_of(shapes.text_encoder_sd2())]
SDXL = [*SD1, config_of(shapes.text_encoder_2())]


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", shapes.UNETS)
def test_every_family_is_told_and_built(name: str) -> None:
    """From its configuration and tensors, every name and shape; nothing is allocated."""
    real = shapes.unet(name)
    is_sdxl, is_lcm = name in ("sdxl", "lcm-sdxl", "ssd-1b", "koala-1b", "koala-700m"), name.startswith("lcm")
    texts = SDXL if is_sdxl else SD2 if name == "sd21" else SD1
    built = build_unet(dict(real.config), real.state_dict())

    assert architecture.is_sdxl(config_of(real)) == is_sdxl
    assert architecture.detect(name, config_of(real), texts, {}, {}) == Architecture(
        embed_dim=real.config.cross_attention_dim,
        context_length=77,
        pooled_dim=1280 if is_sdxl else 0,
        guidance_dim=256 if is_lcm else 0,
    )
    assert shapes_of(built) == shapes_of(real)
    assert all(parameter.is_meta for parameter in built.parameters())


def test_the_text_encoder_of_another_family_is_refused() -> None:
    """The message says both widths."""
    with pytest.raises(ModelError, match="1024 features, its text encoder makes 768"):
        architecture.detect("mine", config_of(shapes.sd21()), SD1, {}, {})


def test_an_sdxl_refiner_is_refused() -> None:
    """It takes five sizes and an aesthetic score."""
    refiner = config_of(shapes.sdxl(cross_attention_dim=1280, projection_class_embeddings_input_dim=2560))
    with pytest.raises(ModelError, match="refiner"):
        architecture.detect("mine", {**refiner, "cross_attention_dim": 2048}, SDXL, {}, {})
    with pytest.raises(ModelError, match="refiner"):
        architecture.detect("mine", config_of(shapes.sdxl()), SDXL, {}, {"requires_aesthetics_score": True})
