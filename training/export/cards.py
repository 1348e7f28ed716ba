"""Makes the model card of a folder: of a LoRA, a U-Net, a VAE, a cloud's pipeline or an edge's bundle.

Everything is read off the folder: configurations, headers of weights, the record of the run. No network is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml

from hybridsd import pruned_unet, weight_files
from hybridsd.manifest import MANIFEST_NAME, Manifest, describe_file, read_manifest, write_manifest
from training.core.checkpoints import write_text
from training.export.model_card import CARD_NAME, Card, Source, Training, Usage, render, with_quality, without_path
from training.models.lora import LORA_NAME, UNET_ENTRY

ROLE = "model_card"
FAMILY_LICENCE_NAME = "Apache-2.0"
"""Of what is learnt from scenes that we draw ourselves."""
INDEX_NAME = "model_index.json"
_CONFIG = "config.json"
_TAGS = ("stable-diffusion", "hybrid-sd")
_TEXT_TO_IMAGE = "text-to-image"


def write_card(
    folder: Path,
    *,
    name: str = "",
    base_model: str = "",
    licence: str = "",
    training: Training | None = None,
    hours: float | None = None,
) -> Path | None:
    """Writes README.md into a folder; a bundle's manifest gets it, too.

    Args:
        folder: What was made.
        name: What it is called; the folder's name by default.
        base_model: What it was made of, a hub id or a folder; what the folder says by default.
        licence: Of the weights; what the folder says by default.
        training: How it was trained; what the folder's record of the run says by default.
        hours: How long that took, which no record says.

    Returns:
        The card, or None if the folder holds nothing that has a card.

    Raises:
        ValueError: If the folder's files cannot be read.
    """
    card = describe(folder)
    if card is None:
        return None
    training = training or card.training
    card = replace(
        card,
        name=name or card.name,
        base_model=without_path(base_model) or card.base_model,
        licence=licence or card.licence,
        training=training if training is None or hours is None else replace(training, hours=hours),
    )
    write_text(folder / CARD_NAME, render(card))
    if (folder / MANIFEST_NAME).is_file():
        _list_in_manifest(folder, read_manifest(folder))
    return folder / CARD_NAME


def update_quality(bundle: Path) -> None:
    """Puts what a bundle's manifest says was measured into its card, if it has one."""
    manifest = read_manifest(bundle)
    if ROLE not in manifest.files:
        return
    path = bundle / manifest.files[ROLE].path
    write_text(path, with_quality(path.read_text(encoding="utf-8"), manifest.quality, _parity(bundle, manifest)))
    _list_in_manifest(bundle, manifest)


def _list_in_manifest(bundle: Path, manifest: Manifest) -> None:
    files = {**manifest.files, ROLE: describe_file(bundle, CARD_NAME)}
    write_manifest(replace(manifest, files=files), bundle)


def describe(folder: Path) -> Card | None:
    """Finds out what a folder holds, and what there is to say of it; None if it has no card."""
    if (folder / MANIFEST_NAME).is_file():
        return bundle_card(folder, read_manifest(folder))
    if (folder / INDEX_NAME).is_file():
        return _pipeline(folder)
    if (folder / LORA_NAME).is_file():
        return _lora(folder)
    if not (folder / _CONFIG).is_file():
        return None
    kind = _json(folder / _CONFIG).get("_class_name", "")
    if kind == "UNet2DConditionModel":
        return _unet(folder)
    return _vae(folder) if kind in ("AutoencoderKL", "AutoencoderTiny", "AutoencoderTinyWS", "SmallVAE") else None


def read_training(folder: Path) -> Training | None:
    """Reads the record of a run off its folder; None if there is none."""
    recipe, record, finished = (folder / name for name in ("recipe.yaml", "run.json", "finished.json"))
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    steps = _json(finished).get("steps") if finished.is_file() else None
    versions = _json(record).get("versions") if record.is_file() else None
    if not settings and steps is None:
        return None
    return Training(recipe=settings.pop("recipe", ""), settings=settings, steps=steps, versions=versions)


