"""The `ett` command: what it prints and writes, and that errors are one sentence."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import torch
import typer
from PIL import Image
from torch._utils import ExceptionWrapper
from transformers import pipeline
from transformers.utils import logging
from typer.testing import CliRunner

from ett import __version__ as ett_version
from ett import inference
from ett.cli import app
from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(models, monkeypatch, tmp_path):
    """Runs `ett` in a folder that holds the three models."""
    for name in ("ett-tokenizer", "ett-chat", "ett-gen"):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    # The command line sets these for libraries that it has yet to import; here they are imported already.
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(variable, "1" if variable.startswith("HF") else "error")
    logging.disable_progress_bar()
    yield lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
    logging.enable_progress_bar()


@pytest.fixture
def fake(monkeypatch):
    """Puts stand-ins for functions into a room."""

    def replace(room, **functions):
        for name, function in functions.items():
            monkeypatch.setattr(importlib.import_module(f"ett.{room}"), name, function)

    return replace


def raiser(error):
    def function(*args, **kwargs):
        raise error

    return function


def assert_one_sentence(result, *parts):
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("ett: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_caption_is_printed_on_stdout_alone(run, image):
    result = run("caption", image)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() and result.stderr == ""


def test_caption_is_the_same_as_the_pipelines(run, image):
    expected = pipeline("image-to-text", model="ett-chat")(str(image), max_new_tokens=64)[0]["generated_text"]
    assert run("caption", image).stdout.strip() == expected.strip()


def test_different_questions_reach_the_model(run, image, monkeypatch):
    asked = []
    monkeypatch.setattr(
        ETTForConditionalGeneration, "generate", lambda self, input_ids, **kwargs: asked.append(input_ids) or input_ids
    )
    assert run("ask", image, "what color is the circle?").exit_code == 0
    assert run("ask", image, "what is the square?").exit_code == 0
    assert asked[0].tolist() != asked[1].tolist()


def test_ask_refuses_words_beyond_the_vocabulary(run, image):
    assert_one_sentence(run("ask", image, "what is the zebra?"), "'zebra'", "vocabulary")


def test_ask_refuses_an_empty_question(run, image):
    assert_one_sentence(run("ask", image, " "), "question is empty")


@pytest.fixture
def no_weights(monkeypatch):
    """Weights are not loaded: what is wrong has to be said before."""
    monkeypatch.setattr(inference, "_load_weights", lambda model: pytest.fail("weights were loaded"))


def set_context(folder: Path, copy: Path, context: int):
    """A copy of a model with a shorter context."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = context
    (copy / "config.json").write_text(json.dumps(config))


def test_ask_with_more_images_than_there_are(run, no_weights, image):
    message = "ett: Text 0 has 2 <image> and 1 images; give one image for each.\n"
    assert_one_sentence(run("ask", image, "<image> what is the <image>?"), message)


def test_ask_longer_than_the_context(run, no_weights, models, tmp_path, image):
    set_context(models / "ett-chat", tmp_path / "short", 40)
    message = "The prompt has 43 tokens, images included, and the language model's context ends at 40; shorten it."
    assert_one_sentence(run("ask", image, "red " * 20, "--model", "short"), message)


def test_draw_longer_than_the_context(run, no_weights, models, tmp_path):
    set_context(models / "ett-gen", tmp_path / "short", 40)
    message = "The prompt has 31 tokens and the image 16 codes, together more than the 40 of the language model's"
    assert_one_sentence(run("draw", "red " * 30, "--model", "short"), message)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ", "The prompt is empty; say what to draw."),
        ("a zebra", "The word 'zebra' is beyond this model's vocabulary"),
        ("<image>", "The text has 1 <image> and there are 0 images; give one image for each."),
    ],
)
def test_draw_refuses_a_prompt_before_the_weights_are_loaded(run, no_weights, prompt, message):
    assert_one_sentence(run("draw", prompt), message)


