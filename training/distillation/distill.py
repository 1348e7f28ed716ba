"""Trains a U-Net to predict noise: alone, or distilled from a larger one's predictions and features.

The three terms and their weights are those of BK-SDM (Kim et al., 2023, eqs. 1 to 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from training.core.conditioning import Conditioner
from training.core.noise_schedule import NoiseSchedule, offset_noise, stratified_timesteps
from training.core.task import Batch, Task, freeze, normal

FeatureMap = Sequence[tuple[str, str]]
"""(teacher module path, student module path) each; what both give must have the same shape."""


def predict(unet: nn.Module, x_t: Tensor, timesteps: Tensor, unet_kwargs: Mapping[str, Any]) -> Tensor:
    """Runs a U-Net: float32 [B, C, h, w] and int64 [B] => float32 [B, C, h, w]."""
    (output,) = unet(x_t, timesteps, **unet_kwargs, return_dict=False)
    return cast(Tensor, output.float())


def squared_errors(
    schedule: NoiseSchedule, predicted: Tensor, wanted: Tensor, timesteps: Tensor, snr_gamma: float | None
) -> Tensor:
    """Gives each sample's mean squared error, weighted by min-SNR where there is a gamma: float32 [B]."""
    errors = F.mse_loss(predicted, wanted, reduction="none").mean(dim=(1, 2, 3))
    return errors if snr_gamma is None else errors * schedule.min_snr_weights(timesteps, snr_gamma)


