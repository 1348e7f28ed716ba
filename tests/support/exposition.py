"""What /metrics says, read as Prometheus reads it."""

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families


@dataclass
class Exposition:
    """The families of an exposition, and the values of their series."""

    text: str
    kinds: dict[str, str] = field(default_factory=dict)
    """counter, gauge, histogram or info, by the name of a series as a query says it."""
    labels: dict[str, set[str]] = field(default_factory=dict)
    """Names of labels that were seen, likewise."""
    values: dict[tuple[str, frozenset[tuple[str, str]]], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for family in text_string_to_metric_families(self.text):
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            for suffix in suffixes:
                self.kinds[family.name + suffix] = family.type
                self.labels.setdefault(family.name + suffix, set())
            for sample in family.samples:
                self.labels[sample.name] |= set(sample.labels)
                self.values[sample.name, frozenset(sample.labels.items())] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """Returns the value of a series; 0 where it is not there."""
        return self.values.get((name, frozenset(labels.items())), 0.0)

    def total(self, name: str, **labels: str) -> float:
        """Returns the sum of all series with these labels."""
        wanted = set(labels.items())
        return sum(value for (each, given), value in self.values.items() if each == name and wanted <= given)


def exposition_of(registry: CollectorRegistry) -> Exposition:
    """Returns what a registry says."""
    return Exposition(generate_latest(registry).decode())
