"""The head's loss: that of all scores, of which no more than a chunk ever exists."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ett.modeling_ett import scoring_head
from ett.modeling_ett.scoring_head import ScoringHead

NUM_TOKENS = 50


@pytest.fixture
def head(monkeypatch):
    monkeypatch.setattr(scoring_head, "CHUNK_ELEMENTS", 4 * NUM_TOKENS)
    torch.manual_seed(0)
    return ScoringHead(3, NUM_TOKENS)


@pytest.fixture
def hidden_states():
    return torch.randn(3, 7, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def labels():
    labels = torch.randint(0, NUM_TOKENS, (3, 7), generator=torch.Generator().manual_seed(2))
    labels[0, :3] = labels[2] = -100
    return labels


def dense_loss(head, hidden_states, labels):
    return F.cross_entropy(head(hidden_states).flatten(0, 1).float(), labels.flatten(), reduction="sum")


def test_the_loss_and_its_gradients_are_those_of_all_scores(head, hidden_states, labels):
    loss = head(hidden_states, labels)
    found = torch.autograd.grad(2 * loss, (hidden_states, head.weight))
    expected_loss = dense_loss(head, hidden_states, labels)
    expected = torch.autograd.grad(2 * expected_loss, (hidden_states, head.weight))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_passes_the_gradient_on(head, hidden_states, labels):
    head.requires_grad_(False)
    (found,) = torch.autograd.grad(head(hidden_states, labels), hidden_states)
    (expected,) = torch.autograd.grad(dense_loss(head, hidden_states, labels), hidden_states)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_without_labels_to_learn_the_loss_is_nothing(head, hidden_states, labels):
    loss = head(hidden_states, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden_states.grad.abs().sum() == 0


def test_under_autocast_the_products_are_in_half_precision_and_the_loss_is_not(head, hidden_states, labels):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(hidden_states, labels)
    assert loss.dtype == torch.float32
    halved = ScoringHead(3, NUM_TOKENS, dtype=torch.bfloat16)
    halved.load_state_dict(head.state_dict())
    torch.testing.assert_close(loss, dense_loss(halved, hidden_states.bfloat16(), labels), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, dense_loss(head, hidden_states, labels), rtol=1e-2, atol=0)


class LargestResult(TorchDispatchMode):
    """Notes how many elements the largest new tensor of `NUM_TOKENS` columns has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (NUM_TOKENS,):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_more_than_a_chunk_of_scores_exists(head, hidden_states, labels):
    with LargestResult() as ours:
        head(hidden_states, labels).backward()
    with LargestResult() as dense:
        dense_loss(head, hidden_states, labels).backward()
    assert ours.elements == 4 * NUM_TOKENS
    assert dense.elements == 21 * NUM_TOKENS


def test_a_resized_model_keeps_its_head(make_model):
    model = make_model()
    model.resize_token_embeddings(48)
    assert isinstance(model.lm_head, ScoringHead)
    assert len(model.lm_head.weight) == 48
    ids = torch.randint(10, 48, (1, 5))
    assert torch.isfinite(model.train()(ids, labels=ids).loss)


def test_in_training_labels_leave_the_scores_out_unless_asked(make_model):
    model, ids = make_model().train(), torch.randint(10, 40, (2, 5))
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, skip_logits=False).logits.shape[:2] == (2, 5)
    assert model.eval()(ids, labels=ids).logits.shape[:2] == (2, 5)
    assert model(ids, labels=ids, skip_logits=True).logits is None
