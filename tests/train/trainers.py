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
