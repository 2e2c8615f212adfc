"""The diffusers pipeline that draws: the images of `generate`, options, stopping and refusals."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoModelForImageTextToText, CompileConfig

import ett
from ett.processing_ett import ImageError

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def folder(save_model):
    return save_model("ett-gen", visual_head=True)


@pytest.fixture
def pipe(folder):
    pipe = ett.ETTTextToImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def codes_of(pipe, prompt=PROMPT, seed: int = 0, **options) -> torch.Tensor:
    return pipe(prompt, generator=seeded(seed), output_type="latent", **options).images


def test_latents_are_the_codes_of_generate(pipe):
    inputs = pipe.processor(text=PROMPT, generation_mode="image")
    options = {"guidance_scale": 2.0, "temperature": 0.9, "top_k": 20, "top_p": 0.9}
    expected = pipe.model.generate(**inputs, generation_mode="image", generator=seeded(0), **options)
    assert expected.unique().numel() > 2
    assert torch.equal(codes_of(pipe, **options), expected)


def test_images_arrays_and_tensors_show_the_codes(pipe):
    pixels = pipe.model.decode_image_tokens(codes_of(pipe))
    (image,) = pipe(PROMPT, generator=seeded(0)).images
    (array,) = pipe(PROMPT, generator=seeded(0), output_type="np").images
    tensor = pipe(PROMPT, generator=seeded(0), output_type="pt").images
    assert np.array_equal(image, pipe.processor.post_process_images(pixels)[0])
    torch.testing.assert_close(tensor, (pixels + 1) / 2)
    assert array.shape == (8, 8, 3) and np.array_equal(array, tensor[0].permute(1, 2, 0))


def test_four_images_with_a_generator_each_equal_four_single_runs(pipe):
    prompts = [PROMPT, "a", "what color is it", "the top"]
    batch = pipe(prompts, generator=seeded(0, 1, 2, 3), output_type="latent").images
    alone = [codes_of(pipe, prompt, seed) for seed, prompt in enumerate(prompts)]
    assert torch.equal(batch, torch.cat(alone))


def test_several_images_of_each_prompt(pipe):
    batch = pipe([PROMPT, "a"], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), output_type="latent").images
    alone = [codes_of(pipe, prompt, seed) for seed, prompt in enumerate([PROMPT, PROMPT, "a", "a"])]
    assert torch.equal(batch, torch.cat(alone))


def test_one_generator_draws_the_same_again(pipe):
    first, second = (pipe(PROMPT, generator=seeded(5)[0], output_type="latent").images for _ in range(2))
    assert torch.equal(first, second)


def test_guessing_ahead_and_compiling_draw_the_same(pipe):
    def draw(**options):
        return pipe(PROMPT, generator=seeded(4)[0], output_type="latent", **options).images

    assert torch.equal(draw(jacobi_window=4), draw())
    assert torch.equal(draw(compile_config=CompileConfig(backend="eager", mode=None)), draw())


def test_a_size_of_its_own(pipe):
    (image,) = pipe(PROMPT, height=4, width=12).images
    assert image.size == (12, 4)


def test_without_a_dict_the_result_is_a_tuple(pipe):
    (images,) = pipe(PROMPT, return_dict=False)
    assert isinstance(images[0], Image.Image)


def test_the_callback_sees_each_code_as_it_is_drawn(pipe):
    seen = []
    whole = codes_of(
        pipe, callback_on_step_end=lambda pipe, step, timestep, given: seen.append((step, given["latents"].clone()))
    )
    assert [step for step, _ in seen] == list(range(16))
    for step, codes in seen:
        assert torch.equal(codes.flatten()[: step + 1], whole.flatten()[: step + 1])
        assert codes.flatten()[step + 1 :].unique().tolist() in ([], [-1])


def interrupt_at(place: int):
    def callback(pipe, step, timestep, given):
        pipe._interrupt = step == place

    return callback


def test_interrupted_drawing_is_the_beginning_of_the_image(pipe):
    whole = codes_of(pipe)
    part = codes_of(pipe, callback_on_step_end=interrupt_at(5)).flatten()
    assert torch.equal(part[:6], whole.flatten()[:6]) and part[6:].unique().tolist() == [-1]


def test_an_interrupted_image_is_grey_where_nothing_was_drawn(pipe):
    (image,) = pipe(PROMPT, callback_on_step_end=interrupt_at(7)).images
    assert np.unique(np.asarray(image)[4:]).tolist() == [128]
    assert len(np.unique(np.asarray(image)[:4])) > 1


def test_a_drawing_after_an_interrupted_one_is_whole(pipe):
    codes_of(pipe, callback_on_step_end=interrupt_at(0))
    assert not (codes_of(pipe) < 0).any()


def test_progress_counts_codes(pipe, capfd):
    pipe.set_progress_bar_config()
    pipe([PROMPT, "a"])
    assert "16/16" in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPT)
    assert capfd.readouterr().err == ""


def test_an_image_in_a_prompt_is_the_image_that_generate_sees(pipe, folder):
    inputs = pipe.processor(text="<image> a red circle", images=str(folder / "red.png"), generation_mode="image")
    expected = pipe.model.generate(**inputs, generation_mode="image", generator=seeded(0))
    with Image.open(folder / "red.png") as image:
        assert torch.equal(codes_of(pipe, "<image> a red circle", image=image), expected)
        assert torch.equal(codes_of(pipe, PROMPT, image=image), expected)
    assert not torch.equal(codes_of(pipe, PROMPT, image=str(folder / "blue.png")), expected)


def test_prompts_with_different_numbers_of_images_equal_single_runs(pipe, folder):
    red, blue = str(folder / "red.png"), str(folder / "blue.png")
    batch = pipe([PROMPT, "a"], image=[[red, blue], blue], generator=seeded(0, 1), output_type="latent").images
    alone = [codes_of(pipe, PROMPT, 0, image=[red, blue]), codes_of(pipe, "a", 1, image=blue)]
    assert torch.equal(batch, torch.cat(alone))


def test_a_saved_pipeline_is_an_ordinary_model_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    AutoModelForImageTextToText.from_pretrained(tmp_path)
    for pipeline_class in (ett.ETTTextToImagePipeline, DiffusionPipeline):
        again = pipeline_class.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(codes_of(again), codes_of(pipe))


def test_diffusers_finds_the_pipeline_of_a_folder_without_its_name(pipe, folder):
    found = DiffusionPipeline.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    assert type(found) is ett.ETTTextToImagePipeline and not found.model.training
    assert torch.equal(codes_of(found), codes_of(pipe))


def test_diffusers_loads_the_pipeline_in_half_precision(folder):
    found = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert found.model.dtype == torch.bfloat16 and found.model.model.vision_tokenizer.dtype == torch.float32


def test_half_precision_leaves_the_vision_tokenizer_in_full(folder):
    pipe = ett.ETTTextToImagePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert pipe.model.visual_head.weight.dtype == torch.bfloat16
    assert pipe.model.model.vision_tokenizer.dtype == torch.float32


def test_a_pipeline_moves_whole(pipe):
    assert pipe.to("meta") is pipe
    assert {parameter.device.type for parameter in pipe.model.parameters()} == {"meta"}


def test_offloading_fetches_the_model_before_it_draws(pipe, monkeypatch):
    expected, moves = codes_of(pipe), []
    pipe.enable_model_cpu_offload(device="cpu")
    monkeypatch.setattr(type(pipe.model._hf_hook), "pre_forward", lambda hook, model: moves.append(model))
    assert torch.equal(codes_of(pipe), expected)
    assert moves == [pipe.model]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs an accelerator")
def test_an_offloaded_model_is_on_the_accelerator_while_it_draws(pipe):
    pipe.enable_model_cpu_offload()
    devices = []
    for _ in range(2):
        pipe(PROMPT, callback_on_step_end=lambda pipe, *_: devices.append(pipe.model.device.type))
        assert pipe.model.device.type == "cpu"
    assert set(devices) == {"cuda"}


def test_a_model_that_cannot_draw(save_model):
    folder = save_model("ett-chat")
    with pytest.raises(ValueError, match=r"no visual head .* cannot generate"):
        ett.ETTTextToImagePipeline.from_pretrained(folder)
    assert not (folder / "model_index.json").exists()


def test_processes_that_do_not_write_leave_the_index_out(pipe, tmp_path):
    pipe.model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "model_index.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": " "}, "The prompt is empty"),
        ({"prompt": [None]}, "A prompt is of type NoneType; expected a text"),
        ({"prompt": 5}, "A prompt is of type int; expected a text"),
        ({"prompt": []}, "The prompt is empty"),
        ({"prompt": [PROMPT, ""]}, "The prompt is empty"),
        ({"prompt": "a zebra"}, "The word 'zebra' is beyond"),
        ({"height": 7}, r"Images of 7 x 8 pixels \(height x width\) do not divide into codes of 2 pixels a side"),
        ({"height": 8.0}, r"Images of 8\.0 x 8 pixels .* choose positive, whole multiples of it"),
        ({"height": "8"}, "Images of '8' x 8 pixels"),
        ({"width": 0}, "Images of 8 x 0 pixels"),
        ({"width": -8, "image": "gone.png"}, "Images of 8 x -8 pixels"),
        ({"height": 400, "width": 400}, "The prompt has 4 tokens and the image 40000 codes"),
        ({"height": 1000, "width": 1000}, "have 250000 codes; expected at most 65536, so choose a smaller size"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; expected at least 1"),
        ({"generator": seeded(0, 1)}, "Got 2 generators for 1 images"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; expected one of pil, np, pt, latent"),
        ({"guidance_scale": 0.5}, "guidance_scale 0.5"),
        ({"prompt": [PROMPT, "a"], "image": ["red.png"]}, "There are 2 prompts, and image has 1 entries"),
        ({"prompt": [PROMPT, "a"], "image": "red.png"}, "There are 2 prompts, and image has one image"),
        ({"prompt": "<image> <image>", "image": "red.png"}, "Text 0 has 2 <image> and 1 images"),
        ({"prompt": "<image>"}, "The text has 1 <image> and there are 0 images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_drawn_is_said_before_any_work(pipe, monkeypatch, given, message):
    monkeypatch.setattr(type(pipe.model.model), "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPT, **given})


def test_a_missing_image(pipe):
    with pytest.raises(ImageError, match=r"gone.png' is missing"):
        pipe(PROMPT, image="gone.png")
