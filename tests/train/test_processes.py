"""Two processes learn what one does: DDP, FSDP2 and DeepSpeed on gloo, their checkpoints and averages. Runs of two
processes are made together, since starting them takes most of the time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ett.modeling_ett.modeling_ett import ETTForConditionalGeneration

from .processes import in_one_piece

ROOT = Path(__file__).parents[2]


def launch(folder, *arguments):
    folder.mkdir()
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *command, str(Path(__file__).with_name("processes.py")), str(folder), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(root):
    return in_one_piece(root / "one")


@pytest.fixture(scope="module")
def two(root):
    return launch(root / "two")


@pytest.mark.parametrize("stage", ["alignment", "semantic", "chat", "drawing"])
def test_two_processes_have_the_losses_of_one(one, two, stage):
    assert two[stage] == pytest.approx(one[stage], rel=0, abs=1e-5 * one[stage][0])


def test_with_an_adversary_two_processes_have_nearly_the_losses_of_one(one, two):
    """The discriminator's batch norm takes its statistics from each process."""
    assert two["adversary"] == pytest.approx(one["adversary"], rel=2e-2)
    assert two["adversary"][0] != two["semantic"][0]


def test_lecams_running_means_are_those_of_one_process_and_one_batch(one, two):
    assert two["lecam"] == pytest.approx(one["lecam"], rel=1e-4)
    assert one["lecam"][0] != 0


@pytest.mark.parametrize("stage", ["alignment", "semantic", "untied", "lora"])
def test_fsdp2_has_the_losses_of_ddp(two, stage):
    assert two[f"fsdp {stage}"] == pytest.approx(two[stage][:4], rel=1e-4)


def test_with_an_adversary_fsdp2_has_the_losses_of_ddp(two):
    assert two["fsdp FULL whole"] == pytest.approx(two["adversary"], rel=1e-4)


def test_in_half_precision_fsdp2_computes_what_ddp_does(two):
    """Rounded pixels or weights of the tokenizer would give other codes."""
    assert two["fsdp half"] == pytest.approx(two["half"], rel=1e-3)
    assert two["half"] != two["alignment"][:4]


@pytest.mark.parametrize("name", ["checkpointed chat", "fsdp checkpointed chat"])
def test_with_gradient_checkpointing_rows_without_an_image_train_as_without(root, two, name):
    """DDP would wait for the projector's gradients of a process without an image; FSDP2 would mix up gradients."""
    assert two[name] == pytest.approx(two["chat"], rel=1e-6)
    found, expected = (torch.load(root / "two" / f"{run}.pt", weights_only=True) for run in (name, "chat"))
    torch.testing.assert_close({key: found[key] for key in expected}, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
def test_resumed_under_fsdp2_a_run_is_the_uninterrupted_one(two, kind):
    assert len(two[f"fsdp {kind} resumed"]) == 4
    assert two[f"fsdp {kind} resumed"] == two[f"fsdp {kind} whole"]
    assert two[f"fsdp {kind} same average"]


@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
def test_gathered_weights_are_the_average_in_the_checkpoint(root, two, kind):
    gathered = torch.load(root / "two" / f"{kind}.pt", weights_only=True)
    average = safetensors.torch.load_file(root / "two" / f"fsdp-{kind}" / "checkpoint-4" / "average.safetensors")
    assert {name for name in gathered if name not in average} <= {"lm_head.weight", "visual_head.weight"}
    torch.testing.assert_close({name: gathered[name] for name in average}, average, rtol=0, atol=0)


def test_a_full_checkpoint_under_fsdp2_is_a_model_folder(root, two):
    checkpoint = root / "two" / "fsdp-FULL" / "checkpoint-4"
    _, notes = ETTForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]


# DeepSpeed


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def zero(request):
    pytest.importorskip("deepspeed")
    return request.param


@pytest.fixture(scope="module")
def sharded(root, zero):
    return launch(root / zero, zero)


@pytest.mark.parametrize("variant", ["adversary", "alignment", "lora"])
def test_deepspeed_has_the_losses_and_gradient_norms_of_ddp(sharded, variant):
    whole = sharded[f"ddp {variant}"]
    assert sharded[variant].keys() == whole.keys()
    for name, values in whole.items():
        assert sharded[variant][name] == pytest.approx(values, rel=1e-5)


def test_in_half_precision_deepspeed_computes_nearly_what_ddp_does(sharded, zero):
    """ZeRO-3 adds a layer's bias to a product that is rounded already."""
    tolerance = {"zero2": 1e-5, "zero3": 5e-3}[zero]
    assert sharded["half"]["loss"] == pytest.approx(sharded["ddp half"]["loss"], rel=tolerance)
    assert sharded["half"]["loss"] != sharded["alignment"]["loss"]


@pytest.mark.parametrize("variant", ["adversary", "lora"])
def test_resumed_under_deepspeed_a_run_is_the_uninterrupted_one(root, zero, sharded, variant):
    assert len(sharded[variant]["loss"]) == 4
    assert sharded[f"{variant} resumed"] == sharded[variant]
    weights, resumed = torch.load(root / zero / zero / variant / "weights.pt", weights_only=True)
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)


def test_a_checkpoint_under_deepspeed_is_a_model_folder(root, zero, sharded):
    folder = root / zero / zero / "adversary"
    model, notes = ETTForConditionalGeneration.from_pretrained(folder / "checkpoint-4", output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    weights, _ = torch.load(folder / "weights.pt", weights_only=True)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


def test_under_deepspeed_gradients_that_are_no_numbers_change_no_weight(sharded):
    assert "the gradients of vision_tokenizer, projector" in sharded["broken"]["message"]
    assert sharded["broken"]["weights stay"]
