"""Writes components/monitoring/rule.yaml from deploy/prometheus/alerts.yml: python make_rule.py [--check].

With --check it writes nothing, and fails where the file is another.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ALERTS, RULE = FOLDER.parent / "prometheus/alerts.yml", FOLDER / "components/monitoring/rule.yaml"
HEAD = """\
# Made from deploy/prometheus/alerts.yml by `python deploy/kubernetes/make_rule.py`: change that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: hybridsd
spec:
"""


def main() -> int:
    """Returns the exit status."""
    lines = ALERTS.read_text(encoding="utf-8").splitlines()
    made = HEAD + "".join(f"  {line}\n" if line else "\n" for line in lines if not line.startswith("#"))
    if "--check" not in sys.argv[1:]:
        RULE.write_text(made, encoding="utf-8")
    elif not RULE.exists() or RULE.read_text(encoding="utf-8") != made:
        sys.stderr.write(f"{RULE.name} is not what {ALERTS.name} makes; run python deploy/kubernetes/make_rule.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
