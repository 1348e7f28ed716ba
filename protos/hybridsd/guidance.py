"""Classifier-free guidance: one output of two, the same on both ends, on numpy arrays and torch tensors.

Sources: Ho and Salimans (2022), eq. 6, with guidance_scale = 1 + w; Lin et al. (2024, arXiv 2305.08891), eq. 15 and 16,
as diffusers' `rescale_noise_cfg`.
"""

from typing import Any, TypeVar

A = TypeVar("A")

_TINY = 1e-30
"""Keeps an output that is the same everywhere from a division by 0."""


def guide(unconditional: A, conditional: A, guidance_scale: float, guidance_rescale: float = 0.0) -> A:
    """Returns the guided output of a model, in the precision of its two outputs.

    Strong guidance makes outputs larger than those that a model was trained for, and images too bright and too plain,
    most of all with a zero-terminal-SNR model. Rescaled, the guided output has the standard deviation of the
    conditional one, or is a part of the way there.

    Args:
        unconditional: Without the prompt, or with the negative one, `[C, h, w]`.
        conditional: With the prompt, same shape.
        guidance_scale: In [1, 30].
        guidance_rescale: In [0, 1]: 0 leaves it as it is, 1 goes all the way.
    """
    without: Any = unconditional
    prompted: Any = conditional
    guided: A = without + guidance_scale * (prompted - without)
    return rescale(conditional, guided, guidance_rescale) if guidance_rescale > 0.0 else guided


def rescale(conditional: A, guided: A, guidance_rescale: float) -> A:
    """Returns a guided output brought back to the standard deviation of the conditional one; see `guide`."""
    factor = _spread(conditional) / _spread(guided)
    scaled: Any = guided
    result: A = scaled * (guidance_rescale * factor + (1.0 - guidance_rescale))
    return result


def _spread(values: Any) -> Any:
    """Returns the standard deviation over all values."""
    centred = values - values.mean()
    return ((centred * centred).mean() + _TINY) ** 0.5
