"""What the recipes of the published family amount to, without making it."""

import torch

from training import recipes
from training.cli.demo import SETTINGS
from training.core.diffusion import build_unet
from training.data.text import build_text_encoder
from training.evaluation.classifier import Classifier
from training.vae.kl_vae import build_vae
from training.vae.tiny_vae import build_tiny_vae

PLANS = 1.3e6
"""Bytes of plans, tokenizers, configurations and graphs."""


def test_the_published_family_fits_into_the_repository() -> None:
    """Two bytes a weight: the cloud's pipeline, the edge's bundle with text and tiny VAE, the judge; below 90 MiB."""
    shape = recipes.find("unet")("demo")
    kl, tiny, judge, text = (recipes.find(name)("demo") for name in ("vae", "tiny-vae", "classifier", "text"))
    with torch.device("meta"):
        large = build_unet(shape.widths, layers=shape.layers, cross_attention_dim=text.hidden, mid=True)
        networks = {
            "vae": build_vae(kl.widths),
            "tiny": build_tiny_vae(tiny.width, blocks=tiny.blocks),
            "judge": Classifier(judge.width),
            "text": build_text_encoder(1500, hidden=text.hidden, layers=text.layers, heads=text.heads),
        }
    counts = {name: sum(value.numel() for value in network.parameters()) for name, network in networks.items()}
    unet = sum(value.numel() for value in large.parameters())
    ratio = SETTINGS["demo"]["prune"]["ratio"]
    cloud = unet + counts["vae"] + counts["text"]
    edge = ratio * unet + counts["text"] + counts["tiny"]

    assert 2 * (cloud + edge + counts["judge"]) + PLANS < 90 * 2**20
    assert 2 * counts["judge"] < 2.7e6