@pytest.mark.parametrize("arguments", [["caption"], ["ask"], ["reconstruct"]], ids=lambda arguments: arguments[0])
def test_a_url_that_does_not_answer(run, free_port, arguments):
    url = f"http://127.0.0.1:{free_port}/scene.png"
    question = ["what is the circle?"] if arguments == ["ask"] else []
    assert_one_sentence(run(*arguments, url, *question), f"ett: '{url}' cannot be fetched (", "Connection refused")


@pytest.mark.parametrize("arguments", [["caption"], ["ask"], ["reconstruct"]], ids=lambda arguments: arguments[0])
def test_an_image_without_a_path(run, arguments):
    question = ["what is the circle?"] if arguments == ["ask"] else []
    assert_one_sentence(run(*arguments, "", *question), "ett: The path of the image is empty; give that of an image")


def test_draw_writes_numbered_images_and_says_their_seeds(run):
    result = run("draw", "a red circle", "-n", "2", "--seed", "3", "--output", "circle.png")
    assert result.stdout == "Wrote circle-1.png (seed 3).\nWrote circle-2.png (seed 4).\n"
    assert Image.open("circle-1.png").size == (16, 16)


def test_an_image_drawn_alone_equals_the_one_drawn_in_a_batch(run):
    run("draw", "a red circle", "-n", "2", "--seed", "3", "--output", "batch.png")
    run("draw", "a red circle", "--seed", "4", "--output", "alone.png")
    assert Image.open("alone.png").tobytes() == Image.open("batch-2.png").tobytes()
    assert Image.open("alone.png").tobytes() != Image.open("batch-1.png").tobytes()


def test_guessing_ahead_draws_the_same_image(run):
    run("draw", "a red circle", "--seed", "4", "--output", "plain.png")
    run("draw", "a red circle", "--seed", "4", "--jacobi-window", "4", "--output", "ahead.png")
    assert Image.open("ahead.png").tobytes() == Image.open("plain.png").tobytes()


def test_draw_without_a_seed_says_one_that_draws_the_same_again(run):
    seed = run("draw", "a red circle", "--output", "first.png").stdout.rpartition("seed ")[2].rstrip(").\n")
    run("draw", "a red circle", "--seed", seed, "--output", "second.png")
    assert Image.open("first.png").tobytes() == Image.open("second.png").tobytes()


def test_draw_leaves_no_temporary_file(run, tmp_path):
    run("draw", "a red circle", "--output", "circle.png")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["circle.png"]


def test_reconstruct_takes_a_tokenizer_or_the_one_inside_a_model(run, image):
    for model in ("ett-tokenizer", "ett-chat"):
        result = run("reconstruct", image, "--model", model, "--output", "out.png")
        assert result.stdout.startswith("Wrote out.png (PSNR "), result.stderr
        assert Image.open("out.png").size == (16, 16)


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder of six images and one that cannot be read; no network that judges them has its weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "photos").mkdir()
    for index in range(6):
        Image.linear_gradient("L").resize((40 + index, 50)).save(tmp_path / "photos" / f"{index}.png")
    (tmp_path / "photos" / "6.png").write_text("no image")
    datasets.disable_progress_bars()
    yield "photos"
    datasets.enable_progress_bars()


@pytest.mark.parametrize("model", ["ett-tokenizer", "ett-chat"])
def test_evaluate_reconstruction_prints_a_table_and_writes_the_file(run, photographs, model, caplog):
    result = run("evaluate", "reconstruction", "--model", model, "--dataset", photographs, "--image-size", 32)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["Images", "6"] and lines[-1] == "Wrote reconstruction.json."
    assert any(line.startswith("No rFID: Put the file https://") for line in lines)
    assert "  " + str(Path("photos/6.png").resolve()) in result.stdout
    assert "rFID will not be measured. Put the file https://" in caplog.text
    written = json.loads(Path("reconstruction.json").read_text())
    assert written["metrics"]["rfid"] is None and written["settings"]["model"] == model
    assert f"PSNR            {written['metrics']['psnr']:.2f} dB" in lines


