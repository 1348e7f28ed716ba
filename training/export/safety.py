"""The safety checker of Stable Diffusion as a graph: how near an image is to each concept that it should not show.

It is CLIP's vision model, and a cosine to the embedding of each concept with a threshold of its own (Rando et al.,
2022, take it apart). Where an image is near one of the concepts of "special care", every other threshold is 0.01
lower.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor, nn
from torch.nn import functional as F

from training.core.task import freeze
from training.export.graphs import Graph

SUBFOLDER = "safety_checker"  # of a pipeline
SPECIAL_CARE = 0.01
ROUNDING = 0.0005
"""diffusers rounds every score to three digits before it asks whether it is above 0; what is above this stays so."""


class SafetyScores(nn.Module):
    """Scores of images: clip_input float32 [B, 3, S, S] => float32 [B, n], above 0 where a concept is shown.

    An image is flagged if any of its scores is above 0: exactly when diffusers' own module flags it.
    """

    def __init__(self, checker: StableDiffusionSafetyChecker) -> None:
        super().__init__()
        self.checker = checker

    def forward(self, clip_input: Tensor) -> Tensor:
        """See the class."""
        checker: Any = self.checker
        image = F.normalize(checker.visual_projection(checker.vision_model(clip_input)[1]))
        special = image @ F.normalize(checker.special_care_embeds).T - checker.special_care_embeds_weights
        concepts = image @ F.normalize(checker.concept_embeds).T - checker.concept_embeds_weights
        needs_care = (special > ROUNDING).any(dim=1, keepdim=True)
        return cast(Tensor, concepts + SPECIAL_CARE * needs_care - ROUNDING)


def safety_graph(checker: StableDiffusionSafetyChecker) -> Graph:
    """Describes the safety checker: clip_input [B, 3, S, S], normalized as CLIP wants it -> scores [B, n]."""
    rng = np.random.default_rng(9)
    side = int(checker.config.vision_config.image_size)
    return Graph(
        role="safety_checker",
        module=SafetyScores(checker),
        axes={"clip_input": {0: "batch"}},
        outputs=("scores",),
        feeds=tuple(
            {"clip_input": torch.from_numpy(rng.standard_normal((rows, 3, side, side), dtype=np.float32))}
            for rows in (3, 1, 2)
        ),
    )


def load_safety_checker(source: str) -> StableDiffusionSafetyChecker:
    """Loads a safety checker, frozen: its own folder or hub id, or those of a pipeline that has one.

    Raises:
        ValueError: If there is none, or some of its weights are missing.
    """
    alone = Path(source) / "config.json"
    own = alone.is_file() or "safety" in Path(source).name.lower()
    try:
        checker, report = StableDiffusionSafetyChecker.from_pretrained(
            source, subfolder="" if own else SUBFOLDER, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{source!r} has no safety checker ({str(error).strip().splitlines()[0][:200]}); give the folder or hub id"
            f" of one, or of a pipeline with {SUBFOLDER}/"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"the safety checker of {source!r} lacks {len(missing)} weights (such as {missing[0]}), so it would flag at"
            " random; take config.json and weights from one folder"
        )
    return freeze(cast(StableDiffusionSafetyChecker, checker))
