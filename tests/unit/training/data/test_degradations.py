"""What spoils images keeps them images, does what it says, and does it again for the same seed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from training.data.degradations import blur, chosen, degrade, gaussian_kernel, jpeg, noise, shift_colours

Change = Callable[[Tensor, np.random.Generator], Tensor]
CHANGES = [blur, noise, jpeg, shift_colours, degrade]


def pictures(batch: int = 3, size: int = 24) -> Tensor:
    """Smooth shades with an edge."""
    ramp = torch.linspace(-1, 1, size)
    image = torch.stack(
        [ramp.expand(size, size), ramp[:, None].expand(size, size), (ramp > 0.2) * 1.6 - 0.8 + 0 * ramp[:, None]]
    )
    return image.expand(batch, 3, size, size).clone()


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_gives_pictures_again(change: Change) -> None:
    """Shape, dtype and range stay, something changes, each image differently, and the input is left alone."""
    before = pictures()
    after = change(before, np.random.default_rng(0))

    assert torch.equal(before, pictures())
    assert after.shape == before.shape
    assert after.dtype == torch.float32
    assert float(after.abs().max()) <= 1
    assert float((after - before).abs().max()) > 1e-3
    assert float((after[0] - after[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("change", CHANGES)
def test_the_seed_decides(change: Change) -> None:
    """The same generator gives the same images, another one others."""
    once, again, other = (change(pictures(), np.random.default_rng(seed)) for seed in (1, 1, 2))

    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_a_kernel_is_a_gaussian() -> None:
    """A kernel sums to 1, is round for equal widths, and is wider along its longer axis."""
    round_one, long_one = gaussian_kernel(0.8, 0.8, 0.3), gaussian_kernel(1.0, 0.2, 0.0)

    assert round_one.sum() == pytest.approx(1)
    np.testing.assert_allclose(round_one, round_one.T, atol=1e-7)
    assert long_one[3, 5] > 100 * long_one[5, 3]


def test_blur_keeps_areas_and_softens_edges() -> None:
    """A flat image stays; the steepest difference of another falls."""
    flat, sharp = torch.full((2, 3, 16, 16), 0.3), pictures(16)
    blurred = blur(sharp, np.random.default_rng(3))

    torch.testing.assert_close(blur(flat, np.random.default_rng(3)), flat)
    assert float(blurred.diff(dim=-1).abs().amax(dim=(1, 2, 3)).mean()) < 0.9 * float(sharp.diff(dim=-1).abs().max())


def test_blur_refuses_what_its_border_cannot_mirror() -> None:
    """Images under 4 pixels are refused by name."""
    with pytest.raises(ValueError, match="3x3"):
        blur(torch.zeros(1, 3, 3, 3), np.random.default_rng(0))


def test_noise_is_at_most_forty_bytes() -> None:
    """The deviation spreads over 0 to 40 of 255."""
    made = noise(torch.zeros(64, 3, 32, 32), np.random.default_rng(4)) / 2 * 255
    deviations = made.std(dim=(1, 2, 3))

    assert float(deviations.max()) < 42
    assert float(deviations.max()) > 30
    assert float(deviations.min()) < 5


def test_jpeg_is_close() -> None:
    """Quality 60 or better stays near a smooth image."""
    assert float((jpeg(pictures(), np.random.default_rng(5)) - pictures()).abs().mean()) < 0.06


def test_colours_of_a_pixel_do_not_depend_on_its_place() -> None:
    """The matrix is one for an image: rolling it and shifting its colours commute."""
    rolled = shift_colours(pictures().roll(5, dims=-1), np.random.default_rng(6))

    torch.testing.assert_close(rolled, shift_colours(pictures(), np.random.default_rng(6)).roll(5, dims=-1))


def test_chosen_is_a_probability() -> None:
    """0 chooses none, 1 all, a tenth about a tenth."""
    rng = np.random.default_rng(7)

    assert not chosen(0, 100, rng).any()
    assert chosen(1, 100, rng).all()
    assert 60 < chosen(0.1, 1000, rng).sum() < 140
