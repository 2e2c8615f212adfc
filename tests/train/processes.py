"""What two processes do for test_processes.py: `torchrun --nproc-per-node 2 processes.py FOLDER`, with `zero2` or
`zero3` after it under DeepSpeed. Losses are written to `results.json` in the folder, which also holds checkpoints."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, Qwen2Config

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.train import ETTCollator, ETTTrainer, ETTTrainingArguments, train_only
from ett.train.checkpointing.finite import NonFiniteLossError
from ett.train.models.adapters import add_adapter
from ett.train.recipes import LoraSection
from ett.train.sharding import find_deepspeed_config, whole_weights

STEPS = 20
STAGES = {
    "alignment": ["projector"],
    "chat": ["projector", "language_model"],
    "semantic": ["vision_tokenizer", "projector", "language_model"],
    "drawing": ["projector", "language_model", "visual_head"],
}
ADVERSARY = {"adversarial_weight": 0.1}
SHORT = {"max_steps": 4}
# Half of the rows have no image: in each step, both processes, one or neither have an image.
CHAT = {"stage": "chat", "per_device_train_batch_size": 2 // int(os.environ.get("WORLD_SIZE", 1))}


def make_model(tied: bool = True) -> ETTForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    tokenizer = IBQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=32,
        vq_embed_dim=8,
        norm_num_groups=4,
        patch_size=2,
    )
    tokens = {"image_token_id": 4, "image_start_token_id": 5, "image_end_token_id": 6, "image_size": 16}
    language_model = AutoModelForCausalLM.from_config(config)
    return ETTForConditionalGeneration.from_parts(language_model, tokenizer, visual_head=True, **tokens)


def make_items(stage: str) -> list[dict]:
    predicts_codes = stage == "drawing"
    generator = torch.Generator().manual_seed(0)
    items = []
    for index in range(16):
        words = torch.randint(10, 40, (1 + 3 * index % 5,), generator=generator).tolist()
        ids = [*words, 5, *[4] * 16] if predicts_codes else [5, *[4] * 16, 6, *words]
        pixels = torch.randint(0, 256, (1, 3, 16, 16), generator=generator, dtype=torch.uint8)
        labels = [-100] * (len(ids) - len(words)) + words
        image = {"image_codes": pixels[:, 0, ::4, ::4].long() % 32} if predicts_codes else {"pixel_values": pixels}
        items.append({"input_ids": ids, "labels": labels, **image})
    if stage == "chat":
        items[1::2] = [{"input_ids": [7, *words], "labels": [-100, *words]} for words in map(answer, items[1::2])]
    return items


def answer(item: dict) -> list[int]:
    return [label for label in item["labels"] if label != -100]


def make_trainer(folder: Path, stage: str, tied: bool = True, lora: bool = False, **changes) -> ETTTrainer:
    fields = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", 1)),
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "perceptual_weight": 0.0,
        "adversarial_weight": 0.0,
        # Of the mean assignment in a process's own images, which differs between one process and two.
        "entropy_weight": 0.0,
        "discriminator_width": 8,
        "discriminator_layers": 1,
        "seed": 3,
    }
    if "deepspeed" in changes:
        # Accelerate knows DeepSpeed on accelerators only.
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True).distributed_type = DistributedType.DEEPSPEED
        fields["accelerator_config"] = {"use_configured_state": True}
    args = ETTTrainingArguments(output_dir=str(folder), **{**fields, **changes})
    if args.fsdp:
        # Accelerate knows FSDP2 on accelerators only.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    model = make_model(tied)
    if lora:
        add_adapter(model, LoraSection(rank=4))
    train_only(model, STAGES[stage])
    predicts_codes = stage == "drawing"
    collator = ETTCollator(predicts_codes=predicts_codes)
    trainer = ETTTrainer(model=model, args=args, train_dataset=make_items(stage), data_collator=collator)
    assert bool(args.fsdp) == trainer.accelerator.is_fsdp2
    assert bool(args.deepspeed) == trainer.is_deepspeed_enabled
    return trainer


def train(folder: Path, stage: str, resume: str | None = None, **options) -> ETTTrainer:
    """A run of the stage: its trainer, after training."""
    trainer = make_trainer(folder, stage, **options)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.args.fsdp:
        assert all(isinstance(layer, FSDPModule) for layer in trainer.model.model.language_model.layers)
    return trainer


def curve(trainer: ETTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def in_one_piece(root: Path) -> dict[str, list[float]]:
    results = {stage: curve(train(root / stage, stage)) for stage in ("alignment", "semantic", "drawing")}
    results["chat"] = saved_curve(train(root / "chat", **CHAT, **SHORT), root / "chat.pt")
    results["adversary"] = curve(train(root / "adversary", "semantic", **ADVERSARY, **SHORT))
    results["lecam"] = lecam_means(root / "lecam")
    return results


def saved_curve(trainer: ETTTrainer, path: Path) -> list[float]:
    """The losses; the weights are saved at the path."""
    gathered = whole_weights(trainer)
    weights = trainer.model.state_dict() if gathered is None else gathered
    if PartialState().is_main_process:
        torch.save(weights, path)
    return curve(trainer)


def lecam_means(folder: Path) -> list[float]:
    """LeCAM's running means after a step of four images: one batch in one process, or two micro-batches in each of two
    processes."""
    # Without batch norm, which takes its statistics from the micro-batch of a process.
    options = {**ADVERSARY, "discriminator_layers": 0, "max_steps": 1}
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = 1 if world_size == 1 else 2
    options |= {"gradient_accumulation_steps": accumulation}
    options |= {"per_device_train_batch_size": 4 // (world_size * accumulation)}
    discriminator = train(folder, "semantic", **options).adversary.discriminator
    return [discriminator.lecam_real.item(), discriminator.lecam_fake.item()]


def in_shards(root: Path) -> dict[str, list[float]]:
    """Runs under FSDP2, and those under DDP that they are compared with."""
    results = {}
    for stage in ("alignment", "semantic"):
        results[f"fsdp {stage}"] = curve(train(root / f"fsdp-{stage}", stage, fsdp=True, **SHORT))
    variants = {"untied": {"stage": "semantic", "tied": False}, "lora": {"stage": "drawing", "lora": True}}
    variants["half"] = {"stage": "alignment", "bf16": True}
    for name, options in variants.items():
        results[name] = curve(train(root / name, **options, **SHORT))
        results[f"fsdp {name}"] = curve(train(root / f"fsdp-{name}", **options, fsdp=True, **SHORT))
    checkpointed = {**CHAT, **SHORT, "gradient_checkpointing": True}
    for name, options in {"checkpointed chat": {}, "fsdp checkpointed chat": {"fsdp": True}}.items():
        results[name] = saved_curve(train(root / name, **checkpointed, **options), root / f"{name}.pt")
    for kind in ("FULL", "SHARDED"):
        results |= resumed_in_shards(root, kind)
    return results


def resumed_in_shards(root: Path, kind: str) -> dict[str, list[float]]:
    def run_to_the_end(folder: Path, resume: str | None = None) -> ETTTrainer:
        saving = {"ema_decay": 0.9, "save_strategy": "steps", "save_steps": 2}
        state_dict_type = {"fsdp": True, "fsdp_config": {"state_dict_type": f"{kind}_STATE_DICT"}}
        return train(folder, "semantic", resume, **saving, **state_dict_type, **ADVERSARY, **SHORT)

    folder = root / f"fsdp-{kind}"
    whole = run_to_the_end(folder)
    again = run_to_the_end(root / f"fsdp-{kind}-again", str(folder / "checkpoint-2"))
    pairs = zip(whole.average.weights.values(), again.average.weights.values(), strict=True)
    same_average = all(torch.equal(one.to_local(), other.to_local()) for one, other in pairs)
    weights = whole_weights(whole)
    if PartialState().is_main_process:
        torch.save(weights, root / f"{kind}.pt")
    return {
        f"fsdp {kind} whole": curve(whole),
        f"fsdp {kind} resumed": curve(again),
        f"fsdp {kind} same average": same_average,
    }


def figures(trainer: ETTTrainer) -> dict[str, list[float]]:
    """Losses and gradient norms, step by step."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [step[name] for step in steps] for name in steps[0] if name == "loss" or "norm" in name}


