"""The trainer: what moves and what stays, in every stage; accumulation; logs; evaluation."""

import logging

import pytest
import torch

from ett.data_ett.preparation import replace_pixels
from ett.modeling_ett.gradient_path import measure_gradient_path
from ett.train import ETTCollator, ETTTrainingArguments, train_only
from ett.train.monitoring.figures import mean_by_name

from .trainers import changed, gradients_after_one_step, make_trainer, one_step, snapshot


def belongs(name, parts):
    part = "language_model" if name == "lm_head.weight" else name.removeprefix("model.").split(".")[0]
    return part in parts


# Stages

STAGES = {
    "alignment": (["projector"], {}, {}),
    "semantic": (["vision_tokenizer", "projector", "language_model"], {}, {}),
    "alignment, indices": (["index_embedding"], {"visual_embedding": "index"}, {}),
    "semantic, indices": (["index_embedding", "language_model"], {"visual_embedding": "index"}, {}),
    "chat": (["projector", "language_model"], {}, {"codes": True}),
    "drawing": (["projector", "language_model", "visual_head"], {}, {"codes": True}),
    "drawing, indices": (
        ["index_embedding", "language_model", "visual_head"],
        {"visual_embedding": "index"},
        {"codes": True},
    ),
    "drawing head": (["visual_head"], {}, {"codes": True}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_part_that_trains_moves_and_every_frozen_one_stays(make_model, arguments, make_items, stage):
    parts, config, items = STAGES[stage]
    model = make_model(**config)
    train_only(model, parts)
    before = snapshot(model)
    make_trainer(model, arguments(), make_items(**items), predicts_codes="drawing" in stage).train()
    assert changed(before, model) == {name for name in before if belongs(name, parts)}


def test_training_a_tokenizer_moves_all_of_it(make_vision_tokenizer, arguments, make_items):
    model = make_vision_tokenizer()
    before = snapshot(model)
    make_trainer(model, arguments(), make_items()).train()
    assert changed(before, model) == set(before)


def test_a_part_that_the_model_lacks_is_an_error(make_model):
    with pytest.raises(ValueError, match="no part vision_tower; its parts are vision_tokenizer, projector"):
        train_only(make_model(), ["projector", "vision_tower"])


def test_freezing_tells_each_parts_size_and_whether_it_trains(make_model):
    model = make_model()
    told = train_only(model, ["projector"])
    assert told["projector"] == (sum(p.numel() for p in model.model.projector.parameters()), True)
    assert told["visual_head"] == (32 * 32, False)
    assert sum(count for count, _ in told.values()) == sum(p.numel() for p in model.parameters())


def test_with_everything_frozen_training_is_an_error(make_model, arguments, make_items):
    model = make_model()
    train_only(model, [])
    with pytest.raises(ValueError, match="Nothing to train"):
        make_trainer(model, arguments(), make_items()).train()


# The objective


def test_accumulation_does_not_change_the_update_of_captions_and_images(make_model, arguments, make_items):
    items = make_items()
    assert len({len(item["input_ids"]) for item in items}) > 1, "captions of equal length would hide a wrong mean"
    updates = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = make_model()
        train_only(model, ["vision_tokenizer", "projector", "language_model"])
        updates.append(gradients_after_one_step(model, one_step(arguments, batch_size, accumulation), items))
    assert updates[0]["model.vision_tokenizer.decoder.conv_out.weight"].abs().max() > 1e-3
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-5, atol=1e-5)


def test_accumulation_does_not_change_the_update_of_drawings(make_model, arguments, make_items):
    updates = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = make_model()
        train_only(model, ["visual_head"])
        before = snapshot(model)
        args = one_step(arguments, batch_size, accumulation)
        make_trainer(model, args, make_items(codes=True), predicts_codes=True).train()
        updates.append(before["visual_head.weight"] - model.state_dict()["visual_head.weight"])
    assert updates[0].abs().max() > 1e-3
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-5, atol=1e-5)


def test_drawing_from_pixels_predicts_codes_from_their_codes(make_model, arguments, make_items):
    updates, losses = [], []
    for has_codes in (False, True):
        model, items = make_model(), make_items()
        train_only(model, ["visual_head", "projector"])
        if has_codes:
            replace_pixels(items, model.model.vision_tokenizer.eval())
        before, trainer = snapshot(model), make_trainer(model, one_step(arguments, 2, 2), items, predicts_codes=True)
        trainer.train()
        updates.append({name: before[name] - value for name, value in model.state_dict().items()})
        losses.append(trainer.state.log_history[0]["drawing_loss"])
    assert updates[0]["visual_head.weight"].abs().max() > 1e-4
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-5, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0] > 3


