"""Exports a trained family: the edge's bundle (ONNX), and the cloud's pipeline (diffusers), in half precision.

Every weight is rounded to float16 first and then both written to ONNX and used in torch, so that the two agree to the
rounding of float32 arithmetic. In the ONNX files the weights are stored as float16 with a Cast to float32 behind
them; ONNX Runtime folds the casts when it loads the file, so that computing stays in float32. Knows files, graphs and
the manifest. Knows nothing about how the networks were trained.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from transformers import CLIPTextModel

from hybridsd import plan as plans
from hybridsd import schedulers
from hybridsd.errors import InvalidRequest
from hybridsd.manifest import Defaults, Manifest, QualityPoint, describe_file, write_manifest
from hybridsd.plan_compiler import compile_plan
from training.diffusion import build_scheduler, load_unet
from training.text import load_text_encoder, load_tokenizer
from training.tiny_vae import load_tiny_vae
from training.vae import VAE_SCALE_FACTOR, load_vae

log = logging.getLogger(__name__)

OPSET = 23
SMALLEST_HALF = 16  # initializers with fewer elements stay as they are: constants of the graph
PLAN_STEPS = (4, 8, 15, 20, 25, 50)
FAMILY_NAME = "scenes"
DEFAULT_GUIDANCE = 4.0
DEFAULT_STEPS = 25
DEFAULT_SIZE = 128
DEFAULT_CLOUD_STEPS = 8
DEFAULT_SCHEDULER = "dpmpp_2m"
# What every scheduler takes from the family's; the rest of its options belong to one class.
SHARED_OPTIONS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
)
FONT_LICENCE = (
    "Weights: Apache-2.0. Trained on pictures drawn from Noto Color Emoji (SIL Open Font License 1.1; the licence\n"
    "does not extend to pictures made with the font).\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far one ONNX model is from its torch parent, over several shapes."""

    role: str
    shapes: tuple[str, ...]
    max_abs_error: float
    mean_abs_error: float
    output_std: float


class _UNet(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return cast(Tensor, self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0])


class _TextEncoder(nn.Module):
    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return cast(Tensor, self.encoder(input_ids=input_ids).last_hidden_state)


class _Decoder(nn.Module):
    def __init__(self, tiny: AutoencoderTiny) -> None:
        super().__init__()
        self.tiny = tiny

    def forward(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.tiny.decode(latents, return_dict=False)[0])


class _Encoder(nn.Module):
    def __init__(self, tiny: AutoencoderTiny) -> None:
        super().__init__()
        self.tiny = tiny

    def forward(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.tiny.encode(image, return_dict=False)[0])


def round_to_half(module: nn.Module) -> nn.Module:
    """Rounds every weight to what float16 can hold, in place; the dtype stays float32."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half().float())
    return module


def store_as_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Stores float32 initializers as float16 with a Cast in front of their readers, where that loses nothing."""
    graph = model.graph
    casts = []
    for initializer in list(graph.initializer):
        if initializer.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(initializer)
        half = values.astype(np.float16)
        if values.size < SMALLEST_HALF or not np.array_equal(half.astype(np.float32), values):
            continue
        name = initializer.name
        initializer.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], name=f"cast.{name}", to=TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    onnx.checker.check_model(model)
    return model


