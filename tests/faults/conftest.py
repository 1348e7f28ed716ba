"""A toy bundle, its models with one thread, and a fake cloud that can do everything wrong to an impatient edge."""

import pytest

from edge_client.request import Patience
from tests.support.edge_fixtures import (  # noqa: F401
    bundle,
    bundle_folder,
    cloud,
    fake,
    models,
    running,
)


@pytest.fixture
def patience() -> Patience:
    return Patience(
        idle_timeout_s=1.0, progress_timeout_s=0.4, queue_timeout_s=0.6, reattach_timeout_s=0.2, busy_timeout_s=0.2
    )
