"""Texts that are near to each other: what approximate reuse goes by. Knows nothing of jobs, threads or models."""

import numpy as np
from numpy.typing import NDArray

from cloud_server.models.denoiser import Encoded

Feature = NDArray[np.float32]
"""Of a text, `[D]`, of length 1: a product of two is the cosine of the angle between them."""


def text_feature(text: Encoded, empty: Encoded) -> Feature:
    """Returns what texts are compared by.

    The embedding of the whole text where the model has one (CLIP's was trained for it). Else the mean of its tokens'
    embeddings, without that of the empty text: the beginning and the padding, which all texts share, would outweigh
    the rest.

    Args:
        text: The text.
        empty: The empty one, of the same model.
    """
    feature = text.embeds.mean(axis=0) - empty.embeds.mean(axis=0) if text.pooled is None else text.pooled
    length = float(np.linalg.norm(feature))
    found: Feature = (feature / length if length else feature).astype(np.float32)
    return found
