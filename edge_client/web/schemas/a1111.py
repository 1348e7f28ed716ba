"""AUTOMATIC1111's API: requests and responses, and what is done with each field that a client may send.

Every field is one of three: followed (it is declared below), read over because it changes no image here (`HARMLESS`),
or taken only with the values that have no effect (`NEUTRAL`). All others are refused, known or not. So no field that
would change an image is dropped.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge_client.generation.serialize import MAX_PARAMETERS_CHARS, parse_parameters
from edge_client.images.inputs import Fit
from edge_client.types import SafetyAction
from edge_client.web.schemas.native import JOB_ID, MAX_IMAGES, Hybrid
from hybridsd.errors import Reason
from hybridsd.limits import (
    MAX_GUIDANCE,
    MAX_GUIDANCE_RESCALE,
    MAX_IMAGE_INDEX,
    MAX_PROMPT_CHARS,
    MAX_SCHEDULER_CHARS,
    MAX_SEED,
    MAX_SIZE,
    MAX_STEPS,
)
from hybridsd.prompting import LongPrompt

HARMLESS = frozenset({
    "subseed", "script_args", "comments", "override_settings_restore_afterwards",
    "do_not_save_samples", "do_not_save_grid", "save_images",  # the gateway keeps images by its own rules
    "firstphase_width", "firstphase_height", "image_cfg_scale", "distilled_cfg_scale",  # of modes and models not here
    "url", "auth",  # SillyTavern's own
})  # fmt: skip
"""Fields that change no image here, whatever their value; so do those of the second pass, which is never run."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "enable_hr": (False,), "restore_faces": (False,), "tiling": (False,), "styles": ([], [""], ["None"]),
    "script_name": ("", "None"), "refiner_checkpoint": ("", "None"), "subseed_strength": (0,),
    "seed_resize_from_h": (-1, 0), "seed_resize_from_w": (-1, 0), "clip_skip": (0, 1),
    "s_churn": (0,), "s_tmin": (0,), "s_tmax": (0, "inf"), "s_noise": (1,), "s_min_uncond": (0,),
    "initial_noise_multiplier": (1,), "firstpass_image": ("",), "latent_mask": ("",), "mask_round": (True,),
}  # fmt: skip
"""Fields that are not supported, with the values that have no effect."""
NEUTRAL_IN_MASKS: Mapping[str, tuple[Any, ...]] = {"inpaint_full_res": (False,), "inpainting_fill": (0, 1)}
"""The same for what concerns a mask; without one any value is."""
_OF_MASKS = frozenset({*NEUTRAL_IN_MASKS, "inpaint_full_res_padding", "mask_blur_x", "mask_blur_y", "mask_round"})
_SECOND_PASS = "hr_"
HARMLESS_SETTINGS = frozenset({
    "sd_checkpoint_hash", "samples_save", "samples_filename_pattern", "samples_log_stdout", "save_images_add_number",
    "save_to_dirs", "save_txt", "directories_filename_pattern", "grid_save", "grid_format", "grid_save_to_dirs",
    "grid_extended_filename", "grid_only_if_multiple", "grid_prevent_empty_spots", "n_rows", "return_grid",
    "outdir_samples", "outdir_txt2img_samples", "outdir_img2img_samples", "outdir_extras_samples", "outdir_grids",
    "outdir_txt2img_grids", "outdir_img2img_grids", "outdir_save", "show_progress_every_n_steps",
    "show_progress_type", "show_progress_grid", "live_previews_enable", "live_previews_image_format",
    "live_preview_refresh_period", "live_preview_content", "memmon_poll_rate", "multiple_tqdm", "send_seed",
    "send_size", "do_not_show_images", "add_model_hash_to_info", "add_model_name_to_info", "add_version_to_infotext",
})  # fmt: skip
"""Settings that change no image."""
NEUTRAL_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "CLIP_stop_at_last_layers": (0, 1), "sd_vae": ("", "Automatic", "None"), "sd_hypernetwork": ("", "None"),
    "eta_noise_seed_delta": (0,), "eta_ddim": (0,), "eta_ancestral": (1,), "s_churn": (0,), "s_tmin": (0,),
    "s_noise": (1,), "always_discard_next_to_last_sigma": (False,), "img2img_fix_steps": (False,),
    "img2img_color_correction": (False,), "inpainting_mask_weight": (1,), "initial_noise_multiplier": (1,),
    "emphasis": ("Original",), "enable_emphasis": (True,), "token_merging_ratio": (0,), "randn_source": ("GPU",),
    "face_restoration": (False,), "tiling": (False,), "enable_pnginfo": (True,), "return_mask": (False,),
    "return_mask_composite": (False,), "forge_additional_modules": ([],), "samples_format": ("png",),
}  # fmt: skip
"""Settings that are not supported, with the values that have no effect."""
FOLLOWED_SETTINGS = frozenset({"sd_model_checkpoint", "samples_format", "jpeg_quality"})
"""Settings of a request, `override_settings`, that are."""


