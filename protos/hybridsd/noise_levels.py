"""Noise levels of a plan: where an image, or the latents of another plan, can enter it; and inpainting.

Works on numpy arrays and torch tensors alike. Knows plans; nothing of models or the network.

The U-Net's input before a call is u = alpha * x0 + sigma * noise, alpha^2 + sigma^2 = 1 (VP). A row of a plan tells
both: its preview of x0 is (u - sigma e) / alpha for epsilon and alpha u - sigma e for v-prediction (Salimans, Ho 2022).
"""

import math
from collections.abc import Sequence
from typing import Any

from hybridsd.errors import Reason
from hybridsd.plan import A, Plan, PlanRow, combine

SLACK = 1e-4
"""Two noise levels, sigma / alpha, that differ by less than this part are one."""
TOP_SLACK = 0.2
"""By so much may latents be noisier than the first step of a plan that continues from them."""


def noise_level(plan: Plan, call: int, prediction_type: str) -> tuple[float, float]:
    """Returns alpha and sigma of the input of the U-Net at `call`; (1, 0) at the end of the plan.

    Raises:
        InvalidRequest: SPLIT_INVALID where the plan does not tell (prediction type "sample").
    """
    if call == len(plan.rows):
        return 1.0, 0.0
    weight = -plan.rows[call].x0_output
    if prediction_type == "epsilon":
        alpha = 1.0 / math.hypot(1.0, weight)
        return alpha, weight * alpha
    if prediction_type == "v_prediction" and 0.0 <= weight <= 1.0:
        return math.sqrt(1.0 - weight * weight), weight
    raise Reason.SPLIT_INVALID.error(
        f"the noise levels of a model that predicts {prediction_type!r} are not known; continue on the same "
        "timestep schedule",
        field="segments",
    )


def begin_from(plan: Plan, latents: A, noise: A, prediction_type: str) -> list[A]:
    """Returns the state before the first call of a plan for an image to start from (SDEdit, Meng et al. 2021).

    Args:
        plan: Compiled with a begin_step, or a whole one.
        latents: Clean latents as the U-Net sees them, `[C, h, w]`.
        noise: Unit normal noise, same shape.
        prediction_type: Of the plan.
    """
    alpha, sigma = noise_level(plan, 0, prediction_type)
    scale = plan.rows[0].unet_input[0]
    state: Any = (alpha / scale) * latents + (sigma / scale) * noise
    return [state]


def vp_latents(plan: Plan, call: int, state: Sequence[A]) -> A:
    """Returns the latents of a state in VP scale, as the U-Net would see them before `call`."""
    if call == len(plan.rows):
        return state[0]
    result: A = combine(plan.rows[call].unet_input, state)
    return result


def entry_step(plan: Plan, level: tuple[float, float], prediction_type: str) -> int:
    """Returns the last step of a whole plan that is at least as noisy as latents of `level`; 0 to the number of steps.

    The latents reach that step's level with a little more noise (`raise_level`), which is exact; there is no such way
    back down.

    Raises:
        InvalidRequest: SPLIT_INVALID if even the first step is too clean for them.
    """
    ratio = _ratio(level)
    if ratio == 0.0:
        return plan.num_inference_steps
    steps = range(plan.num_inference_steps)
    ratios = [_ratio(noise_level(plan, plan.first_call(step), prediction_type)) for step in steps]
    noisy_enough = [step for step in steps if ratios[step] >= ratio * (1.0 - SLACK)]
    if noisy_enough:
        return noisy_enough[-1]
    if ratios[0] * (1.0 + TOP_SLACK) >= ratio:
        return 0
    raise Reason.SPLIT_INVALID.error(
        f"the latents are noisier (sigma/alpha {ratio:.3g}) than the first step of {plan.scheduler} in "
        f"{plan.num_inference_steps} steps ({ratios[0]:.3g}); let the model before it run more steps",
        field="segments",
    )


def raise_level(latents: A, level: tuple[float, float], target: tuple[float, float], noise: A) -> A:
    """Returns VP latents of `level` at the noisier `target`: diffused forward, which keeps their distribution exact.

    Where target is no noisier they are returned as they are, scaled to it.
    """
    (alpha, sigma), (target_alpha, target_sigma) = level, target
    scale = target_alpha / alpha
    more = target_sigma**2 - (scale * sigma) ** 2
    result: Any = scale * latents + math.sqrt(more) * noise if more > 0.0 else (target_sigma / sigma) * latents
    raised: A = result
    return raised


def convert_output(output: A, latents: A, level: tuple[float, float], made: str, wanted: str) -> A:
    """Returns a model output as another prediction type, epsilon to v_prediction or back; same shape.

    Args:
        output: What a model of prediction type `made` predicts.
        latents: Its input u, VP scale.
        level: Its alpha and sigma.
        made: "epsilon" or "v_prediction".
        wanted: What the plan is for.

    Raises:
        InvalidRequest: SPLIT_INVALID for any other pair.
    """
    alpha, sigma = level
    result: Any
    if made == wanted:
        result = output
    elif (made, wanted) == ("v_prediction", "epsilon"):
        result = alpha * output + sigma * latents
    elif (made, wanted) == ("epsilon", "v_prediction"):
        result = (1.0 / alpha) * output - (sigma / alpha) * latents
    else:
        raise Reason.SPLIT_INVALID.error(f"a model that predicts {made!r} cannot continue a plan for {wanted!r}",
            field="segments",
        )  # fmt: skip
    converted: A = result
    return converted


def inpaint(row: PlanRow, state: Sequence[A], output: A, keep: A, mask: A) -> A:
    """Returns the model output with which the preview of the final latents is `keep` where the mask is 0.

    The solver then runs to `keep` there, whichever solver it is. Many end in it; those that remember more than the last
    call, or stop above a noise level of 0, end near it: the last call of a plan is `composite`d instead.

    Args:
        row: The call's row of the plan.
        state: The state before the call.
        output: The model output after guidance, `[C, h, w]`.
        keep: Clean latents to keep, `[C, h, w]`.
        mask: `[1, h, w]` in [0, 1]; 1 draws freely, 0 keeps.
    """
    if row.x0_output == 0.0:  # this call has no say in the preview
        return output
    from_state: Any = combine(row.x0_state, state)
    forced: Any = (keep - from_state) / row.x0_output
    inpainted: A = mask * output + (1.0 - mask) * forced
    return inpainted


def composite(latents: A, keep: A, mask: A) -> A:
    """Returns final latents that are `keep`, to the last bit, where the mask is 0.

    Args:
        latents: After the last call of a plan, run with the model's own output, `[C, h, w]`.
        keep: Clean latents to keep, `[C, h, w]`.
        mask: `[1, h, w]` in [0, 1]; 1 draws freely, 0 keeps.
    """
    result: A = mask * latents + (1.0 - mask) * keep
    return result


def _ratio(level: tuple[float, float]) -> float:
    return level[1] / level[0] if level[0] > 0.0 else math.inf
