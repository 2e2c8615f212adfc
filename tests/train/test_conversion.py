"""Public IBQ checkpoints, made here in small from their published layouts, become tokenizers that compute the same."""

import pytest
import safetensors.torch
import torch
from PIL import Image
from typer.testing import CliRunner

from ett.cli import app
from ett.modeling_ett.modeling_ibq import IBQModel
from ett.train.models.conversion import convert_tokenizer
from ett.train.objective.discriminator import PatchDiscriminator

from . import ibq_reference
from .ibq_reference import Reference, make_discriminator_state, make_state, write_checkpoint, write_emu_folder

MARGIN = 1e-3


@pytest.fixture(scope="module")
def raw():
    return make_state(seed=0)


@pytest.fixture(scope="module")
def ema():
    return make_state(seed=1)


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(5)) * 2 - 1


def assert_computes_the_same(model: IBQModel, reference: Reference, pixels: torch.Tensor):
    with torch.no_grad():
        codes = model.quantize(model.encode(pixels).latents).codes
        logits = reference.logits(reference.encode(pixels))
        best = logits.topk(2, dim=-1).values
        is_clear = best[..., 0] - best[..., 1] > MARGIN
        assert is_clear.float().mean() > 0.9
        assert torch.equal(codes[is_clear], logits.argmax(dim=-1)[is_clear])
        torch.testing.assert_close(model.decode_codes(codes).sample, reference.decode(codes), rtol=0, atol=1e-4)


def test_the_moving_average_is_what_a_checkpoint_is_converted_to(tmp_path, raw, ema, pixels):
    source = write_checkpoint(tmp_path / "tokenizer.ckpt", raw, ema)
    conversion = convert_tokenizer(source, tmp_path / "tokenizer")
    assert_computes_the_same(IBQModel.from_pretrained(tmp_path / "tokenizer"), Reference(ema), pixels)
    assert conversion.left_out["raw weights"] == len(raw)


def test_raw_weights_are_converted_on_request(tmp_path, raw, ema, pixels):
    source = write_checkpoint(tmp_path / "tokenizer.ckpt", raw, ema)
    conversion = convert_tokenizer(source, tmp_path / "tokenizer", weights="raw")
    assert_computes_the_same(IBQModel.from_pretrained(tmp_path / "tokenizer"), Reference(raw), pixels)
    judge = make_discriminator_state()
    assert conversion.left_out == {
        "the discriminator": len(judge) + sum(name.endswith(("weight", "bias")) for name in judge),
        "LPIPS": 1,
        "the moving average": len(raw),
        "the moving average's bookkeeping": 2,
    }


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_an_emu_folder_is_converted_with_its_flag(tmp_path, raw, pixels, l2_normalize):
    source = write_emu_folder(tmp_path / "emu", raw, l2_normalize)
    convert_tokenizer(source, tmp_path / "tokenizer")
    model = IBQModel.from_pretrained(tmp_path / "tokenizer")
    assert model.config.l2_normalize is l2_normalize
    assert_computes_the_same(model, Reference(raw, l2_normalize), pixels)


def test_sizes_are_read_off_the_tensors(tmp_path, raw):
    convert_tokenizer(write_emu_folder(tmp_path / "emu", raw), tmp_path / "tokenizer")
    config = IBQModel.from_pretrained(tmp_path / "tokenizer").config
    assert list(config.block_out_channels) == [32, 32, 64]
    assert (config.layers_per_block, config.latent_channels) == (ibq_reference.BLOCKS, ibq_reference.LATENT)
    assert (config.num_vq_embeddings, config.vq_embed_dim) == (ibq_reference.CODES, ibq_reference.DIM)
    assert list(config.down_block_types) == ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"]


def test_the_summary_says_sizes_and_which_weights(tmp_path, raw, ema):
    source = write_checkpoint(tmp_path / "tokenizer.ckpt", raw, ema)
    conversion = convert_tokenizer(source, tmp_path / "tokenizer")
    summary = conversion.summary()
    assert "50 codes of width 16, one for 4 x 4 pixels" in summary
    assert "the moving average (EMA)" in summary and "1 tensors of LPIPS" in summary
    parameters = sum(tensor.numel() for tensor in raw.values())
    assert f"{parameters:,} parameters" in summary


