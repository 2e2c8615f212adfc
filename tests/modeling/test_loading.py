"""Loaded in every way that transformers offers, it is the same model, and its tokenizer gives the same codes."""

import json

import accelerate
import pytest
import safetensors.torch
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration, ETTModel

IMAGE, IMAGE_START, IMAGE_END = 4, 5, 6
HALVES = [torch.bfloat16, torch.float16]
PARTS = ["model.vision_tokenizer", "model.projector", "model.language_model", "lm_head", "visual_head"]


@pytest.fixture
def folder(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def inputs():
    return {
        "input_ids": torch.tensor([[IMAGE_START, *[IMAGE] * 16, IMAGE_END, 10, 11]]),
        "pixel_values": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    }


def load(folder, **options):
    return ETTForConditionalGeneration.from_pretrained(folder, **options)


@torch.no_grad()
def reads_and_draws(model, inputs):
    """Each thing that a model does, by its name."""
    prompt = torch.tensor([[10, IMAGE_START]])
    options = {"generation_mode": "image", "do_sample": False, "image_size": (8, 8)}
    tokenizer, codes = model.model.vision_tokenizer, torch.arange(4).view(1, 2, 2)
    return {
        "logits": model(**inputs).logits,
        "losses": model(**inputs, labels=inputs["input_ids"], predict_codes=True, skip_logits=True).loss,
        "text": model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False),
        "beams": model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, num_beams=2, do_sample=False),
        "drawing": model.generate(prompt, **options),
        "codes": tokenizer.encode_codes(inputs["pixel_values"]),
        "images": model.decode_image_tokens(codes),
        "reconstructions": tokenizer(inputs["pixel_values"]).sample,
    }


def assert_same(found, expected):
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def dtypes(module):
    return {parameter.dtype for parameter in module.parameters()}


# Precision


@pytest.mark.parametrize("dtype", HALVES)
def test_in_half_precision_it_reads_and_draws_by_the_codes_of_single_precision(folder, inputs, dtype):
    whole, model = load(folder), load(folder, dtype=dtype)
    assert model.dtype == dtype
    for part in (model.model.language_model, model.lm_head, model.visual_head):
        assert dtypes(part) == {dtype}
    assert dtypes(model.model.vision_tokenizer) == {torch.float32}
    assert dtypes(model.model.projector) == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}
    found, expected = reads_and_draws(model, inputs), reads_and_draws(whole, inputs)
    for name in ("codes", "images", "reconstructions"):
        assert torch.equal(found[name], expected[name])
    assert found["logits"].dtype == dtype
    torch.testing.assert_close(found["logits"].float(), expected["logits"], rtol=0, atol=0.5)
    assert found["drawing"].shape == expected["drawing"].shape


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_saved_it_is_loaded_in_the_precision_that_it_was_saved_in(folder, tmp_path, dtype):
    model = load(folder, dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    saved = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    for options in ({}, {"dtype": "auto"}):
        loaded = load(tmp_path / "again", **options)
        assert loaded.dtype == dtype
        weights = loaded.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
        assert all(weights[name].dtype == value.dtype for name, value in saved.items())
        assert dtypes(loaded.model.vision_tokenizer) == {torch.float32}


def test_half_precision_can_be_loaded_in_single(folder, tmp_path):
    load(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert dtypes(load(tmp_path / "half", dtype=torch.float32)) == {torch.float32}


# Devices


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"], ids=str)
def test_a_device_map_changes_nothing(folder, inputs, device_map):
    expected = reads_and_draws(load(folder), inputs)
    model = load(folder, device_map=device_map, max_memory={"cpu": "1GB"})
    assert_same(reads_and_draws(model, inputs), expected)


def test_what_does_not_fit_into_memory_stays_on_disk(folder, inputs, tmp_path):
    model = load(folder, device_map="auto", max_memory={"cpu": "200KB"}, offload_folder=tmp_path / "offloaded")
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert_same(reads_and_draws(model, inputs), reads_and_draws(load(folder), inputs))


@pytest.mark.parametrize(
    "on_disk",
    [
        ["model.vision_tokenizer"],
        # The words' embeddings and the head for them are one matrix, which is in one place only.
        ["model.projector", "model.language_model", "lm_head", "visual_head"],
        PARTS,
    ],
    ids=["tokenizer", "the rest", "all"],
)
def test_parts_on_disk_change_nothing(folder, inputs, tmp_path, on_disk):
    device_map = {part: "disk" if part in on_disk else "cpu" for part in PARTS}
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offloaded")
    for part in PARTS:
        devices = {parameter.device.type for parameter in model.get_submodule(part).parameters()}
        assert devices == {"meta" if part in on_disk else "cpu"}
    assert_same(reads_and_draws(model, inputs), reads_and_draws(load(folder), inputs))


def test_an_index_model_of_unit_vectors_is_the_same_on_disk(make_model, make_vision_tokenizer, inputs, tmp_path):
    whole = make_model(vision_tokenizer=make_vision_tokenizer(l2_normalize=True), visual_embedding="index")
    whole.save_pretrained(tmp_path / "saved")
    model = load(tmp_path / "saved", device_map={"": "disk"}, offload_folder=tmp_path / "offloaded")
    assert_same(reads_and_draws(model, inputs), reads_and_draws(whole, inputs))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_by_accelerate_it_is_the_same(folder, inputs, tmp_path, offload):
    model, device = load(folder), torch.device("cpu")
    if offload == "cpu":
        accelerate.cpu_offload(model, device, offload_buffers=True)
    else:
        accelerate.disk_offload(model, tmp_path / "offloaded", device, offload_buffers=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.model.vision_tokenizer.execution_device == device
    assert_same(reads_and_draws(model, inputs), reads_and_draws(load(folder), inputs))


def test_a_tokenizer_of_its_own_is_the_same_when_offloaded(make_vision_tokenizer, inputs, tmp_path):
    whole, tokenizer, pixels = make_vision_tokenizer(), make_vision_tokenizer(), inputs["pixel_values"]
    accelerate.disk_offload(tokenizer, tmp_path, torch.device("cpu"))
    codes = whole.encode_codes(pixels)
    assert torch.equal(tokenizer.encode_codes(pixels), codes)
    with torch.no_grad():
        assert torch.equal(tokenizer.decode_codes(codes).sample, whole.decode_codes(codes).sample)
        found, expected = tokenizer(pixels), whole(pixels)
    assert torch.equal(found.sample, expected.sample)
    assert torch.equal(found.commit_loss, expected.commit_loss)


# Attention


@pytest.mark.parametrize("attention", ["eager", "sdpa", {"text_config": "eager"}], ids=str)
def test_the_kind_of_attention_is_that_of_the_language_model(folder, inputs, attention):
    model = load(folder, attn_implementation=attention)
    name = attention if isinstance(attention, str) else attention["text_config"]
    assert model.model.language_model.config._attn_implementation == name
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, load(folder)(**inputs).logits, rtol=0, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the package may be there, beside a GPU")
def test_flash_attention_without_its_package_is_an_error(folder):
    with pytest.raises(ImportError, match="the package for FlashAttention2 doesn't seem to be installed"):
        load(folder, attn_implementation="flash_attention_2")


# Quantization of the language model


def bits_and_bytes(bits, **options):
    pytest.importorskip("bitsandbytes")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)


def torch_ao(**options):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), **options)