class TextToImage(BaseModel):
    """Request of txt2img. A null is a field that is not there, as AUTOMATIC1111 has it."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = Field("", max_length=MAX_PROMPT_CHARS)
    negative_prompt: str = Field("", max_length=MAX_PROMPT_CHARS)
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="-1: random")
    sampler_name: str | None = Field(None, max_length=MAX_SCHEDULER_CHARS)
    sampler_index: str | None = Field(None, max_length=MAX_SCHEDULER_CHARS)
    scheduler: str | None = Field(None, max_length=64, description="the noise schedule of the sampler")
    batch_size: int = Field(1, ge=1, le=MAX_IMAGES)
    n_iter: int = Field(1, ge=1, le=MAX_IMAGES)
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    cfg_scale: float | None = Field(None, ge=0, le=MAX_GUIDANCE, description="0 to 1: no guidance")
    guidance_rescale: float = Field(0.0, ge=0, le=MAX_GUIDANCE_RESCALE, description="0: off")
    eta: float | None = Field(None, description="0 to 1 with DDIM and TCD; else the sampler's own, 1 of ancestral ones")
    width: int | None = Field(None, ge=8, le=MAX_SIZE)
    height: int | None = Field(None, ge=8, le=MAX_SIZE)
    refiner_switch_at: float | None = Field(None, ge=0, le=1, description="share of steps that run in the cloud")
    force_task_id: str | None = Field(None, pattern=JOB_ID)
    disable_extra_networks: bool = Field(False, description="read over <lora:...>")
    override_settings: dict[str, Any] = Field({}, description="sd_model_checkpoint, samples_format, jpeg_quality")
    alwayson_scripts: dict[str, Any] = Field({}, description="none is supported")
    send_images: bool = True
    infotext: str | None = Field(
        None, max_length=MAX_PARAMETERS_CHARS, description="text of an image file; gives the fields that are not sent"
    )
    image_index: int = Field(0, ge=0, le=MAX_IMAGE_INDEX)
    long_prompt: LongPrompt = "chunk"
    fit_size: bool | None = Field(None, description="draw the nearest size that the models have, and resize")
    safety_checker: SafetyAction = "off"
    hybrid: Hybrid = Field(default_factory=Hybrid)

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, value: Any) -> Any:
        """Leaves nulls out and reads `infotext`; refuses unpaired surrogates, for the response repeats the request."""
        if not isinstance(value, dict):
            return value
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text has an unpaired surrogate; send valid UTF-8") from error
        given = {name: each for name, each in value.items() if each is not None}
        if given.get("force_task_id") == "":
            del given["force_task_id"]
        text = given.get("infotext")
        if not isinstance(text, str) or not text:
            return given
        known = read_infotext(text)
        if "refiner_switch_at" in given:
            known["hybrid"].pop("cloud_steps", None)
        if isinstance(given.get("hybrid"), dict):
            given["hybrid"] = {**known.pop("hybrid"), **given["hybrid"]}
        return {**known, **given}

    def check(self) -> None:
        """Makes sure that nothing is asked for which would be dropped.

        Raises:
            InvalidRequest: FIELD_INVALID, naming the field.
        """
        extra = {name: value for name, value in (self.model_extra or {}).items() if not self._is_harmless(name)}
        refuse_others(extra, HARMLESS, {**NEUTRAL, **NEUTRAL_IN_MASKS})
        settings = {name: value for name, value in self.override_settings.items() if name not in FOLLOWED_SETTINGS}
        refuse_others(settings, HARMLESS_SETTINGS, NEUTRAL_SETTINGS, where="override_settings.")
        for name, script in self.alwayson_scripts.items():
            if not _is_idle(script):
                raise _refuse("alwayson_scripts", f"{name[:64]!r} is not supported; leave it out")

    def _is_harmless(self, name: str) -> bool:
        return name.startswith(_SECOND_PASS) or name == "denoising_strength"


class ImageToImage(TextToImage):
    """Request of img2img."""

    init_images: list[str] = Field(min_length=1, max_length=1, description="base64 or a data URL")
    include_init_images: bool = Field(False, description="repeat the images in `parameters`")
    mask: str | None = None
    mask_blur: float | None = Field(None, ge=0, le=256)
    inpainting_mask_invert: int = Field(0, ge=0, le=1)
    denoising_strength: float = Field(0.75, ge=0, le=1, description="0: the image itself")
    resize_mode: int = Field(0, ge=0, le=2, description="0: stretch, 1: crop, 2: pad")
    fit: Fit | None = Field(None, description="instead of `resize_mode`")

    def check(self) -> None:
        """Makes sure that nothing is asked for which would be dropped."""
        super().check()
        for name in ("mask_blur_x", "mask_blur_y"):
            value = (self.model_extra or {}).get(name)
            if self.mask and value is not None and value != self.mask_blur:
                raise _refuse(name, f"it is {value!r:.40}; give mask_blur, which is that of both axes")

    def _is_harmless(self, name: str) -> bool:
        if name in _OF_MASKS and not self.mask:
            return True
        return name.startswith(_SECOND_PASS) or name in ("mask_blur_x", "mask_blur_y", "inpaint_full_res_padding")


def refuse_others(
    values: Mapping[str, Any], harmless: Iterable[str], neutral: Mapping[str, tuple[Any, ...]], *, where: str = ""
) -> None:
    """Refuses what is neither harmless nor has a value without effect.

    Raises:
        InvalidRequest: FIELD_INVALID, naming the field.
    """
    for name, value in values.items():
        if value is None or name in harmless or value in neutral.get(name, ()):
            continue
        allowed = " or ".join(repr(each) for each in neutral.get(name, ()))
        instead = f"give {allowed}, or leave it out" if allowed else "leave it out"
        raise _refuse(f"{where}{name[:64]}", f"{value!r:.40} is not supported; {instead}")


def read_infotext(text: str) -> dict[str, Any]:
    """Returns the fields of a request that the text of an image file stands for.

    Raises:
        InvalidRequest: FIELD_INVALID if the image was made with something that is not supported.
    """
    known = parse_parameters(text)
    if not known:
        raise _refuse("infotext", "it has no fields such as Steps; give the `parameters` of an image file")
    given: dict[str, Any] = {}
    hybrid: dict[str, Any] = {}
    for name, value in known.items():
        if name in _INFOTEXT:
            field, read = _INFOTEXT[name]
            try:
                given[field] = read(value)
            except (ValueError, KeyError) as error:
                raise _refuse("infotext", f"{name} is {value[:40]!r}, which cannot be read") from error
        elif name in _INFOTEXT_HYBRID:
            hybrid[_INFOTEXT_HYBRID[name]] = value
        elif name == "Size":
            width, _, height = value.partition("x")
            given |= {"width": width, "height": height}
        elif name not in _INFOTEXT_HARMLESS and (name, value) not in _INFOTEXT_NEUTRAL:
            raise _refuse("infotext", f"{name}: {value[:40]} is not supported; take it out")
    if "mode" in hybrid:
        hybrid.setdefault("codec", "fp16")  # what it meant, in texts of earlier versions, not to name one
    if "segments" in hybrid:
        del hybrid["mode"]
    if hybrid.get("mode") != "hybrid":
        hybrid.pop("cloud_steps", None)
    if hybrid.get("mode") == "edge" or "segments" in hybrid:
        hybrid.pop("model", None)
    return {**given, "hybrid": hybrid}


_INFOTEXT: Mapping[str, tuple[str, Any]] = {
    "Prompt": ("prompt", str), "Negative prompt": ("negative_prompt", str), "Steps": ("steps", int),
    "Sampler": ("sampler_name", str), "Schedule type": ("scheduler", str), "CFG scale": ("cfg_scale", float),
    "CFG rescale": ("guidance_rescale", float),
    "Seed": ("seed", int), "Denoising strength": ("denoising_strength", float), "Mask blur": ("mask_blur", float),
    "Mask mode": ("inpainting_mask_invert", {"Inpaint masked": 0, "Inpaint not masked": 1}.__getitem__),
    "Fit": ("fit", str), "Image index": ("image_index", int), "Long prompt": ("long_prompt", str),
    "Drawn size": ("fit_size", bool), "Safety checker": ("safety_checker", str),
}  # fmt: skip
_INFOTEXT_HYBRID: Mapping[str, str] = {
    "Model": "model", "Hybrid mode": "mode", "Cloud steps": "cloud_steps", "Segments": "segments",
    "Cloud skip": "cloud_skip", "Edge skip": "edge_skip", "Codec": "codec", "Max state bytes": "max_state_bytes",
    "Private": "private", "State PSNR": "state_psnr",
}  # fmt: skip
_INFOTEXT_HARMLESS = frozenset({
    "Model hash", "Version", "VAE", "VAE hash", "Lora hashes", "Edge model", "Planned cloud steps", "Fallback",
    "Dropped tokens", "Approximate reuse", "Masked area padding", "Image digest", "Mask digest",
})  # fmt: skip
_INFOTEXT_NEUTRAL = frozenset({("Clip skip", "1"), ("Inpaint area", "Whole picture"), ("Eta", "0")})


class Drawn(BaseModel):
    """Response of txt2img and img2img."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class PngInfo(BaseModel):
    """Request of png-info."""

    image: str


