"""Loading an exported folder against loading its parts, the language model and the vision tokenizer.

Each load is the first of a process of its own, as it is for a user; the folder's code is loaded, too. Two times are
taken: that of the load alone, and that from the process's start, imports of torch, transformers, diffusers included.

    python benchmarks/loading.py --layers 24 --turns 5
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import Qwen2Config, Qwen2ForCausalLM

import ett
from ett.hub_cards import export_folder
from ett.processing_ett import build_word_tokenizer
from ett.train import library_versions

START = """
import sys, time
import diffusers, torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
folder = sys.argv[1]
options = {"trust_remote_code": True, "dtype": getattr(torch, sys.argv[2])}
"""
LOADS = {
    "exported folder": "models = [AutoModelForImageTextToText.from_pretrained(f'{folder}/exported', **options)]",
    "its parts": """models = [
        AutoModelForCausalLM.from_pretrained(f"{folder}/language_model", **options),
        diffusers.AutoModel.from_pretrained(f"{folder}/exported/vision_tokenizer", trust_remote_code=True),
    ]""",
}
END = """
# Weights are mapped, and read when they are first needed.
sum(parameter.view(-1)[::1024].float().sum() for model in models for parameter in model.parameters())
print(time.perf_counter() - start)
"""


def write_models(folder: Path, layers: int):
    """An exported model with the paper's tokenizer, but for a codebook of 16,384, and its language model alone."""
    vision_tokenizer = ett.IBQModel(num_vq_embeddings=16384)
    tokenizer = build_word_tokenizer(["a red circle"])
    processor = ett.ETTProcessor.from_parts(tokenizer, vision_tokenizer, image_size=256)
    language_model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32000,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=layers,
            num_attention_heads=14,
            num_key_value_heads=2,
        )
    )
    model = ett.ETTForConditionalGeneration.from_parts(
        language_model,
        vision_tokenizer,
        image_token_id=processor.image_token_id,
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    language_model.save_pretrained(folder / "language_model")
    export_folder(folder / "model", folder / "exported")
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f}M parameters")


def measure(load: str, folder: Path, dtype: str) -> tuple[float, float]:
    """Seconds of a load, and of its process."""
    code = f"{START}start = time.perf_counter()\n{LOADS[load]}\n{END}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", code, str(folder), dtype]
    start = time.perf_counter()
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1]), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24, help="layers of the language model")
    parser.add_argument("--turns", type=int, default=5, help="turns of both")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "loading.json", help="JSON file"
    )
    options = parser.parse_args()
    if min(options.layers, options.turns) < 1:
        parser.error("all numbers must be at least 1")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, options.layers)
        print(f"{'precision':<11}{'exported, s':>12}{'parts, s':>10}{'times':>7}{'with imports, times':>21}")
        for dtype in ("float32", "bfloat16"):
            seconds = {load: [] for load in LOADS}
            for turn in range(options.turns + 1):
                for load, measured in seconds.items():
                    pair = measure(load, folder, dtype)
                    # The first turn brings the files into memory.
                    measured.extend([pair] if turn else [])
            whole, parts = (
                [statistics.median(times) for times in zip(*measured, strict=True)] for measured in seconds.values()
            )
            row = {"dtype": dtype, "exported": whole, "parts": parts}
            row["times"], row["times_with_imports"] = (one / other for one, other in zip(whole, parts, strict=True))
            rows.append(row)
            print(
                f"{dtype:<11}{whole[0]:>12.2f}{parts[0]:>10.2f}{row['times']:>7.2f}{row['times_with_imports']:>21.2f}",
                flush=True,
            )
    results = {"rows": rows, **vars(options), "output": str(options.output), "versions": library_versions()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
