"""Packing: examples that share a row cost no padding and see nothing of one another."""

import pytest
import torch

from ett.data_ett import pack
from ett.train import ETTCollator, PreparedDataset, SceneExamples, train_only

from .trainers import make_trainer, snapshot


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([5, 4, 3, 2], [[0, 2], [1, 3]]), ([8, 8], [[0], [1]]), ([9], [[0]]), ([2, 2, 2, 2, 2], [[0, 1, 2, 3], [4]])],
    ids=["first fit", "full rows", "longer than a row", "many short ones"],
)
def test_each_example_goes_into_the_first_row_with_room(lengths, expected):
    assert pack(lengths, 8) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("codes", [False, True], ids=["pixels", "codes"])
def test_packed_captions_have_the_loss_and_the_gradients_of_padded_ones(make_model, make_items, codes, attention):
    items = make_items(6, codes=codes)
    results = []
    for packed_length in (None, 64):
        model = make_model().train()
        model.set_attn_implementation(attention)
        train_only(model, ["projector", "language_model"])
        batch = ETTCollator(packed_length=packed_length)(items)
        rows = len(batch["input_ids"])
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        results.append((loss, model.model.projector.linear_1.weight.grad))
    assert rows == 2
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_packed_drawings_train_as_padded_ones(make_model, arguments, make_items):
    updates = []
    for packed_length in (None, 70):
        model = make_model()
        train_only(model, ["visual_head", "projector"])
        before = snapshot(model)
        args = arguments(max_steps=1, per_device_train_batch_size=4, optim="sgd", learning_rate=1.0, max_grad_norm=0)
        trainer = make_trainer(model, args, make_items(codes=True), predicts_codes=True)
        trainer.data_collator.packed_length = packed_length
        trainer.train()
        updates.append({name: before[name] - value for name, value in model.state_dict().items()})
    assert updates[0]["visual_head.weight"].abs().max() > 1e-4
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-4, atol=1e-6)


def test_independent_turns_can_be_packed(processor, make_model, make_language_model, make_vision_tokenizer):
    examples = SceneExamples("chat", 0, "train", 4, 3, independent_turns=True)
    prepared = PreparedDataset(examples, "chat", processor, independent_turns=True)
    items = [prepared[index] for index in range(4)]
    losses = []
    for packed_length in (None, 400):
        model = make_model(
            make_language_model(vocab_size=len(processor.tokenizer)),
            make_vision_tokenizer(patch_size=4),
            image_token_id=processor.image_token_id,
        )
        batch = ETTCollator(processor.tokenizer.pad_token_id, packed_length=packed_length)(items)
        losses.append(model(**batch, use_cache=False).loss)
    assert len(batch["input_ids"]) < 4
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
