"""The gateway and its fake cloud, as the integration tests have them."""

from tests.integration.web.conftest import (  # noqa: F401 (fixtures)
    bundle,
    client,
    cloud,
    fake,
    gate,
    models,
    running_cloud,
    server,
)
