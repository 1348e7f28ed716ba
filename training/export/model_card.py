"""The model card of what was made: a README.md with the front matter of the Hugging Face hub.

Pure: what is known goes in, text comes out. What is not known is left out; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub import ModelCardData

from hybridsd.manifest import QualityPoint

CARD_NAME = "README.md"
QUALITY_HEADING = "## Measured quality"

Source = Literal["hybrid-sd", "bk-sdm", "lora", "dreambooth", "lcm", "latent-diffusion", "taesd"]
_CITATIONS: Mapping[Source, str] = {
    "hybrid-sd": """@misc{yan2024hybridsd,
  title = {Hybrid SD: Edge-Cloud Collaborative Inference for Stable Diffusion Models},
  author = {Yan, Chenqian and others},
  year = {2024}, eprint = {2408.06646}, archivePrefix = {arXiv}
}""",
    "bk-sdm": """@misc{kim2023bksdm,
  title = {BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion},
  author = {Kim, Bo-Kyeong and others},
  year = {2023}, eprint = {2305.15798}, archivePrefix = {arXiv}
}""",
    "lora": """@misc{hu2021lora,
  title = {LoRA: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and others},
  year = {2021}, eprint = {2106.09685}, archivePrefix = {arXiv}
}""",
    "dreambooth": """@misc{ruiz2022dreambooth,
  title = {DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation},
  author = {Ruiz, Nataniel and others},
  year = {2022}, eprint = {2208.12242}, archivePrefix = {arXiv}
}""",
    "lcm": """@misc{luo2023lcm,
  title = {Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference},
  author = {Luo, Simian and others},
  year = {2023}, eprint = {2310.04378}, archivePrefix = {arXiv}
}""",
    "latent-diffusion": """@misc{rombach2021ldm,
  title = {High-Resolution Image Synthesis with Latent Diffusion Models},
  author = {Rombach, Robin and others},
  year = {2021}, eprint = {2112.10752}, archivePrefix = {arXiv}
}""",
    "taesd": """@misc{taesd,
  title = {TAESD: Tiny AutoEncoder for Stable Diffusion},
  author = {Bohan, Ollin Boer},
  howpublished = {https://github.com/madebyollin/taesd}
}""",
}
_LICENCES = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "openrail++",
        "creativeml-openrail-m",
        "bigscience-openrail-m",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "bsd-2-clause",
        "bsd-3-clause",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl-3.0",
        "agpl-3.0",
        "mpl-2.0",
        "unlicense",
        "ofl-1.1",
    ]
)
"""Identifiers of the hub; another licence is "other" there, with its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a model was trained, as far as it is known."""

    recipe: str = ""
    """Such as "sd-lora"."""
    settings: Mapping[str, Any] | None = None
    """The recipe's fields, nested; those that are None are not shown."""
    steps: int | None = None
    hours: float | None = None
    """Wall time of all steps."""
    versions: Mapping[str, str] | None = None
    """Of what computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """One way to use it."""

    what: str
    """A sentence."""
    code: str
    language: Literal["bash", "python"] = "bash"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a card says."""

    name: str
    summary: str
    library: Literal["diffusers", "onnx"]
    tags: Sequence[str]
    facts: Mapping[str, str]
    """What it is, as a table."""
    usage: Sequence[Usage]
    limits: Sequence[str]
    sources: Sequence[Source]
    """Whose method it is, to cite."""
    pipeline_tag: str | None = None
    base_model: str = ""
    """A hub id goes into the front matter as well; the name of a folder is said in the text only."""
    relation: Literal["adapter", "finetune", "quantized"] | None = None
    """To the base model, in the hub's words."""
    licence: str = ""
    """An SPDX identifier, or an identifier of the hub."""
    instance_prompt: str = ""
    """Of a LoRA: what a prompt must say."""
    training: Training | None = None
    quality: Sequence[QualityPoint] = ()
    parity: Sequence[Mapping[str, Any]] = ()
    """Of a bundle: role and largest relative error of each file against torch."""
    reconstruction: Mapping[str, Mapping[str, float]] | None = None
    """Of a VAE: by whose decoder, what was measured of held-out images by metric."""


def render(card: Card) -> str:
    """Writes the card as Markdown; sections of which nothing is known are not there."""
    sections = [
        ("What it is", _what(card)),
        ("How it was trained", _trained(card.training)),
        ("How to use it", _used(card.usage)),
        ("Measured quality", quality_tables(card.quality, card.parity) or _reconstructed(card.reconstruction or {})),
        ("Limits", "\n".join(f"* {limit}" for limit in card.limits)),
        ("Licence", _licence(card)),
        ("Citation", "```bibtex\n" + "\n".join(_CITATIONS[source] for source in card.sources) + "\n```"),
    ]
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections if text)
    return f"---\n{front_matter(card)}\n---\n\n# {card.name}\n\n{card.summary}\n\n{body}\n"


