"""Linear probes: what they find, what they cannot find, and where they look."""

import pytest
import torch
import torch.nn.functional as F

from ett.miniature_ett.probe import embed_cells, fit_and_test, probe_tokenizer
from ett.scenes_ett import Scene, Scenes, Shape


class Pooling(torch.nn.Module):
    """Stands for a tokenizer: a code is a mean over pixels, and its embedding is that colour."""

    device = torch.device("cpu")

    def __init__(self, side=9):
        super().__init__()
        self.side = side

    def encode_codes(self, pixels):
        return F.adaptive_avg_pool2d(pixels, self.side)

    def codes_to_embeddings(self, codes):
        return codes


class Blind(Pooling):
    """All images look the same."""

    def codes_to_embeddings(self, codes):
        return torch.zeros_like(codes)


def test_a_probe_reads_what_embeddings_tell_and_nothing_else():
    seeing = probe_tokenizer(Pooling(), 0, "flat", 300, 100)
    blind = probe_tokenizer(Blind(), 0, "flat", 300, 100)
    assert seeing["colour"] > 0.9 and seeing["shape"] > 0.6 and seeing["letter"] > 0.5
    assert blind["colour"] < 0.25 and blind["shape"] < 0.35 and blind["letter"] < 0.25


def test_the_same_numbers_come_out_again():
    assert probe_tokenizer(Pooling(), 1, "textured", 60, 30) == probe_tokenizer(Pooling(), 1, "textured", 60, 30)


def test_features_are_those_of_the_cell_alone():
    empty = Scene(())
    cross = Scene((Shape("black", "cross", "large", "left"),))
    cells = [(number, row, column) for number in range(2) for row in range(3) for column in range(3)]
    features = embed_cells(Pooling(), [empty, cross], cells).reshape(2, 3, 3, 3, 3, 3)
    changed = (features[0] != features[1]).flatten(2).any(dim=2)
    assert changed.nonzero().tolist() == [[1, 0]]
    # Channels first, then the cell's rows and columns of codes.
    pooled = F.adaptive_avg_pool2d(torch.from_numpy(cross.pixels()).permute(2, 0, 1) / 127.5 - 1, 9)
    assert torch.allclose(features[1, 1, 0], pooled[:, 3:6, 0:3].double(), atol=1e-6)


def test_fitting_separates_what_a_line_separates():
    features = torch.tensor([[0.0], [1.0], [10.0], [11.0]], dtype=torch.double)
    classes = torch.tensor([0, 0, 1, 1])
    assert fit_and_test(features, classes, features, classes, 2) == 1.0
    assert fit_and_test(features, classes, features, 1 - classes, 2) == 0.0


def test_codes_that_do_not_divide_into_cells_are_an_error():
    with pytest.raises(ValueError, match="gives 8 x 8 codes; a probe needs multiples of 3"):
        embed_cells(Pooling(8), [Scenes(0, "test")[0]], [(0, 0, 0)])
