"""The adversary beside the trainer: whose gradients are whose, its own step, schedule, start and weight."""

import pytest
import torch

from ett.train import train_only
from ett.train.objective.adversary import adaptive_weight

from .trainers import changed, gradients_after_one_step, make_trainer, one_step, snapshot


def test_the_discriminator_moves_in_its_own_step(make_vision_tokenizer, arguments, make_items):
    trainer = make_trainer(make_vision_tokenizer(), arguments(), make_items())
    before = snapshot(trainer.adversary.discriminator)
    trainer.train()
    assert changed(before, trainer.adversary.discriminator) == set(before)


def test_the_generators_loss_gives_the_discriminator_no_gradient(make_vision_tokenizer, arguments, make_items):
    trainer = make_trainer(make_vision_tokenizer(), arguments(), make_items())
    reconstruction = torch.rand(2, 3, 16, 16, requires_grad=True)
    trainer.adversary.fool(reconstruction).backward()
    assert reconstruction.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in trainer.adversary.discriminator.parameters())
    assert all(parameter.requires_grad for parameter in trainer.adversary.discriminator.parameters())


def test_the_discriminators_loss_gives_the_generator_no_gradient(make_vision_tokenizer, arguments, make_items):
    """Without a weight in the loss, the adversary alone must not move the tokenizer."""
    updates = []
    for weight in (1e-30, 0.0):
        args = one_step(arguments, 4, 1, adversarial_weight=weight)
        updates.append(gradients_after_one_step(make_vision_tokenizer(), args, make_items()))
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-5, atol=1e-6)


def test_the_discriminator_steps_once_for_all_accumulated_batches(make_vision_tokenizer, arguments, make_items):
    args = arguments(max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    trainer = make_trainer(make_vision_tokenizer(), args, make_items())
    trainer.train()
    steps = {state["step"].item() for state in trainer.adversary.optimizer.state_dict()["state"].values()}
    assert steps == {1}


def test_accumulation_does_not_change_the_update_of_either_player(make_vision_tokenizer, arguments, make_items):
    """Without BatchNorm and LeCAM, which take their statistics from a micro-batch."""
    plain = {"adversarial_weight": 1.0, "discriminator_layers": 0, "lecam_weight": 0.0}
    updates = []
    for sizes in ((4, 1), (1, 4)):
        tokenizer = make_vision_tokenizer()
        before = snapshot(tokenizer)
        trainer = make_trainer(tokenizer, one_step(arguments, *sizes, **plain), make_items())
        trainer.adversary.step = lambda: torch.zeros(())
        trainer.train()
        gradients = {f"d.{n}": p.grad for n, p in trainer.adversary.discriminator.named_parameters()}
        updates.append(gradients | {n: before[n] - value for n, value in tokenizer.state_dict().items()})
    assert updates[0]["d.main.0.weight"].abs().max() > 1e-5
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_accumulation_does_not_change_lecams_running_means(make_vision_tokenizer, arguments, make_items, steps):
    """Without batch norm, which takes its statistics from a micro-batch. The learning rate of 0 keeps the logits."""
    means = []
    for sizes in ((4, 1), (1, 4)):
        changes = {"adversarial_weight": 1.0, "discriminator_layers": 0, "learning_rate": 0.0}
        args = one_step(arguments, *sizes, **changes)
        args.max_steps = steps
        trainer = make_trainer(make_vision_tokenizer(), args, make_items())
        trainer.train()
        discriminator = trainer.adversary.discriminator
        means.append((discriminator.lecam_real.item(), discriminator.lecam_fake.item()))
    assert means[1] == pytest.approx(means[0], rel=1e-5)
    moved = 1 - 0.999**steps
    logged = trainer.state.log_history[0]
    assert means[1] == pytest.approx((moved * logged["real_logits"], moved * logged["fake_logits"]), rel=1e-4)


def test_the_discriminator_has_a_schedule_and_a_clipping_of_its_own(make_vision_tokenizer, arguments, make_items):
    args = arguments(
        max_steps=4,
        discriminator_start_step=2,
        discriminator_learning_rate=0.5,
        discriminator_lr_scheduler_type="linear",
        discriminator_max_grad_norm=1e-9,
    )
    trainer = make_trainer(make_vision_tokenizer(), args, make_items())
    rates, step = [], trainer.adversary.step
    trainer.adversary.step = lambda: rates.append(trainer.adversary.scheduler.get_last_lr()) or step()
    before = trainer.adversary.discriminator.main[0].weight.detach().clone()
    trainer.train()
    assert rates == [[0.5], [0.25]]
    assert args.discriminator_max_grad_norm == 1e-9 and args.max_grad_norm == 1.0
    # Adam moves by the rate however small a gradient is, unless its epsilon is larger still.
    assert (trainer.adversary.discriminator.main[0].weight - before).abs().max() < 0.1


def test_the_adaptive_weight_balances_gradients_at_the_last_layer():
    layer = torch.nn.Linear(3, 2, bias=False)
    output = layer(torch.ones(4, 3)).mean()
    weight = adaptive_weight(6 * output, 2 * output, layer)
    torch.testing.assert_close(weight, torch.tensor(3.0), rtol=1e-3, atol=0)
    assert not weight.requires_grad
    assert adaptive_weight(output, 0 * output, layer).item() <= 1e4


def test_an_adaptive_weight_multiplies_the_fixed_one(make_vision_tokenizer, arguments, make_items):
    def update(**weights):
        tokenizer = make_vision_tokenizer()
        before, trainer = snapshot(tokenizer), make_trainer(tokenizer, one_step(arguments, 4, 1, **weights), items)
        trainer.train()
        return trainer, {name: before[name] - value for name, value in tokenizer.state_dict().items()}

    items = make_items()
    trainer, adaptive = update(adversarial_weight=0.5, adaptive_adversarial_weight=True)
    balance = trainer.state.log_history[0]["adversarial_balance"]
    assert abs(balance - 1) > 0.1
    torch.testing.assert_close(adaptive, update(adversarial_weight=0.5 * balance)[1], rtol=1e-4, atol=1e-5)


def test_critics_see_a_part_of_the_batch_where_told_so(make_vision_tokenizer, arguments, make_items):
    args = arguments(max_steps=1, per_device_train_batch_size=4, critics_batch_size=2)
    trainer = make_trainer(make_vision_tokenizer(), args, make_items())
    sizes = []

    def see(module, inputs):
        # FLOPs are counted on images without data.
        if not inputs[0].is_meta:
            sizes.append(len(inputs[0]))

    class Perceptual(torch.nn.Module):
        def forward(self, pixels, reconstruction):
            return pixels.new_zeros(len(reconstruction))

    trainer.vq_loss.perceptual = Perceptual()
    for critic in (trainer.adversary.discriminator, trainer.vq_loss.perceptual):
        critic.register_forward_pre_hook(see)
    trainer.train()
    assert sizes == [2, 2, 2, 2]


def test_the_discriminator_waits_for_its_first_step(make_vision_tokenizer, arguments, make_items):
    trainer = make_trainer(make_vision_tokenizer(), arguments(discriminator_start_step=1), make_items())
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "vq_loss" in entry]
    assert "adversarial_loss" not in first and "discriminator_loss" not in first
    assert "adversarial_loss" in second and "discriminator_loss" in second