def bundle_card(folder: Path, manifest: Manifest, training: Training | None = None) -> Card:
    """Describes an edge bundle, whose files lie in `folder`."""
    defaults = manifest.defaults
    size = f"{defaults.width}x{defaults.height}"
    facts = {
        "kind": "edge bundle: ONNX files, tokenizers, plans, manifest",
        **{f"parameters of {role}": _count(number) for role, number in manifest.num_parameters.items()},
        "latent space": manifest.latent_space,
        "predicts": manifest.prediction_type,
        "guidance": "an input of the U-Net" if manifest.guidance == "embedded" else "classifier-free, two rows a call",
        "defaults": f"{size}, {defaults.scheduler}, {defaults.num_inference_steps} steps, guidance"
        f" {defaults.guidance_scale:g}, {defaults.cloud_steps} of the steps in the cloud",
        "size": f"{sum(file.size_bytes for file in manifest.files.values()) / 1e6:.1f} MB",
    }
    limits = [
        f"Width and height are multiples of {manifest.size_multiple} pixels; the models were made for {size}.",
        f"Prompts are read up to {manifest.context_length} tokens at once.",
        f"Pairs with cloud models of the latent space {manifest.latent_space} only.",
    ]
    if manifest.max_timestep is not None:
        above = "are drawn by another U-Net in it" if "unet_high_noise" in manifest.files else "are for the cloud"
        limits.append(f"Its U-Net learnt timesteps up to {manifest.max_timestep:g}; those above {above}.")
    if manifest.guidance == "embedded":
        limits.append("A latent consistency model: no negative prompts, and the scheduler lcm only.")
    if "safety_checker" not in manifest.files:
        limits.append("There is no safety checker in it: images are not checked.")
    if "vae_encoder" not in manifest.files:
        limits.append("There is no VAE encoder in it: images to start from need a cloud.")
    usage = [
        Usage(what="On the device alone:", code='hybridsd generate "PROMPT" --bundle FOLDER --mode edge'),
        Usage(
            what="With a cloud, which runs the first steps with the large model:",
            code='hybridsd generate "PROMPT" --bundle FOLDER --server HOST:PORT',
        ),
    ]
    return Card(
        name=manifest.name,
        summary=_join(
            "The edge's half of a hybrid text-to-image model: it finishes images that a large model in the cloud began,"
            " or draws them alone.",
            manifest.description,
        ),
        library="onnx",
        pipeline_tag=_TEXT_TO_IMAGE,
        tags=(*_TAGS, "onnx", _TEXT_TO_IMAGE, *(("lcm",) if manifest.guidance == "embedded" else ())),
        base_model=without_path(manifest.base_model),
        licence=manifest.licence,
        facts=facts,
        usage=usage,
        limits=limits,
        sources=_sources("hybrid-sd", lcm=manifest.guidance == "embedded"),
        training=training or read_training(folder),
        quality=manifest.quality,
        parity=_parity(folder, manifest),
    )


def _parity(folder: Path, manifest: Manifest) -> Sequence[Mapping[str, Any]]:
    file = manifest.files.get("parity_report")
    if file is None or not (folder / file.path).is_file():
        return ()
    return cast(Sequence[Mapping[str, Any]], json.loads((folder / file.path).read_text(encoding="utf-8")))


def _pipeline(folder: Path) -> Card:
    index = _json(folder / INDEX_NAME)
    extras = _json(folder / "hybridsd.json") if (folder / "hybridsd.json").is_file() else {}
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    unet = _json(folder / "unet" / _CONFIG)
    pruned, lcm = _is_pruned(unet), unet.get("time_cond_proj_dim") is not None
    facts = {
        "kind": f"{index['_class_name']} in diffusers layout",
        **{
            f"parameters of {name}": _count(_parameters(folder / name))
            for name in sorted(index)
            if _has_weights(folder / name)
        },
        "predicts": str(scheduler.get("prediction_type", "epsilon")),
        "scheduler": str(scheduler.get("_class_name", "")),
        **({"latent space": str(extras["latent_space"])} if "latent_space" in extras else {}),
    }
    usage = [Usage(what="As the cloud of a hybrid:", code="hybridsd-cloud serve --model NAME=FOLDER")]
    if not pruned:
        code = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER")
