"""Draws curves of training."""

from __future__ import annotations

from pathlib import Path


def plot_losses(curve: list[dict[str, float]], path: Path, title: str) -> None:
    """Draws the loss curve as PNG: one line a term; a row may lack terms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    terms = dict.fromkeys(term for row in curve for term in row if term not in ("step", "lr", "grad_norm"))
    for term in terms:
        points = [(row["step"], row[term]) for row in curve if term in row]
        axes.plot([x for x, _ in points], [y for _, y in points], label=term)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.set_yscale("symlog", linthresh=1e-4)  # an adversarial term may be below 0
    axes.legend()
    figure.savefig(path, dpi=100)