def test_evaluate_reconstruction_compares_two_models_in_a_figure(run, photographs):
    arguments = ("--dataset", photographs, "--image-size", 32, "--limit", 2, "--output", "figure.png")
    result = run("evaluate", "reconstruction", "--compare", "ett-tokenizer", "ett-chat", *arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "Wrote figure.png.\n"
    assert Image.open("figure.png").width > 1000


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--output", "photos"], ["photos", "no .json suffix"]),
        (["--output", "missing/result.json"], ["no folder missing"]),
        (["--dataset", "absent"], ["'absent' could not be read"]),
        (["--dataset", "empty"], ["'empty' is empty"]),
        (["--image-column", "photo"], ["no column 'photo'", "'image'", "--image-column"]),
        (["--split", "test"], ["'photos' could not be read", "test"]),
        (["--image-size", "34"], ["34 x 34", "multiples of 4", "--image-size"]),
        (["--model", "photos"], ["photos is not a model folder"]),
        (["--compare", "ett-tokenizer", "ett-tokenizer"], ["Both models", "ett-tokenizer"]),
        (["--compare", "ett-tokenizer", "ett-chat", "--output", "result.json"], ["result.json", "suffix"]),
        (["--compare", "ett-tokenizer", "ett-chat", "--output", "figure.bmp"], ["figure.bmp", ".png, .pdf"]),
        (["--compare", "ett-tokenizer", "ett-chat", "--model", "ett-chat", "--workers", "2"], ["--model, --workers"]),
    ],
)
def test_evaluate_reconstruction_says_what_is_wrong_before_it_measures(run, photographs, tmp_path, arguments, parts):
    (tmp_path / "empty").mkdir()
    given = ["--dataset", photographs, "--image-size", "32", *arguments]
    assert_one_sentence(run("evaluate", "reconstruction", *given), *parts)


@pytest.mark.parametrize("model", ["ett-tokenizer", "ett-chat"])
def test_inspect_tokenizer_ends_with_a_verdict(run, photographs, model):
    result = run("inspect-tokenizer", model, "--dataset", photographs, "--image-size", 32)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["Images", "6"] and lines[1].startswith("Gradient ratio")
    assert lines[-1].startswith("The path is ")


def test_inspect_tokenizer_measures_with_what_stage_2_would_set_and_writes_it_down(run):
    options = ("--straight-through-weight", 0.5, "--logit-scale", 1e-6, "--limit", 2, "--image-size", 32)
    result = run("inspect-tokenizer", "ett-tokenizer", "--dataset", "scenes", *options, "--json", "path.json")
    assert result.stdout.startswith("Wrote path.json.\nImages               2\nGradient ratio       0.5\n")
    written = json.loads(Path("path.json").read_text())
    assert written["settings"]["straight_through_weight"] == 0.5 and written["settings"]["data_set"] == "scenes"
    assert written["measures"]["ratio"] == pytest.approx(0.5, rel=1e-3) and written["path"] == "open"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--json", "path.txt"], ["path.txt", "no .json suffix"]),
        (["--dataset", "absent"], ["'absent' could not be read"]),
        (["--image-size", "34"], ["34 x 34", "multiples of 4", "--image-size"]),
        (["--logit-scale", "0"], ["logit_scale is 0.0; expected a number above 0"]),
        (["--straight-through-weight", "-1"], ["straight_through_weight is -1.0; expected 0 or a number above 0"]),
    ],
)
def test_inspect_tokenizer_says_what_is_wrong_before_it_measures(run, photographs, arguments, parts):
    given = ["--dataset", photographs, "--image-size", "32", *arguments]
    assert_one_sentence(run("inspect-tokenizer", "ett-tokenizer", *given), *parts)


@pytest.mark.parametrize("option", ["--batch-size", "--limit", "--image-size", "--save-every"])
def test_evaluate_reconstruction_refuses_numbers_below_one(run, photographs, option):
    result = run("evaluate", "reconstruction", "--dataset", photographs, option, "0")
    assert result.exit_code == 2 and option in result.stderr


