"""LoRA files of every format for tiny networks, and the same by hand: W + weight * alpha / rank * B A."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests.support.tiny_unets import tiny_unet

RANK = 4
_UNET = ("attn1.to_q", "attn2.to_k", "to_out.0", "ff.net.0.proj", "conv1", "time_emb_proj", "downsamplers.0.conv")
_TEXT = ("q_proj", "out_proj", "fc1")
Deltas = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]

WRONG = {
    "extra layer": "layers are here",
    "extra kohya layer": "layers are here",
    "second text encoder": "layers are here",
    "extra text layer": "layers are here",
    "dora": "DoRA",
    "loha": "LoHa",
    "empty": "no LoRA layers",
    "wide": "1024 features .SD 2.x.",
}
"""What is wrong, and a pattern of what must be said."""


def networks() -> tuple[Any, Any]:
    """Returns a U-Net and a text encoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=12, bos_token_id=98, eos_token_id=99, pad_token_id=99,
            )
        )  # fmt: skip
    return tiny_unet(0).eval(), text.eval()


def outputs(unet: Any, text: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what both make of fixed inputs."""
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted = unet(sample, torch.tensor([3, 700]), torch.ones(2, 5, 16)).sample
        return predicted, text(torch.tensor([[98, 1, 2, 3, 99]])).last_hidden_state


def by_hand(network: Any, deltas: dict[str, torch.Tensor], weight: float) -> Any:
    """Returns a copy with the products added to its weights."""
    changed = copy.deepcopy(network)
    for name, delta in deltas.items():
        layer = changed.get_submodule(name)
        layer.weight.data += weight * delta.reshape(layer.weight.shape)
    return changed


def make(case: str, unet: Any, text: Any) -> tuple[dict[str, torch.Tensor], Deltas, dict[str, str]]:
    """Returns tensors, products and header of a file: "peft", "peft-ranks", "kohya", "kohya-alphas" or "header"."""
    generator = torch.Generator().manual_seed(1)
    state: dict[str, torch.Tensor] = {}
    deltas: Deltas = ({}, {})
    ranks = (2, 4, 8) if case == "peft-ranks" else (RANK,)
    alphas: tuple[float, ...] = (1.0, 2.0, 4.0) if case == "kohya-alphas" else (2.0,)
    is_kohya = case.startswith("kohya")
    prefixes = ("lora_unet_", "lora_te_text_model_") if is_kohya else ("unet.", "text_encoder.text_model.")
    for number, (network, endings) in enumerate(((unet, _UNET), (text, _TEXT))):
        layers = [
            (name, layer) for name, layer in network.named_modules()
            if name.endswith(endings) and isinstance(layer, nn.Linear | nn.Conv2d)
        ]  # fmt: skip
        for index, (name, layer) in enumerate(layers):
            rank, shape = ranks[index % len(ranks)], layer.weight.shape
            down = 0.3 * torch.randn(rank, *shape[1:], generator=generator)
            up = 0.3 * torch.randn(shape[0], rank, *([1] * (len(shape) - 2)), generator=generator)
            scale = 1.0
            if is_kohya:
                key, alpha = prefixes[number] + name.replace(".", "_"), alphas[index % len(alphas)]
                state |= {
                    f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)
                }  # fmt: skip
                scale = alpha / rank
            else:
                key = prefixes[number] + name
                state |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
                scale = 0.5 if case == "header" else 1.0
            deltas[number][name] = scale * (up.flatten(1) @ down.flatten(1))
    header = {f"{name}.lora_alpha": RANK / 2 for name in ("unet", "text_encoder")}
    return state, deltas, {"lora_adapter_metadata": json.dumps(header)} if case == "header" else {}


def write(case: str, path: Path, unet: Any, text: Any) -> tuple[Path, Deltas]:
    """Writes a file of `make`; returns it with its products."""
    state, deltas, metadata = make(case, unet, text)
    save_file(state, path, metadata=metadata or None)
    return path, deltas


def write_wrong(wrong: str, path: Path, unet: Any, text: Any) -> Path:
    """Writes a file that must be refused, one of `WRONG`."""
    state, _, _ = make("kohya" if "kohya" in wrong else "peft", unet, text)
    attention = "encoder.layers.{}.self_attn.q_proj.lora_{}.weight"
    first = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    extra = {
        "extra layer": {
            "unet.up_blocks.7.resnets.0.conv1.lora_A.weight": torch.ones(4, 8, 3, 3),
            "unet.up_blocks.7.resnets.0.conv1.lora_B.weight": torch.ones(8, 4, 1, 1),
        },
        "extra kohya layer": {
            "lora_unet_up_blocks_7_resnets_0_conv1.lora_down.weight": torch.ones(4, 8, 3, 3),
            "lora_unet_up_blocks_7_resnets_0_conv1.lora_up.weight": torch.ones(8, 4, 1, 1),
            "lora_unet_up_blocks_7_resnets_0_conv1.alpha": torch.tensor(4.0),
        },
        "second text encoder": {
            "text_encoder_2.text_model." + attention.format(0, "A"): torch.ones(4, 16),
            "text_encoder_2.text_model." + attention.format(0, "B"): torch.ones(16, 4),
        },
        "extra text layer": {
            "text_encoder.text_model." + attention.format(9, "A"): torch.ones(4, 16),
            "text_encoder.text_model." + attention.format(9, "B"): torch.ones(16, 4),
        },
        "dora": {f"{first}.lora_magnitude_vector": torch.ones(4)},
        "loha": {"lora_unet_mid_block_resnets_0_conv1.hada_w1_a": torch.ones(4, 4)},
        "empty": {"something": torch.ones(1)},
        "wide": {f"{first}.lora_A.weight": torch.ones(4, 1024), f"{first}.lora_B.weight": torch.ones(32, 4)},
    }[wrong]
    save_file(extra if wrong in ("empty", "loha", "wide") else state | extra, path)
    return path
