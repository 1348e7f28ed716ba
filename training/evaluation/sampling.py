"""Denoises with several torch U-Nets along one plan, as the product does: the first model's steps, the next one's.

The plan and its executor are the product's (`hybridsd.plan`), so the solver's memory crosses at every hand-over exactly
as it does between cloud and edge, and so is the noise that a call draws (`hybridsd.noise`): an image depends on its
seed and number, and not on the batch or the process that makes it.

Latents are float32 [B, C, h, w] as the U-Net sees them (VP scale, variance near 1); guidance_scale = 1 + w of Ho and
Salimans (2022), and pairs are ordered unconditional first. The networks may be on any device and of any dtype; the
solver's state stays float32, where `noise` is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hybridsd import codec
from hybridsd import noise as product_noise
from hybridsd.plan import Plan, denoise, initial_state
from training.distillation.lcm import guidance_embedding

DECODED_AT_ONCE = 8  # images; on a CPU their activations stay in the cache

Split = tuple[int, ...]
"""How many steps each model does, in order; 0 leaves a model out."""
Predict = Callable[[Tensor, float], Tensor]
"""(latents float32 [B, C, h, w], timestep) => the model's output after guidance, the same shape."""
Context = Callable[[], AbstractContextManager[Any]]
"""What the networks run under, such as `partial(torch.autocast, "cpu", dtype=torch.bfloat16)`."""


def _call(
    unet: nn.Module,
    latents: Tensor,
    timestep: float,
    embeds: Tensor,
    added: Mapping[str, Tensor] | None,
    timestep_cond: Tensor | None = None,
) -> Tensor:
    """Runs a U-Net on its own device and in its own dtype; what comes back is float32 and where `latents` are."""
    first = next(unet.parameters())

    def moved(value: Tensor) -> Tensor:
        return value.to(first.device, first.dtype)

    (output,) = unet(
        moved(latents),
        torch.full((len(latents),), timestep, device=first.device),
        encoder_hidden_states=moved(embeds),
        timestep_cond=None if timestep_cond is None else moved(timestep_cond),
        added_cond_kwargs=None if added is None else {name: moved(value) for name, value in added.items()},
        return_dict=False,
    )
    return cast(Tensor, output.to(latents.device, torch.float32))


def _conditional(rows: int, embeds: Tensor, added: Mapping[str, Tensor] | None) -> tuple[Tensor, Any]:
    """Gives the last `rows` rows of everything: the conditional ones, whether or not others stand before them."""
    if len(embeds) not in (rows, 2 * rows):
        raise ValueError(f"embeds has {len(embeds)} rows for {rows} latents; give {rows}, or {2 * rows} in pairs")
    return embeds[-rows:], None if added is None else {name: value[-rows:] for name, value in added.items()}