def test_a_discriminator_that_warms_up_learns_and_gives_the_generator_no_gradient(
    make_vision_tokenizer, arguments, make_items
):
    updates = []
    for changes in ({"adversarial_weight": 1.0, "discriminator_warmup_steps": 1}, {"adversarial_weight": 0.0}):
        tokenizer = make_vision_tokenizer()
        before = snapshot(tokenizer)
        trainer = make_trainer(tokenizer, one_step(arguments, 4, 1, **changes), make_items())
        discriminator = trainer.adversary and snapshot(trainer.adversary.discriminator)
        trainer.train()
        if discriminator:
            assert changed(discriminator, trainer.adversary.discriminator) == set(discriminator)
        updates.append({name: before[name] - value for name, value in tokenizer.state_dict().items()})
    torch.testing.assert_close(updates[0], updates[1], rtol=0, atol=0)


def test_the_adversarial_loss_counts_once_the_discriminator_has_warmed_up(
    make_vision_tokenizer, arguments, make_items
):
    """It starts at step 1 and warms up for one step."""
    args = arguments(max_steps=3, discriminator_start_step=1, discriminator_warmup_steps=1)
    trainer = make_trainer(make_vision_tokenizer(), args, make_items())
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "vq_loss" in entry]
    assert ["discriminator_loss" in step for step in steps] == [False, True, True]
    assert ["adversarial_loss" in step for step in steps] == [False, False, True]


def test_a_negative_warm_up_is_an_error(arguments):
    with pytest.raises(ValueError, match="discriminator_warmup_steps is -1; expected a number of steps, or 0"):
        arguments(discriminator_warmup_steps=-1)


@pytest.mark.parametrize(
    ("parts", "weights"),
    [(["projector"], {}), (["vision_tokenizer", "projector"], {"adversarial_weight": 0.0})],
    ids=["frozen tokenizer", "no weight"],
)
def test_no_discriminator_where_none_is_needed(make_model, arguments, make_items, parts, weights):
    model = make_model()
    train_only(model, parts)
    assert make_trainer(model, arguments(**weights), make_items()).adversary is None