def test_an_interrupted_evaluation_says_how_to_go_on(run, fake):
    fake("evaluation", evaluate_reconstruction=raiser(KeyboardInterrupt()))
    result = run("evaluate", "reconstruction", "--dataset", "photos")
    assert result.stderr == "Interrupted. Run the same command again to continue.\n"


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ([], (16, 16)),
        (["--height", "32"], (16, 32)),
        (["--height", "8", "--width", "24"], (24, 8)),
        (["--own-size"], (40, 28)),
    ],
)
def test_reconstruct_at_the_models_size_or_another(run, image, options, size):
    result = run("reconstruct", image, "--output", "out.png", *options)
    assert result.exit_code == 0, result.stderr
    assert Image.open("out.png").size == size


def test_own_size_cuts_edges_and_leaves_the_other_pixels_alone(run, tmp_path, monkeypatch):
    # 1 + 4 + 2 columns of which the middle ones stay, 4 rows that all stay.
    image = Image.new("RGB", (7, 4), "white")
    image.paste("black", (1, 0, 5, 4))
    image.save("edges.png")
    tokenizer, image_processor = inference.load_tokenizer("ett-tokenizer")
    seen = []
    original = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda pixels: seen.append(pixels) or original(pixels))
    monkeypatch.setattr(inference, "load_tokenizer", lambda model: (tokenizer, image_processor))
    inference.reconstruct("edges.png", "ett-tokenizer", own_size=True)
    assert seen[0].shape == (1, 3, 4, 4) and (seen[0] == -1).all()


@pytest.mark.parametrize(("side", "is_tiled"), [(1024, False), (1028, True)])
def test_reconstruct_uses_tiles_above_1024_pixels(run, monkeypatch, side, is_tiled):
    Image.linear_gradient("L").resize((side, 4)).save("long.png")
    tokenizer, image_processor = inference.load_tokenizer("ett-tokenizer")
    monkeypatch.setattr(inference, "load_tokenizer", lambda model: (tokenizer, image_processor))
    result = run("reconstruct", "long.png", "--own-size", "--output", "out.png")
    assert result.exit_code == 0, result.stderr
    assert tokenizer.use_tiling is is_tiled
    assert Image.open("out.png").size == (side, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--own-size"], "3 x 9 pixels (height x width); at its own size this tokenizer needs at least 4 x 4"),
        (["--height", "10"], "10 x 16 pixels (height x width); this tokenizer needs sides that are multiples of 4"),
        (["--height", "100000000"], "size is {'height': 100000000, 'width': 16}; expected at most 89478485 pixels"),
        (["--own-size", "--width", "8"], "either a height and width or own_size"),
    ],
)
def test_reconstruct_at_a_size_that_cannot_be(run, tmp_path, options, message):
    Image.new("RGB", (9, 3)).save("small.png")
    assert_one_sentence(run("reconstruct", "small.png", "--output", "out.png", *options), message)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("output", ["drawing", "drawing.txt", "model.safetensors"])
def test_draw_writes_only_to_image_files(run, tmp_path, output):
    (tmp_path / output).write_text("kept")
    assert_one_sentence(run("draw", "a red circle", "--output", output), "suffix", ".png")
    assert (tmp_path / output).read_text() == "kept"


def test_draw_into_a_missing_folder(run):
    assert_one_sentence(run("draw", "a red circle", "--output", "missing/drawing.png"), "no folder missing")


def test_chat_model_asked_to_draw(run):
    assert_one_sentence(run("draw", "a red circle", "--model", "ett-chat"), "ett-chat has no visual head")


@pytest.fixture
def trained_to_draw(models, tmp_path):
    """A drawing model as training leaves it."""
    shutil.copytree(models / "ett-gen", tmp_path / "trained")
    config = json.loads((models / "ett-gen" / "config.json").read_text())
    (tmp_path / "trained" / "config.json").write_text(json.dumps({**config, "answers": False}))
    return "trained"


@pytest.mark.parametrize("command", ["caption", "ask", "chat"])
def test_drawing_model_asked_to_answer(run, no_weights, trained_to_draw, image, command):
    arguments = {"caption": [image], "ask": [image, "what is the circle?"], "chat": []}[command]
    result = run(command, *arguments, "--model", trained_to_draw)
    assert_one_sentence(
        result, "trained was trained to generate images, not to answer; name a chat model such as ett-chat"
    )


