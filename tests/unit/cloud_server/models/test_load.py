"""Loading: what a folder says of itself, what is refused, where models run, which plans they have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cloud_server.engine.scheduler import Load
from cloud_server.models.check import check_model
from cloud_server.models.devices import place
from cloud_server.models.load import Model, ModelError, load_model
from cloud_server.models.plans import PlanCompiler, default_scheduler
from cloud_server.models.registry import ModelRegistry
from cloud_server.rpc.write_response import capabilities
from hybridsd.errors import HybridSDError, Reason
from hybridsd.plan_compiler import compile_plan
from hybridsd.prompting import TextOptions
from hybridsd.v1 import denoising_service_pb2 as pb
from tests.support.tiny_pipeline import EMBED_DIM, EMBED_DIM_2, POOLED_DIM, Kind, write_tiny_pipeline

CPU = place("cpu", "fp32")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
MakeFolder = Callable[[Kind], Path]


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Writes a tiny pipeline of a kind, once."""
    root = tmp_path_factory.mktemp("kinds")

    def make(kind: Kind) -> Path:
        return root / kind if (root / kind).is_dir() else write_tiny_pipeline(root / kind, kind=kind)

    return make


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
    short, long = (tiny_model.denoiser.encode(text, TextOptions()) for text in ("afox", "a " * 30))
    assert (short.num_dropped_tokens, long.num_dropped_tokens) == (0, 30 + 2 - 12)
    assert short.embeds.shape == long.embeds.shape == (12, 8)
    assert short.embeds.dtype == np.float32


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
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type = 'image'"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "tensors are missing.*cond_proj"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
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


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "dpmpp_3m"),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "sde-dpmsolver++",
                "use_karras_sigmas": True,
            },
            "dpmpp_2m_sde_karras",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1}, "dpmpp_2m+order=1"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "euler"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 3}, "unipc+order=3"),
        ({"_class_name": "DEISMultistepScheduler", "solver_order": 3}, "deis+order=3"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "pndm"),
        ({"_class_name": "PNDMScheduler"}, "own"),
        ({"_class_name": "KDPM2DiscreteScheduler"}, "kdpm2"),
        ({"_class_name": "SASolverScheduler"}, "sa_solver"),
        ({"_class_name": "IPNDMScheduler"}, "own"),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "dpmsolver",
                "final_sigmas_type": "sigma_min",
            },
            "own",
        ),
    ],
)
def test_a_models_own_scheduler_is_its_default(folder: Path, config: dict[str, object], name: str) -> None:
    """As its configuration has it: the plan is that of the scheduler which diffusers makes of it."""
    path = folder / "scheduler/scheduler_config.json"
    content = BETAS | config
    path.write_text(json.dumps(content))
    model = load_model(str(folder), CPU)
    exact = getattr(diffusers, str(config["_class_name"])).from_config(content)

    assert (model.info.schedulers[0], model.info.scheduler_note) == (name, "")
    assert model.plans.plan(name, 7).digest() == compile_plan(exact, 7, torch.from_numpy).digest()
    assert any(line.split()[:2] == ["default", name] for line in check_model(model))


@pytest.mark.parametrize(
    ("config", "name", "says"),
    [
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "ddim", "clip_sample"),
        ({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, "dpmpp_2m", "thresholding"),
        ({"_class_name": "ConsistencyDecoderScheduler"}, "dpmpp_2m", "ConsistencyDecoderScheduler"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "dpmpp_2m", "no number of steps"),
    ],
)
def test_what_of_the_own_scheduler_is_not_followed_is_said(
    folder: Path, config: dict[str, object], name: str, says: str
) -> None:
    """By `check`, and to clients by GetCapabilities."""
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(BETAS | config))
    model = load_model(str(folder), CPU)

    assert model.info.schedulers[0] == name
    assert says in model.info.scheduler_note
    assert any(says in line for line in check_model(model) if line.startswith("default"))
    answer = capabilities(
        version="1",
        models=ModelRegistry.of({model.info.id: model}).views(),
        bundles=(),
        limits=pb.Limits(),
        load=Load(num_running=0, num_queued=0, call_s=0),
    )
    assert says in answer.models[0].scheduler_note


