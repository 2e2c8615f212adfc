"""The `ett` command line. It parses arguments and prints results; the other packages of ETT do the work."""

import random
from pathlib import Path
from typing import Annotated

import typer

from . import cli_training, inference  # noqa: F401 - cli_training registers its commands
from .app import Resume, app, command

evaluate = typer.Typer(help="Measure a model on your own data.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(evaluate, name="evaluate")

Image = Annotated[str, typer.Argument(help="Image file or URL.", show_default=False)]
Images = Annotated[list[str], typer.Argument(help="Image files or URLs.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of the answer, in tokens.")]
Device = Annotated[
    str | None, typer.Option(help="Device of the model, such as cpu or cuda:1.", show_default="the GPU, else cpu")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Dtype of the weights: float32, bfloat16, float16, or auto for the stored dtype.", show_default="float32"
    ),
]
ChatModel = Annotated[str, typer.Option(help="Folder or Hub name of an ETT model.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Image file to write.")]
Side = Annotated[
    int | None, typer.Option(min=1, help="Size of this side, in pixels.", show_default="from the model's folder")
]
OF_THE_MODEL = "from the model's folder"
WithDiscriminator = Annotated[
    bool, typer.Option("--with-discriminator", help="Include discriminator.safetensors, to continue training.")
]


@command(resumable=True)
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Run a few steps of every stage, as a test.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 0,
    output_dir: Annotated[Path, typer.Option(help="Folder for models and report.")] = Path(),
    resume: Resume = True,
):
    """Train tokenizer, chat model and image generation model at miniature scale, evaluate, write report/index.html."""
    from .miniature_ett import run_demo

    run_demo(output_dir=output_dir, seed=seed, quick=quick, resume=resume)


@command(resumable=True)
def study(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="ARM", help="Run only this arm; repeat for several arms.", show_default="all"),
    ] = None,
    ground: Annotated[
        list[str] | None,
        typer.Option(help="Run only this background, textured or flat; repeat for both.", show_default="both"),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of seeds per arm.",
            show_default="5 on textured background, 3 on flat background and for controls",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Worker processes, of one thread each.", show_default="number of cores")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run a few steps of everything, as a test.")] = False,
    known: Annotated[
        Path | None,
        typer.Option(
            help="Results of an earlier run, such as docs/study/results.json, to reuse instead of a new run.",
            show_default="none",
        ),
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for results and models.")] = Path("ett-study"),
    report: Annotated[
        bool, typer.Option("--report", help="Only write study.md and study/ from existing results, without training.")
    ] = False,
    docs_dir: Annotated[Path, typer.Option(help="With --report: folder for study.md and study/.")] = Path("docs"),
):
    """Run the paper's ablations with seeds and controls at miniature scale (hours on two cores)."""
    from ett import miniature_ett as miniature

    if report:
        typer.echo(f"Wrote {miniature.report_study(output_dir, docs_dir)}.")
        return
    summary = miniature.run_study(output_dir, ground or (), seeds, processes, only or (), quick, known)
    typer.echo(f"Cells: {', '.join(f'{count} {status}' for status, count in summary.statuses.items())}.")
    typer.echo(f"Wrote {summary.page}.")
    if summary.statuses.get("failed"):
        raise ValueError(f"Some cells failed; see {output_dir}/study.log and run the same command again to retry.")


@command()
def caption(
    images: Images,
    model: ChatModel = "ett-chat",
    max_new_tokens: MaxNewTokens = 64,
    device: Device = None,
    dtype: Dtype = None,
):
    """Print a caption for each image. With several images, each line begins with the image's name."""
    captions = inference.captions(images, model, max_new_tokens, device, dtype)
    for image, text in zip(images, captions, strict=True):
        typer.echo(text if len(images) == 1 else f"{image}: {text}")


@command()
def ask(
    images: Images,
    question: Annotated[str, typer.Argument(help="Question about the images.", show_default=False)],
    model: ChatModel = "ett-chat",
    max_new_tokens: MaxNewTokens = 64,
    device: Device = None,
    dtype: Dtype = None,
):
    """Answer a question about one image, or about several images together."""
    typer.echo(inference.ask(images, question, model, max_new_tokens, device, dtype))


@command()
def chat(
    model: ChatModel = "ett-chat",
    drawing_model: Annotated[str, typer.Option(help="Folder or Hub name of an ETT model for /draw.")] = "ett-gen",
    output_dir: Annotated[Path, typer.Option(help="Folder for generated images.")] = Path(),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 256,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first generated image; each further image adds one.")
    ] = 0,
):
    """Chat with a model about images and generate images, in the terminal."""
    from .chat import chat

    chat(model, drawing_model, output_dir, max_new_tokens, seed)


@command()
def serve(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of an ETT model.")] = "ett-chat",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    device: Annotated[str, typer.Option(help="Device of the model, such as cpu or cuda:0.")] = "auto",
):
    """Serve a model over OpenAI's API, with the server of transformers."""
    inference.serve(model, host, port, device)


