"""Defaults of a request."""

import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.generation.resolve import resolve
from edge_client.request import Request


@pytest.mark.parametrize(("steps", "cloud_steps"), [(6, 3), (10, 5), (1, 0), (2, 1)])
def test_default_split_keeps_its_share(steps: int, cloud_steps: int, bundle: Bundle) -> None:
    """With other numbers of steps the cloud runs the same share of them."""
    assert resolve(Request(prompt="x", num_inference_steps=steps), bundle.manifest).cloud_steps == cloud_steps