def test_accumulation_does_not_change_the_update_of_a_tokenizer(make_vision_tokenizer, arguments, make_items):
    updates = [
        gradients_after_one_step(make_vision_tokenizer(), one_step(arguments, *sizes), make_items())
        for sizes in ((4, 1), (1, 4))
    ]
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-5, atol=1e-5)


def test_the_objective_is_the_caption_loss_plus_alpha_times_the_weighted_terms(make_model, arguments, make_items):
    """Equation 3 written out for one batch, by its gradient."""
    items = make_items()
    weights = {"alpha": 0.7, "squared_error_weight": 1.5, "quantization_weight": 2.0, "entropy_weight": 0.3}
    parts = ["vision_tokenizer", "projector", "language_model"]
    model, reference = make_model(), make_model()
    for each in (model, reference):
        train_only(each, parts)
    update = gradients_after_one_step(model, one_step(arguments, 4, 1, **weights), items)
    # Batches come shuffled; only the mean assignment of the whole batch could depend on order, and it does not.
    batch = ETTCollator()(items)
    output = reference.train()(**batch, return_reconstruction=True)
    vq_loss = (
        (output.reconstruction - batch["pixel_values"]).abs().mean()
        + 1.5 * (output.reconstruction - batch["pixel_values"]).square().mean()
        + 2.0 * output.quantized.quantization_loss
        + 0.3 * output.quantized.entropy_loss
    )
    (output.loss + 0.7 * vq_loss).backward()
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(update[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_under_bfloat16_all_losses_of_the_tokenizer_are_in_single_precision(make_model, arguments, make_items):
    seen = {}
    model = make_model()
    train_only(model, ["vision_tokenizer", "projector", "language_model"])
    trainer = make_trainer(model, arguments(bf16=True, max_steps=1, per_device_train_batch_size=4), make_items())
    vq_loss, trainer.vq_loss = trainer.vq_loss, lambda *inputs: seen.update(inputs=inputs) or vq_loss(*inputs)
    trainer.vq_loss.perceptual = None
    record, trainer._record = trainer._record, lambda name, value: seen.update({name: value}) or record(name, value)
    trainer.train()
    pixels, reconstruction, quantized, *_ = seen.pop("inputs")
    assert pixels.dtype == reconstruction.dtype == torch.float32
    assert torch.equal(reconstruction, reconstruction.bfloat16().float()), "the networks are in half precision"
    assert quantized.quantization_loss.dtype == quantized.entropy_loss.dtype == torch.float32
    assert {value.dtype for value in seen.values()} == {torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.adversary.discriminator.parameters())


def test_a_tokenizer_alone_learns_under_bfloat16(make_vision_tokenizer, arguments, make_items):
    losses = []
    for bf16 in (True, False):
        trainer = make_trainer(make_vision_tokenizer(), arguments(bf16=bf16, max_steps=1), make_items())
        trainer.train()
        losses.append(trainer.state.log_history[0]["vq_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_checkpointing_of_activations_in_both_halves_changes_no_update(make_model, arguments, make_items):
    updates = []
    for checkpointing in (False, True):
        model = make_model()
        train_only(model, ["vision_tokenizer", "projector", "language_model"])
        args = one_step(arguments, 2, 2, gradient_checkpointing=checkpointing)
        updates.append(gradients_after_one_step(model, args, make_items()))
        modules = (model.model.vision_tokenizer.encoder, model.model.vision_tokenizer.decoder)
        assert {module.gradient_checkpointing for module in modules} == {checkpointing}
        assert model.model.language_model.layers[0].gradient_checkpointing is checkpointing
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-5, atol=1e-6)


def test_alpha_zero_leaves_the_caption_loss_alone(make_model, arguments, make_items):
    model = make_model()
    train_only(model, ["vision_tokenizer", "projector", "language_model"])
    update = gradients_after_one_step(model, one_step(arguments, 4, 1, alpha=0.0), make_items())
    assert not update["model.vision_tokenizer.decoder.conv_out.weight"].any()
    assert update["model.vision_tokenizer.encoder.conv_in.weight"].any()


def test_cut_off_from_captions_the_tokenizer_learns_by_alpha_times_the_vq_loss_alone(
    make_model, arguments, make_items
):
    batch = ETTCollator()(make_items())
    gradients = {}
    for kind in ("whole", "cut", "vq loss"):
        model = make_model().train()
        train_only(model, ["vision_tokenizer", "projector", "language_model"])
        args = one_step(arguments, 4, 1, alpha=0.7, entropy_weight=0.3, caption_gradient_to_tokenizer=kind == "whole")
        trainer = make_trainer(model, args, make_items())
        trainer.get_batch_samples(iter([batch]), 1, args.device)
        if kind == "vq loss":
            output = model(**batch, return_reconstruction=True)
            loss = 0.7 * trainer.vq_loss(batch["pixel_values"], output.reconstruction, output.quantized, 0)[0]
        else:
            loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        gradients[kind] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients["cut"].items():
        if gradient is not None:
            expected = gradients["vq loss" if "vision_tokenizer" in name else "whole"][name]
            assert torch.equal(gradient, expected), name
    encoder = "model.vision_tokenizer.encoder.conv_in.weight"
    assert not torch.equal(gradients["whole"][encoder], gradients["cut"][encoder])


# Optimizer


def test_parts_have_their_own_learning_rates(make_model, arguments, make_items):
    model = make_model()
    train_only(model, ["projector", "language_model"])
    args = arguments(part_learning_rates={"projector": 5e-2})
    groups = make_trainer(model, args, make_items()).create_optimizer().param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert {rates[id(parameter)] for parameter in model.model.projector.parameters()} == {5e-2}
    assert {rates[id(parameter)] for parameter in model.model.language_model.parameters()} == {1e-3}
    assert len(rates) == sum(parameter.requires_grad for parameter in model.parameters())


def test_a_learning_rate_for_an_unknown_part_is_an_error(make_model, arguments, make_items):
    args = arguments(part_learning_rates={"projektor": 1.0})
    with pytest.raises(ValueError, match="part_learning_rates names projektor; this model's parts are"):
        make_trainer(make_model(), args, make_items()).create_optimizer()


def test_settings_out_of_range_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="perceptual_network is 'resnet'; expected vgg, alex or squeeze"):
        ETTTrainingArguments(output_dir=str(tmp_path), perceptual_network="resnet")
    with pytest.raises(ValueError, match="entropy_weight is -1; a loss weight cannot be negative"):
        ETTTrainingArguments(output_dir=str(tmp_path), entropy_weight=-1)


# Logs


def test_logs_hold_every_loss_and_the_use_of_the_codebook(make_model, make_vision_tokenizer, arguments, make_items):
    model = make_model(vision_tokenizer=make_vision_tokenizer(patch_size=4), image_size=32)
    train_only(model, ["vision_tokenizer", "projector"])
    items = make_items()
    for item in items:
        item["pixel_values"] = item["pixel_values"].repeat_interleave(2, -1).repeat_interleave(2, -2)
    args = arguments(perceptual_weight=1.0, perceptual_network="squeeze", perceptual_pretrained=False, max_steps=1)
    trainer = make_trainer(model, args, items)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    losses = {f"{name}_loss" for name in ("caption", "vq", "reconstruction", "quantization", "entropy", "perceptual")}
    losses |= {"adversarial_loss", "discriminator_loss", "lecam", "real_logits", "fake_logits"}
    assert losses | {"psnr", "codebook_usage", "codebook_perplexity", "learning_rate", "grad_norm"} <= set(logged)
    assert 1 / 32 <= logged["codebook_usage"] <= 1
    assert 1 <= logged["codebook_perplexity"] <= 32 * logged["codebook_usage"] + 1e-6
    total = (
        logged["reconstruction_loss"]
        + logged["quantization_loss"]
        + 0.05 * logged["entropy_loss"]
        + logged["perceptual_loss"]
        + 0.1 * logged["adversarial_loss"]
    )
    assert logged["vq_loss"] == pytest.approx(total, rel=1e-5)
    assert logged["loss"] == pytest.approx(logged["caption_loss"] + 0.25 * logged["vq_loss"], rel=1e-3)


def test_the_logged_caption_loss_is_a_mean_however_batches_accumulate(make_model, arguments, make_items):
    model = make_model()
    train_only(model, ["projector"])
    batch = ETTCollator()(make_items(1))
    with torch.no_grad():
        expected = model(**batch).loss.item()
    items = make_items(1) * 4
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = make_model()
        train_only(model, ["projector"])
        trainer = make_trainer(model, one_step(arguments, batch_size, accumulation), items)
        trainer.train()
        assert trainer.state.log_history[0]["caption_loss"] == pytest.approx(expected, rel=1e-4)


def test_logs_of_several_processes_are_means_over_those_that_have_a_value():
    """One process alone saw an image."""
    records = [{"caption_loss": 1.0}, {"caption_loss": 4.0, "vq_loss": 3.0}]
    assert mean_by_name(records) == {"caption_loss": 2.5, "vq_loss": 3.0}


def test_psnr_is_that_of_images_between_0_and_1(make_vision_tokenizer, arguments, make_items):
    model, items = make_vision_tokenizer(), make_items(2)
    with torch.no_grad():
        pixels = ETTCollator()(items)["pixel_values"]
        error = (((pixels + 1) / 2 - (model(pixels).sample + 1) / 2) ** 2).mean()
    trainer = make_trainer(model, arguments(max_steps=1), items)
    trainer.train()
    assert trainer.state.log_history[0]["psnr"] == pytest.approx(-10 * torch.log10(error).item(), rel=1e-5)


@pytest.mark.parametrize("stage", ["tokenizer", "semantic"])
def test_logs_hold_the_gradient_path_where_a_tokenizer_learns(
    make_model, make_vision_tokenizer, arguments, make_items, stage
):
    model = make_vision_tokenizer() if stage == "tokenizer" else make_model()
    tokenizer = model if stage == "tokenizer" else model.model.vision_tokenizer
    train_only(model, ["vision_tokenizer"])
    pixels = ETTCollator()(make_items())["pixel_values"]
    with torch.no_grad():
        latents = tokenizer.encode(pixels).latents
    expected = measure_gradient_path(tokenizer.quantize, latents).summary()
    trainer = make_trainer(model, arguments(per_device_train_batch_size=4, max_steps=1), make_items())
    trainer.train()
    logged = trainer.state.log_history[0]
    # The order of the images decides which random gradient each of them gets.
    for name, tolerance in (("ratio", 0.2), ("largest_probability", 1e-5), ("dead_tokens", 1e-5)):
        assert logged[f"gradient_path/{name}"] == pytest.approx(expected[name].item(), rel=tolerance)


def test_a_frozen_tokenizer_has_no_gradient_path_in_the_logs(make_model, arguments, make_items):
    model = make_model()
    train_only(model, ["projector"])
    trainer = make_trainer(model, arguments(max_steps=1), make_items())
    trainer.train()
    assert not any("gradient_path" in name for name in trainer.state.log_history[0])


def test_the_gradient_path_is_measured_once_a_log_and_changes_nothing(
    make_vision_tokenizer, arguments, make_items, monkeypatch
):
    measured = []
    monkeypatch.setattr(
        "ett.train.monitoring.gradient_path.measure_gradient_path",
        lambda *inputs: measured.append(inputs) or measure_gradient_path(*inputs),
    )
    trained = []
    for logging_steps in (2, 100):
        args = arguments(max_steps=4, gradient_accumulation_steps=2, logging_steps=logging_steps)
        trainer = make_trainer(make_vision_tokenizer(), args, make_items())
        trainer.train()
        trained.append(snapshot(trainer.model))
    assert len(measured) == 2
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_a_closed_gradient_path_is_warned_of_once_with_the_remedies(
    make_vision_tokenizer, arguments, make_items, caplog
):
    model = make_vision_tokenizer(logit_scale=1e6)
    with caplog.at_level(logging.WARNING, logger="ett.train.monitoring.gradient_path"):
        make_trainer(model, arguments(max_steps=3), make_items()).train()
    [warning] = [record.getMessage() for record in caplog.records if "gradient_path/ratio" in record.getMessage()]
    assert "lower model.logit_scale, or with model.straight_through_weight above 0" in warning


def test_an_open_gradient_path_is_not_warned_of(make_vision_tokenizer, arguments, make_items, caplog):
    make_trainer(make_vision_tokenizer(), arguments(), make_items()).train()
    assert "gradient_path" not in caplog.text


# Evaluation


def test_evaluation_gives_the_mean_caption_loss_and_moves_nothing(make_model, arguments, make_items):
    model = make_model()
    train_only(model, ["vision_tokenizer", "projector", "language_model"])
    trainer = make_trainer(model, arguments(per_device_eval_batch_size=4), make_items())
    before = snapshot(model)
    metrics = trainer.evaluate(make_items())
    with torch.no_grad():
        expected = model(**ETTCollator()(make_items())).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert changed(before, model) == set()


def test_evaluation_of_drawing_gives_the_mean_code_loss(make_model, arguments, make_items):
    model, items = make_model(), make_items(codes=True)
    trainer = make_trainer(model, arguments(per_device_eval_batch_size=4), items, predicts_codes=True)
    with torch.no_grad():
        expected = model(**ETTCollator(predicts_codes=True)(items)).loss.item()
    assert trainer.evaluate(items)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_of_a_tokenizer_moves_neither_it_nor_its_adversary(make_vision_tokenizer, arguments, make_items):
    model, items = make_vision_tokenizer(), make_items()
    args = arguments(per_device_eval_batch_size=4, adversarial_weight=1e-9)
    trainer = make_trainer(model, args, items)
    before, adversary = snapshot(model), snapshot(trainer.adversary.discriminator)
    metrics = trainer.evaluate(items)
    with torch.no_grad():
        pixels = ETTCollator()(items)["pixel_values"]
        output = model(pixels)
        quantized = output.quantized
        expected = (output.sample - pixels).abs().mean() + quantized.quantization_loss + 0.05 * quantized.entropy_loss
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert changed(before, model) == changed(adversary, trainer.adversary.discriminator) == set()


@pytest.mark.parametrize("setting", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_half_precision_leaves_a_tokenizer_in_float32(
    make_vision_tokenizer, arguments, make_items, setting
):
    # So many codes that rounding to half precision changes some.
    tokenizer, items = make_vision_tokenizer(num_vq_embeddings=4000), make_items(16)
    pixels = ETTCollator()(items)["pixel_values"]
    expected = tokenizer.encode_codes(pixels)
    args = arguments(adversarial_weight=0.0, **{setting: True})
    trainer = make_trainer(tokenizer, args, items, eval_dataset=items)
    trainer.evaluate()
    assert getattr(args, setting)
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}
    assert torch.equal(tokenizer.encode_codes(pixels), expected)
    assert not torch.equal(tokenizer.bfloat16().encode_codes(pixels.bfloat16()), expected)


def test_logs_of_training_hold_nothing_of_evaluation_nor_the_reverse(make_vision_tokenizer, arguments, make_items):
    args = arguments(logging_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = make_trainer(make_vision_tokenizer(), args, make_items(), eval_dataset=make_items(8))
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    assert not any("vq_loss" in entry or "codebook_usage" in entry for entry in evaluations)
    assert int(trainer.unlogged.code_counts.sum()) == 0


def test_gradient_checkpointing_changes_no_update_of_a_tokenizer(make_vision_tokenizer, arguments, make_items):
    trained = []
    for gradient_checkpointing in (False, True):
        args = arguments(gradient_checkpointing=gradient_checkpointing)
        trainer = make_trainer(make_vision_tokenizer(), args, make_items())
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == gradient_checkpointing
        trained.append(trainer.model.state_dict())
    torch.testing.assert_close(*trained, rtol=0, atol=1e-7)


# Limits of gradient norms


def clipped_gradients(model, args, items):
    """Gradients as the optimizer has them: plain gradient descent of rate 1 subtracts them."""
    train_only(model, ["vision_tokenizer", "projector", "language_model"])
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = make_trainer(model, args, items)
    trainer.train()
    squares = dict.fromkeys(("vision_tokenizer", "projector", "language_model"), 0.0)
    for name, value in model.named_parameters():
        part = next((part for part in squares if part in name), "language_model")
        squares[part] += (before[name] - value).double().square().sum().item()
    logged = next(entry for entry in trainer.state.log_history if "grad_norm/projector" in entry)
    return {part: square**0.5 for part, square in squares.items()}, logged


@pytest.mark.parametrize("joint", [0.0, 1e-2])
def test_gradients_of_parts_are_clipped_each_to_its_own_norm(make_model, arguments, make_items, joint):
    def norms(**changes):
        return clipped_gradients(make_model(), one_step(arguments, 2, 1, **changes), make_items(2))

    free, logged = norms()
    assert min(free.values()) > 2e-3
    limits = {"vision_tokenizer": 1e-3, "projector": 0.0}
    clipped, logged_clipped = norms(max_grad_norm=joint, part_max_grad_norms=limits)
    assert clipped["vision_tokenizer"] == pytest.approx(1e-3, rel=1e-2)
    assert clipped["projector"] == pytest.approx(free["projector"], rel=1e-3)
    expected = min(free["language_model"], joint) if joint else free["language_model"]
    assert clipped["language_model"] == pytest.approx(expected, rel=1e-2)
    for part in free:
        assert logged_clipped[f"grad_norm/{part}"] == pytest.approx(logged[f"grad_norm/{part}"], rel=1e-3)


def test_a_limit_for_an_unknown_part_is_an_error(make_model, arguments, make_items):
    args = arguments(part_max_grad_norms={"projecter": 1.0})
    with pytest.raises(ValueError, match="part_max_grad_norms names projecter; this model's parts are"):
        make_trainer(make_model(), args, make_items(2)).train()
