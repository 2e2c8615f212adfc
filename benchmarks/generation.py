"""Drawing: codes a second of ours and of transformers' Janus, in turns, on one and the same language model.

Both have random weights, guidance, greedy choice and the same number of codes; the language model (the size of
Qwen2.5-1.5B, without its vocabulary) is one module that both hold. The bound is what memory allows: the weights are
read once a step, at the rate at which this machine multiplies a large float32 matrix by a vector.

With --drawing-model, the speed of a trained model follows, for windows of speculative Jacobi decoding: how often its
guesses are right depends on the model and its images, and with random weights they hardly are.

    python benchmarks/generation.py --codes 24 --turns 3
    python benchmarks/generation.py --drawing-model ett-gen --windows 1 2 4 8
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from ett import ETTForConditionalGeneration, ETTProcessor, IBQModel
from ett.train import library_versions

CODES, WIDTH, VOCABULARY, PROMPT = 16384, 1536, 1024, 32
PAD, BEGIN, IMAGE_START = 0, 1, 2
GUIDANCE = 5.0


def build_models(layers: int) -> tuple[ETTForConditionalGeneration, JanusForConditionalGeneration]:
    """Both, with one language model."""
    torch.manual_seed(0)
    text_config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=8960,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
    )
    janus = JanusForConditionalGeneration(
        JanusConfig(
            text_config=text_config,
            vision_config=JanusVisionConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=WIDTH, image_size=32
            ),
            vq_config=JanusVQVAEConfig(
                num_embeddings=CODES,
                base_channels=32,
                image_token_embed_dim=WIDTH,
                projection_dim=WIDTH,
            ),
        )
    ).eval()
    janus.generation_config.generation_kwargs = {"boi_token_id": IMAGE_START}
    with torch.device("meta"):
        language_model = LlamaForCausalLM(LlamaConfig(**{**text_config.to_dict(), "num_hidden_layers": 1}))
    tokenizer = IBQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        latent_channels=256,
        num_vq_embeddings=CODES,
        vq_embed_dim=256,
    )
    language_model = language_model.to_empty(device="cpu")
    ours = ETTForConditionalGeneration.from_parts(
        language_model,
        tokenizer,
        image_token_id=3,
        image_start_token_id=IMAGE_START,
        image_end_token_id=4,
        visual_head=True,
    ).eval()
    ours.model.language_model = janus.model.language_model
    ours.config.text_config = janus.config.text_config
    return ours, janus


def prompts(batch_size: int) -> torch.LongTensor:
    ids = torch.randint(10, VOCABULARY, (batch_size, PROMPT), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, -1] = BEGIN, IMAGE_START
    return ids


def draw_ours(model: ETTForConditionalGeneration, batch_size: int, codes: int) -> torch.LongTensor:
    side = model.model.vision_tokenizer.spatial_factor
    return model.generate(
        prompts(batch_size),
        generation_mode="image",
        image_size=(side, side * codes),
        guidance_scale=GUIDANCE,
        do_sample=False,
    ).flatten(1)


def draw_janus(model: JanusForConditionalGeneration, batch_size: int, codes: int) -> torch.LongTensor:
    model.model.vision_model.config.num_image_tokens = codes
    ids = prompts(batch_size)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_mode="image",
        guidance_scale=GUIDANCE,
        do_sample=False,
        max_length=PROMPT + codes,
    )


def rate(draw: Callable[..., torch.Tensor], model: torch.nn.Module, batch_size: int, codes: int) -> float:
    """Codes a second, the prompt's pass taken out: by the difference of a long and a short drawing."""
    seconds = []
    for number in (1, codes + 1):
        start = time.perf_counter()
        draw(model, batch_size, number)
        seconds.append(time.perf_counter() - start)
    return batch_size * codes / (seconds[1] - seconds[0])


def bandwidth() -> float:
    """Bytes a second of a large matrix times a vector."""
    matrix, vector = torch.ones(16384, 16384), torch.ones(16384)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mv(matrix, vector)
        seconds.append(time.perf_counter() - start)
    return matrix.nbytes / min(seconds)


def step_bytes(model: ETTForConditionalGeneration) -> int:
    """Bytes of the weights that a step reads."""
    read = [*model.model.language_model.layers.parameters(), *model.visual_head.parameters()]
    return sum(parameter.nbytes for parameter in read)


