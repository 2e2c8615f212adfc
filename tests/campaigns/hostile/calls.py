"""Ways into the project that several kinds of cases take."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from ett.cli import app

from .isolation import Place, Refused, Wrong


def run_command(*arguments: Any) -> str:
    """Runs `ett` and returns what it prints.

    Raises:
        Refused: It ended with exit code 1 and one sentence.
        Wrong: It ended otherwise.
    """
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exit_code == 0:
        return result.stdout
    sentences = [line for line in result.stderr.splitlines() if line.startswith("ett: ")]
    if result.exit_code != 1 or len(sentences) != 1 or not result.stderr.rstrip().endswith(sentences[0].rstrip()):
        raise Wrong(f"`ett {arguments[0]}` ended with exit code {result.exit_code}: {result.stderr[-1500:]}")
    if sentences[0].startswith("ett: Unexpected "):
        raise Wrong(sentences[0])
    raise Refused(re.sub("^ett: ", "", sentences[0]))


def copy_model(place: Place, name: str, changed: Sequence[str] = ()) -> Path:
    """A folder of a model in the inputs: links to the files of a good one, copies of those that will be changed."""
    folder = place.inputs / name
    folder.mkdir()
    for path in (place.models / name).iterdir():
        if path.name in changed:
            shutil.copyfile(path, folder / path.name)
        else:
            (folder / path.name).symlink_to(path)
    return folder


__all__ = ["copy_model", "run_command"]
