"""Distils a U-Net into a latent consistency model by a low-rank adapter alone: LCM-LoRA.

The loss is that of `training.distillation.lcm`, without an embedding of w: one fixed w is distilled in, and the
images are then drawn without guidance. The target is the student itself without gradients, as in diffusers' LCM-LoRA
script; an average of it would only add delay (Song and Dhariwal, 2023, section 3.2, for consistency training). Source:
Luo et al. (2023), "LCM-LoRA".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from hybridsd import lora_files, weight_files
from training.core.conditioning import Conditioner
from training.core.task import Batch, Task, freeze
from training.distillation.lcm import ConsistencySolver, Loss, consistency_loss
from training.models.lora import ADAPTER, LORA_NAME, UNET_LAYERS, add_adapter


def add_lora(unet: UNet2DConditionModel, *, rank: int = 64) -> UNet2DConditionModel:
    """Freezes a U-Net and adds a trainable adapter that does nothing yet, to all layers that LCM-LoRA adapts.

    Its scale (alpha / rank) is 1, which is what readers of a file that does not tell alpha assume. Draws from torch's
    global generator.
    """
    add_adapter(unet, UNET_LAYERS["all"], rank=rank)
    return unet


def save_lora(unet: UNet2DConditionModel, directory: Path) -> None:
    """Writes pytorch_lora_weights.safetensors, which `pipeline.load_lora_weights(directory)` reads.

    Under peft's names. diffusers' `convert_state_dict_to_diffusers` renames those of the attentions alone, and its
    loader then takes the file for one in peft's names and skips them.
    """
    layers = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    StableDiffusionLoraLoaderMixin.save_lora_weights(directory, unet_lora_layers=layers)


def load_lora(unet: UNet2DConditionModel, directory: Path) -> UNet2DConditionModel:
    """Adds the adapter that `save_lora` wrote to a U-Net of the shape it was made for."""
    unet.load_lora_adapter(str(directory), prefix="unet", adapter_name=ADAPTER, use_safetensors=True)
    return unet


def fuse(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Copies a U-Net with an adapter into a plain one of the same outputs, to save and export."""
    fused = deepcopy(unet)
    fused.fuse_lora()
    fused.unload_lora()
    return fused


@contextmanager
def without_lora(unet: UNet2DConditionModel) -> Iterator[None]:
    """Runs the U-Net as it was before, inside the block. Not to be entered between a forward and its backward pass."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


class LCMLoRATask(Task):
    """Distils guidance at one w and few steps into the adapter of a U-Net.

    Args:
        unet: From `add_lora`. Its own weights stay as they are.
        conditioner: Makes latents and embeddings of a batch. It should drop no captions.
        solver: The grid and the scalings.
        preview: Draws the validation image; see `Task.preview`.
        teacher: Is frozen; None is `unet` without its adapter. Give a pruned U-Net the large one's teacher, so that
            both can take turns within one trajectory.
        w: The guidance that is distilled, in the convention guidance_scale = 1 + w.
        loss: See `consistency_loss`.
        huber_c: See `consistency_loss`.
        gradient_checkpointing: Computes activations twice rather than keep them: less memory, more time.

    Attributes:
        learnt: The adapter's parameters, by name, with "/" for ".".
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditioner: Conditioner,
        solver: ConsistencySolver,
        *,
        preview: Callable[[], NDArray[np.uint8] | None] | None = None,
        teacher: UNet2DConditionModel | None = None,
        w: float = 6.5,
        loss: Loss = "huber",
        huber_c: float = 0.001,
        gradient_checkpointing: bool = False,
    ) -> None:
        if w < 0:
            raise ValueError(f"w is {w}; choose 0 or more")
        adapter = {name.replace(".", "/"): p for name, p in unet.named_parameters() if p.requires_grad}
        if not adapter:
            raise ValueError("the U-Net has no adapter to train; make it by add_lora")
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.unet = unet
        self.learnt = nn.ParameterDict(adapter)
        self.teacher = None if teacher is None else freeze(teacher)
        self.frozen = (unet, *([] if teacher is None else [teacher]), *conditioner.networks)
        self.conditioner = conditioner
        self.solver = solver
        self.w = w
        self.loss, self.huber_c = loss, huber_c
        self._preview = preview

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Gives "consistency"."""
        del step
        given = self.conditioner.encode(batch, rng, unconditional=True)
        w = torch.full((len(given.x0),), self.w, device=given.x0.device)
        if self.teacher is None:
            with without_lora(self.unet):
                jump = self.solver.jump(self.unet, given, rng, w)
        else:
            jump = self.solver.jump(self.teacher, given, rng, w)
        # Before the target: older torch, under autocast, goes on using weights that were cast without gradients
        # (pytorch issue 112583).
        predicted = self.solver.consistency(self.unet, jump.x_t, jump.t, given.unet_kwargs)
        with torch.no_grad():
            target = self.solver.consistency(self.unet, jump.x_s, jump.s, given.unet_kwargs)
        return {"consistency": consistency_loss(predicted, target, loss=self.loss, huber_c=self.huber_c)}

    def preview(self) -> NDArray[np.uint8] | None:
        """See `Task`."""
        return None if self._preview is None else self._preview()

    def save(self, directory: Path) -> None:
        """Writes the adapter; see `save_lora`."""
        save_lora(self.unet, directory)


def fuse_files(
    unet: UNet2DConditionModel, text_encoders: Sequence[nn.Module], loras: Sequence[tuple[Path | str, float]]
) -> int:
    """Adds adapters to the weights of networks, for good: W + weight * alpha / rank * B A.

    Args:
        unet: Is changed.
        text_encoders: Are changed where a file has layers of theirs; two for SDXL.
        loras: Files or folders, in the formats of diffusers, peft or kohya, with their weights.

    Returns:
        How many layers were changed.

    Raises:
        ValueError: If a file cannot be read, or does not fit the networks as a whole.
    """
    networks, changed = (unet, *text_encoders), 0
    for source, weight in loras:
        try:
            changed += _fuse(unet, text_encoders, Path(source), weight)
        except Exception as error:  # torch, peft and diffusers have many ways to say that layers do not fit
            raise ValueError(
                f"LoRA {source} does not fit these networks: {' '.join(str(error).split())[:400]}"
            ) from error
    for network in networks:
        network.requires_grad_(False)
    return changed


def _fuse(unet: UNet2DConditionModel, text_encoders: Sequence[nn.Module], source: Path, weight: float) -> int:
    loader = StableDiffusionXLLoraLoaderMixin if len(text_encoders) > 1 else StableDiffusionLoraLoaderMixin
    path = source if source.is_file() else source / LORA_NAME
    weight_files.read_header(path)
    with safe_open(path, framework="pt") as file:
        state = lora_files.read(file, int(unet.config.cross_attention_dim))
    lora_files.load_into(unet, text_encoders, state, loader, ADAPTER)
    changed = 0
    for network in (unet, *text_encoders):
        for name, layer in list(network.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.scaling[ADAPTER] = weight  # the adapter's own scale is in its weights
                layer.merge(adapter_names=[ADAPTER])
                parent, _, attribute = name.rpartition(".")
                setattr(network.get_submodule(parent), attribute, layer.get_base_layer())
                changed += 1
        if hasattr(network, "peft_config"):
            del network.peft_config
            network._hf_peft_config_loaded = False
    lora_files.check_complete(changed, state)
    return changed