def test_the_discriminator_is_written_for_further_training(tmp_path, raw, ema):
    torch.manual_seed(3)
    source = write_checkpoint(tmp_path / "tokenizer.ckpt", raw, ema)
    convert_tokenizer(source, tmp_path / "tokenizer", discriminator=tmp_path / "discriminator.safetensors")
    judge = PatchDiscriminator(3, 8, 2)
    safetensors.torch.load_model(judge, tmp_path / "discriminator.safetensors")
    stored = torch.load(source, weights_only=True)["state_dict"]
    for name, tensor in judge.state_dict().items():
        expected = torch.zeros(()) if name.startswith("lecam") else stored[f"loss.discriminator.{name}"]
        assert torch.equal(tensor, expected), name


def rename(old: str, new: str):
    def change(state: dict):
        state[new] = state.pop(old)

    return change


def drop(name: str):
    return lambda state: state.pop(name)


def reshape(name: str, shape: tuple[int, ...]):
    return lambda state: state.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            rename("decoder.mid.attn_1.q.weight", "decoder.mid.attn_1.query.weight"),
            r"1 missing: decoder\.mid\.attn_1\.q\.weight; 1 unknown: decoder\.mid\.attn_1\.query\.weight",
        ),
        (drop("encoder.norm_out.bias"), r"1 missing: encoder\.norm_out\.bias\."),
        (
            reshape("post_quant_conv.weight", (24, 17, 1, 1)),
            r"1 of another shape, \(24, 17, 1, 1\) where \(24, 16, 1, 1\) was expected: post_quant_conv\.weight\.",
        ),
        (drop("quantize.embedding.weight"), r"no tensor 'quantize\.embedding\.weight', so it is no IBQ tokenizer"),
    ],
    ids=["renamed", "missing", "of another shape", "without codebook"],
)
def test_a_tensor_out_of_place_is_named_and_nothing_is_written(tmp_path, raw, change, message):
    source = write_checkpoint(tmp_path / "tokenizer.ckpt", raw, change=change)
    with pytest.raises(ValueError, match=message):
        convert_tokenizer(source, tmp_path / "tokenizer", weights="raw")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.ckpt"]


def test_an_error_names_the_first_tensors_of_many(tmp_path, raw):
    lost = [name for name in raw if name.startswith("decoder.up.")]

    def change(state: dict):
        for name in lost:
            state[f"lost.{name}"] = state.pop(name)

    source = write_checkpoint(tmp_path / "tokenizer.ckpt", raw, change=change)
    with pytest.raises(ValueError) as caught:
        convert_tokenizer(source, tmp_path / "tokenizer", weights="raw")
    missing, unknown = str(caught.value).partition(f"{len(lost)} missing: ")[2].split("; ")
    listed, more = missing.split(" and ")
    assert set(listed.split(", ")) < set(lost) and more == f"{len(lost) - 8} more"
    assert unknown.startswith(f"{len(lost)} unknown: lost.decoder.up.")


class Intruder:
    def __reduce__(self):
        return (print, ("this must not run",))


def pickled_object(path, raw):
    torch.save({"state_dict": raw, "callbacks": Intruder()}, path)


def cut_off(path, raw):
    write_checkpoint(path, raw)
    path.write_bytes(path.read_bytes()[:-5000])


def not_a_checkpoint(path, raw):
    path.write_text("weights")


def pickle_of_nothing(path, raw):
    path.write_bytes(b"\x80\x02.")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pickled_object, "holds objects that are no tensors, which are never loaded"),
        (cut_off, "cannot be read as a checkpoint; it may be cut off"),
        (pickle_of_nothing, "cannot be read as a checkpoint; it may be cut off"),
        (not_a_checkpoint, "no"),
        (lambda path, raw: None, "neither a .ckpt file nor a folder"),
    ],
    ids=["pickled object", "cut off", "pickle of nothing", "no checkpoint", "nothing there"],
)
def test_a_file_that_is_no_checkpoint_is_refused_without_being_run(tmp_path, capsys, raw, make, message):
    make(tmp_path / "tokenizer.ckpt", raw)
    with pytest.raises(ValueError, match=message):
        convert_tokenizer(tmp_path / "tokenizer.ckpt", tmp_path / "tokenizer", weights="raw")
    assert not (tmp_path / "tokenizer").exists()
    assert "this must not run" not in capsys.readouterr().out


def test_a_checkpoint_without_moving_average_points_to_raw_weights(tmp_path, raw):
    with pytest.raises(ValueError, match=r"no moving average .* --weights raw"):
        convert_tokenizer(write_checkpoint(tmp_path / "tokenizer.ckpt", raw), tmp_path / "tokenizer")


