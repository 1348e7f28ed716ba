"""Writes the edge's bundle: ONNX files, tokenizer, plans, reports, licence and the manifest that holds their hashes.

Knows networks, files and the manifest. Knows nothing about how the networks were trained.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import tokenizers
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from hybridsd import plan as plans
from hybridsd import schedulers
from hybridsd.manifest import MANIFEST_NAME, Defaults, Manifest, QualityPoint, describe_file, write_manifest
from training.folders import written_whole
from training.graphs import VAE_SCALE_FACTOR, decoder_graph, encoder_graph, text_encoder_graph, unet_graph
from training.onnx_export import DATA_LIMIT, Parity, data_path, export_graph
from training.quantize import export_quantized
from training.sampling import make_plan
from training.trajectories import caption_drawings, caption_encoder

log = logging.getLogger(__name__)

PLAN_STEPS = (4, 8, 15, 20, 25, 50)
HELD_OUT = 4  # one in so many captions measures
CLIP_PADDING = "<|endoftext|>"

Precision = Literal["fp32", "half-storage", "fp16", "int8"]
"""Of the U-Net: see `onnx_export.Precision` and `quantize`. The other files are "fp32" or "half-storage"."""


def compile_plans(
    scheduler_config: Mapping[str, Any], step_counts: Sequence[int] = PLAN_STEPS
) -> dict[str, dict[str, Any]]:
    """Compiles the plans that the edge needs without a cloud: "scheduler/steps" -> plan as JSON.

    Every scheduler of `hybridsd.schedulers` is tried; what it cannot do with this model is left out, and said in the
    log.

    Args:
        scheduler_config: The configuration of the model's own scheduler.
        step_counts: Numbers of steps.
    """
    compiled: dict[str, dict[str, Any]] = {}
    for spec in schedulers.SCHEDULERS:
        for steps in step_counts:
            try:
                plan = make_plan(scheduler_config, spec.name, steps)
            except Exception as error:  # diffusers has many ways to dislike a number of steps
                log.info("no plan %s/%d: %s", spec.name, steps, error)
                continue
            compiled[f"{spec.name}/{steps}"] = json.loads(plans.to_json(plan))
    return compiled


def write_tokenizer(source: Path, target: Path, context_length: int) -> None:
    """Copies a tokenizer.json; padding and truncation are written into it, as whoever has only the file needs them.

    Raises:
        ValueError: If it pads to another length, or does not say with what and knows no CLIP padding.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(source))
    padding = tokenizer.padding
    if padding is not None and padding.get("length") not in (None, context_length):
        raise ValueError(f"{source} pads to {padding['length']}, but the text encoder reads {context_length} tokens")
    token = CLIP_PADDING if padding is None else padding["pad_token"]
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"{source} has no token {token!r} to pad with; write its padding into the file")
    tokenizer.enable_truncation(max_length=context_length)
    tokenizer.enable_padding(length=context_length, pad_id=number, pad_token=token)
    tokenizer.save(str(target))


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What the manifest says of a bundle for people."""

    description: str = ""
    licence: str = ""
    """An SPDX identifier."""
    licence_text: str = ""
    base_model: str = ""
    """The cloud's model that it was distilled from."""


def _count(*modules: nn.Module | None) -> int:
    return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())


def _check_fit(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, decoder: nn.Module, defaults: Defaults) -> None:
    width, embed_dim = unet.config.cross_attention_dim, text_encoder.config.hidden_size
    if unet.config.addition_embed_type is not None:
        raise ValueError(
            f"the U-Net needs {unet.config.addition_embed_type!r} beside its embeddings, which an edge bundle has not; "
            "export a U-Net of SD 1.x or 2.x, or write the graph alone with export_graph"
        )
    if width != embed_dim:
        raise ValueError(f"the U-Net reads embeddings of {width} features, but the text encoder gives {embed_dim}")
    channels = (unet.config.in_channels, unet.config.out_channels, cast(Any, decoder).config.latent_channels)
    if len(set(channels)) > 1:
        raise ValueError(
            "the U-Net reads {}, and draws {} latent channels, the decoder reads {}; all must be equal".format(
                *channels
            )
        )
    for side in (defaults.width, defaults.height):
        if side % _size_multiple(unet):
            raise ValueError(f"the default size has a side of {side}; it must be a multiple of {_size_multiple(unet)}")


def _size_multiple(unet: UNet2DConditionModel) -> int:
    return VAE_SCALE_FACTOR << (len(unet.config.block_out_channels) - 1)  # halved between levels


