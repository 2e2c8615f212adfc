"""Trainers for the tests, and what they changed."""

import torch

from ett.train import ETTCollator, ETTTrainer


def make_trainer(model, args, items, predicts_codes=False, **kwargs):
    collator = ETTCollator(predicts_codes=predicts_codes)
    return ETTTrainer(model=model, args=args, train_dataset=items, data_collator=collator, **kwargs)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def timeless(history):
    """What was logged, less rates and the last entry, which has durations."""
    entries = [entry for entry in history if "train_runtime" not in entry]
    return [{key: value for key, value in entry.items() if "per_second" not in key} for entry in entries]


def gradients_after_one_step(model, args, items):
    """With plain gradient descent of rate 1, the gradient is what the weights lost."""
    before = snapshot(model)
    make_trainer(model, args, items).train()
    return {name: before[name] - value for name, value in model.state_dict().items()}


def one_step(arguments, batch_size, accumulation, **changes):
    # The batch's mean assignment makes the entropy loss differ between one batch of four and four of one, by nature.
    return arguments(
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **{
            "optim": "sgd",
            "learning_rate": 1.0,
            "max_grad_norm": 0.0,
            "adversarial_weight": 0.0,
            "entropy_weight": 0.0,
            **changes,
        },
    )
