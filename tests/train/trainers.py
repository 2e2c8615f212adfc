"""Trainers for the tests, and what they changed."""

import torch

from train import ETTCollator, ETTTrainer


def make_trainer(model, args, items, is_drawing=False, **kwargs):
    collator = ETTCollator(is_drawing=is_drawing)
    return ETTTrainer(model=model, args=args, train_dataset=items, data_collator=collator, **kwargs)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def timeless(history):
    """What was logged, less rates and the last entry, which has durations."""
    entries = [entry for entry in history if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if "per_second" not in key} for entry in entries]
