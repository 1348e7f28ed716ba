"""Every field of AUTOMATIC1111's API is followed, read over or refused; none that changes an image is dropped."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.web.schemas.a1111 import (
    FOLLOWED_SETTINGS,
    HARMLESS,
    HARMLESS_SETTINGS,
    NEUTRAL,
    NEUTRAL_IN_MASKS,
    NEUTRAL_SETTINGS,
    ImageToImage,
    TextToImage,
)
from hybridsd.errors import InvalidRequest

KNOWN = {*TextToImage.model_fields, *ImageToImage.model_fields, *HARMLESS, *NEUTRAL, *NEUTRAL_IN_MASKS}
VALUES = st.one_of(st.booleans(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=2))


def check(body: dict[str, Any], kind: type[TextToImage] = TextToImage) -> None:
    kind.model_validate({"prompt": "a fox", **body}).check()


@given(st.text(min_size=1, max_size=20), VALUES)
def test_unknown_fields_are_refused(name: str, value: Any) -> None:
    """Whatever they are called and hold, in the body and in its settings."""
    if name not in KNOWN and not name.startswith("hr_") and name != "denoising_strength":
        with pytest.raises(InvalidRequest) as caught:
            check({name: value})
        assert caught.value.field == name[:64]
    if name not in {*HARMLESS_SETTINGS, *NEUTRAL_SETTINGS, *FOLLOWED_SETTINGS}:
        with pytest.raises(InvalidRequest) as caught:
            check({"override_settings": {name: value}})
        assert caught.value.field == f"override_settings.{name[:64]}"


@pytest.mark.parametrize("name", [*NEUTRAL, *(f"override_settings.{name}" for name in NEUTRAL_SETTINGS)])
def test_only_values_without_effect_are_taken(name: str) -> None:
    where, _, inner = name.partition(".")
    values = NEUTRAL_SETTINGS[inner] if inner else NEUTRAL[name]
    for value in (*values, None):
        check({where: {inner: value}} if inner else {where: value})
    if inner in FOLLOWED_SETTINGS:
        return
    for other in (0.123, "something", ["something"], {"a": 1}):
        with pytest.raises(InvalidRequest, match="is not supported"):
            check({where: {inner: other}} if inner else {where: other})


@pytest.mark.parametrize(
    ("body", "is_taken"),
    [
        ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": False}]}}}, True),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": True}]}}}, False),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"model": "canny"}]}}}, False),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {"ad_model": "face"}]}}}, False),
        ({"alwayson_scripts": {"x": {"args": "on"}}}, False),
        ({"enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_any": 1}, True),
        ({"enable_hr": True, "hr_scale": 2}, False),
    ],
)
def test_what_concerns_other_parts(body: dict[str, Any], is_taken: bool) -> None:
    """Scripts that are off and the fields of a second pass that is not run have no effect."""
    if is_taken:
        check(body)
    else:
        with pytest.raises(InvalidRequest):
            check(body)


@pytest.mark.parametrize(
    "body",
    [{"inpaint_full_res": True}, {"inpainting_fill": 2}, {"mask_blur_x": 4, "mask_blur_y": 4}, {"mask_round": False}],
)
def test_masks(body: dict[str, Any]) -> None:
    """What concerns a mask has no effect without one."""
    check({"init_images": ["x"], **body}, ImageToImage)
    with pytest.raises(InvalidRequest):
        check({"init_images": ["x"], "mask": "x", **body}, ImageToImage)


def test_mask_blur_of_both_axes() -> None:
    check({"init_images": ["x"], "mask": "x", "mask_blur": 4, "mask_blur_x": 4, "mask_blur_y": 4}, ImageToImage)


@pytest.mark.parametrize(
    "text",
    ["a fox\nSteps: 20, Sampler: Euler a, Hires upscale: 2", "a fox\nSteps: 20, Clip skip: 2", "a fox",
     "a fox\nSteps: 20, ControlNet 0: \"Module: canny, Model: x\""],
)  # fmt: skip
def test_an_infotext_that_cannot_be_followed(text: str) -> None:
    """Is refused as the field would be."""
    with pytest.raises(ValueError, match="infotext"):
        check({"infotext": text})


def test_an_infotext_gives_what_is_not_sent() -> None:
    text = "a fox,\nred\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, "
    rest = "Version: v1.10, Image digest: 00ff"
    body = TextToImage.model_validate({"infotext": f"{text}Seed: 3, Size: 512x256, {rest}", "seed": 4})

    assert (body.prompt, body.negative_prompt, body.steps, body.seed) == ("a fox,\nred", "blurry", 20, 4)
    assert (body.sampler_name, body.scheduler, body.width, body.height) == ("DPM++ 2M", "Karras", 512, 256)


def test_an_infotext_of_an_earlier_version_means_the_codec_of_then() -> None:
    """Which was fp16 where it names none; that of another tool means our default."""
    ours = "a fox\nSteps: 20, Hybrid mode: hybrid, Cloud steps: 8"
    assert TextToImage.model_validate({"infotext": ours}).hybrid.codec == "fp16"
    assert TextToImage.model_validate({"infotext": f"{ours}, Codec: residual"}).hybrid.codec == "residual"
    assert TextToImage.model_validate({"infotext": "a fox\nSteps: 20"}).hybrid.codec == "residual"
