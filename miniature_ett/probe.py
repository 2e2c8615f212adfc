"""Linear probes: what a linear map reads from the codebook embeddings of a scene's cells.

- A cell of the 3 x 3 grid covers whole codes; its features are the embeddings of these codes, concatenated.
- Colour and shape are those of the shape in the cell. A letter of a word fills the cell, too.
- A probe is multinomial logistic regression with an L2 penalty, fitted in float64: the same numbers in every run.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ett.evaluation_ett.common import batches, evaluating, to_pixels
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.scenes_ett import COLORS, ROWS, SHAPES, WORDS, Scene, Scenes

GRID = 3
PENALTY = 1e-3
ITERATIONS = 200
LETTERS = tuple(sorted(set("".join(WORDS))))
PROBES = {"colour": tuple(COLORS), "shape": SHAPES, "letter": LETTERS}
"""Classes of each probe."""


def probe_tokenizer(
    tokenizer: IBQModel, seed: int, ground: str = "mixed", train_size: int = 1500, test_size: int = 500
) -> dict[str, float]:
    """Accuracies in 0..1 of linear probes for `colour`, `shape` and `letter` on held-out scenes.

    Args:
        tokenizer: Codes `(3 n, 3 n)` for an image of a scene.
        seed, ground: Of the scenes; the probes are fitted on split "train" and tested on "test".
        train_size, test_size: Number of scenes for colours and shapes, and number of letters.

    Raises:
        ValueError: Cells do not cover whole codes.
    """
    sets = {}
    for split, size in (("train", train_size), ("test", test_size)):
        scenes = Scenes(seed, split, ground=ground)
        shapes = [scenes[index] for index in range(size)]
        sets[split] = cell_features(tokenizer, shapes) | letter_features(tokenizer, scenes, size)
    return {name: fit_and_test(*sets["train"][name], *sets["test"][name], len(PROBES[name])) for name in PROBES}


Labelled = tuple[torch.Tensor, torch.LongTensor]
"""Features of shape `(N, F)` and classes of shape `(N,)`."""


def cell_features(tokenizer: IBQModel, scenes: Sequence[Scene]) -> dict[str, Labelled]:
    """Features of every shape's cell, with the shape's colour and kind."""
    places = [(index, shape) for index, scene in enumerate(scenes) for shape in scene.shapes]
    features = embed_cells(tokenizer, scenes, [(index, shape.row, shape.column) for index, shape in places])
    colours = torch.tensor([PROBES["colour"].index(shape.color) for _, shape in places])
    kinds = torch.tensor([PROBES["shape"].index(shape.shape) for _, shape in places])
    return {"colour": (features, colours), "shape": (features, kinds)}


def letter_features(tokenizer: IBQModel, scenes: Scenes, count: int) -> dict[str, Labelled]:
    """Features of the cells of `count` letters, of the first scenes that show a word."""
    chosen, cells, letters = [], [], []
    index = 0
    while len(cells) < count:
        scene = scenes[index]
        index += 1
        if scene.text is None or scene.text.kind != "word":
            continue
        cells += [(len(chosen), ROWS.index(scene.text.row), column) for column in range(GRID)]
        letters += [PROBES["letter"].index(letter) for letter in scene.text.content]
        chosen.append(scene)
    return {"letter": (embed_cells(tokenizer, chosen, cells[:count]), torch.tensor(letters[:count]))}


def embed_cells(
    tokenizer: IBQModel, scenes: Sequence[Scene], cells: list[tuple[int, int, int]], batch_size: int = 64
) -> torch.Tensor:
    """Codebook embeddings of cells, given as (number of the scene, row, column): `(len(cells), F)` in float64."""
    grids = []
    with evaluating(tokenizer):
        for batch in batches(scenes, batch_size):
            pixels = torch.stack([to_pixels(scene) for scene in batch]).to(tokenizer.device)
            embeddings = tokenizer.codes_to_embeddings(tokenizer.encode_codes(pixels))
            if embeddings.shape[-1] % GRID or embeddings.shape[-2] % GRID:
                height, width = embeddings.shape[-2:]
                raise ValueError(f"The tokenizer gives {height} x {width} codes; a probe needs multiples of {GRID}.")
            # (B, D, 3 n, 3 n) to (B, 3, 3, D n n)
            windows = embeddings.unflatten(3, (GRID, -1)).unflatten(2, (GRID, -1))
            grids.append(windows.permute(0, 2, 4, 1, 3, 5).flatten(3).double().cpu())
    numbers, rows, columns = torch.tensor(cells).T
    return torch.cat(grids)[numbers, rows, columns]


def fit_and_test(
    features: torch.Tensor,
    classes: torch.LongTensor,
    test_features: torch.Tensor,
    test_classes: torch.LongTensor,
    num_classes: int,
) -> float:
    """Accuracy in 0..1 on the test set of a logistic regression that is fitted on the other."""
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    features, test_features = (features - mean) / deviation, (test_features - mean) / deviation
    weight = torch.zeros(features.shape[1], num_classes, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight + bias, classes) + PENALTY / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return (test_features @ weight + bias).argmax(dim=1).eq(test_classes).double().mean().item()


__all__ = ["PROBES", "probe_tokenizer"]
