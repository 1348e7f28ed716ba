"""A job is refused at once for what the cloud has said it cannot do, in one range and with what it can."""

from dataclasses import replace

import pytest

from edge_client.bundles.bundle import Bundle
from edge_client.cloud.types import Capabilities, CloudModel
from edge_client.web.jobs.check_cloud import refusal
from edge_client.web.schemas.native import JobCreate
from hybridsd.errors import Reason
from hybridsd.manifest import Manifest

MODEL = CloudModel(
    id="large", latent_space="a", prediction_type="epsilon", num_parameters=1, default_size=128, schedulers=("ddim",),
    loras=("style", "pose"),
)  # fmt: skip
FOUND = Capabilities(
    server_version="1", models=(MODEL,), bundles={}, num_running=0, num_queued=0, min_size=8, max_size=256
)


def check(manifest: Manifest, found: Capabilities | None = FOUND, **fields: object) -> tuple[Reason, str | None, str]:
    models = [] if found is None else [*found.models, replace(MODEL, id="plain", loras=())]
    error = refusal(JobCreate.model_validate({"prompt": "a fox", **fields}), manifest, found, models)
    assert error is not None
    return error.reason, error.field, error.message


@pytest.fixture
def manifest(bundle: Bundle) -> Manifest:
    return replace(bundle.manifest, size_multiple=32)


@pytest.mark.parametrize("side", [1, 8, 130, 288, 512, 5000, 10**30])
@pytest.mark.parametrize("name", ["width", "height"])
def test_one_range_of_sizes(name: str, side: int, manifest: Manifest) -> None:
    """Whatever is wrong with a size, the range is the one that both ends have."""
    reason, field, message = check(manifest, **{name: side})

    assert (reason, field) == (Reason.SIZE_INVALID, name)
    assert message.startswith(f"`{name}` is {side}; choose a multiple of 32 from 32 to 256")
    assert ("`mode` edge" in message) == (256 < side <= 4096)
    assert "from 32 to 4096" in check(manifest, None, width=130)[2]


def test_models_and_adapters(manifest: Manifest) -> None:
    assert check(manifest, hybrid={"model": "huge"}) == (
        Reason.MODEL_UNKNOWN, "hybrid.model", "the cloud has no model 'huge'; choose one of large, plain",
    )  # fmt: skip
    assert check(manifest, hybrid={"segments": "large:3@cloud,huge:3@cloud,x:*@edge"})[:2] == (
        Reason.MODEL_UNKNOWN, "hybrid.segments",
    )  # fmt: skip
    assert check(manifest, loras=[{"name": "style"}, {"name": "no"}]) == (
        Reason.LORA_UNKNOWN, "loras", "model large has no adapter 'no'; choose one of style, pose",
    )  # fmt: skip
    assert "omit `loras`" in check(manifest, loras=[{"name": "style"}], hybrid={"model": "plain"})[2]


def test_what_is_fine_or_not_known(manifest: Manifest) -> None:
    models = list(FOUND.models)
    for fields in ({}, {"width": 256, "height": 32}, {"hybrid": {"model": "large"}, "loras": [{"name": "pose"}]}):
        assert refusal(JobCreate.model_validate({"prompt": "a fox", **fields}), manifest, FOUND, models) is None
    unknown = JobCreate.model_validate({"prompt": "a fox", "hybrid": {"model": "x"}, "loras": [{"name": "x"}]})
    assert refusal(unknown, manifest, None, []) is None
    odd = JobCreate(prompt="a fox", width=5000, height=33)
    assert refusal(odd, manifest, FOUND, models, fits_size=True) is None
