"""What fields of recipes may be: refused when a recipe is made, before anything is loaded."""

from typing import Any

import pytest

from training import recipes
from training.core.overrides import override, plain, replaced


def made(name: str) -> Any:
    """A recipe as it is published."""
    return recipes.find(name)(*(["demo"] if name in recipes.SCENES else []))


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("vae", "mse_weight=-1", "mse_weight is -1.0; it must be in"),
        ("vae", "widths=(8, 0)", "widths is (8, 0); each of them must be in [1,"),
        ("text", "heads=0", "heads is 0; it must be in [1,"),
        ("classifier", "pool=0", "pool is 0; it must be in [1,"),
        ("unet", "caption_dropout=2", "caption_dropout is 2.0; it must be in [0, 1]"),
        ("small-unet", "lambda_feature=-0.1", "lambda_feature is -0.1; it must be in"),
        ("specialist", "timestep_range=(-5, 780)", "timestep_range is (-5, 780); each of them must be in"),
        ("specialist", "timestep_range=(0,)", "timestep_range is '(0,)'; it must be a tuple of 2 or None"),
        ("tiny-vae", "adversarial_weight=-1", "adversarial_weight is -1.0; it must be in"),
        ("tiny-vae", "turns.lr_scale=-1", "lr_scale is -1.0; it must be in"),
        ("vae", "perceptual_weight=-1", "perceptual_weight is -1.0; it must be in"),
        ("tiny-vae", "latent_noise=-1", "latent_noise is -1.0; it must be in"),
        ("lcm", "w_max=0.5", "w_max is 0.5; it must be in [1, 1000]"),
        ("lcm", "target_decay=1.5", "target_decay is 1.5; it must be in [0, 1]"),
        ("sd-distill", "lambda_output=-1", "lambda_output is -1.0; it must be in"),
        ("sd-distill", "snr_gamma=-1", "snr_gamma is -1.0; it must be in"),
        ("sd-distill", "data.crop=left", "crop is 'left'; choose one of center, random"),
        ("sd-distill", "data.resolution=0", "resolution is 0; it must be in [8,"),
        ("sd-lcm", "loss=l1", "loss is 'l1'; choose one of huber, l2"),
        ("sd-lcm", "num_ddim_timesteps=0", "num_ddim_timesteps is 0; it must be in [1,"),
        ("sd-lcm-lora", "rank=0", "rank is 0; it must be in [1,"),
        ("sd-tiny-vae", "terms.pixel_weight=-1", "pixel_weight is -1.0; it must be in"),
        ("sd-tiny-vae", "terms.colour=2", "colour is 2.0; it must be in [0, 1]"),
        ("sd-tiny-vae", "terms.turns.warmup=-1", "warmup -1"),
        ("sd-small-vae", "widths=(0,)", "widths is (0,); each of them must be in"),
        ("sd-small-vae", "schedule.precision=half", "precision is 'half'; choose one of auto, no, bf16, fp16"),
    ],
)
def test_what_a_field_cannot_be_is_named(name: str, setting: str, message: str) -> None:
    """With its value and what it may be."""
    with pytest.raises(ValueError, match=r"must be|choose|they are") as caught:
        override(made(name), [setting])

    assert message in str(caught.value)


@pytest.mark.parametrize("name", [*recipes.SCENES, *recipes.SD])
def test_a_recipe_is_the_same_after_yaml(name: str) -> None:
    """As plain values, which is what a run records."""
    recipe = made(name)

    assert replaced(override(recipe, ["schedule.steps=7"]), plain(recipe)) == recipe


def test_what_must_be_set_is_told_at_once() -> None:
    """All of it, before anything else is looked at."""
    with pytest.raises(ValueError, match=r"^student and data\.spec are not set; give --set student=pruned_unet --set"):
        recipes.reads(made("sd-distill"))
    with pytest.raises(ValueError, match=r"^data\.spec is not set; give --set data\.spec=imagefolder:DIRECTORY$"):
        recipes.reads(made("sd-lcm"))


def test_recipes_validate_by_default_at_scale_but_not_as_toys() -> None:
    """Curves of one kind: toys have none to keep tests quick."""
    assert all(made(name).schedule.validate_every > 0 for name in recipes.SCENES)
    assert all(recipes.find(name)("toy").schedule.validate_every == 0 for name in recipes.SCENES)