def predict_guided(
    unet: nn.Module,
    latents: Tensor,
    timestep: float,
    embeds: Tensor,
    guidance: float,
    added: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Predicts with classifier-free guidance, both halves in one call: float32 [B, C, h, w] => the same.

    Args:
        unet: The U-Net.
        latents: Noisy latents, float32 [B, C, h, w].
        timestep: Training time in [0, 1000], the same for all.
        embeds: [2B, T, D], the first B rows unconditional; with a guidance of 1, [B, T, D] is enough.
        guidance: The guidance scale, 1 or more. 1 turns guidance off and halves the work.
        added: SDXL's `added_cond_kwargs`, as many rows as `embeds`.

    Raises:
        ValueError: If the guidance is below 1 or the rows do not fit.
    """
    rows = len(latents)
    if guidance < 1:
        raise ValueError(f"guidance is {guidance}; choose 1 (off) or more")
    conditional, added_conditional = _conditional(rows, embeds, added)
    if guidance == 1:
        return _call(unet, latents, timestep, conditional, added_conditional)
    if len(embeds) != 2 * rows:
        raise ValueError(f"embeds has {len(embeds)} rows; guidance needs {2 * rows}, the unconditional ones first")
    unguided, guided = _call(unet, torch.cat([latents, latents]), timestep, embeds, added).chunk(2)
    return unguided + guidance * (guided - unguided)


def predict_lcm(
    unet: nn.Module,
    latents: Tensor,
    timestep: float,
    embeds: Tensor,
    guidance: float,
    added: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Predicts with a U-Net that has learnt guidance as an input: one row each, the negative caption does not count.

    Args:
        unet: With `time_cond_proj_dim`, such as a latent consistency model (Luo et al., 2023).
        latents: See `predict_guided`.
        timestep: See `predict_guided`.
        embeds: [B, T, D], or pairs as in `predict_guided`, of which the conditional rows are used.
        guidance: The guidance scale; w = guidance - 1 is embedded.
        added: See `predict_guided`.

    Raises:
        ValueError: If the U-Net has no such input, or the rows do not fit.
    """
    dim = cast(Any, unet).config.time_cond_proj_dim
    if dim is None:
        raise ValueError("the U-Net has no time_cond_proj_dim, so it takes no guidance embedding; use predict_guided")
    conditional, added_conditional = _conditional(len(latents), embeds, added)
    w = torch.full((len(latents),), guidance - 1.0, device=latents.device)
    return _call(unet, latents, timestep, conditional, added_conditional, guidance_embedding(w, dim))


def predictor(unet: nn.Module, embeds: Tensor, guidance: float, added: Mapping[str, Tensor] | None = None) -> Predict:
    """Binds a U-Net to its conditions, in the way it takes guidance; models of both ways can share one trajectory."""
    if getattr(unet, "takes_guidance", False):  # an edge's LCM embeds it in its graph
        return lambda latents, timestep: cast(
            Tensor,
            unet(
                latents,
                torch.full((len(latents),), timestep, device=latents.device),
                _conditional(len(latents), embeds, None)[0],
                guidance_scale=torch.full((len(latents),), guidance, device=latents.device),
            )[0],
        )
    learnt = getattr(cast(Any, unet).config, "time_cond_proj_dim", None) is not None
    predict = predict_lcm if learnt else predict_guided
    return lambda latents, timestep: predict(unet, latents, timestep, embeds, guidance, added)


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Draws what images number `indices` of `seed` start from: float32 [B, *shape], variance 1."""
    return torch.from_numpy(np.stack([product_noise.initial_latents(seed, index, shape) for index in indices]))


def call_noise(seed: int, indices: Sequence[int], call: int, shape: tuple[int, int, int]) -> Tensor:
    """Draws what call number `call` of a plan adds to images `indices` of `seed`: float32 [B, *shape], variance 1."""
    return torch.from_numpy(np.stack([product_noise.call_noise(seed, index, call, shape) for index in indices]))


def no_noise(call: int) -> Tensor:
    """Stands in for the noise of a deterministic plan."""
    raise ValueError(f"call {call} of the plan draws noise; pass draw_noise, such as a partial of call_noise")


Crossing = Callable[[list[Tensor]], list[Tensor]]
"""What happens to the solver's state where one model hands over to the next: float32 [B, C, h, w] each => the same."""


def uncoded(state: list[Tensor]) -> list[Tensor]:
    """Hands the state over as it is."""
    return state


def coded(encoding: str) -> Crossing:
    """Hands the state over as the product sends it (`hybridsd.codec`): every image's arrays are a message each.

    Args:
        encoding: "fp32", "fp16" or "int8".

    Raises:
        ValueError: If there is no such encoding.
    """
    if encoding not in codec.ENCODINGS:
        raise ValueError(f"the encoding is {encoding!r}; choose one of {', '.join(codec.ENCODINGS)}")

    def cross(state: list[Tensor]) -> list[Tensor]:
        crossed = []
        for array in state:
            messages = [codec.encode_tensor(image, codec.ENCODINGS[encoding]) for image in array.cpu().numpy()]
            crossed.append(torch.from_numpy(np.stack([codec.decode_tensor(message) for message in messages])))
        return [array.to(old.device) for array, old in zip(crossed, state, strict=True)]

    return cross


def check_split(plan: Plan, split: Split, models: int) -> None:
    """Raises ValueError if a split does not name all models, or its steps are not the plan's."""
    if len(split) != models or min(split) < 0 or sum(split) != plan.num_inference_steps:
        raise ValueError(
            f"split {','.join(map(str, split))} does not fit {models} models and {plan.num_inference_steps} steps; "
            f"give {models} numbers from 0 up that add up to {plan.num_inference_steps}"
        )


@torch.inference_mode()
def denoise_splits(
    plan: Plan,
    noise: Tensor,
    predictors: Sequence[Predict],
    splits: Sequence[Split],
    *,
    draw_noise: Callable[[int], Tensor] = no_noise,
    cross: Crossing = uncoded,
    context: Context = nullcontext,
) -> dict[Split, Tensor]:
    """Denoises `noise` by every split. What splits have in common is run once: all start with the first model.

    Args:
        plan: The solver.
        noise: float32 [B, C, h, w], variance 1.
        predictors: The models, in the order in which they take over from each other.
        splits: Steps of each model, adding up to the plan's.
        draw_noise: The noise of a call, float32 [B, C, h, w]; asked where the plan draws any, perhaps several times.
        cross: What happens to the state at a hand-over.
        context: What the models run under.

    Returns:
        By split, in the order given, the clean latents, float32 [B, C, h, w].

    Raises:
        ValueError: If a split does not fit.
    """
    for split in splits:
        check_split(plan, split, len(predictors))
    finished: dict[Split, Tensor] = {}

    def go_on(model: int, state: list[Tensor], step: int, wanted: Sequence[Split]) -> None:
        """Lets `model` and those after it finish `wanted`, which have had the same steps by the same models."""
        if step == plan.num_inference_steps:
            finished.update(dict.fromkeys(wanted, state[0]))
            return
        call, first = plan.first_call(step), state
        for steps in sorted({split[model] for split in wanted}):
            if steps and step and state is first:
                state = cross(state)  # another model made it
            end = plan.first_call(step + steps)
            points = denoise(plan, state, predictors[model], draw_noise, start=call, stop=end)
            for point in points:
                call, state = point.call, point.state
            go_on(model + 1, state, step + steps, [split for split in wanted if split[model] == steps])

    with context():
        go_on(0, initial_state(plan, noise), 0, list(dict.fromkeys(splits)))
    return {split: finished[split] for split in splits}


@torch.inference_mode()
def decode_latents(vae: Any, latents: Tensor, *, context: Context = nullcontext) -> Tensor:
    """Decodes with an AutoencoderKL or an AutoencoderTiny: float32 [B, C, h, w] => float32 [B, 3, 8h, 8w] in [-1, 1].

    `latents` are as the U-Net sees them; the VAE's own `scaling_factor` (1 for the tiny ones) is divided out.
    """
    first = next(vae.parameters())
    scaled = (latents / float(vae.config.scaling_factor)).to(first.device, first.dtype)
    with context():
        images = torch.cat([vae.decode(part, return_dict=False)[0] for part in torch.split(scaled, DECODED_AT_ONCE)])
    return images.to(latents.device, torch.float32).clamp(-1, 1)


def autocast(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Context:
    """Gives the context in which float32 networks compute in `dtype`."""
    return partial(torch.autocast, device.type, dtype=dtype)
