"""Distils a guided diffusion U-Net into one that jumps to the clean latents: a latent consistency model.

Symbols: `f(x_t, t, w)` the consistency function, what the student says the clean latents are; `t` a timestep of the
solver's grid and `s < t` the one before it; `w` the guidance of Imagen's convention, `guidance_scale = 1 + w`;
`c_skip`, `c_out` the scalings that make f(x, 0, w) = x. In each step a frozen teacher, guided by w, takes x_t one DDIM
step down to x_s, and the student learns to say of x_t what a slow copy of itself says of x_s. Source: Luo et al.
(2023), "Latent Consistency Models", algorithm 1.

Students of any size, distilled from the same teacher, approximate the same f, and can thus take turns within one
trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training.core.conditioning import Conditioned, Conditioner
from training.core.noise_schedule import NoiseSchedule, stratified_timesteps
from training.core.task import Batch, Task, freeze, normal
from training.distillation.distill import predict

GUIDANCE_DIM = 256
Loss = Literal["huber", "l2"]


def guidance_embedding(w: Tensor, dim: int = GUIDANCE_DIM) -> Tensor:
    """Gives the sines, then the cosines, of 1000 w at dim / 2 frequencies from 1 to 1e-4: float32 [B] => [B, dim].

    Source: diffusers' LCM pipelines, which feed the same as `timestep_cond`.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (1000 * w.float())[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def with_guidance_embedding(unet: UNet2DConditionModel, dim: int = GUIDANCE_DIM) -> UNet2DConditionModel:
    """Copies a U-Net and lets the copy see `timestep_cond`, float32 [B, dim], through `time_embedding.cond_proj`.

    The new weights are 0, so that the copy begins as the U-Net it was, at every w, and learns from there. (The
    reference draws them at random, which adds noise of half the timestep's own size to it, different for every w.)
    Copied module by module, not built from the config: pruned U-Nets have widths that a stock config does not tell.

    Raises:
        ValueError: If the U-Net has such an input already.
    """
    known = unet.config.time_cond_proj_dim
    if known is not None:
        raise ValueError(f"the U-Net has a guidance embedding of {known} already; give one without, or use it as it is")
    student = deepcopy(unet)
    embedding = student.time_embedding
    weight = embedding.linear_1.weight
    embedding.cond_proj = nn.Linear(dim, weight.shape[1], bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.zeros_(embedding.cond_proj.weight)
    student.register_to_config(time_cond_proj_dim=dim)
    return student


@dataclass(frozen=True, kw_only=True, slots=True)
class Jump:
    """One step of the teacher's solver: from x_t at `t` down to x_s at `s`. Float32 [B, C, h, w] and int64 [B]."""

    x_t: Tensor
    t: Tensor
    x_s: Tensor
    s: Tensor


@dataclass(frozen=True)
class ConsistencySolver:
    """The grid, the teacher's step and the boundary scalings of one distillation.

    Inference must use the same numbers: diffusers' LCMScheduler has these as its defaults, `num_ddim_timesteps` under
    the name `original_inference_steps`.
    """

    schedule: NoiseSchedule
    num_ddim_timesteps: int = 50
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.num_ddim_timesteps <= self.schedule.num_train_timesteps:
            raise ValueError(
                f"num_ddim_timesteps is {self.num_ddim_timesteps}; choose 1 to {self.schedule.num_train_timesteps}"
            )

    @property
    def stride(self) -> int:
        """Timesteps between two points of the grid."""
        return self.schedule.num_train_timesteps // self.num_ddim_timesteps

    @cached_property
    def timesteps(self) -> Tensor:
        """The grid, int64 [num_ddim_timesteps], rising: 19, 39, ..., 999 for 50 of 1000."""
        return torch.arange(1, self.num_ddim_timesteps + 1) * self.stride - 1

    def scalings(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Gives c_skip and c_out, float32 [B, 1, 1, 1] each (Luo et al., 2023, section 4.1; c_in is not used)."""
        scaled = (self.timestep_scaling * timesteps.float()).view(-1, 1, 1, 1)
        total = scaled.square() + self.sigma_data**2
        return self.sigma_data**2 / total, scaled / total.sqrt()

    def consistency(self, unet: nn.Module, x_t: Tensor, timesteps: Tensor, unet_kwargs: Mapping[str, Any]) -> Tensor:
        """Gives f: c_skip x_t + c_out x0, float32 like `x_t`."""
        x0, _ = self.schedule.x0_and_eps(predict(unet, x_t, timesteps, unet_kwargs), x_t, timesteps)
        c_skip, c_out = self.scalings(timesteps)
        return c_skip * x_t + c_out * x0

    def ddim_step(self, model_output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Takes latents from `t` to `s` by a prediction at `t` (Song et al., 2021, eq. 12, with sigma 0)."""
        x0, eps = self.schedule.x0_and_eps(model_output, x_t, t)
        return self.schedule.add_noise(x0, eps, s)

    @torch.no_grad()
    def jump(self, teacher: nn.Module, given: Conditioned, rng: np.random.Generator, w: Tensor) -> Jump:
        """Draws points of the grid and noise, and lets the teacher, guided by `w` (float32 [B]), take one step.

        Args:
            teacher: Predicts as the schedule says.
            given: With `unconditional_kwargs`.
            rng: Draws the points, one from each of B equal parts of the grid, then the noise.
            w: How much further than the conditional prediction, away from the unconditional one.
        """
        if given.unconditional_kwargs is None:
            raise ValueError("guidance needs unconditional_kwargs; encode the batch with unconditional=True")
        x0 = given.x0
        index = stratified_timesteps(rng, len(x0), self.num_ddim_timesteps)
        t = self.timesteps[index].to(x0.device)
        s = (t - self.stride).clamp(min=0)
        x_t = self.schedule.add_noise(x0, normal(rng, x0.shape, x0.device), t)
        unconditional = predict(teacher, x_t, t, given.unconditional_kwargs)
        conditional = predict(teacher, x_t, t, given.unet_kwargs)
        guided = conditional + w.view(-1, 1, 1, 1) * (conditional - unconditional)
        return Jump(x_t=x_t, t=t, x_s=self.ddim_step(guided, x_t, t, s), s=s)


def consistency_loss(predicted: Tensor, target: Tensor, *, loss: Loss = "huber", huber_c: float = 0.001) -> Tensor:
    """Gives the mean of sqrt(d^2 + c^2) - c ("huber") or of d^2 ("l2") of the differences d.

    Source: Song and Dhariwal (2023), eq. 7, elementwise as in diffusers' LCM scripts.
    """
    if loss not in get_args(Loss):
        raise ValueError(f"loss is {loss!r}; choose one of {', '.join(get_args(Loss))}")
    if loss == "l2":
        return F.mse_loss(predicted, target)
    return ((predicted - target).square() + huber_c**2).sqrt().sub(huber_c).mean()


class LCMTask(Task):
    """Distils a teacher into a student that is told w.

    Args:
        student: From `with_guidance_embedding`; as the teacher, or pruned. It must have learnt to predict already.
        teacher: Is frozen. Give every student of one family the same.
        conditioner: Makes latents and embeddings of a batch. It should drop no captions: guidance is learnt here.
        solver: The grid and the scalings.
        save: Writes a U-Net to a directory.
        preview: Draws the validation image; see `Task.preview`.
        w_min: The least w that is learnt, 0 or more.
        w_max: The largest, `w_min` or more.
        ema_decay: How much of itself the target keeps at each step, in [0, 1).
        loss: See `consistency_loss`.
        huber_c: See `consistency_loss`.
        gradient_checkpointing: Computes activations twice rather than keep them: less memory, more time.

    Attributes:
        companions: The target, an exponential average of the student. It, and not the student, is what `save` writes:
            it says the same with less noise of the last batches. (The reference ships the student.)

    Raises:
        ValueError: If a value is out of its range, or the student cannot be told w.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        conditioner: Conditioner,
        solver: ConsistencySolver,
        *,
        save: Callable[[UNet2DConditionModel, Path], None],
        preview: Callable[[], NDArray[np.uint8] | None] | None = None,
        w_min: float = 5.0,
        w_max: float = 15.0,
        ema_decay: float = 0.95,
        loss: Loss = "huber",
        huber_c: float = 0.001,
        gradient_checkpointing: bool = False,
    ) -> None:
        if not 0 <= w_min <= w_max:
            raise ValueError(f"w is drawn from [{w_min}, {w_max}]; choose 0 <= w_min <= w_max")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay is {ema_decay}; choose from 0 to below 1")
        if student.config.time_cond_proj_dim is None:
            raise ValueError("the student has no guidance embedding; make it by with_guidance_embedding")
        self.target = self.companions = freeze(deepcopy(student))
        if gradient_checkpointing:
            student.enable_gradient_checkpointing()
        self.student = self.learnt = student.requires_grad_(True)
        self.teacher = freeze(teacher)
        self.frozen = (teacher, *conditioner.networks)
        self.conditioner = conditioner
        self.solver = solver
        self.w_min, self.w_max = w_min, w_max
        self.ema_decay = ema_decay
        self.loss, self.huber_c = loss, huber_c
        self._save = save
        self._preview = preview

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Gives "consistency"."""
        del step
        given = self.conditioner.encode(batch, rng, unconditional=True)
        drawn = rng.uniform(self.w_min, self.w_max, size=len(given.x0)).astype(np.float32)
        w = torch.from_numpy(drawn).to(given.x0.device)
        jump = self.solver.jump(self.teacher, given, rng, w)
        guidance = guidance_embedding(w, int(self.student.config.time_cond_proj_dim))
        kwargs = {**given.unet_kwargs, "timestep_cond": guidance}
        with torch.no_grad():
            target = self.solver.consistency(self.target, jump.x_s, jump.s, kwargs)
        predicted = self.solver.consistency(self.student, jump.x_t, jump.t, kwargs)
        return {"consistency": consistency_loss(predicted, target, loss=self.loss, huber_c=self.huber_c)}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Moves the target towards the student."""
        del step
        for slow, fast in zip(self.target.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.ema_decay)

    def preview(self) -> NDArray[np.uint8] | None:
        """See `Task`."""
        return None if self._preview is None else self._preview()

    def save(self, directory: Path) -> None:
        """Writes the target to `directory`, and the student as it was last to `directory`/online."""
        self._save(self.target, directory)
        self._save(self.student, directory / "online")