QUANTIZATIONS = {"8 bits": lambda: bits_and_bytes(8), "4 bits": lambda: bits_and_bytes(4), "torchao": torch_ao}
WITH_MODULES_OF_THE_USERS = {
    "8 bits, some kept": lambda: bits_and_bytes(8, llm_int8_skip_modules=["lm_head"]),
    "4 bits, some kept": lambda: bits_and_bytes(4, llm_int8_skip_modules=["lm_head"]),
    "torchao, some kept": lambda: torch_ao(modules_to_not_convert=["lm_head", "visual_head"]),
}


@pytest.fixture
def wide_folder(make_model, make_language_model, tmp_path):
    """Of a language model whose rows are whole blocks of bitsandbytes' 4 bits, which its products on CPUs need."""
    model = make_model(make_language_model(hidden_size=64, intermediate_size=128, initializer_range=0.1))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def quantized(model):
    """Names of the layers with weights in other than plain tensors of floats."""
    plain = (torch.nn.Parameter, torch.Tensor)
    parameters = dict(model.named_parameters()).items()
    return {name for name, value in parameters if type(value) not in plain or not value.is_floating_point()}


@pytest.mark.parametrize("quantization", QUANTIZATIONS | WITH_MODULES_OF_THE_USERS)
def test_quantization_is_that_of_the_language_models_layers_alone(wide_folder, inputs, quantization):
    whole = load(wide_folder)
    quantization_config = (QUANTIZATIONS | WITH_MODULES_OF_THE_USERS)[quantization]()
    model = load(wide_folder, quantization_config=quantization_config)
    layers = whole.model.language_model.layers.named_modules(prefix="model.language_model.layers")
    assert quantized(model) == {f"{name}.weight" for name, layer in layers if isinstance(layer, torch.nn.Linear)}
    for part in ("model.vision_tokenizer", "model.projector", "lm_head", "visual_head"):
        assert dtypes(model.get_submodule(part)) == {torch.float32}
    with torch.no_grad():
        found, expected = (one.get_image_features(inputs["pixel_values"]) for one in (model, whole))
    assert torch.equal(found.quantized.codes, expected.quantized.codes)
    assert torch.equal(found.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_it_reads_and_draws_by_the_codes_of_single_precision(wide_folder, inputs, quantization, dtype):
    whole = reads_and_draws(load(wide_folder), inputs)
    model = load(wide_folder, dtype=dtype, quantization_config=QUANTIZATIONS[quantization]())
    assert dtypes(model.model.vision_tokenizer) == {torch.float32}
    assert dtypes(model.visual_head) == {dtype}
    found = reads_and_draws(model, inputs)
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in whole.items()}
    for name in ("codes", "images", "reconstructions"):
        assert torch.equal(found[name], whole[name])
    assert torch.cosine_similarity(found["logits"].float(), whole["logits"], dim=-1).min() > 0.9


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_saved_in_its_bits_it_is_loaded_as_it_was(wide_folder, inputs, tmp_path, quantization):
    model = load(wide_folder, quantization_config=QUANTIZATIONS[quantization]())
    # Before a product: on some CPUs bitsandbytes packs weights for it, and rounds their scales.
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert quantized(again) == quantized(model)
    assert_same(reads_and_draws(again, inputs), reads_and_draws(model, inputs))


def test_the_model_without_heads_is_quantized_the_same(wide_folder):
    model = ETTModel.from_pretrained(wide_folder, quantization_config=bits_and_bytes(8))
    names = quantized(model)
    assert names and all(name.startswith("language_model.layers.") for name in names)
