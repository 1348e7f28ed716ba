"""Loading: what a folder says of itself, what is refused, where models run, which plans they have."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_server.devices import place
from cloud_server.models import Model, ModelError, load_model, split_name
from cloud_server.plans import PlanCompiler, default_scheduler
from hybridsd.errors import HybridSDError, Reason

CPU = place("cpu", "fp32")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def edit(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_says_what_it_is(tiny_model: Model) -> None:
    """Id, space and defaults come from the folder."""
    info = tiny_model.info
    assert (info.id, info.latent_space, info.default_size, info.default_num_inference_steps) == ("tiny", "tiny", 64, 8)
    assert info.num_parameters > 1000
    assert tiny_model.num_text_parameters > 1000


def test_text_that_does_not_fit_is_counted(tiny_model: Model) -> None:
    """Tokens beyond the context are dropped and counted; shorter text has none."""
    short, long = tiny_model.denoiser.encode("a fox"), tiny_model.denoiser.encode("a " * 30)
    assert (short.num_dropped_tokens, long.num_dropped_tokens) == (0, 30 + 2 - 12)
    assert short.embeds.shape == long.embeds.shape == (12, 8)
    assert short.embeds.dtype == np.float32


def test_names() -> None:
    """`id=path` names a model; otherwise the folder or hub id does."""
    assert split_name("mine=/models/x") == ("mine", "/models/x")
    assert split_name("owner/model") == ("owner/model", "owner/model")


@pytest.mark.parametrize(
    ("scaling_factor", "latent_channels", "space"), [(0.18215, 4, "sd1"), (0.13025, 4, "sdxl"), (0.5, 4, "vae-")]
)
def test_latent_spaces(folder: Path, scaling_factor: float, latent_channels: int, space: str) -> None:
    """Without a name of its own a space is known by its scaling factor, or named by the VAE's weights."""
    (folder / "hybridsd.json").unlink()
    edit(folder, "vae/config.json", scaling_factor=scaling_factor, latent_channels=latent_channels)
    info = load_model(str(folder), CPU).info

    assert info.latent_space.startswith(space)
    assert info.latent_space == space or len(info.latent_space) == len("vae-") + 12
    assert (info.default_size, info.default_guidance_scale, info.default_num_inference_steps) == (64, 7.5, 25)
    assert load_model(str(folder), CPU, latent_space="mine").info.latent_space == "mine"


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"cross_attention_dim": 99}, "99"),
        ("unet/config.json", {"_class_name": "UNet3D"}, "UNet3D"),
        ("text_encoder/config.json", {"architectures": ["T5"]}, "T5"),
        ("hybridsd.json", {"default_size": "big"}, "default_size"),
        ("hybridsd.json", {"default_scheduler": "magic"}, "magic"),
        ("hybridsd.json", {"default_size": 65}, "multiple of 16"),
        ("hybridsd.json", {"default_guidance_scale": 99}, "99"),
        ("hybridsd.json", {"default_num_inference_steps": 2000}, "2000"),
    ],
)
def test_unsupported_models_are_refused(folder: Path, name: str, changes: dict[str, object], says: str) -> None:
    """What would fail later is refused when it is loaded, saying why."""
    edit(folder, name, **changes)
    with pytest.raises(ModelError, match=says):
        load_model(str(folder), CPU)


def test_missing_files_are_named(folder: Path) -> None:
    """A folder without a part, or no folder at all, is a clear error."""
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ModelError, match=r"scheduler_config\.json"):
        load_model(str(folder), CPU)
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        load_model(str(folder / "nowhere"), CPU)


def test_a_hub_id_fetches_what_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the parts that are served are asked for; the VAE's weights only where they name the latent space."""
    asked: list[list[str]] = []

    def snapshot_download(_hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_model("owner/name", CPU).info.id == "owner/name"
    assert not any(pattern.endswith(".bin") or "vae/diffusion" in pattern for pattern in asked[0])

    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(folder / "elsewhere")
    (folder / "hybridsd.json").unlink()
    with pytest.raises(ModelError, match="--latent-space"):
        load_model("owner/name", CPU)
    assert "vae/diffusion_pytorch_model.safetensors" in asked[-1]


def test_a_hub_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub says goes to the user, with what to do."""

    def snapshot_download(*_: object, **__: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"offline.*give its folder"):
        load_model("owner/name", CPU)


def test_pickles_are_not_loaded(folder: Path) -> None:
    """Weights come from safetensors only."""
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(folder), CPU)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "PNDMScheduler"}, "pndm"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "dpmpp_2m_karras"),
        ({"_class_name": "LCMScheduler"}, "lcm"),
        ({"_class_name": "SomethingElse"}, "dpmpp_2m"),
    ],
)
def test_default_schedulers(config: dict[str, object], name: str) -> None:
    """The model's own scheduler, by our name for it."""
    assert default_scheduler(config) == name


def test_plans_are_kept(tiny_model: Model) -> None:
    """A plan is compiled once, whatever name it is asked for by, and only so many are kept."""
    plans = PlanCompiler({"_class_name": "DDIMScheduler"}, max_plans=2)
    first = plans.plan("DPM++ 2M", 4)
    assert plans.plan("dpmpp_2m", 4) is first
    assert plans.held("dpmpp_2m", 5) is None
    plans.plan("ddim", 4)
    plans.plan("ddim", 5)
    assert plans.held("dpmpp_2m", 4) is None


def test_impossible_plans_have_a_reason() -> None:
    """Unknown names and step counts that a scheduler cannot do are the caller's error."""
    plans = PlanCompiler({})
    for name, steps, reason in (("magic", 5, Reason.SCHEDULER_UNKNOWN), ("lcm", 999, Reason.STEPS_INVALID)):
        with pytest.raises(HybridSDError) as refused:
            plans.plan(name, steps)
        assert refused.value.reason is reason


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"amx_bf16"}, torch.bfloat16), ({"avx512_bf16"}, torch.bfloat16), ({"avx2"}, torch.float32)],
)
def test_the_cpu_decides_the_precision(flags: set[str], dtype: torch.dtype) -> None:
    """bf16 where the processor is fast at it, and a reason in any case."""
    placement = place("cpu", "auto", cpu_flags=frozenset(flags))
    assert placement.dtype is dtype
    assert placement.dtype_reason
    assert placement.device_reason == "chosen"
    assert place("cpu", "fp16").dtype is torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_refused() -> None:
    """Asking for a device that is not there is an error, not a slow server."""
    with pytest.raises(ValueError, match="no CUDA device"):
        place("cuda")
    assert place().device_reason == "no CUDA device"