def test_drawing_model_draws_and_reconstructs_whatever_it_was_trained_for(run, trained_to_draw, image):
    assert run("draw", "a red circle", "--model", trained_to_draw).exit_code == 0
    assert run("reconstruct", image, "--model", trained_to_draw).exit_code == 0


def test_tokenizer_asked_to_caption(run, image):
    message = "name an ETT model such as ett-chat instead"
    assert_one_sentence(run("caption", image, "--model", "ett-tokenizer"), "IBQ tokenizer", message)


def test_model_of_another_kind(run, tmp_path, image):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert_one_sentence(run("caption", image, "--model", "bert"), "'bert'", "expected an ETT model")
    assert_one_sentence(run("reconstruct", image, "--model", "bert"), "'bert'", "expected an IBQ tokenizer")


def test_folder_that_is_no_model(run, tmp_path, image):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    assert_one_sentence(run("caption", image, "--model", "photos"), "no config.json", "cat.jpg")


def test_model_that_is_nowhere(run, image):
    assert_one_sentence(run("caption", image, "--model", "ett-chta"), "no folder ett-chta", "ett demo")


def test_model_with_damaged_weights(run, models, tmp_path, image):
    shutil.copytree(models / "ett-chat", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\x00" * 100)
    assert_one_sentence(run("caption", image, "--model", "damaged"), "damaged is incomplete or damaged")


@pytest.mark.parametrize(
    ("model", "file", "lost", "command"),
    [
        ("ett-chat", "model.safetensors", "model.projector.linear_1.weight", ("caption",)),
        ("ett-tokenizer", "diffusion_pytorch_model.safetensors", "quantize.embedding.weight", ("reconstruct",)),
    ],
)
def test_a_model_whose_weights_lack_a_tensor(run, models, tmp_path, image, model, file, lost, command):
    shutil.copytree(models / model, tmp_path / "partial")
    weights = safetensors.torch.load_file(tmp_path / "partial" / file)
    del weights[lost]
    safetensors.torch.save_file(weights, tmp_path / "partial" / file, {"format": "pt"})
    assert_one_sentence(run(*command, image, "--model", "partial"), f"The weights of 'partial' lack {lost}; save")


def test_missing_and_corrupt_images(run, tmp_path):
    assert_one_sentence(run("caption", "missing.png"), "missing.png")
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n corrupt")
    assert_one_sentence(run("reconstruct", "corrupt.png"), "corrupt.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"Dear diary", "is not an image in a format that is read here"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "bad.png"),
        (b"P6 60000 60000 255\n", "too large"),
        (b"P6 16 16 255\n" + bytes(99), "corrupt or truncated"),
    ],
    ids=["empty", "text", "corrupt", "bomb", "cut off"],
)
def test_a_bad_image_is_refused_and_nothing_written(run, tmp_path, content, message):
    (tmp_path / "bad.png").write_bytes(content)
    assert_one_sentence(run("reconstruct", "bad.png", "--output", "out.png"), "bad.png", message)
    assert not (tmp_path / "out.png").exists()


def test_debug_shows_the_traceback(run):
    result = run("--debug", "caption", "missing.png")
    assert type(result.exception).__name__ == "ImageError"


def test_an_unexpected_error_is_one_sentence_that_says_how_to_see_more(run, fake):
    fake("train", run_recipe=raiser(KeyError("steps")))
    assert_one_sentence(run("train", "tokenizer"), "Unexpected KeyError", "--debug")


def test_an_error_in_a_worker_of_a_data_loader_is_one_sentence(run, fake):
    try:
        raise ValueError("No row can be used.")
    except ValueError:
        error = ExceptionWrapper(where="in DataLoader worker process 0")
    fake("train", run_recipe=lambda *arguments: error.reraise())
    assert run("train", "tokenizer").stderr == "ett: No row can be used.\n"


