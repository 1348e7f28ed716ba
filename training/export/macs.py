"""What the networks of a bundle cost, as its manifest says it: for the energy of images (`hybridsd.energy`)."""

from __future__ import annotations

import logging

from hybridsd.energy import Macs
from training.cost.cost import WHOLE, costs
from training.export.graphs import Graph

log = logging.getLogger(__name__)


def graph_macs(graph: Graph) -> tuple[float, ...]:
    """Returns multiply-accumulates of one row, as coefficients of a polynomial of latent cells; empty if not known.

    Of a U-Net with the guidance fused into it, a row is one of the two that it runs.
    """
    points: dict[int, int] = {}
    try:
        for feed in graph.feeds:
            first = next(iter(feed.values()))  # latents [B, C, h, w], an image [B, 3, H, W], or ids [B, T]
            cells = 0 if first.ndim < 4 else first.shape[-2] * first.shape[-1]
            cells //= 64 if graph.role == "vae_encoder" else 1
            rows = first.shape[0] * (2 if "prompt_embeds" in feed else 1)
            points[cells] = costs(graph.module, feed)[WHOLE].all_macs // rows
        return Macs.fit(list(points.items())).coefficients
    except Exception as error:
        log.warning("the MACs of %s cannot be counted (%s), so its energy will not be known", graph.role, error)
        return ()