def export_bundle(
    folder: Path,
    *,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer_file: Path,
    decoder: nn.Module,
    encoder: nn.Module | None,
    scheduler_config: Mapping[str, Any],
    name: str,
    latent_space: str,
    defaults: Defaults,
    scaling_factor: float | None = None,
    plan_steps: Sequence[int] = PLAN_STEPS,
    quality: Sequence[QualityPoint] = (),
    about: Description | None = None,
    precision: Precision = "half-storage",
    fused_guidance: bool = False,
    captions: Sequence[str] = (),
    data_limit: int = DATA_LIMIT,
    tolerance: float | None = None,
) -> list[Parity]:
    """Writes an edge bundle: ONNX files, tokenizer, plans, reports, licence and manifest. It is whole or not there.

    Args:
        folder: The bundle. An older bundle is replaced.
        unet: Of SD 1.x or 2.x: stock, pruned or distilled to a consistency model.
        text_encoder: Its text encoder.
        tokenizer_file: tokenizer.json of the text encoder.
        decoder: AutoencoderTiny, AutoencoderKL, or what has their `decode` and `config.scaling_factor`.
        encoder: The same for img2img; None leaves it out.
        scheduler_config: The configuration of the model's own scheduler.
        name: Of the bundle: 1 to 64 characters of A-Z a-z 0-9 . _ -
        latent_space: See `Manifest`; the cloud model's must be equal.
        defaults: What to do when the user does not say. Their plan is always in the bundle.
        scaling_factor: Of the VAE that spans the latent space, for information; the decoder's when None.
        plan_steps: Numbers of steps to compile plans for.
        quality: What was measured.
        about: What people are told.
        precision: Of the U-Net.
        fused_guidance: See `unet_graph`.
        captions: To calibrate "int8" with, two or more of the training data's; one in four measures the error.
        data_limit: Bytes of weights above which a file gets a second one.
        tolerance: Largest relative error of each file; that of its precision when None, `math.inf` accepts any.

    Returns:
        How far each file is from its network; also in the bundle.

    Raises:
        ValueError: If the parts do not fit together, captions are missing, or the default plan cannot be made.
        ParityError: If a file is too far from its network.
    """
    _check_fit(unet, text_encoder, decoder, defaults)
    if precision == "int8" and len(captions) < 2:
        raise ValueError(f"int8 is calibrated on real captions; give 2 or more, not {len(captions)}")
    about = about or Description()
    channels = int(unet.config.in_channels)
    context_length = int(text_encoder.config.max_position_embeddings)
    default_plan = make_plan(scheduler_config, defaults.scheduler, defaults.num_inference_steps)
    with written_whole(folder, MANIFEST_NAME) as partial:
        files = {"tokenizer": "tokenizer.json", "plans": "plans.json", "parity_report": "parity.json"}
        write_tokenizer(tokenizer_file, partial / files["tokenizer"], context_length)
        compiled = compile_plans(scheduler_config, sorted({*plan_steps, defaults.num_inference_steps}))
        write_json(partial / files["plans"], compiled, indent=None)

        options: dict[str, Any] = {"data_limit": data_limit, "tolerance": tolerance}
        parity = []
        others = [text_encoder_graph(text_encoder), decoder_graph(decoder)]
        for other in others if encoder is None else [*others, encoder_graph(encoder)]:
            kind: Literal["fp32", "half-storage"] = "fp32" if precision == "fp32" else "half-storage"
            parity.append(export_graph(other, partial / f"{other.role}.onnx", precision=kind, **options))

        graph = unet_graph(unet, context_length=context_length, fused_guidance=fused_guidance)
        path = partial / "unet.onnx"
        if precision == "int8":
            drawings = caption_drawings(
                captions,
                caption_encoder(text_encoder, partial / files["tokenizer"]),
                graph.axes,
                shape=(channels, defaults.height // VAE_SCALE_FACTOR, defaults.width // VAE_SCALE_FACTOR),
                guidance_scale=defaults.guidance_scale,
            )
            measured = drawings[::HELD_OUT]
            seen = [drawing for index, drawing in enumerate(drawings) if index % HELD_OUT]
            report, quantization = export_quantized(graph, path, default_plan, seen, measured, **options)
            files["quantization_report"] = "quantization.json"
            write_json(partial / files["quantization_report"], asdict(quantization))
        else:
            report = export_graph(graph, path, precision=precision, **options)
        parity.append(report)
        for role in [entry.role for entry in parity]:
            path = partial / f"{role}.onnx"
            files[role] = path.name
            if data_path(path).exists():
                files[f"{role}_data"] = data_path(path).name

        write_json(partial / files["parity_report"], [asdict(entry) for entry in parity])
        if about.licence_text:
            files["licence"] = "LICENCE.txt"
            (partial / files["licence"]).write_text(about.licence_text, encoding="utf-8")
        counts = {
            "unet": _count(unet),
            "text_encoder": _count(text_encoder),
            "vae_decoder": _count(cast(nn.Module, decoder.decoder), getattr(decoder, "post_quant_conv", None)),
        }
        if encoder is not None:
            counts["vae_encoder"] = _count(cast(nn.Module, encoder.encoder), getattr(encoder, "quant_conv", None))
        manifest = Manifest(
            name=name,
            latent_space=latent_space,
            latent_channels=channels,
            vae_scale_factor=VAE_SCALE_FACTOR,
            scaling_factor=float(
                cast(Any, decoder).config.scaling_factor if scaling_factor is None else scaling_factor
            ),
            size_multiple=_size_multiple(unet),
            prediction_type=str(scheduler_config.get("prediction_type", "epsilon")),
            context_length=context_length,
            embed_dim=int(text_encoder.config.hidden_size),
            num_parameters=counts,
            defaults=defaults,
            files={role: describe_file(partial, file) for role, file in files.items()},
            quality=tuple(quality),
            description=about.description,
            licence=about.licence,
            base_model=about.base_model,
        )
        write_manifest(manifest, partial)
    return parity


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Writes plain values as JSON; without an indent as short as it gets."""
    separators = (",", ":") if indent is None else None
    path.write_text(json.dumps(value, indent=indent, separators=separators) + "\n", encoding="utf-8")