image = pipeline("PROMPT").images[0]"""
        usage.append(Usage(what="With diffusers:", language="python", code=code))
    limits = []
    if not _has_weights(folder / "safety_checker"):
        limits.append("There is no safety checker in it: images are not checked.")
    if pruned:
        limits.append("Its U-Net has widths of its own, which stock diffusers does not read.")
    return Card(
        name=folder.name,
        summary="A text-to-image model. In a hybrid it is the cloud's half: it runs the first steps, and a small model"
        " at the edge finishes.",
        library="diffusers",
        pipeline_tag=_TEXT_TO_IMAGE,
        tags=(*_TAGS, _TEXT_TO_IMAGE, *(("lcm",) if lcm else ())),
        facts=facts,
        usage=usage,
        limits=limits,
        sources=_sources("latent-diffusion", "hybrid-sd", lcm=lcm),
        training=read_training(folder),
    )


def _unet(folder: Path) -> Card:
    config = _json(folder / _CONFIG)
    pruned, lcm = _is_pruned(config), config.get("time_cond_proj_dim") is not None
    text = config.get("cross_attention_dim")
    facts = {
        "kind": "UNet2DConditionModel" + (", pruned inside its layers" if pruned else ""),
        "parameters": _count(_parameters(folder)),
        "text": f"{text} features a token",
        "trained at": f"{config.get('sample_size')}x{config.get('sample_size')} latents",
        **({"guidance": "an input (latent consistency model)"} if lcm else {}),
    }
    code = "python -m training export-bundle --model PIPELINE --unet FOLDER --vae VAE --to BUNDLE"
    usage = [Usage(what="In an edge bundle, beside the text side of the pipeline that it was made for:", code=code)]
    if not pruned:
        loaded = 'from diffusers import UNet2DConditionModel\n\nunet = UNet2DConditionModel.from_pretrained("FOLDER")'
        usage.append(Usage(what="With diffusers:", language="python", code=loaded))
    limits = [f"Goes with text encoders of {text} features only."]
    if config.get("timestep_range"):
        limits.append("Learnt the timesteps from {} to before {} only.".format(*config["timestep_range"]))
    if pruned:
        limits += [
            "Widths of its own, which stock diffusers does not read; this package and its cloud do.",
            "LoRAs for the stock widths do not fit: train them for this U-Net (sd-lora --set unet=...).",
        ]
    return Card(
        name=folder.name,
        summary="The denoising network of a text-to-image model.",
        library="diffusers",
        tags=(*_TAGS, "unet", *(("pruned",) if pruned else ()), *(("lcm",) if lcm else ())),
        facts=facts,
        usage=usage,
        limits=limits,
        sources=_sources("hybrid-sd", "bk-sdm", lcm=lcm) if pruned else _sources("latent-diffusion", lcm=lcm),
        training=read_training(folder),
    )


def _vae(folder: Path) -> Card:
    config = _json(folder / _CONFIG)
    kind = str(config["_class_name"])
    tiny = "Tiny" in kind
    small = not tiny and bool(config.get("decoder_block_out_channels"))
    scaling = config.get("scaling_factor", 1.0 if tiny else 0.18215)
    facts = {
        "kind": kind + (", its decoder narrowed" if small else ""),
        "parameters": _count(_parameters(folder)),
        "latents": f"{config.get('latent_channels')} channels, scaled by {scaling}",
    }
    code = "python -m training export-bundle --model PIPELINE --unet UNET --vae FOLDER --to BUNDLE"
    usage = [Usage(what="In an edge bundle:", code=code)]
    if not small and kind != "AutoencoderTinyWS":
        loaded = f'from diffusers import {kind}\n\nvae = {kind}.from_pretrained("FOLDER")'
        usage.append(Usage(what="With diffusers:", language="python", code=loaded))
    scores = _json(folder / "reconstruction.json")
    if scores and not any(isinstance(value, Mapping) for value in scores.values()):
        scores = {"this": scores}
    limits = ["Reads the latents of the models that it was made for only."]
    if small:
        limits.append("Its decoder has widths of its own, which stock diffusers does not read.")
    return Card(
        name=folder.name,
        summary="Turns latents into images and back" + (", in place of a larger one." if tiny or small else "."),
        library="diffusers",
        tags=(*_TAGS, "vae"),
        facts=facts,
        usage=usage,
        limits=limits,
        sources=("hybrid-sd", "taesd") if tiny else ("latent-diffusion", "hybrid-sd"),
        reconstruction=scores,
        training=read_training(folder),
    )


def _lora(folder: Path) -> Card:
    header = weight_files.read_header(folder / LORA_NAME)
    said: Mapping[str, str] = header.get("__metadata__", {})
    trigger, unet = said.get("modelspec.trigger_phrase", ""), said.get(UNET_ENTRY, "")
    base = said.get("ss_sd_model_name", "")
    layers = sum(name.endswith((".lora_down.weight", ".lora_A.weight")) for name in header)
    facts = {
        "kind": "LoRA" + (f" for the U-Net {unet}" if unet else ""),
        "layers": str(layers),
        "parameters": _count(_parameters_in(header)),
        **{
            what: said[entry]
            for what, entry in (
                ("rank", "ss_network_dim"), ("alpha", "ss_network_alpha"), ("trigger", "modelspec.trigger_phrase"),
                ("made for", "modelspec.architecture"), ("pictures", "modelspec.resolution"),
            )
            if entry in said
        },
    }  # fmt: skip
    prompt, model = trigger or "PROMPT", base or "MODEL"
    bundle = f"python -m training export-bundle --model {model} --unet UNET --vae VAE --lora {LORA_NAME} --to BUNDLE"
    fused = Usage(what="At the edge, fused into the bundle of the U-Net that it was made for:", code=bundle)
    if unet:
        usage = [fused]
    else:
        served = f"""hybridsd-cloud serve --model {model} --lora {folder.name}={LORA_NAME}