def under_deepspeed(root: Path, name: str) -> dict[str, Any]:
    """Runs under DeepSpeed, and those under DDP that they are compared with."""
    import deepspeed

    # Compiled when it is first used, which takes longer than all runs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sharded = {"deepspeed": find_deepspeed_config(name)}
    saving = {"save_strategy": "steps", "save_steps": 2}
    variants = {
        "adversary": {"stage": "semantic", **ADVERSARY},
        "alignment": {"stage": "alignment"},
        "lora": {"stage": "drawing", "lora": True},
        "half": {"stage": "alignment", "bf16": True},
    }
    results = {}
    for variant, options in variants.items():
        results[f"ddp {variant}"] = figures(train(root / "ddp" / variant, **options, **SHORT))
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    for variant, options in variants.items():
        folder = root / name / variant
        trainer = train(folder, **options, **SHORT, **saving, **sharded)
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
        results[variant] = figures(trainer)
        if variant not in ("adversary", "lora"):
            continue
        again = train(folder / "again", resume=str(folder / "checkpoint-2"), **options, **SHORT, **saving, **sharded)
        pairs = [whole_weights(each) for each in (trainer, again)]
        results[f"{variant} resumed"] = figures(again)
        if PartialState().is_main_process:
            torch.save(pairs, folder / "weights.pt")
    results["broken"] = broken(root / "broken", **sharded)
    return results


def broken(folder: Path, **sharded) -> dict[str, Any]:
    """A run whose first gradients are no numbers, in one process."""
    trainer = make_trainer(folder, "semantic", **SHORT, **sharded)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    if PartialState().is_last_process:
        trainer.model.model.projector.register_forward_hook(
            lambda module, inputs, output: output.register_hook(lambda gradient: gradient * math.nan) and None
        )
    try:
        trainer.train()
    except NonFiniteLossError as error:
        weights = whole_weights(trainer)
        is_same = weights is not None and all(torch.equal(weights[name], before[name]) for name in before)
        return {"message": str(error), "weights stay": is_same}


def main(root: Path, deepspeed: str | None = None):
    # Accelerate names the CPU as if it were an accelerator, by a number, which torch cannot load from.
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, place: storage if place == "cpu:0" else None
    )
    results = in_one_piece(root) | in_shards(root) if deepspeed is None else under_deepspeed(root, deepspeed)
    if PartialState().is_main_process:
        (root / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