def test_names_that_cannot_work_with_a_model_do_not_advise_fewer_steps() -> None:
    """A configuration that no number of steps mends is answered with another scheduler."""
    plans = PlanCompiler({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True, "beta_schedule": "?"})
    with pytest.raises(HybridSDError, match="choose another scheduler") as refused:
        plans.plan("dpmpp_2m", 8)
    assert refused.value.reason is Reason.SCHEDULER_NOT_AFFINE
    exponential = PlanCompiler({"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True})
    assert exponential.plan("euler_karras", 8).rows[1].timestep != exponential.plan("euler", 8).rows[1].timestep


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


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("sd2", {"prediction_type": "v_prediction", "guidance": "cfg", "pooled_dim": 0, "sizes": ()}),
        ("sdxl", {"embed_dim": EMBED_DIM + EMBED_DIM_2, "pooled_dim": POOLED_DIM, "default_guidance_scale": 5.0}),
        ("lcm", {"guidance": "embedded", "schedulers": ("lcm",), "default_guidance_scale": 8.0, "pooled_dim": 0}),
        ("sdxl-lcm", {"guidance": "embedded", "schedulers": ("lcm",), "pooled_dim": POOLED_DIM}),
    ],
)
def test_every_kind_says_what_it_takes(make_folder: MakeFolder, kind: Kind, says: dict[str, object]) -> None:
    """What is predicted, how guidance is taken, which features text has, and SDXL its sizes."""
    info = load_model(str(make_folder(kind)), CPU).info

    assert {key: getattr(info, key) for key in says} == says
    assert ((64, 64) in info.sizes) == (info.pooled_dim > 0)
    assert all(side % info.size_multiple == 0 for size in info.sizes for side in size)


def test_what_is_at_fault_is_the_schedule_and_not_the_steps(make_folder: MakeFolder, tmp_path: Path) -> None:
    """At pure noise an epsilon says nothing of the image: no number of steps helps."""
    copy = Path(shutil.copytree(make_folder("lcm"), tmp_path / "copy"))
    edit(copy, "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    with pytest.raises(ModelError, match=r"scheduler_config\.json in 8 steps: lcm, which it needs, does not"):
        load_model(str(copy), CPU)


def test_a_consistency_model_takes_no_other_scheduler(make_folder: MakeFolder, tmp_path: Path) -> None:
    """Whatever its folder says: 8 steps of "lcm" are the default, and a solver of the ODE is refused."""
    copy = Path(shutil.copytree(make_folder("lcm"), tmp_path / "copy"))
    edit(copy, "scheduler/scheduler_config.json", _class_name="PNDMScheduler")
    edit(copy, "hybridsd.json", default_num_inference_steps=0)
    info = load_model(str(copy), CPU).info
    assert (info.schedulers, info.default_num_inference_steps) == (("lcm",), 8)

    edit(copy, "hybridsd.json", default_scheduler="ddim")
    with pytest.raises(ModelError, match="scheduler ddim is not one of lcm"):
        load_model(str(copy), CPU)


def test_a_refiner_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    """Whether its U-Net says so, or its lack of a first text encoder."""
    copy = Path(shutil.copytree(make_folder("sdxl"), tmp_path / "copy"))
    edit(copy, "unet/config.json", projection_class_embeddings_input_dim=POOLED_DIM + 5 * 4)
    with pytest.raises(ModelError, match="refiner"):
        load_model(str(copy), CPU)
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(ModelError, match="refiner"):
        load_model(str(copy), CPU)


@pytest.mark.parametrize("kind", ["sd1", "sdxl-lcm"])
def test_a_check_runs_every_kind(make_folder: MakeFolder, kind: Kind) -> None:
    """And says what there is to know of it."""
    lines = list(check_model(load_model(str(make_folder(kind)), CPU)))
    assert lines[-1] == "ok"
    assert any("one guided step" in line for line in lines)


def test_text_encoders_that_lack_tensors_are_refused(folder: Path) -> None:
    """They would be random otherwise."""
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "final_layer_norm.weight" in name)]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors of its text_encoder are missing.*final_layer_norm\.weight"):
        load_model(str(folder), CPU)