def test_a_folder_of_another_model_is_refused(tmp_path, raw):
    source = write_emu_folder(tmp_path / "emu", raw)
    (source / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="its model_type is 'qwen2', where 'Emu3p5VisionVQ' was expected"):
        convert_tokenizer(source, tmp_path / "tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["emu"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(tmp_path, raw, name):
    source = write_emu_folder(tmp_path / "emu", raw)
    (source / name).unlink()
    with pytest.raises(ValueError, match=rf"'.*emu' has no {name}; expected a folder such as"):
        convert_tokenizer(source, tmp_path / "tokenizer")


def test_tensors_of_another_model_are_listed(tmp_path):
    source = tmp_path / "other.ckpt"
    torch.save({f"layers.{layer}.{name}": torch.zeros(2) for layer in range(3) for name in ("query", "key")}, source)
    with pytest.raises(ValueError, match=r"it is no IBQ tokenizer\. Its tensors are layers\.0\.query, layers\.0\.key"):
        convert_tokenizer(source, tmp_path / "tokenizer", weights="raw")
    assert [path.name for path in tmp_path.iterdir()] == ["other.ckpt"]


def test_a_cut_off_emu_folder_is_refused(tmp_path, raw):
    source = write_emu_folder(tmp_path / "emu", raw)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"'.*emu' cannot be converted"):
        convert_tokenizer(source, tmp_path / "tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["emu"]


def test_an_output_folder_that_holds_something_is_left_alone(tmp_path, raw):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something already"):
        convert_tokenizer(write_emu_folder(tmp_path / "emu", raw), tmp_path / "tokenizer")
    assert (tmp_path / "tokenizer" / "thesis.txt").read_text() == "years of work"


def test_a_discriminator_that_has_no_folder_is_refused_before_anything_is_written(tmp_path, raw):
    source = write_checkpoint(tmp_path / "ibq.ckpt", raw)
    with pytest.raises(ValueError, match=r"There is no folder '.*absent'"):
        convert_tokenizer(source, tmp_path / "tokenizer", "raw", tmp_path / "absent" / "discriminator.safetensors")
    assert not (tmp_path / "tokenizer").exists()


def test_a_discriminator_that_is_there_already_is_left_alone(tmp_path, raw):
    source = write_checkpoint(tmp_path / "tokenizer.ckpt", raw)
    (tmp_path / "discriminator.safetensors").write_text("trained for weeks")
    with pytest.raises(ValueError, match=r"discriminator.safetensors' exists already"):
        convert_tokenizer(source, tmp_path / "tokenizer", "raw", tmp_path / "discriminator.safetensors")
    assert (tmp_path / "discriminator.safetensors").read_text() == "trained for weeks"
    assert not (tmp_path / "tokenizer").exists()


def test_a_converted_tokenizer_reconstructs_images(tmp_path, raw):
    convert_tokenizer(write_emu_folder(tmp_path / "emu", raw), tmp_path / "tokenizer")
    Image.linear_gradient("L").save(tmp_path / "image.png")
    command = ["reconstruct", tmp_path / "image.png", "--model", tmp_path / "tokenizer", "--output"]
    for size, options in ((256, []), (32, ["--height", "32", "--width", "32"])):
        output = tmp_path / f"{size}.png"
        result = CliRunner().invoke(app, [str(argument) for argument in (*command, output, *options)])
        assert result.exit_code == 0, result.stderr
        assert Image.open(output).size == (size, size)


def test_the_command_writes_a_tokenizer_and_says_what_it_is(tmp_path, raw, ema):
    source = write_checkpoint(tmp_path / "tokenizer.ckpt", raw, ema)
    result = CliRunner().invoke(app, ["convert-tokenizer", str(source), str(tmp_path / "tokenizer")])
    assert result.exit_code == 0, result.stderr
    assert "50 codes of width 16" in result.stdout
    assert IBQModel.from_pretrained(tmp_path / "tokenizer").config.num_vq_embeddings == 50


def test_the_command_names_what_is_wrong_in_one_sentence(tmp_path, raw):
    source = write_checkpoint(tmp_path / "tokenizer.ckpt", raw)
    result = CliRunner().invoke(
        app, ["convert-tokenizer", str(source), str(tmp_path / "tokenizer"), "--weights", "best"]
    )
    assert result.exit_code == 1
    assert result.stderr == "ett: weights is 'best'; expected one of ema, raw.\n"
