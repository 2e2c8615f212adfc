"""The aesthetic predictor against the plain arithmetic, and the weights that it takes or refuses."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from ett.data_ett import filters
from ett.data_ett.aesthetics import AestheticHead, AestheticPredictor, find_head
from ett.data_ett.selection import FilterChain

LAYERS = {0: (1024, 12), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


@pytest.fixture
def published(tmp_path):
    """A CLIP model with embeddings of 12 numbers, and a head as it is published: folder, head's file, its weights."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    sides = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=sides).save_pretrained(tmp_path / "clip")
    weights = {}
    for number, shape in LAYERS.items():
        weights[f"layers.{number}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        weights[f"layers.{number}.bias"] = torch.randn(shape[0])
    torch.save(weights, tmp_path / "head.pth")
    return str(tmp_path / "clip"), str(tmp_path / "head.pth"), weights


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(3)]


def plain_scores(folder, weights, images):
    clip = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        x = clip(pixel_values=pixels).image_embeds
    x = x / x.norm(dim=-1, keepdim=True)
    for number in LAYERS:
        x = x @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    return x[:, 0]


def test_scores_are_those_of_the_plain_arithmetic(published, images):
    folder, head, weights = published
    predictor = AestheticPredictor.from_pretrained(folder, head)
    scores = predictor(torch.stack([predictor.preprocess(image) for image in images]))
    assert tuple(scores.shape) == (3,)
    assert torch.allclose(scores, plain_scores(folder, weights, images), atol=1e-5)
    assert scores.unique().numel() == 3


def test_the_head_has_the_published_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in AestheticHead().state_dict().items()}
    expected = {**LAYERS, 0: (1024, 768)}
    assert {name: shape for name, shape in shapes.items() if name.endswith("weight")} == {
        f"layers.{number}.weight": shape for number, shape in expected.items()
    }


def test_a_head_in_safetensors_gives_the_same_scores(published, images, tmp_path):
    folder, head, weights = published
    save_file(weights, tmp_path / "head.safetensors")
    first, second = (
        AestheticPredictor.from_pretrained(folder, str(file)) for file in (head, tmp_path / "head.safetensors")
    )
    pixels = first.preprocess(images[0])[None]
    assert torch.equal(first(pixels), second(pixels))


def test_a_filter_keeps_rows_by_their_images_scores(published, images):
    folder, head, weights = published
    scores = plain_scores(folder, weights, images)
    cells = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    middle = scores.median().item()
    chain = FilterChain([{"type": "aesthetic", "min_score": middle - 1e-4, "model": folder, "head": head}])
    rows = [*({"image": cell} for cell in cells), {"image": cells}, {"image": {"bytes": b"?", "path": None}}]
    expected = [score >= middle for score in scores.tolist()]
    assert chain.keep(rows) == [*expected, False, True]
    assert sorted(expected) == [False, True, True]


def test_weights_are_loaded_when_the_first_image_is_there(published, monkeypatch):
    monkeypatch.setattr(filters.AestheticPredictor, "from_pretrained", lambda *names: pytest.fail("loaded"))
    chain = FilterChain([{"type": "aesthetic", "min_score": 5}])
    assert chain.keep([{"image": None}]) == [True]
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        chain.keep([{"image": {"bytes": (b"P6 1 1 255 " + b"abc"), "path": None}}])


def test_a_missing_head_is_an_error_that_says_where_to_get_it(tmp_path):
    with pytest.raises(
        ValueError, match=r"'.*absent\.pth' is missing: there is no such file\. Give head=FILE, the pub"
    ):
        find_head(str(tmp_path / "absent.pth"))
    with pytest.raises(ValueError, match=r"'nobody/nothing/head\.pth' is missing"):
        find_head("nobody/nothing/head.pth")


def test_a_missing_clip_model_is_an_error_that_names_it(published):
    with pytest.raises(ValueError, match=r"needs CLIP's weights and preprocessor_config\.json of 'nobody/clip'"):
        AestheticPredictor.from_pretrained("nobody/clip", published[1])


def test_a_head_for_another_clip_model_is_an_error(published, tmp_path):
    torch.save(AestheticHead(16).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth' is no head of the aesthetic predictor for .* have 12 numbers"):
        AestheticPredictor.from_pretrained(published[0], str(tmp_path / "other.pth"))


def test_a_head_is_not_unpickled(published, tmp_path):
    torch.save({"layers.0.weight": print}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth' cannot be read as weights"):
        AestheticPredictor.from_pretrained(published[0], str(tmp_path / "evil.pth"))
