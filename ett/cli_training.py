"""The part of the `ett` command that makes models: data, training, conversion."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Resume, command
from .rooms import room


@command(resumable=True)
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a YAML file.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields to change, as key=value.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Where the model goes; else as the recipe says.")] = None,
    resume: Resume = True,
):
    """Run one stage of training from a recipe."""
    rooms = room("train")
    folder = rooms.run_recipe(recipe, overrides, output_dir, resume)
    room("hub_cards").write_card(folder, rooms.read_record(folder))
    typer.echo(f"Wrote {folder}.")


@command()
def convert_tokenizer(
    source: Annotated[Path, typer.Argument(help="A .ckpt of SEED-Voken, or a folder of Emu3.5.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    weights: Annotated[str, typer.Option(help="Of a .ckpt: ema, the moving average, or raw, as trained.")] = "ema",
    discriminator: Annotated[
        Path | None, typer.Option(help="Also write the discriminator, to go on training with.", show_default=False)
    ] = None,
):
    """Turn a public IBQ checkpoint into a tokenizer's folder."""
    conversion = room("train.conversion").convert_tokenizer(source, output, weights, discriminator)
    typer.echo(f"Wrote {output}.\n{conversion.summary()}")