hybridsd generate "{prompt}" --lora {folder.name}"""
        code = f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{model}")
pipeline.load_lora_weights("FOLDER", weight_name="{LORA_NAME}")
image = pipeline("{prompt}").images[0]"""
        usage = [
            Usage(what="In the cloud, asked for by name:", code=served),
            Usage(what="With diffusers:", language="python", code=code),
        ]
        if "modelspec.architecture" in said:  # of a family that they have
            copied = f"cp {LORA_NAME} models/loras/{folder.name}.safetensors"
            usage.append(Usage(what="ComfyUI, A1111 and kohya's scripts read the file, too:", code=copied))
    limits = [f"Fits the widths of {unet or 'its base model'} only; a U-Net of other widths needs a LoRA of its own."]
    timesteps = said.get("modelspec.timestep_range", "0,1000")
    if timesteps != "0,1000":
        limits.append(f"Learnt the timesteps {timesteps} only: it is for an edge that starts there.")
    recipe = read_training(folder)
    if recipe is None and "ss_steps" in said:
        settings = {name.removeprefix("ss_"): value for name, value in said.items() if name.startswith("ss_")}
        recipe = Training(settings=settings, steps=int(said["ss_steps"]))
    return Card(
        name=folder.name,
        summary="A LoRA: teaches a text-to-image model what it was shown"
        + (f", under the words `{trigger}`." if trigger else "."),
        library="diffusers",
        pipeline_tag=_TEXT_TO_IMAGE,
        tags=(*_TAGS, "lora", _TEXT_TO_IMAGE),
        base_model=base,
        relation="adapter",
        facts=facts,
        usage=usage,
        limits=limits,
        sources=("lora", "dreambooth") if "ss_prior_loss_weight" in said else ("lora",),
        instance_prompt=trigger,
        training=recipe,
    )


def _sources(*sources: Source, lcm: bool) -> tuple[Source, ...]:
    return (*sources, "lcm") if lcm else sources


def _json(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); make it again") from error


def _is_pruned(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in pruned_unet.EXTRA_KEYS)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _parameters(folder: Path) -> int:
    return sum(_parameters_in(weight_files.read_header(path)) for path in folder.glob("*.safetensors"))


def _parameters_in(header: Mapping[str, Any]) -> int:
    entries = (entry for name, entry in header.items() if name != "__metadata__" and not name.endswith(".alpha"))
    return sum(math.prod(entry["shape"]) for entry in entries)


def _count(number: int) -> str:
    return f"{number:,}"


def _join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
