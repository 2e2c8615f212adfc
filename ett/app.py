"""Frame of the `ett` command line: registration of commands, errors as one sentence, quiet libraries."""

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
    help="ETT, end-to-end vision tokenizer tuning: train every stage, describe and generate images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Rich truncates long option names in narrow terminals.
    rich_markup_mode=None,
)

Resume = Annotated[bool, typer.Option(help="Continue an interrupted run.")]

_EXPECTED = (ValueError, OSError, ImportError)
_options = {"debug": False}


def command(group: typer.Typer = app, resumable: bool = False) -> Callable[[Callable], Callable]:
    """Register a function as a command that prints its errors as one sentence on stderr.

    `ett --debug` prints the traceback instead.

    Args:
        group (`typer.Typer`, defaults to `app`): The group of the command.
        resumable (`bool`, defaults to `False`): Whether the same command continues an interrupted run.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except KeyboardInterrupt:
                again = " Run the same command again to continue." if resumable else ""
                typer.echo(f"Interrupted.{again}", err=True)
                raise typer.Exit(130) from None
            except Exception as error:
                if _options["debug"]:
                    raise
                sentence = " ".join(_message(error).split()) or type(error).__name__
                if not isinstance(error, _EXPECTED):
                    sentence = f"Unexpected {type(error).__name__}: {sentence} (`ett --debug ...` shows the traceback)"
                typer.echo(f"ett: {sentence}", err=True)
                raise typer.Exit(1) from None

        return group.command()(run)

    return register


def _message(error: Exception) -> str:
    """Message of an error. A data loader's worker puts its traceback before the message; this drops the traceback."""
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
    """Silence warnings and progress bars of libraries in this process and its child processes.

    Environment variables that the user has set do not change.
    """
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    if "DIFFUSERS_VERBOSITY" not in os.environ:
        os.environ["DIFFUSERS_VERBOSITY"] = "error"
        diffusers.logging.set_verbosity_error()
        diffusers.logging.disable_progress_bar()
    if downloads:
        # datasets reads this variable at its import, which comes later.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
            disable_progress_bars()


__all__ = ["Resume", "app", "command"]
