"""Teaches a U-Net a subject or a style from a few pictures, by an adapter alone: LoRA, as DreamBooth or with captions.

Sources: Hu et al. (2021), "LoRA"; Ruiz et al. (2023), "DreamBooth", section 3.2 for the pictures of the class, which
keep what the model knew of it (prior preservation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn

from training.core.conditioning import Conditioner
from training.core.noise_schedule import NoiseSchedule, offset_noise, stratified_timesteps
from training.core.task import Batch, Task
from training.distillation.distill import predict, squared_errors


class FineTuneTask(Task):
    """Learns the pictures of a batch by what has gradients in the networks: adapters.

    Args:
        unet: With an adapter; see `training.models.lora.add_adapter`. Its own weights stay as they are.
        text_encoders: Those of the conditioner; with adapters they learn, too.
        conditioner: Makes latents and embeddings of a batch, and may drop captions.
        schedule: The noise, and what the U-Net predicts.
        save: Writes the adapter to a directory.
        preview: Draws the validation image; see `Task.preview`.
        prior_weight: The second half of every batch are pictures of the class, which count this much: 0 or more,
            commonly 1. None: there are none.
        snr_gamma: See `NoiseSchedule.min_snr_weights`; None is plain squared error.
        noise_offset: See `offset_noise`; 0 is plain noise.
        timestep_range: The timesteps to learn, from the first to before the last; None is all. The adapter of a U-Net
            that only finishes what another began needs those after the hand-over.
        gradient_checkpointing: Computes activations twice rather than keep them: less memory, more time.

    Attributes:
        learnt: The adapters' parameters, by network and name, with "/" for ".".

    Raises:
        ValueError: If nothing can learn, or a number is out of range.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoders: Sequence[nn.Module],
        conditioner: Conditioner,
        schedule: NoiseSchedule,
        *,
        save: Callable[[Path], None],
        preview: Callable[[], NDArray[np.uint8] | None] | None = None,
        prior_weight: float | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        timestep_range: tuple[int, int] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        learnt = {
            f"{network}/{name.replace('.', '/')}": parameter
            for network, module in (("unet", unet), *((f"text{n}", each) for n, each in enumerate(text_encoders)))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        if not learnt:
            raise ValueError("the networks have no adapter to train; make one by add_adapter")
        if prior_weight is not None and prior_weight < 0:
            raise ValueError(f"the weight of the class's pictures is {prior_weight}; choose 0 or more")
        if snr_gamma is not None and snr_gamma <= 0:
            raise ValueError(f"snr_gamma is {snr_gamma}; choose more than 0, commonly 5, or None")
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.unet = unet
        self.learnt = nn.ParameterDict(learnt)
        self.frozen = (unet, *conditioner.networks)
        self.conditioner = conditioner
        self.schedule = schedule
        self.prior_weight = prior_weight
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
        self.timestep_range = schedule.check_range(timestep_range)
        self._save = save
        self._preview = preview

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Gives "subject", and "prior" where there are pictures of the class."""
        del step
        given = self.conditioner.encode(batch, rng)
        x0, (start, stop) = given.x0, self.timestep_range
        halves = 1 if self.prior_weight is None else 2
        drawn = [stratified_timesteps(rng, len(x0) // halves, stop, start=start) for _ in range(halves)]
        timesteps = torch.cat(drawn).to(x0.device)
        eps = offset_noise(rng, x0.shape, self.noise_offset, x0.device)
        predicted = predict(self.unet, self.schedule.add_noise(x0, eps, timesteps), timesteps, given.unet_kwargs)
        target = self.schedule.target(x0, eps, timesteps)
        errors = squared_errors(self.schedule, predicted, target, timesteps, self.snr_gamma)
        if self.prior_weight is None:
            return {"subject": errors.mean()}
        subject, prior = errors.chunk(2)
        return {"subject": subject.mean(), "prior": self.prior_weight * prior.mean()}

    def preview(self) -> NDArray[np.uint8] | None:
        """See `Task`."""
        return None if self._preview is None else self._preview()

    def save(self, directory: Path) -> None:
        """Writes the adapter."""
        self._save(directory)
