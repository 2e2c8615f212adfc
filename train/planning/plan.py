"""What a run would do and need, told before it: nothing is written, and no weight is loaded."""

import dataclasses
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ett.common_ett.lpips import random_lpips
from ett.common_ett.model_folders import require_model_folder
from ett.data_ett.image_rows import read_rows, reading
from ett.data_ett.tars import TarRows, find_tars
from ett.data_ett.tasks import Task
from ett.modeling_ett.configuration_ett import ETTConfig
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.processing_ett import build_word_tokenizer

from ..arguments import ETTTrainingArguments, accumulation_steps
from ..consistency import check_recipe, settled_recipe
from ..examples import build_examples, source_section
from ..models.adapters import add_adapter, check_adapter, has_adapter, is_adapter_weight
from ..models.building import check_visual_embedding, new_language_model, require_parts, tokenizer_fields
from ..models.quantization import check_quantization
from ..muon import hidden_matrices
from ..objective.discriminator import PatchDiscriminator
from ..objective.starting_point import DiscriminatorStart, find_discriminator
from ..parts import model_parts, train_only
from ..recipes import NEW_MODEL, DataSection, Recipe, load_recipe
from ..run import training_arguments
from .flops import StepFlops, peak_flops
from .footprint import activation_bytes

TEXT_TOKENS = 128
MOST_COUNTED = 200_000
NO_EXAMPLES = "none that can be read"
ASSUMED_UTILIZATION = 0.4
GIB = 2**30
# 4 bits, and the scales of 64 weights in 8 bits, theirs of 256 in 32.
BYTES_IN_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass
class Plan:
    """
    Args:
        recipe: With every default.
        parts: Number of parameters of each part, and whether it trains.
        devices: How many share a step.
        batch_size: Examples that a device takes at once.
        accumulation: Batches of a device in a step.
        text_tokens: Tokens of text that an example is taken to have.
        positions: Tokens of an example together, those of its image included.
        examples: Number of examples, or why it is not known.
        steps: Steps of the run, where known.
        memory: Bytes on each device by what they hold, where nothing is sharded.
        checkpoint: Bytes of one checkpoint on the disk.
        discriminator: What the discriminator starts from, or None for a stage without one.
        step_flops: Model FLOPs of a step on all devices together.
        peak: FLOP/s of a device, where known.
    """

    recipe: Recipe
    parts: dict[str, tuple[int, bool]]
    devices: int
    batch_size: int
    accumulation: int
    text_tokens: int
    positions: int
    examples: int | str
    steps: int | None
    memory: dict[str, int]
    checkpoint: int
    discriminator: DiscriminatorStart | None
    step_flops: float
    peak: float | None

    @property
    def step_examples(self) -> int:
        """Examples of a step."""
        return self.batch_size * self.accumulation * self.devices

    def bytes_of_device(self, sharded: tuple[str, ...] = ()) -> int:
        """Memory on each device where `sharded` kinds of it are divided among all."""
        return sum(size // self.devices if kind in sharded else size for kind, size in self.memory.items())

    def report(self) -> str:
        """The plan for people: the resolved recipe as YAML, and what follows from it as comments below."""
        resolved = yaml.safe_dump(dataclasses.asdict(self.recipe), sort_keys=False, allow_unicode=True)
        blocks = [self._parts(), self._steps(), self._memory()]
        if self.discriminator is not None:
            blocks.insert(1, ["Discriminator", *(f"  {line}" for line in self.discriminator.describe())])
        return resolved + "\n" + "\n".join(f"# {line}".rstrip() for block in blocks for line in (*block, ""))

    def _parts(self) -> list[str]:
        rows = [
            (part, f"{count:,}", "trained" if trained else "frozen") for part, (count, trained) in self.parts.items()
        ]
        trained = sum(count for count, trained in self.parts.values() if trained)
        total = sum(count for count, _ in self.parts.values())
        return ["Parameters", *_table(rows), f"  {trained:,} of {total:,} are trained."]

    def _steps(self) -> list[str]:
        rows = [
            (
                "examples a step",
                f"{self.step_examples:,}",
                f"{self.batch_size} x {self.accumulation} x {self.devices} (at once x accumulation x devices)",
            ),
            (
                "tokens a step",
                f"{self.step_examples * self.positions:,}",
                f"{self.positions:,} an example, of which {self.text_tokens} of text are assumed"
                if self.text_tokens
                else f"{self.positions:,} codes an example",
            ),
            ("examples", self.examples if isinstance(self.examples, str) else f"{self.examples:,}", ""),
            ("steps", "not known" if self.steps is None else f"{self.steps:,}", self._epochs()),
            ("model FLOPs a step", f"{self.step_flops:.3g}", self._time()),
        ]
        return ["Steps", *_table(rows)]

    def _epochs(self) -> str:
        if self.steps is None or isinstance(self.examples, str):
            return ""
        return f"{self.steps * self.step_examples / self.examples:.2f} epochs"

    def _time(self) -> str:
        if self.peak is None:
            return "(give training.peak_flops, FLOP/s of a device, for the time)"
        seconds = self.step_flops / (self.devices * self.peak * ASSUMED_UTILIZATION)
        whole = "" if self.steps is None else f", {seconds * self.steps / 3600:,.1f} hours in all"
        return f"{seconds:,.2f} s a step{whole}, if {ASSUMED_UTILIZATION:.0%} of {self.peak:.3g} FLOP/s are reached"

    def _memory(self) -> list[str]:
        rows = [(kind, _gib(size), "") for kind, size in self.memory.items()]
        rows.append(("together", _gib(self.bytes_of_device()), "on each device"))
        if self.devices > 1:
            shards = ("optimizer", "gradients", "weights", "average")
            rows.append(("with ZeRO-2", _gib(self.bytes_of_device((*shards[:2], "DDP's buckets"))), ""))
            rows.append(("with FSDP2 or ZeRO-3", _gib(self.bytes_of_device((*shards, "DDP's buckets"))), ""))
        rows.append(("a checkpoint", _gib(self.checkpoint), "on the disk"))
        return ["Memory, estimated (see train/planning/plan.py and train/planning/footprint.py)", *_table(rows)]


def plan_recipe(
    name: str, overrides: list[str] | None = None, devices: int | None = None, text_tokens: int = TEXT_TOKENS
) -> Plan:
    """
    Works out a run without beginning it.

    Memory on a device, in bytes: 4 for each weight in float32 (0.52 for those in 4 bits), 4 for each trained one's
    gradient, 8 for its Adam state (4 where Muon moves it), 4 for each weight's moving average, 4 for each trained
    weight in DDP's buckets on several devices, and the peaks of [`activation_bytes`], casts of weights to half
    precision included.

    Args:
        name, overrides: As in [`run_recipe`].
        devices: Devices to plan for, by default those that are here.
        text_tokens: Tokens of text that an example is taken to have.

    Raises:
        ValueError: The recipe or its model cannot be used, or `dataloader_drop_last` leaves no batch. What is missing
            of the data is said in the plan.
    """
    recipe = load_recipe(name, overrides)
    check_recipe(recipe)
    check_adapter(recipe)
    check_quantization(recipe)
    seed = recipe.training.get("seed", 0)
    # The number of devices is the plan's, not this machine's.
    settings = {**recipe.training, "global_batch_size": None}
    args = training_arguments(dataclasses.replace(recipe, training=_on_this_machine(settings)), Path("unused"), seed)
    if devices is None:
        devices = max(1, torch.cuda.device_count())
    elif devices < 1:
        raise ValueError(f"--devices is {devices}; expected 1 or more.")
    batch_size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if recipe.training.get("global_batch_size") is not None:
        accumulation = accumulation_steps(recipe.training["global_batch_size"], batch_size, devices)

    check_visual_embedding(recipe)
    model = model_without_weights(recipe, seed)
    recipe = settled_recipe(recipe, model)
    if recipe.lora.rank is not None:
        add_adapter(model, recipe.lora)
    parts = train_only(model, recipe.train)
    is_tokenizer = isinstance(model, IBQModel)
    tokenizer = model if is_tokenizer else model.model.vision_tokenizer
    image_size = (
        recipe.model.of_new("image_size") if is_tokenizer or recipe.model.path is None else model.config.image_size
    )
    codes = 0 if not recipe.learns.has_images else (image_size // tokenizer.spatial_factor) ** 2
    text_tokens = 0 if is_tokenizer else text_tokens

    perceptual, discriminator = critics(model, args)
    examples = count_examples(recipe.data)
    if not (recipe.data.streaming or isinstance(examples, str)):
        args.check_samples(examples, devices)
    steps = count_steps(args, examples, batch_size * devices, accumulation)
    flops = StepFlops(model, perceptual, discriminator)
    return Plan(
        recipe=recipe,
        parts=parts,
        devices=devices,
        batch_size=batch_size,
        accumulation=accumulation,
        text_tokens=text_tokens,
        positions=codes if is_tokenizer else text_tokens + (codes + 2 if codes else 0),
        examples=examples,
        steps=steps,
        memory=memory_of(
            model, args, devices, image_size, text_tokens, perceptual, discriminator, recipe.model.load_in_4bit
        ),
        checkpoint=checkpoint_bytes(model, args, discriminator),
        discriminator=find_discriminator(recipe, args),
        step_flops=batch_size
        * accumulation
        * devices
        * example_flops(flops, recipe.learns, image_size, codes, text_tokens),
        peak=args.peak_flops or (peak_flops(torch.device("cuda")) if torch.cuda.is_available() else None),
    )


def _on_this_machine(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without what a machine must have: half precision is planned for, too, where it could not run."""
    return settings if torch.cuda.is_available() else {**settings, "use_cpu": True}


# The model


def model_without_weights(recipe: Recipe, seed: int = 0) -> IBQModel | ETTForConditionalGeneration:
    """The model that training would start from, on the meta device; of folders, `config.json` alone is read.

    Raises:
        ValueError: A folder holds no such model, or a configuration is out of reach.
    """
    section = recipe.model
    text_tokenizer = None
    if not recipe.learns.is_of_tokenizer and section.path is None:
        require_parts(section)
        if isinstance(section.language_model, dict):
            # Not on the meta device, since filters look at images.
            examples = build_examples(recipe, seed)
            text_tokenizer = build_word_tokenizer(examples.texts(), examples.spelled())
    with torch.device("meta"):
        if recipe.learns.is_of_tokenizer:
            fields = _tokenizer_fields(section.path or section.vision_tokenizer)
            size = section.codebook_size
            return IBQModel.from_config({**fields, **({"num_vq_embeddings": size} if size else {})})
        if section.path is not None:
            require_model_folder(section.path, "ett")
            config = _reachable(ETTConfig, section.path)
            config.visual_head = config.visual_head or bool(section.visual_head)
            return ETTForConditionalGeneration(config)
        if text_tokenizer is not None:
            text_config = new_language_model(section.language_model, text_tokenizer).config
        else:
            text_config = _reachable(AutoConfig, section.language_model)
            text_config = AutoModelForCausalLM.from_config(text_config).config
        return ETTForConditionalGeneration(
            ETTConfig(
                text_config=text_config.to_dict(),
                vq_config=_tokenizer_fields(section.vision_tokenizer),
                **{name: section.of_new(name) for name in NEW_MODEL},
            )
        )


def _tokenizer_fields(source: str | dict[str, Any] | None) -> dict[str, Any]:
    if not isinstance(source, str):
        return tokenizer_fields(source or {})
    require_model_folder(source, "IBQModel")
    try:
        found = IBQModel.load_config(source)
    except OSError as error:
        raise _out_of_reach(source) from error
    return {name: value for name, value in found.items() if not name.startswith("_")}


def _reachable(config_class: Any, source: str) -> Any:
    try:
        return config_class.from_pretrained(source)
    except OSError as error:
        raise _out_of_reach(source) from error


def _out_of_reach(source: str) -> ValueError:
    return ValueError(
        f"The configuration of '{source}' is no folder here, not in the cache, and the Hub does not give it; give a "
        "folder, or run once with a network connection."
    )


def critics(model: nn.Module, args: ETTTrainingArguments) -> tuple[nn.Module | None, PatchDiscriminator | None]:
    """LPIPS and discriminator on the meta device, where the tokenizer learns and has them."""
    parts = model_parts(model)
    learns = any(parameter.requires_grad for parameter in parts["vision_tokenizer"])
    perceptual = discriminator = None
    if learns and args.perceptual_weight:
        perceptual = random_lpips(args.perceptual_network).requires_grad_(False).to("meta")
    if learns and args.adversarial_weight:
        with torch.device("meta"):
            discriminator = PatchDiscriminator(3, args.discriminator_width, args.discriminator_layers)
    return perceptual, discriminator


# Data and steps


def count_examples(data: DataSection) -> int | str:
    """Number of examples, or why it is not known. Rows of local data are counted, without a copy of them, up to a
    limit."""
    if data.mixture:
        counts = {name: count_examples(source_section(data, entry)) for name, entry in data.mixture.items()}
        unknown = [f"{name}: {count}" for name, count in counts.items() if isinstance(count, str)]
        return "; ".join(unknown) if unknown else sum(counts.values())
    if data.source is None:
        return "not given (data.source)"
    if data.source == "scenes":
        return data.length
    if data.streaming:
        return "streamed, without an end"
    if not (Path(data.source).exists() or "*" in data.source):
        return "not counted (not on this machine)"
    try:
        if tars := find_tars(data.source):
            return len(TarRows(tars)) or NO_EXAMPLES
        rows = read_rows(data.source, data.split, streaming=True)
        with reading(data.source):
            count = sum(1 for _ in itertools.islice(rows, MOST_COUNTED + 1))
    except ValueError as error:
        return f"cannot be read: {error}"
    if not count:
        return NO_EXAMPLES
    return count if count <= MOST_COUNTED else f"more than {MOST_COUNTED:,}"


def count_steps(args: ETTTrainingArguments, examples: int | str, at_once: int, accumulation: int) -> int | None:
    """Steps of a run, as the trainer counts them; none where that needs the number of examples."""
    if args.max_steps > 0:
        return args.max_steps
    if isinstance(examples, str):
        return None
    batches = examples // at_once if args.dataloader_drop_last else math.ceil(examples / at_once)
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / accumulation), 1))


def example_flops(flops: StepFlops, task: Task, image_size: int, codes: int, text_tokens: int) -> float:
    """Model FLOPs of an example with one image; half of its text is taken to be predicted."""
    total = 0.0
    if codes:
        total += flops.of_image(image_size, image_size) + codes * flops.of_code
        total += flops.of_judged_image(image_size, image_size)
    if task.is_of_tokenizer:
        return total
    positions = text_tokens + (codes + 2 if codes else 0)
    total += positions * flops.of_position + positions * (positions + 1) / 2 * flops.of_pair
    return total + (codes * flops.of_code_label if task.predicts_codes else text_tokens / 2 * flops.of_label)


# Memory


def memory_of(
    model: nn.Module,
    args: ETTTrainingArguments,
    devices: int,
    image_size: int,
    text_tokens: int,
    perceptual: nn.Module | None,
    discriminator: nn.Module | None,
    in_4bit: bool = False,
) -> dict[str, int]:
    """Bytes on a device by what they hold, as [`plan_recipe`] says."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [
        parameter for critic in (perceptual, discriminator) if critic is not None for parameter in critic.parameters()
    ]
    by_muon = hidden_matrices(model) if args.muon_rate_factor is not None else []
    adversary = 0 if discriminator is None else _count(discriminator.parameters())
    rounded = matrices_in_4bit(model) if in_4bit else []
    weights = 4 * (_count(model.parameters()) + _count(others))
    memory = {
        "weights": weights - round((4 - BYTES_IN_4BIT) * _count(rounded)),
        "gradients": 4 * (_count(trained) + adversary),
        "optimizer": 8 * (_count(trained) + adversary) - 4 * _count(p for p in by_muon if p.requires_grad),
    }
    if devices > 1:
        memory["DDP's buckets"] = 4 * _count(trained)
    if args.ema_decay is not None:
        memory["average"] = 4 * _count(model.parameters())
    judges = [critic for critic in (perceptual, discriminator) if critic is not None]
    batch_size = args.per_device_train_batch_size
    if in_4bit:
        # Made whole for each product and dropped again, they are never cast and kept for the way back.
        for parameter in rounded:
            parameter.data = parameter.data.to(torch.bfloat16 if args.bf16 else torch.float32)
    found = Counter(activation_bytes(model, args, batch_size, image_size, text_tokens, judges))
    return memory | {f"activations: {part}": size for part, size in found.items()}


def matrices_in_4bit(model: ETTForConditionalGeneration) -> list[nn.Parameter]:
    """Those that `model.load_in_4bit` rounds: the language model's, without its embeddings."""
    return [
        module.weight
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear) and not is_adapter_weight(name)
    ]


def checkpoint_bytes(model: nn.Module, args: ETTTrainingArguments, discriminator: nn.Module | None) -> int:
    """Bytes of a checkpoint: weights (beside an adapter those that train), optimizer, average, discriminator."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    by_muon = hidden_matrices(model) if args.muon_rate_factor is not None else []
    weights = trained if has_adapter(model) else model.parameters()
    total = 4 * _count(weights) + 8 * _count(trained) - 4 * _count(p for p in by_muon if p.requires_grad)
    if args.ema_decay is not None:
        total += 4 * _count(model.parameters())
    return total + (12 * _count(discriminator.parameters()) if discriminator is not None else 0)


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"  {a:<{first}}  {b:>{second}}  {c}" for a, b, c in rows]


__all__ = ["Plan", "model_without_weights", "plan_recipe"]
