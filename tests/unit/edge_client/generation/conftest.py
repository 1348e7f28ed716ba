"""A finished image that several tests look at."""

import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.generation.pipeline import generate
from edge_client.generation.resolve import resolve
from edge_client.generation.result import Result
from edge_client.inference.models import Models
from edge_client.request import Request


@pytest.fixture(scope="module")
def result(bundle: Bundle, models: Models) -> Result:
    request = Request(prompt="a red fox, Käse\n2", negative_prompt="blurry", mode="edge", seed=8)
    *_, last = generate(resolve(request, bundle.manifest), bundle, models)
    return last.result