class Enlarge(BaseModel):
    """Request of extra-single-image."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    image: str
    resize_mode: int = Field(0, ge=0, le=1, description="0: by a factor, 1: to a size")
    upscaling_resize: float = Field(2, gt=0, le=8)
    upscaling_resize_w: int = Field(512, ge=1, le=MAX_SIZE)
    upscaling_resize_h: int = Field(512, ge=1, le=MAX_SIZE)
    upscaling_crop: bool = Field(True, description="cut what sticks out of the size; else fit into it")
    upscaler_1: str = "None"

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value

    def check(self) -> None:
        """Makes sure that nothing is asked for which would be dropped.

        Raises:
            InvalidRequest: FIELD_INVALID, naming the field.
        """
        harmless = ("show_extras_results", "upscale_first", "codeformer_weight")
        neutral = {
            "gfpgan_visibility": (0,), "codeformer_visibility": (0,), "upscaler_2": ("", "None"),
            "extras_upscaler_2_visibility": (0,),
        }  # fmt: skip
        extra = dict(self.model_extra or {})
        if extra.get("extras_upscaler_2_visibility") in (None, 0):
            extra.pop("upscaler_2", None)
        refuse_others(extra, harmless, neutral)


def _is_idle(script: Any) -> bool:
    """Whether an entry of `alwayson_scripts` does nothing: it has no arguments, or only units that are off."""
    arguments = script.get("args") if isinstance(script, dict) else script
    if isinstance(arguments, dict):
        arguments = [arguments]
    if not isinstance(arguments, list):
        return not arguments
    return all(isinstance(unit, dict) and unit.get("enabled") is False for unit in arguments)


def _refuse(field: str, what: str) -> Exception:
    return Reason.FIELD_INVALID.error(f"{field}: {what}", field=field)  # AUTOMATIC1111's own name: not in backticks
