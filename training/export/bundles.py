"""Writes the edge's bundle: ONNX files, tokenizers, plans, reports, licence and the manifest that holds their hashes.

The additional parts of SDXL are in `training.export.sdxl_bundle`, the plans in `training.models.plan_table`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import tokenizers
from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from hybridsd import schedulers
from hybridsd.manifest import MANIFEST_NAME, Defaults, Manifest, QualityPoint, describe_file, write_manifest
from hybridsd.plan import Plan
from training.core.folders import written_whole
from training.export.cards import write_card
from training.export.graphs import VAE_SCALE_FACTOR, Graph, decoder_graph, encoder_graph, unet_graph
from training.export.levels import check_levels
from training.export.macs import graph_macs
from training.export.model_card import Training
from training.export.onnx_export import DATA_LIMIT, Parity, data_path, export_graph
from training.export.quantize import export_quantized
from training.export.safety import safety_graph
from training.export.sdxl_bundle import SecondText, TextXL, bundle_sizes, check_text, pooled_dim, text_graphs
from training.export.text_identity import bundle_text_digest
from training.export.trajectories import Drawing, caption_drawings, caption_encoder
from training.models.plan_table import EMBEDDED_SCHEDULERS, PLAN_STEPS, compile_plans, make_plan, write_plans

HELD_OUT = 4  # one in so many captions measures
CLIP_PADDING = "<|endoftext|>"

Precision = Literal["fp32", "half-storage", "fp16", "int8"]
"""Of the U-Net: see `onnx_export.Precision` and `quantize`. The other files are "fp32" or "half-storage"; a VAE is
"fp16" beside a U-Net of "fp16" if its configuration says that it need not be upcast (`force_upcast`)."""


def save_tokenizer(tokenizer: CLIPTokenizer, path: Path, context_length: int) -> Path:
    """Writes tokenizer.json with the tokenizer's own padding, which that file alone would not tell; gives its path.

    SD 2.x and the second tokenizer of SDXL pad with "!", the others with the end token.
    """
    tokenizer.save_pretrained(path.parent)
    saved = tokenizers.Tokenizer.from_file(str(path.parent / "tokenizer.json"))
    saved.enable_padding(length=context_length, pad_id=int(tokenizer.pad_token_id), pad_token=str(tokenizer.pad_token))
    saved.save(str(path))
    return path


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
    training: Training | None = None
    """How the U-Net was trained."""


def _count(*modules: nn.Module | None) -> int:
    return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())


def _check_fit(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    second: SecondText | None,
    decoder: nn.Module,
    defaults: Defaults,
) -> None:
    check_text(unet, text_encoder, second)
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
    if _embeds_guidance(unet) and schedulers.find(defaults.scheduler).name not in EMBEDDED_SCHEDULERS:
        raise ValueError(
            f"the default scheduler is {defaults.scheduler}, but this U-Net embeds the guidance (a latent consistency"
            f" model), which is sampled with {', '.join(EMBEDDED_SCHEDULERS)} only; choose that"
        )


def _embeds_guidance(unet: UNet2DConditionModel) -> bool:
    return unet.config.time_cond_proj_dim is not None


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
    second_text: SecondText | None = None,
    safety_checker: StableDiffusionSafetyChecker | None = None,
    scaling_factor: float | None = None,
    plan_steps: Sequence[int] = PLAN_STEPS,
    quality: Sequence[QualityPoint] = (),
    about: Description | None = None,
    precision: Precision = "half-storage",
    fused_guidance: bool = False,
    max_timestep: float | None = None,
    high_noise_unet: UNet2DConditionModel | None = None,
    captions: Sequence[str] = (),
    data_limit: int = DATA_LIMIT,
    tolerance: float | None = None,
) -> list[Parity]:
    """Writes an edge bundle: ONNX files, tokenizers, plans, reports, licence and manifest. It is whole or not there.

    Args:
        folder: The bundle. An older bundle is replaced.
        unet: Of SD 1.x, 2.x or SDXL: stock, pruned or distilled to a consistency model.
        text_encoder: Its text encoder; of SDXL the first one.
        tokenizer_file: tokenizer.json of the text encoder.
        decoder: AutoencoderTiny, AutoencoderKL, or what has their `decode` and `config.scaling_factor`.
        encoder: The same for img2img; None leaves it out.
        scheduler_config: The configuration of the model's own scheduler.
        name: Of the bundle: 1 to 64 characters of A-Z a-z 0-9 . _ -
        latent_space: See `Manifest`; the cloud model's must be equal.
        defaults: What to do when the user does not say. Their plan is always in the bundle.
        second_text: The second text encoder, of SDXL.
        safety_checker: Flags images at the edge; None leaves it out.
        scaling_factor: Of the VAE that spans the latent space, for information; the decoder's when None.
        plan_steps: Numbers of steps to compile plans for.
        quality: What was measured.
        about: What people are told.
        precision: Of the U-Net.
        fused_guidance: See `unet_graph`.
        max_timestep: The highest that the U-Net is trained for; by default what its configuration says
            (`DistillTask`), else all.
        high_noise_unet: Draws the timesteps above that; without it the cloud does.
        captions: To calibrate "int8" with, two or more of the training data's; one in four measures the error.
        data_limit: Bytes of weights above which a file gets a second one.
        tolerance: Largest relative error of each file; that of its precision when None, `math.inf` accepts any.

    Returns:
        How far each file is from its network; also in the bundle.

    Raises:
        ValueError: If the parts do not fit together, captions are missing, or the default plan cannot be made, or gives
            the edge steps that no U-Net is trained for.
        ParityError: If a file is too far from its network.
    """
    _check_fit(unet, text_encoder, second_text, decoder, defaults)
    if precision == "int8" and len(captions) < 2:
        raise ValueError(f"int8 is calibrated on real captions; give 2 or more, not {len(captions)}")
    about = about or Description()
    context_length = int(text_encoder.config.max_position_embeddings)
    default_plan = make_plan(scheduler_config, defaults.scheduler, defaults.num_inference_steps)
    max_timestep = check_levels(unet, high_noise_unet, max_timestep, default_plan, defaults)
    if precision == "int8" and max_timestep is not None:
        raise ValueError(
            f"int8 is calibrated on whole images, and this U-Net draws timesteps up to {max_timestep:g} only; choose "
            "another precision"
        )
    networks = [*text_graphs(text_encoder, second_text), decoder_graph(decoder)]
    networks += [] if encoder is None else [encoder_graph(encoder)]
    networks += [] if safety_checker is None else [safety_graph(safety_checker)]
    graph = unet_graph(unet, context_length=context_length, fused_guidance=fused_guidance)
    others = []
    if high_noise_unet is not None:
        high = unet_graph(high_noise_unet, context_length=context_length, fused_guidance=fused_guidance)
        others.append(replace(high, role="unet_high_noise"))
    with written_whole(folder, MANIFEST_NAME) as partial:
        files = {"tokenizer": "tokenizer.json", "plans": "plans.json", "parity_report": "parity.json"}
        write_tokenizer(tokenizer_file, partial / files["tokenizer"], context_length)
        if second_text is not None:
            files["tokenizer_2"] = "tokenizer_2.json"
            write_tokenizer(second_text.tokenizer_file, partial / files["tokenizer_2"], context_length)
        table = compile_plans(
            scheduler_config,
            sorted({*plan_steps, defaults.num_inference_steps}),
            names=EMBEDDED_SCHEDULERS if _embeds_guidance(unet) else None,
            default=(defaults.scheduler, defaults.num_inference_steps),
        )
        write_plans(partial / files["plans"], table)

        options: dict[str, Any] = {"data_limit": data_limit, "tolerance": tolerance}
        parity = [
            export_graph(other, partial / f"{other.role}.onnx", precision=_other_precision(other, precision), **options)
            for other in networks
        ]
        if precision == "int8":
            drawings = _drawings(partial, graph, captions, text_encoder, second_text, defaults)
            report, quantization = _export_int8(partial / "unet.onnx", graph, default_plan, drawings, options)
            files["quantization_report"] = "quantization.json"
            write_json(partial / files["quantization_report"], quantization)
        else:
            report = export_graph(graph, partial / "unet.onnx", precision=precision, **options)
        parity.append(report)
        if precision != "int8":
            parity += [
                export_graph(other, partial / f"{other.role}.onnx", precision=precision, **options) for other in others
            ]
        for role in [entry.role for entry in parity]:
            path = partial / f"{role}.onnx"
            files[role] = path.name
            if data_path(path).exists():
                files[f"{role}_data"] = data_path(path).name

        write_json(partial / files["parity_report"], [asdict(entry) for entry in parity])
        if about.licence_text:
            files["licence"] = "LICENCE.txt"
            (partial / files["licence"]).write_text(about.licence_text, encoding="utf-8")
        files["text_encoder_digest"] = "text_encoder.sha256"
        tokenizer_paths = [partial / files[role] for role in ("tokenizer", "tokenizer_2") if role in files]
        digest = bundle_text_digest(text_encoder, tokenizer_paths[0], second_text, tokenizer_paths[-1])
        (partial / files["text_encoder_digest"]).write_text(digest + "\n", encoding="ascii")
        counts = {
            "unet": _count(unet),
            "text_encoder": _count(text_encoder),
            "vae_decoder": _count(cast(nn.Module, decoder.decoder), getattr(decoder, "post_quant_conv", None)),
        }
        if high_noise_unet is not None:
            counts["unet_high_noise"] = _count(high_noise_unet)
        if encoder is not None:
            counts["vae_encoder"] = _count(cast(nn.Module, encoder.encoder), getattr(encoder, "quant_conv", None))
        if second_text is not None:
            counts["text_encoder_2"] = _count(second_text.encoder)
        if safety_checker is not None:
            counts["safety_checker"] = _count(safety_checker)
        embed_dim = text_encoder.config.hidden_size + (second_text.encoder.config.hidden_size if second_text else 0)
        manifest = Manifest(
            name=name,
            latent_space=latent_space,
            latent_channels=int(unet.config.in_channels),
            vae_scale_factor=VAE_SCALE_FACTOR,
            scaling_factor=float(
                cast(Any, decoder).config.scaling_factor if scaling_factor is None else scaling_factor
            ),
            size_multiple=_size_multiple(unet),
            prediction_type=str(scheduler_config.get("prediction_type", "epsilon")),
            context_length=context_length,
            embed_dim=int(embed_dim),
            pooled_dim=pooled_dim(unet),
            force_zeros_for_empty_prompt=second_text is not None and second_text.force_zeros_for_empty_prompt,
            guidance="embedded" if _embeds_guidance(unet) else "cfg",
            sizes=bundle_sizes(defaults.width, _size_multiple(unet)) if second_text is not None else (),
            num_parameters=counts,
            defaults=defaults,
            files={role: describe_file(partial, file) for role, file in files.items()},
            quality=tuple(quality),
            description=about.description,
            licence=about.licence,
            base_model=about.base_model,
            macs={each.role: macs for each in (*networks, graph, *others) if (macs := graph_macs(each))},
            max_timestep=max_timestep,
        )
        write_manifest(manifest, partial)
        write_card(partial, training=about.training)
    return parity


def _other_precision(graph: Graph, precision: Precision) -> Literal["fp32", "half-storage", "fp16"]:
    """Chooses how a network beside the U-Net is stored and computed: in float32, for SDXL's VAE overflows in float16.

    A VAE that says it need not be upcast goes with a U-Net in float16.
    """
    vae = getattr(graph.module, "vae", None)
    if precision == "fp16" and vae is not None and cast(Any, vae).config.get("force_upcast") is False:
        return "fp16"
    return "fp32" if precision == "fp32" else "half-storage"


def _drawings(
    folder: Path,
    graph: Graph,
    captions: Sequence[str],
    text_encoder: CLIPTextModel,
    second: SecondText | None,
    defaults: Defaults,
) -> list[Drawing]:
    """Makes drawings to calibrate with; the tokenizers are in the folder already."""
    channels = int(graph.feeds[0]["sample"].shape[1])
    shape = (channels, defaults.height // VAE_SCALE_FACTOR, defaults.width // VAE_SCALE_FACTOR)
    first = folder / "tokenizer.json"
    if second is None:
        encode = caption_encoder(text_encoder, first)
        return caption_drawings(captions, encode, graph.axes, shape=shape, guidance_scale=defaults.guidance_scale)
    text = TextXL(text_encoder, first, second, folder / "tokenizer_2.json")
    return text.drawings(captions, graph.axes, shape=shape, guidance_scale=defaults.guidance_scale)


def _export_int8(
    path: Path, graph: Graph, plan: Plan, drawings: Sequence[Drawing], options: Mapping[str, Any]
) -> tuple[Parity, dict[str, Any]]:
    measured = drawings[::HELD_OUT]
    seen = [drawing for index, drawing in enumerate(drawings) if index % HELD_OUT]
    report, quantization = export_quantized(graph, path, plan, seen, measured, **options)
    return report, asdict(quantization)


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Writes plain values as JSON; without an indent as short as it gets."""
    separators = (",", ":") if indent is None else None
    path.write_text(json.dumps(value, indent=indent, separators=separators) + "\n", encoding="utf-8")