@command()
def draw(
    prompt: Annotated[str, typer.Argument(help="Description of the image.", show_default=False)],
    model: Annotated[str, typer.Option(help="Folder or Hub name of an ETT model that generates images.")] = "ett-gen",
    output: Output = Path("drawing.png"),
    count: Annotated[
        int, typer.Option("-n", min=1, max=64, help="Number of images; file names of several get a number.")
    ] = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the first image.", show_default="random; the command prints it")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=1, help="Guidance scale; higher values follow the prompt more closely.", show_default=OF_THE_MODEL
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature; higher values vary images more.", show_default=OF_THE_MODEL),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample from the k most probable codes.", show_default=OF_THE_MODEL)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most probable codes that sum to this probability.", show_default=OF_THE_MODEL
        ),
    ] = None,
    jacobi_window: Annotated[
        int,
        typer.Option(
            min=1, help="Codes per forward pass, by speculative Jacobi decoding; 4 to 16 is often faster, same images."
        ),
    ] = 1,
):
    """Generate an image from a prompt."""
    output = inference.check_image_path(output)
    seed = random.randrange(2**31) if seed is None else seed
    sampling = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    images = inference.draw(prompt, model, count, seed, jacobi_window, **sampling)
    for number, image in enumerate(images, start=1):
        path = output if count == 1 else output.with_stem(f"{output.stem}-{number}")
        inference.save_image(image, path)
        typer.echo(f"Wrote {path} (seed {seed + number - 1}).")


@command()
def reconstruct(
    image: Image,
    model: Annotated[str, typer.Option(help="Folder or Hub name of a tokenizer or an ETT model.")] = "ett-tokenizer",
    output: Output = Path("reconstruction.png"),
    height: Side = None,
    width: Side = None,
    own_size: Annotated[
        bool, typer.Option("--own-size", help="Keep the image's size; crop it to multiples of the tokenizer's factor.")
    ] = False,
):
    """Encode an image to codes and decode it again. Sides above 1024 pixels are processed in tiles."""
    output = inference.check_image_path(output)
    reconstruction, psnr = inference.reconstruct(image, model, height, width, own_size)
    inference.save_image(reconstruction, output)
    typer.echo(f"Wrote {output} (PSNR {psnr:.1f} dB).")


@command()
def inspect_tokenizer(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub name of a tokenizer or an ETT model.", show_default=False)
    ],
    dataset: Annotated[
        str,
        typer.Option(
            help="Folder of images, any dataset that the datasets library loads, or scenes for the embedded scenes.",
            show_default=False,
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Split, required if the dataset has several.", show_default=False)
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column of images.")] = "image",
    limit: Annotated[int, typer.Option(min=1, help="Number of images, from the first.")] = 100,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the square images, in pixels.", show_default="from the model"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    logit_scale: Annotated[
        float | None,
        typer.Option(help="Measure with this model.logit_scale of stage 2.", show_default="the tokenizer's own"),
    ] = None,
    straight_through_weight: Annotated[
        float | None,
        typer.Option(
            help="Measure with this model.straight_through_weight of stage 2.", show_default="the tokenizer's own"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="JSON file for the result and all settings.", show_default=False)
    ] = None,
):
    """Measure before stage 2 whether captions can tune a tokenizer: the gradient share that reaches its encoder."""
    data = {"path": dataset, "split": split, "image_column": image_column, "limit": limit}
    from .evaluation import inspect_tokenizer
    from .evaluation_ett import describe_inspection

    result = inspect_tokenizer(model, output, image_size, data, logit_scale, straight_through_weight, batch_size)
    if output is not None:
        typer.echo(f"Wrote {output}.")
    typer.echo(describe_inspection(result))


@command(evaluate, resumable=True)
def reconstruction(
    context: typer.Context,
    dataset: Annotated[
        str, typer.Option(help="Folder of images, or any dataset that the datasets library loads.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Folder or Hub name of a tokenizer or an ETT model.")] = "ett-tokenizer",
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="BEFORE AFTER",
            help="Instead of measuring one model, write a figure with the reconstructions of two models.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="JSON file to write, or image file with --compare.",
            show_default="reconstruction.json or comparison.png",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split, required if the dataset has several.", show_default=False)
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column of images.")] = "image",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Number of images, from the first.", show_default="all; 4 with --compare"),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the square images, in pixels.", show_default="from the model"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes that read images.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Images between two saves of an unfinished run.")] = 500,
    resume: Resume = True,
):
    """Measure a tokenizer's reconstructions: rFID, PSNR, SSIM, LPIPS, codebook usage. With --compare, a figure."""
    from . import evaluation, evaluation_ett

    data = {"path": dataset, "split": split, "image_column": image_column, "limit": limit}
    if compare:
        alone = ("model", "batch_size", "workers", "save_every", "resume")
        given = [name for name in alone if context.get_parameter_source(name).name == "COMMANDLINE"]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"--compare writes a figure of two models and does not use {options}; remove {options}.")
        output = output or Path("comparison.png")
        evaluation.compare_reconstructions(compare, output, image_size, data)
    else:
        output = output or Path("reconstruction.json")
        result = evaluation.evaluate_reconstruction(
            model,
            output,
            image_size,
            data,
            batch_size=batch_size,
            workers=workers,
            save_every=save_every,
            resume=resume,
        )
        typer.echo(evaluation_ett.describe(result))
    typer.echo(f"Wrote {output}.")


@command()
def export(
    model: Annotated[Path, typer.Argument(help="Folder of an ETT model or a tokenizer.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="New or empty folder to write.", show_default=False)],
    with_discriminator: WithDiscriminator = False,
):
    """Copy a model folder together with its code, so that it loads without ETT installed."""
    from .hub_cards import export_folder

    export_folder(model, folder, with_discriminator)
    typer.echo(f"Wrote {folder}: Auto classes and pipelines load it with trust_remote_code=True.")


@command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an ETT model or a tokenizer.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, as owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    with_discriminator: WithDiscriminator = False,
):
    """Upload a model folder to the Hugging Face Hub."""
    from .hub_cards import push_folder

    address = push_folder(folder, repo, private=private, with_discriminator=with_discriminator)
    typer.echo(f"Uploaded: {address}")


def main():
    """Entry point of the console command."""
    app(prog_name="ett")


__all__ = ["app", "main"]
