"""Hostile inputs: each must end in success or in one sentence, within limits, and leave nothing by half.

    python -m tests.campaigns.fuzz                            # 1,000 cases of all kinds
    python -m tests.campaigns.fuzz --case recipes:17 --keep failing

What is generated, and the last results: docs/reliability.md.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

# Read by the libraries when they are imported. One thread each, since the workers are forked.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import datasets
import numpy as np
import torch
from tqdm import tqdm

from .hostile.data_files import shards, tables
from .hostile.images import images, photos
from .hostile.isolation import Case, Place, Result, run_cases
from .hostile.model_files import configs, records, weights
from .hostile.models import save_models
from .hostile.recipes import recipes
from .hostile.requests import requests

KINDS = {
    kind.__name__: kind for kind in (images, photos, weights, configs, records, shards, tables, recipes, requests)
}
"""Generator functions of a random generator and a [`Place`], by name."""

SHOWN = 1500
"""Characters of a failure that are printed."""
LARGEST_KEPT = 2**20


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    names = options.case or list(_names(options.count, options.only, options.first))
    torch.set_num_threads(1)
    # Its thread would not be there in the workers.
    tqdm.monitor_interval = 0
    start, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="ett-fuzz-", ignore_cleanup_errors=True) as folder:
        root, models = Path(folder) / "cases", Path(folder) / "models"
        save_models(models)
        _warm_up(models)
        cases = ((name, _case(name, options.seed)) for name in names)
        with tqdm(total=len(names), unit=" cases", disable=None) as bar, contextlib.suppress(KeyboardInterrupt):
            for result in run_cases(cases, root, models, options.workers):
                results.append(result)
                bar.update()
                if not result.passed:
                    tqdm.write(f"{result.name}: {result.status}\n{result.detail[-SHOWN:]}\n", file=sys.stderr)
                    if options.keep:
                        _keep(root / result.name, result, options.keep)
                elif options.case:
                    print(f"{result.name}: {result.status}. {result.detail}")
    print(_table(results, time.monotonic() - start))
    return int(len(results) < len(names) or not all(result.passed for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fuzz", description="Gives hostile inputs to every door of ETT.")
    parser.add_argument("--count", type=int, default=1000, help="cases in all, the kinds in turn (1000)")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it (0)")
    parser.add_argument("--only", choices=KINDS, metavar="KIND", help=f"one kind alone: {', '.join(KINDS)}")
    parser.add_argument(
        "--case",
        metavar="KIND:NUMBER",
        type=_case_name,
        action="append",
        help="repeat this case alone; may be given again",
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind (0)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder that receives the inputs of failing cases")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cases at a time (number of cores)")
    return parser


def _case_name(text: str) -> str:
    kind, _, number = text.partition(":")
    if kind not in KINDS or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no case; expected KIND:NUMBER, such as recipes:17")
    return text


def _names(count: int, only: str | None, first: int) -> Iterator[str]:
    kinds = [only] if only else list(KINDS)
    return (f"{kinds[index % len(kinds)]}:{first + index // len(kinds)}" for index in range(count))


def _case(name: str, seed: int) -> Case:
    kind, _, number = name.partition(":")
    rng = np.random.default_rng((seed, zlib.crc32(kind.encode()), int(number)))
    return partial(_run, kind, rng)


def _run(kind: str, rng: np.random.Generator, place: Place) -> Iterator[None]:
    datasets.config.HF_DATASETS_CACHE = place.cache
    # Torch makes its pool of threads anew after a fork, and threads of autograd must not meet there.
    torch.set_num_threads(1)
    yield from KINDS[kind](rng, place)


def _warm_up(models: Path):
    """Has the libraries import what they import when a model is first loaded, once for all workers."""
    from ett.inference import load_ett

    load_ett(str(models / "ett-gen"))


def _keep(folder: Path, result: Result, kept: Path):
    """Copies a case's own files, links to good ones and large ones aside, with what went wrong."""
    target = kept / result.name.replace(":", "-")
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= LARGEST_KEPT:
            copied = target / path.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
    target.mkdir(parents=True, exist_ok=True)
    (target / "failure.txt").write_text(f"{result.name}: {result.status}\n{result.detail}\n", errors="replace")


def _table(results: list[Result], seconds: float) -> str:
    """Cases by kind, and how they ended."""
    by_kind: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_kind[result.name.partition(":")[0]].append(result)
    rows = [("kind", "cases", "success", "sentence", "failed", "slowest", "most memory")]
    for kind, own in [*by_kind.items(), ("all", results)]:
        counts = [sum(result.status == status for result in own) for status in ("success", "sentence")]
        slowest = f"{max(result.seconds for result in own):.1f} s"
        memory = f"{max(result.megabytes for result in own):.0f} MB"
        rows.append((kind, len(own), *counts, len(own) - sum(counts), slowest, memory))
    lines = [f"{kind:<10}" + "".join(f"{cell:>13}" for cell in cells) for kind, *cells in rows]
    return "\n".join([*lines, f"{seconds / 60:.1f} minutes"])


if __name__ == "__main__":
    sys.exit(main())