@contextmanager
def captured(network: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Notes what the modules at `paths` give, or the first part of it, while the network runs inside the block."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[path] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(network.get_submodule(path).register_forward_hook(keep(path)))
        yield outputs


def feature_loss(
    feature_map: FeatureMap, teacher_features: Mapping[str, Tensor], student_features: Mapping[str, Tensor]
) -> Tensor:
    """Gives the sum over the pairs of the mean squared difference.

    Raises:
        ValueError: If a module was not run, or a pair differs in shape.

    Source: Kim et al. (2023), eq. 3.
    """
    losses = []
    for teacher_path, student_path in feature_map:
        for owner, path, features in (
            ("teacher", teacher_path, teacher_features),
            ("student", student_path, student_features),
        ):
            if path not in features:
                raise ValueError(f"the {owner} does not call {path!r}, so it has no features; name another module")
        wanted, given = teacher_features[teacher_path].float(), student_features[student_path].float()
        if wanted.shape != given.shape:
            raise ValueError(
                f"feature {teacher_path!r} of the teacher is {tuple(wanted.shape)}, but {student_path!r} of the student"
                f" is {tuple(given.shape)}; pair modules of one shape"
            )
        losses.append(F.mse_loss(given, wanted))
    return torch.stack(losses).sum()


class DistillTask(Task):
    """Trains a U-Net on data; given a teacher, on its predictions too; given a feature map, on its features too.

    Args:
        student: What is learnt: all of it.
        conditioner: Makes latents and embeddings of a batch.
        schedule: The noise, and the prediction type of both U-Nets.
        save: Writes the student to a directory.
        preview: Draws the validation image; see `Task.preview`.
        teacher: Is frozen.
        feature_map: Which modules should give the same; needs a teacher.
        lambda_task: The weight of term "task", the squared error against the data.
        lambda_output: The weight of term "output", the squared error against the teacher's prediction.
        lambda_feature: The weight of term "feature", see `feature_loss`.
        snr_gamma: Weighs the terms "task" and "output" by min-SNR with this gamma, commonly 5; None is plain squared
            error, as in BK-SDM.
        noise_offset: See `offset_noise`; 0 is plain noise.
        timestep_range: The timesteps to learn, from the first to before the last; None is all. A student that only
            finishes what another began needs no skill above the level of the hand-off (eDiff-I, Balaji et al., 2022).
        input_perturbation: How much more noise the input has than the target tells (Ning et al., 2023), commonly 0.1.
        gradient_checkpointing: Computes activations twice rather than keep them: less memory, more time.

    Raises:
        ValueError: If the feature map does not fit the U-Nets, or the range of timesteps the schedule.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        conditioner: Conditioner,
        schedule: NoiseSchedule,
        *,
        save: Callable[[UNet2DConditionModel, Path], None],
        preview: Callable[[], NDArray[np.uint8] | None] | None = None,
        teacher: UNet2DConditionModel | None = None,
        feature_map: FeatureMap = (),
        lambda_task: float = 1.0,
        lambda_output: float = 1.0,
        lambda_feature: float = 1.0,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        timestep_range: tuple[int, int] | None = None,
        input_perturbation: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        if teacher is None and feature_map:
            raise ValueError("a feature map needs a teacher; give one, or leave the map empty")
        for index, owner, unet in ((0, "teacher", teacher), (1, "student", student)):
            known = set() if unet is None else dict(unet.named_modules()).keys()
            unknown = [pair[index] for pair in feature_map if pair[index] not in known]
            if unknown:
                raise ValueError(f"the {owner} has no module {unknown[0]!r}; the feature map must name its modules")
        start, stop = schedule.check_range(timestep_range)
        if timestep_range is not None or student.config.get("timestep_range"):
            # kept in its config.json: an edge must know what it is not trained for
            student.register_to_config(timestep_range=None if timestep_range is None else [start, stop])
        if gradient_checkpointing:
            student.enable_gradient_checkpointing()
        self.student = self.learnt = student.requires_grad_(True)
        self.teacher = None if teacher is None else freeze(teacher)
        self.frozen = (*([] if teacher is None else [teacher]), *conditioner.networks)
        self.conditioner = conditioner
        self.schedule = schedule
        self.feature_map = tuple(feature_map)
        self.lambda_task = lambda_task
        self.lambda_output = lambda_output
        self.lambda_feature = lambda_feature
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
        self.timestep_range = start, stop
        self.input_perturbation = input_perturbation
        self._save = save
        self._preview = preview

    def losses(self, batch: Batch, rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        """Gives "task"; with a teacher "output"; with a feature map "feature"."""
        del step
        conditioned = self.conditioner.encode(batch, rng)
        x0, kwargs = conditioned.x0, conditioned.unet_kwargs
        start, stop = self.timestep_range
        timesteps = stratified_timesteps(rng, len(x0), stop, start=start).to(x0.device)
        eps = offset_noise(rng, x0.shape, self.noise_offset, x0.device)
        extra = self.input_perturbation * normal(rng, x0.shape, x0.device) if self.input_perturbation else 0
        x_t = self.schedule.add_noise(x0, eps + extra, timesteps)

        with captured(self.student, [path for _, path in self.feature_map]) as student_features:
            predicted = predict(self.student, x_t, timesteps, kwargs)
        target = self.schedule.target(x0, eps, timesteps)
        losses = {"task": self.lambda_task * self._error(predicted, target, timesteps)}
        if self.teacher is None:
            return losses
        with torch.no_grad(), captured(self.teacher, [path for path, _ in self.feature_map]) as teacher_features:
            wanted = predict(self.teacher, x_t, timesteps, kwargs)
        losses["output"] = self.lambda_output * self._error(predicted, wanted, timesteps)
        if self.feature_map:
            loss = feature_loss(self.feature_map, teacher_features, student_features)
            losses["feature"] = self.lambda_feature * loss
        return losses

    def _error(self, predicted: Tensor, wanted: Tensor, timesteps: Tensor) -> Tensor:
        return squared_errors(self.schedule, predicted, wanted, timesteps, self.snr_gamma).mean()

    def preview(self) -> NDArray[np.uint8] | None:
        """See `Task`."""
        return None if self._preview is None else self._preview()

    def save(self, directory: Path) -> None:
        """Writes the student."""
        self._save(self.student, directory)