def test_an_interruption_is_said_and_has_its_own_exit_code(run, fake):
    fake("miniature_ett", run_demo=raiser(KeyboardInterrupt()))
    result = run("demo")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted. Run the same command again to continue.\n"


def test_train_runs_the_recipe_and_writes_the_card_from_its_record(run, fake):
    calls = []
    fake(
        "train",
        run_recipe=lambda *arguments: calls.append(arguments) or "out",
        read_record=lambda folder: {"record of": folder},
    )
    fake("hub_cards", write_card=lambda *arguments: calls.append(arguments))
    result = run("train", "stage1", "train.steps=3", "train.seed=1", "--output-dir", "out", "--no-resume")
    assert result.stdout == "Wrote out.\n"
    assert calls == [("stage1", ["train.steps=3", "train.seed=1"], "out", False), ("out", {"record of": "out"})]


def test_demo_hands_its_options_on(run, fake, tmp_path):
    calls = []
    fake("miniature_ett", run_demo=lambda **options: calls.append(options))
    assert run("demo", "--quick", "--seed", "2", "--output-dir", tmp_path).exit_code == 0
    assert calls == [{"output_dir": tmp_path, "seed": 2, "quick": True, "resume": True}]


def test_in_a_fresh_process_nothing_but_the_answer_is_printed(models, image):
    command = [
        sys.executable,
        "-m",
        "ett",
        "ask",
        str(image),
        "what is the circle?",
        "--model",
        str(models / "ett-chat"),
    ]
    answered = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answered.returncode == 0 and answered.stderr == ""


# Options of caption and ask


def test_version(run):
    result = run("--version")
    assert result.exit_code == 0 and result.stdout == f"ett {ett_version}\n"


def test_several_images_are_described_one_a_line_and_asked_about_together(run, image, monkeypatch):
    alone = run("caption", image).stdout
    result = run("caption", image, image, "--max-new-tokens", 64, "--device", "cpu", "--dtype", "float32")
    assert result.stdout == f"{image}: {alone}" * 2
    asked = []
    monkeypatch.setattr(
        ETTForConditionalGeneration, "generate", lambda self, **kwargs: asked.append(kwargs) or kwargs["input_ids"]
    )
    assert run("ask", image, image, "what is the circle?", "--max-new-tokens", 3).exit_code == 0
    assert len(asked[0]["pixel_values"]) == 2 and asked[0]["max_new_tokens"] == 3


def test_dtype_reaches_the_weights(run, image, monkeypatch):
    dtypes = []
    monkeypatch.setattr(
        ETTForConditionalGeneration,
        "generate",
        lambda self, **kwargs: dtypes.append(self.lm_head.weight.dtype) or kwargs["input_ids"],
    )
    assert run("ask", image, "what is the circle?", "--dtype", "bfloat16").exit_code == 0
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float8"], "--dtype is 'float8'; expected one of float32, bfloat16, float16, auto."),
        (["--device", "gpu"], "The device 'gpu' cannot be used: "),
    ],
)
def test_a_device_or_dtype_that_cannot_be_used(run, image, options, message):
    assert_one_sentence(run("caption", image, *options), message)


@pytest.mark.parametrize(
    "arguments", [["caption", "nothere.png"], ["ask", "nothere.png", "what?"], ["reconstruct", "nothere.png"]]
)
def test_a_missing_image_is_named_before_a_model_is_loaded(run, monkeypatch, arguments):
    monkeypatch.setattr(inference, "_load", lambda load, *rest: pytest.fail(f"{rest} was loaded"))
    assert_one_sentence(run(*arguments), "ett: 'nothere.png' is missing; expected an image file.\n")


@pytest.mark.parametrize("command", ["train", "draw", "recaption", "tokenize"])
def test_names_of_options_are_whole_in_narrow_terminals(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "60")
    told = CliRunner().invoke(app, [command, "--help"], terminal_width=60).stdout
    for option in typer.main.get_command(app).commands[command].params:
        for name in option.opts:
            if name.startswith("--"):
                assert name in told
