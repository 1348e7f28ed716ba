"""LoRA of a subject: adapters alone learn, text encoders where asked, and pictures of the class count as told."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import tiny_loras
from tests.support.tiny_unets import batch, learn, schedule, tiny_unet, words
from training.core.conditioning import LatentsAndText
from training.distillation.fine_tune import FineTuneTask
from training.models.lora import TEXT_LAYERS, UNET_LAYERS, add_adapter


def make(unet: Any = None, **options: Any) -> FineTuneTask:
    """A task on a U-Net of seed 0 with an adapter of rank 4 in all layers."""
    torch.manual_seed(0)
    unet = tiny_unet(0) if unet is None else unet
    add_adapter(unet, UNET_LAYERS["all"], rank=4)
    return FineTuneTask(unet, (), words(), schedule(), **{"save": lambda directory: None, **options})


def test_only_the_adapter_learns() -> None:
    """The loss falls, and the weights under the adapter stay as they were."""
    before = {name: value.clone() for name, value in tiny_unet(0).state_dict().items()}
    task = make()
    curve = learn(task, batch(), steps=15, lr=1e-2)
    after = {name.replace(".base_layer", ""): value for name, value in task.unet.state_dict().items()}

    assert curve[-1] < 0.8 * curve[0]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all("lora_" in name for name in task.learnt)


@pytest.mark.parametrize("learns", [True, False])
def test_text_encoders_learn_where_they_have_an_adapter(learns: bool) -> None:
    """Gradients go through the embeddings; without an adapter nothing is kept for them."""
    unet, encoder = tiny_loras.networks()
    encoder.requires_grad_(False)  # as ClipText has it
    add_adapter(unet, UNET_LAYERS["attention"], rank=2)
    if learns:
        add_adapter(encoder, TEXT_LAYERS, rank=2)

    class Ids:
        networks = (encoder,)

        def embed(self, captions: Any) -> Any:
            return (encoder(input_ids=torch.tensor([[98, 1, 2, 3, 99]] * len(captions))).last_hidden_state,)

        def unet_kwargs(self, embeds: Any, *sizes: Any) -> dict[str, Any]:
            return {"encoder_hidden_states": embeds[0]}

    conditioner = LatentsAndText(Ids())
    assert (
        conditioner.encode(batch(), np.random.default_rng(0)).unet_kwargs["encoder_hidden_states"].requires_grad
        == learns
    )
    task = FineTuneTask(unet, (encoder,), conditioner, schedule(), save=lambda directory: None)
    learn(task, batch(), steps=2)
    ups = [value for name, value in task.learnt.items() if name.startswith("text0/") and "lora_B" in name]

    assert bool(ups) == learns
    assert all(bool(up.any()) for up in ups)


def test_pictures_of_the_class_count_as_told() -> None:
    """The second half of a batch is a term of its own, times its weight; both halves see every noise level."""
    both = batch(8)
    one = make(prior_weight=1.0).losses(both, np.random.default_rng(1), 0)
    half = make(prior_weight=0.5).losses(both, np.random.default_rng(1), 0)
    changed = replace(both, latents=torch.cat([both.latents[:4], 3 + both.latents[4:]]))  # type: ignore[index]
    other = make(prior_weight=1.0).losses(changed, np.random.default_rng(1), 0)
    seen: list[torch.Tensor] = []
    task = make(prior_weight=1.0)
    task.unet.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1]))
    task.losses(both, np.random.default_rng(1), 0)

    torch.testing.assert_close(half["prior"], 0.5 * one["prior"])
    torch.testing.assert_close(half["subject"], one["subject"])
    torch.testing.assert_close(other["subject"], one["subject"])
    assert not torch.allclose(other["prior"], one["prior"])
    for part in seen[0].split(4):
        assert [int(t) // 250 for t in part] == [0, 1, 2, 3]


def test_a_range_of_timesteps_and_min_snr() -> None:
    """The adapter of an edge that never starts early sees no early step; min-SNR weighs what it sees."""
    seen: list[torch.Tensor] = []
    task = make(timestep_range=(0, 300), snr_gamma=5.0)
    task.unet.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1]))
    weighted = task.losses(batch(), np.random.default_rng(1), 0)["subject"]
    plain = make(timestep_range=(0, 300)).losses(batch(), np.random.default_rng(1), 0)["subject"]

    assert int(seen[0].max()) < 300
    assert bool(weighted < plain)


def test_what_cannot_learn_is_refused() -> None:
    """The error names the value, the range or what is missing."""
    bare = tiny_unet(0).requires_grad_(False)
    with pytest.raises(ValueError, match="no adapter to train"):
        FineTuneTask(bare, (), words(), schedule(), save=lambda directory: None)
    for options, complaint in (
        ({"prior_weight": -1.0}, "is -1.0; choose 0 or more"),
        ({"snr_gamma": 0.0}, "snr_gamma is 0.0; choose more than 0"),
        ({"timestep_range": (5, 2)}, "timestep_range is 5,2"),
    ):
        with pytest.raises(ValueError, match=complaint):
            make(**options)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    """It is memory for time."""
    plain, saving = make(), make(gradient_checkpointing=True)
    for task in (plain, saving):
        task.losses(batch(), np.random.default_rng(1), 0)["subject"].backward()
    assert saving.unet.is_gradient_checkpointing
    for name, parameter in plain.learnt.items():
        torch.testing.assert_close(saving.learnt[name].grad, parameter.grad)
    assert deepcopy(plain.learnt).keys() == saving.learnt.keys()