def front_matter(card: Card) -> str:
    """Gives the YAML that the hub reads."""
    licence = card.licence.lower()
    known = licence in _LICENCES
    base = card.base_model if is_hub_id(card.base_model) else None
    more: dict[str, Any] = {}
    if base is not None and card.relation is not None:
        more["base_model_relation"] = card.relation
    if card.instance_prompt:
        more["instance_prompt"] = card.instance_prompt
    return ModelCardData(
        license=(licence if known else "other") if licence else None,
        license_name=re.sub(r"[^a-z0-9.+-]+", "-", licence) if licence and not known else None,
        library_name=card.library,
        pipeline_tag=card.pipeline_tag,
        base_model=base,
        tags=list(card.tags),
        **more,
    ).to_yaml()


def is_hub_id(name: str) -> bool:
    """Whether it has the form owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def quality_tables(points: Sequence[QualityPoint], parity: Sequence[Mapping[str, Any]] = ()) -> str:
    """Gives what was measured: a row for each split, a column for each metric; then each file against torch."""
    tables = []
    metrics = list(dict.fromkeys(point.metric for point in points))
    rows: dict[tuple[int, int], dict[str, float]] = {}
    for point in points:
        rows.setdefault((point.num_inference_steps, point.cloud_steps), {})[point.metric] = point.value
    if rows:
        head = ["cloud steps", "edge steps", *(metric.replace("_", " ") for metric in metrics)]
        cells = [
            [str(cloud), str(steps - cloud), *(_number(found.get(metric)) for metric in metrics)]
            for (steps, cloud), found in sorted(rows.items())
        ]
        tables.append(table(head, cells))
    if parity:
        errors = [[str(entry["role"]), f"{float(entry['relative_error']):.1e}"] for entry in parity]
        tables.append("Each file against torch:\n\n" + table(["file", "relative error"], errors))
    return "\n\n".join(tables)


def _reconstructed(scores: Mapping[str, Mapping[str, float]]) -> str:
    if not scores:
        return ""
    metrics = list(dict.fromkeys(metric for found in scores.values() for metric in found))
    head = ["held-out images, coded and decoded", *(metric.replace("_", " ") for metric in metrics)]
    return table(head, [[name, *(_number(found.get(metric)) for metric in metrics)] for name, found in scores.items()])


def with_quality(text: str, points: Sequence[QualityPoint], parity: Sequence[Mapping[str, Any]] = ()) -> str:
    """Gives a card whose measured quality is this; the rest of it stays as it is, also what people wrote.

    A card without that section gets it before its limits, or at its end.
    """
    section = f"{QUALITY_HEADING}\n\n{quality_tables(points, parity)}\n\n"
    if QUALITY_HEADING in text:
        old = rf"{QUALITY_HEADING}\n.*?(?=\n## |\Z)"
        return re.sub(old, lambda _: section.rstrip() + "\n", text, count=1, flags=re.DOTALL)
    head, found, tail = text.partition("## Limits")
    return head + section + found + tail if found else f"{text.rstrip()}\n\n{section.rstrip()}\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _what(card: Card) -> str:
    facts = dict(card.facts)
    if card.base_model:
        linked = f"[{card.base_model}](https://huggingface.co/{card.base_model})"
        facts["base model"] = linked if is_hub_id(card.base_model) else card.base_model
    return table(["", ""], [[name, value] for name, value in facts.items()]) if facts else ""


def _trained(training: Training | None) -> str:
    if training is None:
        return ""
    said = []
    if training.recipe:
        steps = "" if training.steps is None else f", {training.steps:,} steps"
        hours = "" if training.hours is None else f", {training.hours:.2g} hours"
        said.append(f"By `python -m training {training.recipe}`{steps}{hours}.")
    elif training.steps is not None:
        said.append(f"{training.steps:,} steps.")
    rows = [[f"`{name}`", f"`{value}`"] for name, value in flattened(training.settings or {})]
    if rows:
        said.append(table(["setting", "value"], rows))
    if training.versions:
        said.append("Versions: " + ", ".join(f"{name} {version}" for name, version in training.versions.items()) + ".")
    return "\n\n".join(said)


def flattened(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Lists nested settings by dotted names, without those that are None or empty, and without folders' paths."""
    found: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            if "prompt" in value and value["prompt"] is None:  # pictures of the class that were not wanted
                continue
            found += flattened(value, f"{prefix}{name}.")
        elif value not in (None, "", (), []):
            found.append((f"{prefix}{name}", without_path(value) if isinstance(value, str) else str(value)))
    return found


def without_path(text: str) -> str:
    """Leaves of a path of somebody's machine the last name: `imagefolder:/home/me/cats` is `imagefolder:cats`.

    Hub ids, URLs and sentences stay; so does a relative path of two names, which looks like a hub id.
    """
    if "://" in text or " " in text:
        return text
    if re.fullmatch(r"[^:/]+(/[^:/]+){2,}/?", text):
        return text.rstrip("/").rpartition("/")[2]
    return re.sub(r"(^|(?<=:))(?:[~.]{0,2}/)(?:[^:]*/)?([^/:]+)/?(?=$|:)", r"\1\2", text)


def _used(usage: Sequence[Usage]) -> str:
    return "\n\n".join(f"{way.what}\n\n```{way.language}\n{way.code}\n```" for way in usage)


def _licence(card: Card) -> str:
    if card.licence:
        return f"{card.licence}."
    return f"That of its base model, {card.base_model}, applies; see there." if card.base_model else ""
