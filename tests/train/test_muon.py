import pytest
import torch
from torch import nn

from ett.train.muon import MuonAdamW, hidden_matrices, orthogonalize, split_for_muon


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 12, 40), (2, 40, 12)])
def test_orthogonalizing_sets_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.3 and values.max() < 1.3
    assert torch.linalg.svdvals(matrices).max() > 4


def test_orthogonalizing_keeps_singular_vectors():
    left, right = (torch.linalg.qr(torch.randn(16, 16))[0] for _ in range(2))
    matrix = left @ torch.diag(torch.linspace(0.5, 2, 16)) @ right
    rotated = left.T @ orthogonalize(matrix[None])[0] @ right.T
    assert (rotated - rotated.diag().diag()).abs().max() < 0.05


def test_a_step_has_the_size_of_adamws():
    weight = nn.Parameter(torch.zeros(32, 64))
    weight.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    MuonAdamW([{"params": [weight], "orthogonalize": True}], lr=1e-2).step()
    assert 0.1e-2 < weight.square().mean().sqrt() < 0.25e-2


def test_convolutions_move_as_matrices_do():
    convolution, matrix = nn.Parameter(torch.zeros(16, 12, 3, 3)), nn.Parameter(torch.zeros(16, 108))
    convolution.grad = torch.randn(16, 12, 3, 3)
    matrix.grad = convolution.grad.flatten(1).clone()
    for weight in (convolution, matrix):
        MuonAdamW([{"params": [weight], "orthogonalize": True}], lr=1e-2, weight_decay=0.0).step()
    assert torch.equal(convolution.flatten(1), matrix)


def test_the_other_groups_move_as_with_adamw():
    ours, theirs = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    first = MuonAdamW([{"params": [ours]}], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    second = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(3):
        for parameter, optimizer in ((ours, first), (theirs, second)):
            parameter.grad = torch.arange(4.0) - step
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_a_saved_state_goes_on_as_if_nothing_had_happened():
    def run(interrupt):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))
        matrices = [layer.weight for layer in model]
        groups = split_for_muon([{"params": list(model.parameters()), "lr": 1e-2}], matrices, 2.0)
        optimizer = MuonAdamW(groups)
        for step in range(4):
            if interrupt and step == 2:
                state = optimizer.state_dict()
                optimizer = MuonAdamW([{**group, "lr": 1.0} for group in groups])
                optimizer.load_state_dict(state)
            model(torch.ones(2, 12)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in model.parameters()]

    for whole, resumed in zip(run(False), run(True), strict=True):
        assert torch.equal(whole, resumed)


def test_embeddings_heads_biases_and_narrow_layers_are_left_to_adamw():
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(40, 16),
            "hidden": nn.Linear(16, 16),
            "conv": nn.Conv2d(16, 16, 3),
            "from_pixels": nn.Conv2d(3, 16, 3),
            "norm": nn.LayerNorm(16),
            "lm_head": nn.Linear(16, 40, bias=False),
            "visual_head": nn.Linear(16, 40, bias=False),
        }
    )
    chosen = {id(matrix) for matrix in hidden_matrices(model)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in chosen]
    assert names == ["hidden.weight", "conv.weight"]


def test_a_group_is_split_and_its_matrices_learn_at_their_own_rate():
    matrix, bias = nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.zeros(16))
    groups = split_for_muon([{"params": [matrix, bias], "lr": 1e-3}], [matrix], 3.0)
    assert [(group["orthogonalize"], group["lr"], len(group["params"])) for group in groups] == [
        (False, 1e-3, 1),
        (True, 3e-3, 1),
    ]
