"""Where this user's files are kept."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Returns `HYBRIDSD_EDGE_CACHE`, or the user's cache folder."""
    given = os.environ.get("HYBRIDSD_EDGE_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("hybridsd")


def bundles_folder() -> Path:
    """Returns where fetched bundles live."""
    return platformdirs.user_data_path("hybridsd") / "bundles"
