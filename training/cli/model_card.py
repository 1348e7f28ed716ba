"""The command model-card: writes the README.md of a folder again."""

from __future__ import annotations

from pathlib import Path

import click

from training.cli.shared_options import FOLDER, say


@click.command("model-card")
@click.argument("folder", type=FOLDER)
@click.option("--name", default="", help="What it is called; the folder's name by default.")
@click.option("--base-model", default="", help="Hub id of what it was made of; what the folder says by default.")
@click.option("--licence", default="", help="Of the weights, such as openrail++; what the folder says by default.")
@click.option("--run", type=FOLDER, help="Folder of the run that trained it, where that is another one.")
def model_card_command(folder: Path, name: str, base_model: str, licence: str, run: Path | None) -> None:
    """Write the model card of a LoRA, U-Net, VAE, pipeline or edge bundle: README.md, as the Hugging Face hub reads it.

    Every recipe and export writes one; this one is for folders of before, and to say what they cannot know.
    """
    from training.export.cards import read_training, write_card

    training = None if run is None else read_training(run)
    if run is not None and training is None:
        raise click.BadParameter(f"{run} has no record of a run", param_hint="--run")
    path = write_card(folder, name=name, base_model=base_model, licence=licence, training=training)
    if path is None:
        raise click.ClickException(
            f"{folder} holds no model; give the folder of a LoRA, U-Net, VAE, pipeline or edge bundle"
        )
    say(f"model-card: {path}")
