"""`hybridsd serve` takes any size where it is asked to, and with the demo's bundle."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_client.cli import serve

DEMO = Path(__file__).parents[4] / "deploy/demo/edge"


class Built(Exception):
    """Ends the command once its settings are known."""


@pytest.mark.parametrize(
    ("is_demo", "options", "fits"),
    [
        (True, [], True),
        (True, ["--no-fit-size"], False),
        (False, [], False),
        (False, ["--fit-size"], True),
    ],
)
def test_default(
    is_demo: bool, options: list[str], fits: bool, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def create_app(settings: Any, *_: Any, **__: Any) -> None:
        seen.append(settings)
        raise Built

    monkeypatch.setattr(serve, "create_app", create_app)
    folder = DEMO if is_demo else bundle_folder
    common = ["--bundle", str(folder), "--no-cloud", "--data-dir", str(tmp_path)]
    result = CliRunner().invoke(serve.serve, [*common, *options])

    assert isinstance(result.exception, Built), result.output
    assert [settings.fit_size for settings in seen] == [fits]
