"""The `ett` command's frame: a command's errors are one sentence, its libraries are quiet."""

import functools
import os
from collections.abc import Callable
from typing import Annotated

import diffusers
import transformers
import typer
from huggingface_hub.utils import disable_progress_bars

from . import __version__

app = typer.Typer(
    help="ETT, end-to-end vision tokenizer tuning: train every stage, describe images, draw them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Rich cuts long names of options off in narrow terminals.
    rich_markup_mode=None,
)

Resume = Annotated[bool, typer.Option(help="Go on where an interrupted run stopped.")]

_EXPECTED = (ValueError, OSError, ImportError)
_options = {"debug": False}


def command(group: typer.Typer = app, resumable: bool = False) -> Callable[[Callable], Callable]:
    """Registers a command, of `ett` or of a group in it, whose errors are one sentence on stderr; the traceback is for
    `ett --debug`.

    Args:
        resumable (`bool`): Whether the same command again goes on where it was interrupted.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except KeyboardInterrupt:
                again = " Run the same command again to go on." if resumable else ""
                typer.echo(f"Interrupted.{again}", err=True)
                raise typer.Exit(130) from None
            except Exception as error:
                if _options["debug"]:
                    raise
                sentence = " ".join(_message(error).split()) or type(error).__name__
                if not isinstance(error, _EXPECTED):
                    sentence = f"Unexpected {type(error).__name__}: {sentence} (`ett --debug ...` shows where)"
                typer.echo(f"ett: {sentence}", err=True)
                raise typer.Exit(1) from None

        return group.command()(run)

    return register


def _message(error: Exception) -> str:
    """What an error says. That of a data loader's worker ends with what it says, behind the worker's traceback."""
    text = str(error)
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:
        return text.rpartition(f"{type(error).__name__}: ")[2]
    return text


def _show_version(wanted: bool):
    if wanted:
        typer.echo(f"ett {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and all messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
):
    _options["debug"] = debug
    if not debug:
        _be_quiet(downloads=context.invoked_subcommand != "push")


def _be_quiet(downloads: bool):
    """Keeps warnings and bars of libraries from standing between a user and an answer, here and in processes that this
    one starts. Variables that the user has set stay."""
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    if "DIFFUSERS_VERBOSITY" not in os.environ:
        os.environ["DIFFUSERS_VERBOSITY"] = "error"
        diffusers.logging.set_verbosity_error()
        diffusers.logging.disable_progress_bar()
    if downloads:
        # Read by datasets when it is imported, later than this.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
            disable_progress_bars()


__all__ = ["Resume", "app", "command"]
