"""Commands of `ett` for training: data preparation, training, conversion."""

from pathlib import Path
from typing import Annotated

import typer

from .app import Resume, command
from .inference import load_tokenizer


@command(resumable=True)
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a YAML file.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields to change, as key=value.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the model; by default from the recipe.")] = None,
    resume: Resume = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the plan of the run and its memory; write nothing.")
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(help="With --dry-run: number of devices.", show_default="the devices of this machine"),
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(min=0, help="With --dry-run: assumed number of text tokens per sample.")
    ] = 128,
):
    """Run one training stage from a recipe."""
    if dry_run:
        from .train.planning.plan import plan_recipe

        typer.echo(plan_recipe(recipe, overrides, devices, text_tokens).report())
        return
    from .data_ett.selection import summarize
    from .hub_cards import write_card
    from .train import read_record, run_recipe

    folder = run_recipe(recipe, overrides, output_dir, resume)
    record = read_record(folder)
    write_card(folder, record)
    if filtered := record.get("data_filters"):
        typer.echo(f"Filters: {summarize(filtered)}.")
    typer.echo(f"Wrote {folder}.")


@command()
def inspect_data(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a YAML file.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields to change, as key=value.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("inspection.html"),
    count: Annotated[int, typer.Option("-n", min=1, help="Samples in the batch.")] = 8,
):
    """Write an HTML page that shows a batch of a recipe's data as the model sees it."""
    from .train.planning import inspection

    typer.echo(f"Wrote {inspection.inspect_data(recipe, overrides, output, count)}.")


@command()
def convert_tokenizer(
    source: Annotated[
        Path,
        typer.Argument(help="A .ckpt file of SEED-Voken, or a folder of Emu3.5's tokenizer.", show_default=False),
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    weights: Annotated[
        str, typer.Option(help="Weights of a .ckpt file: ema (moving average) or raw (as trained).")
    ] = "ema",
    discriminator: Annotated[
        Path | None,
        typer.Option(help="Also write the discriminator to this file, to continue training.", show_default=False),
    ] = None,
):
    """Convert a public IBQ checkpoint to a tokenizer folder."""
    from .train.models.conversion import convert_tokenizer

    conversion = convert_tokenizer(source, output, weights, discriminator)
    typer.echo(f"Wrote {output}.\n{conversion.summary()}")


@command()
def merge(
    base: Annotated[str, typer.Argument(help="Folder or Hub name of the adapter's base model.", show_default=False)],
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
):
    """Merge a low-rank adapter into its base model."""
    from .train.models.adapters import merge_folder

    merge_folder(base, adapter, output)
    typer.echo(f"Wrote {output}.")


@command(resumable=True)
def recaption(
    dataset: Annotated[
        str,
        typer.Argument(help="Folder of images, or any dataset that the datasets library loads.", show_default=False),
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write; a data.source for training.", show_default=False)],
    model: Annotated[str, typer.Option(help="Folder or Hub name of an image-text-to-text model.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="Prompt for each image.")] = "Describe the image.",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a caption, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampled captions.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    split: Annotated[
        str | None, typer.Option(help="Split, required if the dataset has several.", show_default=False)
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column of images.")] = "image",
    text_column: Annotated[
        str, typer.Option(help="Column of captions; existing captions move to original_ plus this name.")
    ] = "text",
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Rows per output file.")] = 10_000,
    shard: Annotated[str, typer.Option(help="This machine's shard, such as 0/4 to 3/4.")] = "0/1",
    dtype: Annotated[
        str, typer.Option(help="Dtype of the weights, such as bfloat16, or auto for the stored dtype.")
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(help="Device of the model, such as cuda:1.", show_default="the accelerator, else cpu"),
    ] = None,
):
    """Write new captions for the images of a dataset, with any image-text-to-text model."""
    from .data_ett import recaption as engine
    from .data_ett.shards import Part

    report = engine.recaption(
        path=dataset,
        output=output,
        model=model,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        split=split,
        image_column=image_column,
        text_column=text_column,
        rows_per_shard=rows_per_shard,
        part=Part.parse(shard),
        dtype=dtype,
        device=device,
    )
    typer.echo(f"Wrote {output}: {report.summary()}")
    if report.read:
        typer.echo(f"{report.read / report.seconds:.2f} images/s.")


@command(resumable=True)
def tokenize(
    dataset: Annotated[
        str,
        typer.Argument(help="Folder of images, or any dataset that the datasets library loads.", show_default=False),
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write; a data.source for training.", show_default=False)],
    model: Annotated[str, typer.Option(help="Folder or Hub name of a tokenizer or an ETT model.")] = "ett-tokenizer",
    split: Annotated[
        str | None, typer.Option(help="Split, required if the dataset has several.", show_default=False)
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column of images.")] = "image",
    image_folder: Annotated[
        str | None,
        typer.Option(help="Folder for relative file names of images.", show_default="the dataset's folder"),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the square images, in pixels.", show_default="from the model"),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="How to make images square: crop, pad or stretch.", show_default="from the model"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of rows, from the first.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes that read images.")] = 0,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Input rows per output file.")] = 10_000,
    shard: Annotated[
        str, typer.Option(help="Shard of this machine or GPU and number of shards, such as 3/8.")
    ] = "0/1",
):
    """Convert a dataset's images to codes once, for the training stages that freeze the tokenizer."""
    from .data_ett.shards import Part
    from .data_ett.tokenization import tokenize_data_set

    part = Part.parse(shard)
    tokenizer, image_processor = load_tokenizer(model)
    if image_size is not None:
        image_processor.size = {"height": image_size, "width": image_size}
    if fit is not None:
        if fit not in ("crop", "pad", "stretch"):
            raise ValueError(f"--fit is {fit!r}; expected crop, pad or stretch.")
        image_processor.fit = fit
    report = tokenize_data_set(
        dataset,
        output,
        tokenizer,
        image_processor,
        model,
        split=split,
        image_column=image_column,
        image_folder=image_folder,
        limit=limit,
        batch_size=batch_size,
        workers=workers,
        rows_per_shard=rows_per_shard,
        part=part,
    )
    typer.echo(f"Wrote {output}: {report.summary()}")