def export_onnx(
    module: nn.Module,
    path: Path,
    example: Mapping[str, Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
    output: str,
) -> None:
    """Writes `module`, called with the tensors of `example`, as one ONNX file with half-precision storage.

    Args:
        module: In evaluation mode, its weights rounded by `round_to_half`.
        path: The file.
        example: The inputs by name, in the order of `forward`; dynamic sizes 2 or more.
        dynamic: Which axes of which input may change, with the names of their sizes.
        output: The name of the output.
    """
    names = {name for axes in dynamic.values() for name in axes.values()}
    sizes = dict.fromkeys(names, torch.export.Dim.DYNAMIC)
    shapes = {
        name: {axis: sizes[size] for axis, size in dynamic[name].items()} if name in dynamic else None
        for name in example
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            kwargs=dict(example),
            input_names=list(example),
            output_names=[output],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise RuntimeError(f"torch.onnx.export gave nothing for {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(store_as_half(program.model_proto), str(path))


def measure_parity(role: str, module: nn.Module, path: Path, inputs: Sequence[Mapping[str, Tensor]]) -> Parity:
    """Runs torch and ONNX Runtime on the same inputs and measures how far they are apart."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    errors, outputs, shapes = [], [], []
    for feed in inputs:
        with torch.inference_mode():
            expected = module(**feed).numpy()
        (actual,) = session.run(None, {name: value.numpy() for name, value in feed.items()})
        errors.append(np.abs(actual - expected).ravel())
        outputs.append(expected.ravel())
        shapes.append("x".join(str(size) for size in next(iter(feed.values())).shape))
    error = np.concatenate(errors)
    return Parity(
        role=role,
        shapes=tuple(shapes),
        max_abs_error=float(error.max()),
        mean_abs_error=float(error.mean()),
        output_std=float(np.concatenate(outputs).std()),
    )


def _random(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def export_models(
    unet: UNet2DConditionModel, encoder: CLIPTextModel, tiny: AutoencoderTiny, folder: Path
) -> list[Parity]:
    """Writes unet.onnx, text_encoder.onnx, vae_decoder.onnx and vae_encoder.onnx, and measures each against torch."""
    rng = np.random.default_rng(5)
    context, width = int(encoder.config.max_position_embeddings), int(encoder.config.hidden_size)
    vocabulary = int(encoder.config.vocab_size)
    latent_shapes = ((1, 16, 16), (2, 16, 16), (3, 24, 16), (2, 32, 32))

    def unet_feed(batch: int, height: int, width_: int) -> dict[str, Tensor]:
        return {
            "sample": _random(rng, batch, 4, height, width_),
            "timestep": torch.from_numpy(rng.uniform(0, 999, size=batch).astype(np.float32)),
            "encoder_hidden_states": _random(rng, batch, context, width),
        }

    def text_feed(batch: int) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(rng.integers(vocabulary, size=(batch, context)))}

    def latents_feed(batch: int, height: int, width_: int) -> dict[str, Tensor]:
        return {"latents": _random(rng, batch, 4, height, width_)}

    def image_feed(batch: int, height: int, width_: int) -> dict[str, Tensor]:
        factor = VAE_SCALE_FACTOR
        return {"image": _random(rng, batch, 3, height * factor, width_ * factor).clamp(-1, 1)}

    jobs: list[tuple[str, nn.Module, dict[str, dict[int, str]], str, list[dict[str, Tensor]]]] = [
        (
            "unet",
            _UNet(unet),
            {
                "sample": {0: "batch", 2: "height", 3: "width"},
                "timestep": {0: "batch"},
                "encoder_hidden_states": {0: "batch", 1: "tokens"},
            },
            "noise_pred",
            [unet_feed(*shape) for shape in latent_shapes],
        ),
        (
            "text_encoder",
            _TextEncoder(encoder),
            {"input_ids": {0: "batch"}},
            "last_hidden_state",
            [text_feed(batch) for batch in (1, 2, 3)],
        ),
        (
            "vae_decoder",
            _Decoder(tiny),
            {"latents": {0: "batch", 2: "height", 3: "width"}},
            "image",
            [latents_feed(*shape) for shape in latent_shapes],
        ),
        (
            "vae_encoder",
            _Encoder(tiny),
            {"image": {0: "batch", 2: "height", 3: "width"}},
            "latents",
            [image_feed(*shape) for shape in latent_shapes],
        ),
    ]
    report = []
    for role, module, dynamic, output, feeds in jobs:
        module.eval()
        path = folder / f"{role}.onnx"
        export_onnx(module, path, feeds[2], dynamic, output)
        report.append(measure_parity(role, module, path, feeds))
        log.info("%s: %d KiB, largest error %.2g", role, path.stat().st_size // 1024, report[-1].max_abs_error)
    return report


def compile_plans(step_counts: Sequence[int] = PLAN_STEPS) -> dict[str, Any]:
    """Compiles the plans that the edge may need without a cloud: "scheduler/steps" => plan as JSON."""
    import diffusers

    compiled: dict[str, Any] = {}
    base = {key: value for key, value in build_scheduler().config.items() if key in SHARED_OPTIONS}
    for spec in schedulers.SCHEDULERS:
        for steps in step_counts:
            scheduler = getattr(diffusers, spec.diffusers_class).from_config(base, **spec.overrides)
            try:
                plan = compile_plan(scheduler, steps, torch.from_numpy, name=spec.name)
            except (InvalidRequest, ValueError) as error:
                log.warning("no plan %s/%d: %s", spec.name, steps, error)
                continue
            compiled[f"{spec.name}/{steps}"] = json.loads(plans.to_json(plan))
    return compiled


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def latent_space_of(vae: AutoencoderKL) -> str:
    """Names the latent space after the weights of the VAE that spans it."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode() + value.half().numpy().tobytes())
    return f"{FAMILY_NAME}-{digest.hexdigest()[:12]}"


def export_edge(
    family: Path, folder: Path, *, quality: Sequence[QualityPoint], cloud_steps: int, plan_steps: Sequence[int]
) -> list[Parity]:
    """Writes the edge's bundle: ONNX files, tokenizer, plans, parity report, licence and manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    unet, encoder, tiny = (
        cast(UNet2DConditionModel, round_to_half(load_unet(family / "small_unet"))),
        cast(CLIPTextModel, round_to_half(load_text_encoder(family / "text" / "text_encoder"))),
        cast(AutoencoderTiny, round_to_half(load_tiny_vae(family / "tiny_vae"))),
    )
    vae = load_vae(family / "vae")
    parity = export_models(unet, encoder, tiny, folder)
    shutil.copyfile(family / "text" / "tokenizer" / "tokenizer.json", folder / "tokenizer.json")
    (folder / "plans.json").write_text(
        json.dumps(compile_plans(plan_steps), separators=(",", ":")) + "\n", encoding="utf-8"
    )
    (folder / "parity.json").write_text(json.dumps([asdict(entry) for entry in parity], indent=2) + "\n")
    (folder / "LICENCE.txt").write_text(FONT_LICENCE, encoding="utf-8")
    files = {
        "unet": "unet.onnx",
        "text_encoder": "text_encoder.onnx",
        "vae_decoder": "vae_decoder.onnx",
        "vae_encoder": "vae_encoder.onnx",
        "tokenizer": "tokenizer.json",
        "plans": "plans.json",
        "licence": "LICENCE.txt",
        "parity_report": "parity.json",
    }
    levels = len(unet.config.block_out_channels)
    manifest = Manifest(
        name=f"{FAMILY_NAME}-small",
        latent_space=latent_space_of(vae),
        latent_channels=int(unet.config.in_channels),
        vae_scale_factor=VAE_SCALE_FACTOR,
        scaling_factor=float(vae.config.scaling_factor),
        size_multiple=VAE_SCALE_FACTOR * 2 ** (levels - 1),
        prediction_type="epsilon",
        context_length=int(encoder.config.max_position_embeddings),
        embed_dim=int(encoder.config.hidden_size),
        num_parameters={
            "unet": _count(unet),
            "text_encoder": _count(encoder),
            "vae_decoder": _count(tiny.decoder),
            "vae_encoder": _count(tiny.encoder),
        },
        defaults=Defaults(
            scheduler=DEFAULT_SCHEDULER,
            num_inference_steps=DEFAULT_STEPS,
            guidance_scale=DEFAULT_GUIDANCE,
            width=DEFAULT_SIZE,
            height=DEFAULT_SIZE,
            cloud_steps=cloud_steps,
        ),
        files={role: describe_file(folder, path) for role, path in files.items()},
        quality=tuple(quality),
        description="Scenes of one or two emoji on a coloured background; the small U-Net and the tiny VAE.",
        licence="Apache-2.0",
        base_model=f"{FAMILY_NAME}-large",
    )
    write_manifest(manifest, folder)
    return parity


def export_cloud(family: Path, folder: Path) -> None:
    """Writes the cloud's pipeline in diffusers layout, float16, with the defaults beside it in hybridsd.json."""
    vae = load_vae(family / "vae")
    pipeline = StableDiffusionPipeline(
        vae=cast(AutoencoderKL, vae).half(),
        text_encoder=load_text_encoder(family / "text" / "text_encoder").half(),
        tokenizer=load_tokenizer(family / "text" / "tokenizer"),
        unet=load_unet(family / "unet").half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    # transformers would load the text encoder in half precision and diffusers the rest in full: say full for both.
    config_path = folder / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # With padding and truncation written into it, the `tokenizers` library alone gives the same ids.
    shutil.copyfile(family / "text" / "tokenizer" / "tokenizer.json", folder / "tokenizer" / "tokenizer.json")
    extras = {
        "latent_space": latent_space_of(load_vae(family / "vae")),
        "default_size": DEFAULT_SIZE,
        "default_guidance_scale": DEFAULT_GUIDANCE,
        "default_num_inference_steps": DEFAULT_STEPS,
        "default_scheduler": DEFAULT_SCHEDULER,
    }
    (folder / "hybridsd.json").write_text(json.dumps(extras, indent=2) + "\n", encoding="utf-8")


def measured_quality(family: Path) -> list[QualityPoint]:
    """Reads what `evaluate` measured, if it was run: accuracy by the number of steps that the cloud does."""
    path = family / "evaluation" / "evaluation.json"
    if not path.exists():
        return []
    results = json.loads(path.read_text(encoding="utf-8"))
    return [
        QualityPoint(
            cloud_steps=row["large_steps"],
            num_inference_steps=results["steps"],
            metric="semantic_accuracy",
            value=round(row["all_correct"], 4),
        )
        for row in sorted(
            (row for row in results["rows"] if row["large_steps"] is not None),
            key=lambda row: row["large_steps"],
        )
    ]


def export_family(
    family: Path,
    target: Path,
    *,
    cloud_steps: int,
    say: Callable[[str], None],
    plan_steps: Sequence[int] = PLAN_STEPS,
) -> list[Parity]:
    """Writes large/, small_unet/ and edge/ into `target`."""
    export_cloud(family, target / "large")
    say(f"{target / 'large'}: the cloud's pipeline")
    load_unet(family / "small_unet").half().save_pretrained(target / "small_unet")
    say(f"{target / 'small_unet'}: the small U-Net, for torch")
    parity = export_edge(
        family,
        target / "edge",
        quality=measured_quality(family),
        cloud_steps=cloud_steps,
        plan_steps=plan_steps,
    )
    say(f"{target / 'edge'}: the edge's bundle")
    return parity
