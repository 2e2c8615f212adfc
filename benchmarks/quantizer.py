"""Times the quantizer, forward and backward with all losses, against the dense definition of index backpropagation.

Both run in turns in one process, on the same latents and codebook, with flat logits (every code matters to every
token) and peaked ones (latents near a code, as after training). Extra memory is the peak above what was held before
the step. Rates count the five products of tokens and codes that both passes need with flat logits (in peaked ones most
of four is left out), beside that of one plain product.

    python benchmarks/quantizer.py --tokens 256 1024 4096 --codes 16384 131072
"""

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ett.modeling_ett.quantizer_ibq import IBQQuantizer

DIM = 256
OURS_PRODUCTS = 5
DENSE_TENSORS = 9
"""Tensors of tokens x codes that the dense definition holds at its peak, counted generously, to see if it fits."""


def dense(quantizer: IBQQuantizer, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, quantization loss and entropy loss as the equations have them, with every tensor written out."""
    table = quantizer.embedding.weight
    tokens = latents.movedim(1, -1).flatten(0, -2)
    logits = tokens @ table.T
    probabilities = logits.softmax(dim=-1)
    one_hot = torch.zeros_like(logits).scatter_(1, logits.argmax(dim=-1, keepdim=True), 1.0)
    embeddings = (one_hot - probabilities.detach() + probabilities) @ table
    hard = one_hot @ table
    quantization_loss = (
        F.mse_loss(embeddings, tokens)
        + F.mse_loss(hard.detach(), tokens)
        + quantizer.codebook_loss_weight * F.mse_loss(hard, tokens.detach())
    )
    sharp = logits / quantizer.entropy_temperature
    assignment = sharp.softmax(dim=-1)
    sample_entropy = -(assignment * sharp.log_softmax(dim=-1)).sum(dim=-1).mean()
    average = assignment.mean(dim=0)
    average_entropy = -(average * (average + quantizer.entropy_eps).log()).sum()
    return embeddings, quantization_loss, sample_entropy - average_entropy


def ours(quantizer: IBQQuantizer, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    output = quantizer(latents)
    embeddings = output.embeddings.movedim(1, -1).flatten(0, -2)
    return embeddings, output.quantization_loss, output.entropy_loss


@dataclass
class Measurement:
    """Seconds of both passes, and MiB beyond what was held before."""

    forward: float
    backward: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


class PeakMemory:
    """MiB held at most inside the block beyond what was held at its beginning."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            # Freed memory that the allocator keeps would hide what a step takes.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *exception):
        is_cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if is_cuda else self._status("VmHWM")
        self.mib = (peak - self.before) / 2**20

    @staticmethod
    def _status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(step: Callable, quantizer: IBQQuantizer, latents: torch.Tensor, upstream: torch.Tensor) -> Measurement:
    """One step: embeddings with an upstream gradient, and both losses."""
    device = latents.device
    quantizer.zero_grad(set_to_none=True)
    latents = latents.clone().requires_grad_()
    synchronize(device)
    with PeakMemory(device) as memory:
        start = time.perf_counter()
        embeddings, quantization_loss, entropy_loss = step(quantizer, latents)
        synchronize(device)
        middle = time.perf_counter()
        loss = (embeddings * upstream).sum() + quantization_loss + 0.05 * entropy_loss
        loss.backward()
        synchronize(device)
        end = time.perf_counter()
    return Measurement(middle - start, end - middle, memory.mib)


def product_seconds(tokens: torch.Tensor, table: torch.Tensor) -> float:
    """Seconds of one product of tokens and codes."""
    start = time.perf_counter()
    tokens @ table.T
    synchronize(tokens.device)
    return time.perf_counter() - start


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def make_latents(table: torch.Tensor, num_tokens: int, kind: str) -> torch.Tensor:
    """`(1, D, num_tokens, 1)`: near zero for flat logits, near a code for peaked ones."""
    noise = torch.randn(num_tokens, DIM, device=table.device)
    chosen = table[torch.randint(len(table), (num_tokens,), device=table.device)]
    tokens = 1e-4 * noise if kind == "flat" else chosen + 0.5 * noise
    return tokens.T.reshape(1, DIM, num_tokens, 1).contiguous()


def compare(num_tokens: int, num_codes: int, kind: str, repeats: int, device: torch.device) -> dict:
    """Medians of both over `repeats` turns, after one to warm up, and their ratios."""
    torch.manual_seed(0)
    quantizer = IBQQuantizer(num_codes, DIM).to(device)
    table = quantizer.embedding.weight.detach()
    latents = make_latents(table, num_tokens, kind)
    upstream = torch.randn(num_tokens, DIM, device=device) / num_tokens
    steps = {"ours": ours}
    if DENSE_TENSORS * num_tokens * num_codes * 4 < free_bytes(device):
        steps["dense"] = dense
    turns: dict[str, list[Measurement]] = {name: [] for name in steps}
    products = []
    for _ in range(repeats + 1):
        for name, step in steps.items():
            turns[name].append(measure(step, quantizer, latents, upstream))
        products.append(product_seconds(latents[0, :, :, 0].T, table))
    result = {"tokens": num_tokens, "codes": num_codes, "logits": kind, "product": statistics.median(products[1:])}
    for name, measured in turns.items():
        medians = {
            field: statistics.median(asdict(turn)[field] for turn in measured[1:])
            for field in ("forward", "backward", "memory")
        }
        result[name] = medians | {"seconds": statistics.median(turn.seconds for turn in measured[1:])}
    if "dense" in steps:
        result["times_faster"] = result["dense"]["seconds"] / result["ours"]["seconds"]
        result["times_less_memory"] = result["dense"]["memory"] / max(result["ours"]["memory"], 1)
    operations = 2e-9 * num_tokens * num_codes * DIM
    result["gflops"] = OURS_PRODUCTS * operations / result["ours"]["seconds"]
    result["product_gflops"] = operations / result["product"]
    return result


COLUMNS = (
    ("tokens", 8),
    ("codes", 9),
    ("logits", 8),
    ("ours fwd", 10),
    ("bwd s", 8),
    ("MiB", 8),
    ("dense fwd", 11),
    ("bwd s", 8),
    ("MiB", 8),
    ("faster", 9),
    ("smaller", 9),
    ("GFLOP/s", 10),
    ("product", 10),
)


def row(result: dict) -> str:
    def cells(name: str) -> list[str]:
        entry = result.get(name)
        if entry is None:
            return ["too big", "-", "-"]
        return [f"{entry['forward']:.3f}", f"{entry['backward']:.3f}", f"{entry['memory']:,.0f}"]

    ratios = [f"{result[key]:.1f}x" if key in result else "-" for key in ("times_faster", "times_less_memory")]
    values = [f"{result['tokens']:,}", f"{result['codes']:,}", result["logits"]]
    values += [*cells("ours"), *cells("dense"), *ratios, f"{result['gflops']:.0f}", f"{result['product_gflops']:.0f}"]
    return "".join(f"{value:>{width}}" for value, (_, width) in zip(values, COLUMNS, strict=True))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="tokens in a step")
    parser.add_argument("--codes", type=int, nargs="+", default=[16384, 131072], help="codebook sizes")
    parser.add_argument("--logits", nargs="+", choices=("flat", "peaked"), default=["flat", "peaked"])
    parser.add_argument("--repeats", type=int, default=3, help="timed turns; medians are shown")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "quantizer.json", help="JSON file"
    )
    options = parser.parse_args()
    if min(*options.tokens, *options.codes, options.repeats, 1) < 1:
        parser.error("--tokens, --codes and --repeats must be at least 1")
    device = torch.device(options.device)
    cases = [(n, k, kind) for k in options.codes for n in options.tokens for kind in options.logits]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"IBQ quantizer, D = {DIM}, float32, {name}, {torch.get_num_threads()} threads, {options.repeats} turns")
    print("".join(f"{title:>{width}}" for title, width in COLUMNS))
    results = []
    for case in tqdm(cases, unit=" cases", leave=False):
        results.append(compare(*case, options.repeats, device))
        tqdm.write(row(results[-1]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    options.output.write_text(json.dumps({**settings, "results": results}, indent=2) + "\n")
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