def shares(model: ETTForConditionalGeneration, codes: int) -> dict[str, float]:
    """Where a drawing's time goes, by operation."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        draw_ours(model, 1, codes)
    events = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    total = sum(events.values())
    largest = sorted(events, key=events.get, reverse=True)[:6]
    return {name: events[name] / total for name in largest}


def measure_windows(folder: str, windows: list[int], num_images: int, turns: int) -> list[dict[str, float]]:
    """Sampled images of a trained model, one after the other: codes a second, and codes a forward pass."""
    model = ETTForConditionalGeneration.from_pretrained(folder).eval()
    processor = ETTProcessor.from_pretrained(folder)
    inputs = processor(text="a red circle and a blue square", generation_mode="image")
    passes = []
    model.model.language_model.register_forward_hook(lambda *_: passes.append(1))

    def draw(window: int) -> list[torch.Tensor]:
        return [
            model.generate(
                **inputs,
                generation_mode="image",
                jacobi_window=window,
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in range(num_images)
        ]

    rows = {window: {"window": window, "seconds": []} for window in windows}
    expected = torch.stack(draw(1))
    for _ in range(turns):
        for window, row in rows.items():
            passes.clear()
            start = time.perf_counter()
            drawn = torch.stack(draw(window))
            row["seconds"].append(time.perf_counter() - start)
            row["codes_per_pass"] = drawn.numel() / len(passes)
            row["same_images"] = torch.equal(drawn, expected)
    for row in rows.values():
        row["codes_per_second"] = expected.numel() / statistics.median(row.pop("seconds"))
    return list(rows.values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--codes", type=int, default=24, help="codes of each drawing")
    parser.add_argument("--turns", type=int, default=3, help="turns of both")
    parser.add_argument("--layers", type=int, default=28, help="layers of the language model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4], help="images at once")
    parser.add_argument("--drawing-model", help="folder of a trained model, to measure Jacobi decoding")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 4, 8], help="windows of Jacobi decoding")
    parser.add_argument("--images", type=int, default=8, help="images that the trained model draws")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "generation.json", help="JSON file"
    )
    options = parser.parse_args()
    if min(options.codes, options.turns, options.layers, options.images, *options.batch_sizes, *options.windows) < 1:
        parser.error("all numbers must be at least 1")
    ours, janus = build_models(options.layers)
    results: dict[str, Any] = {"rows": []}
    print(f"Codes a second of all images together, on the CPU, {torch.get_num_threads()} threads, medians")
    print(f"{'precision':<11}{'images':>9}{'ours':>8}{'Janus':>8}{'times':>7}{'of the bound':>14}{'Janus':>7}")
    for dtype in (torch.float32, torch.bfloat16):
        ours.to(dtype), janus.to(dtype)
        bound = bandwidth() / step_bytes(ours)
        for batch_size in options.batch_sizes:
            for draw, model in ((draw_ours, ours), (draw_janus, janus)):
                draw(model, batch_size, 4)
            pairs = [
                (rate(draw_ours, ours, batch_size, options.codes), rate(draw_janus, janus, batch_size, options.codes))
                for _ in range(options.turns)
            ]
            row = {
                "dtype": str(dtype).removeprefix("torch."),
                "batch_size": batch_size,
                "ours": statistics.median(pair[0] for pair in pairs),
                "janus": statistics.median(pair[1] for pair in pairs),
                "times": statistics.median(pair[0] / pair[1] for pair in pairs),
            }
            row["of_bound"] = row["ours"] / (bound * batch_size)
            row["janus_of_bound"] = row["janus"] / (bound * batch_size)
            results["rows"].append(row)
            print(
                f"{row['dtype']:<11}{batch_size:>9}{row['ours']:>8.2f}{row['janus']:>8.2f}{row['times']:>7.2f}"
                f"{row['of_bound']:>14.0%}{row['janus_of_bound']:>7.0%}",
                flush=True,
            )
        results[f"shares_{results['rows'][-1]['dtype']}"] = where = shares(ours, options.codes)
        print("  where ours goes: " + ", ".join(f"{name} {share:.0%}" for name, share in where.items()), flush=True)
    if options.drawing_model:
        results["windows"] = measure_windows(options.drawing_model, options.windows, options.images, options.turns)
        print(f"{'window':<11}{'codes a second':>17}{'codes a pass':>14}{'same images':>15}")
        for row in results["windows"]:
            print(
                f"{row['window']:<11}{row['codes_per_second']:>17.1f}{row['codes_per_pass']:>14.2f}"
                f"{row['same_images']!s:>15}"
            )
    results |= {**vars(options), "output": str(options.output), "versions": library_versions()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
