"""docs/operations.md has a section for each alert, and none for alerts that there are not."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
    if "alert" in rule
]


def test_each_alert_has_its_section() -> None:
    """At the anchor that the alert itself names, in the order of the rules."""
    headings = re.findall(r"^### (Alert \w+)$", TEXT, re.MULTILINE)

    assert headings == [f"Alert {rule['alert']}" for rule in RULES]
    for rule in RULES:
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#alert-{rule['alert'].lower()}"


def test_each_section_says_how_urgent_it_is() -> None:
    """As the rule does: page or ticket."""
    for rule in RULES:
        section = TEXT.partition(f"### Alert {rule['alert']}\n")[2].partition("\n#")[0]
        assert f"({rule['labels']['severity']})" in section, rule["alert"]


def test_metrics_that_the_runbook_names_are_there() -> None:
    """What it tells people to look at is in the tables of docs/observability.md, which are checked against servers."""
    tables = (ROOT / "docs/observability.md").read_text(encoding="utf-8")

    assert [name for name in re.findall(r"`(hybridsd_\w+)`", TEXT) if f"| `{name}` |" not in tables] == []
