"""Recipes: what comes with the package loads, and what is wrong in one is named."""

import pytest

from ett.data_ett import TASKS
from ett.train import ETTTrainingArguments, available_recipes, load_recipe
from ett.train.arguments import accumulation_steps
from ett.train.consistency import check_recipe
from ett.train.recipes import PARTS, TRAINING_FIELDS


@pytest.mark.parametrize("name", available_recipes())
def test_every_recipe_of_the_package_is_sound(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.title
    assert recipe.task in TASKS
    assert recipe.train and set(recipe.train) <= set(PARTS)
    ETTTrainingArguments(output_dir=str(tmp_path), **{**recipe.training, "bf16": False})


def test_the_papers_stages_come_with_the_package():
    stages = {"tokenizer", "stage1_alignment", "stage2_semantic", "stage3_chat", "stage3_gen"}
    assert stages <= set(available_recipes())


def test_the_papers_numbers_are_in_its_recipes():
    """Sections 3.1, 3.3 and 4.1."""
    tokenizer = load_recipe("tokenizer")
    assert tokenizer.model.image_size == 256
    assert {
        "max_steps": 500_000,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "adam_beta1": 0.5,
        "adam_beta2": 0.9,
        "max_grad_norm": 0,
        "ema_decay": 0.999,
        "perceptual_weight": 1.0,
        "adversarial_weight": 0.1,
        "entropy_weight": 0.05,
    }.items() <= tokenizer.training.items()
    assert load_recipe("stage1_alignment").train == ["projector"]
    semantic = load_recipe("stage2_semantic")
    assert set(semantic.train) == {"vision_tokenizer", "projector", "language_model"}
    assert (semantic.training["alpha"], semantic.training["learning_rate"]) == (0.25, 4e-5)
    assert load_recipe("stage3_chat").training["learning_rate"] == 2e-5
    assert "vision_tokenizer" not in load_recipe("stage3_chat").train + load_recipe("stage3_gen").train
    weights = [
        [entry["weight"] for entry in load_recipe(f"stage3_{name}").data.mixture.values()] for name in ("chat", "gen")
    ]
    assert weights == [[32.0, 3.5, 31.8], [14.0, 16.0]]
    filters = load_recipe("stage3_gen").data.mixture["web"]["filters"]
    assert [entry["type"] for entry in filters] == ["resolution", "aesthetic"]


@pytest.mark.parametrize(
    ("ablation", "stage"),
    [
        ("ablation_index_alignment", "stage1_alignment"),
        ("ablation_index_semantic", "stage2_semantic"),
        ("ablation_index_chat", "stage3_chat"),
        ("ablation_index_gen", "stage3_gen"),
    ],
)
def test_the_index_baseline_is_its_stage_with_an_index_embedding_and_a_frozen_tokenizer(ablation, stage):
    """Table 4, first row."""
    ours, theirs = load_recipe(ablation), load_recipe(stage)
    assert ours.task == theirs.task
    others = [part for part in theirs.train if part not in ("projector", "vision_tokenizer")]
    assert ours.train == ["index_embedding", *others]
    for name in ("learning_rate", "global_batch_size", "lr_scheduler_type", "warmup_steps", "num_train_epochs"):
        assert ours.training[name] == theirs.training[name]


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        (tmp_path / "mine.yaml").write_text(text)
        return str(tmp_path / "mine.yaml")

    return write


def test_a_file_of_ones_own_is_a_recipe(recipe_file):
    recipe = load_recipe(recipe_file("task: caption\ntrain: [projector]\nmodel: {image_size: 64}\n"))
    assert recipe.train == ["projector"]
    assert recipe.model.image_size == 64
    assert recipe.data.split == "train"


def test_an_empty_file_is_a_recipe_of_defaults(recipe_file):
    assert load_recipe(recipe_file("")).task == "caption"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("titel: x", "unknown field 'titel'. Did you mean 'title'?"),
        ("model: {image_sise: 64}", "unknown field 'model.image_sise'. Did you mean 'image_size'?"),
        ("data: {in_memry: true}", "unknown field 'data.in_memry'. Did you mean 'in_memory'?"),
        ("training: {learning_rat: 1}", "unknown field 'training.learning_rat'. Did you mean 'learning_rate'?"),
        ("training: {xyzzy: 1}", "unknown field 'training.xyzzy'. Known are: "),
        ("model: 3", "recipe's 'model' is 3; it is a section of fields"),
        ("model: {logit_scale: 0}", "model.logit_scale is 0; expected a number above 0, or null"),
        ("model: {logit_scale: high}", "model.logit_scale is 'high'; expected a number above 0, or null"),
        (
            "model: {straight_through_weight: -1}",
            "model.straight_through_weight is -1; expected 0 or a number above 0",
        ),
        ("[a, b]", "holds a list; a recipe is a mapping of fields to values"),
        ("a: [", "is no YAML"),
        ("title: !!timestamp x", "is no YAML"),
        ("[" * 9999, "is no YAML"),
        ("train: &a [*a]", "holds more than 10000 values, since aliases repeat some or contain themselves"),
        ("a: &a [x, x, x]\nb: &b [*a, *a, *a]\n" + "title: [" + "*b, " * 2000 + "]", "holds more than 10000 values"),
        ("training: {seed: 1" + "0" * 400 + "}", "expected 0 or a whole number above 0, of at most 2^53"),
        ("data: {mixture: {a: {1: 2}}}", "unknown field 'data.mixture.a.1'. Known are: "),
        ("training: {1: 2}", "unknown field 'training.1'. Known are: "),
    ],
)
def test_what_is_wrong_in_a_file_is_named(recipe_file, text, message):
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file(text))
    assert message in str(caught.value)


def test_an_unknown_recipe_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match=r"There is no recipe 'stage3_chatt'\. Did you mean 'stage3_chat'\?"):
        load_recipe("stage3_chatt")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"There is no recipe '.*absent\.yaml'"):
        load_recipe(str(tmp_path / "absent.yaml"))


def test_overrides_go_into_sections_and_are_read_as_yaml():
    recipe = load_recipe(
        "stage2_semantic",
        [
            "title=My photographs",
            "train=[projector]",
            "data.source=photos",
            "data.in_memory=true",
            "training.learning_rate=1e-4",
            "training.part_learning_rates.projector=3e-3",
            "training.run_name=null",
        ],
    )
    assert recipe.title == "My photographs"
    assert recipe.train == ["projector"]
    assert recipe.data.source == "photos"
    assert recipe.data.in_memory is True
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.training["part_learning_rates"] == {"projector": 3e-3}
    assert recipe.training["run_name"] is None
    assert recipe.training["alpha"] == 0.25


def test_numbers_of_the_gradient_path_may_be_written_without_a_dot():
    model = load_recipe("stage2_semantic", ["model.logit_scale=1e-1", "model.straight_through_weight=5e-2"]).model
    assert (model.logit_scale, model.straight_through_weight) == (0.1, 0.05)


def test_overrides_reach_the_sources_of_a_mixture():
    recipe = load_recipe("stage3_gen", ["data.mixture.web.source=mine", "data.mixture.web.filters.0.min_side=256"])
    assert recipe.data.mixture["web"]["source"] == "mine"
    assert recipe.data.mixture["web"]["filters"][0] == {"type": "resolution", "min_side": 256}
    with pytest.raises(ValueError, match=r"unknown field 'data\.mixture\.web\.sorce'\. Did you mean 'source'\?"):
        load_recipe("stage3_gen", ["data.mixture.web.sorce=mine"])


def test_a_source_takes_the_place_of_the_recipes_mixture():
    recipe = load_recipe("stage3_chat", ["data.source=photos"])
    assert recipe.data.source == "photos" and recipe.data.mixture is None


def test_overrides_make_sections_that_a_recipe_leaves_empty(recipe_file):
    recipe = load_recipe(
        recipe_file("training: {part_learning_rates: }"), ["training.part_learning_rates.projector=1"]
    )
    assert recipe.training["part_learning_rates"] == {"projector": 1}


def test_overrides_reach_the_items_of_a_list(recipe_file):
    path = recipe_file("model: {vision_tokenizer: {blocks: [{width: 1}, {width: 2}]}}\ntrain: [projector]")
    recipe = load_recipe(path, ["model.vision_tokenizer.blocks.1.width=3", "train.0=language_model"])
    assert recipe.model.vision_tokenizer == {"blocks": [{"width": 1}, {"width": 3}]}
    assert recipe.train == ["language_model"]


def test_the_value_of_an_override_may_hold_an_equals_sign():
    assert load_recipe("stage2_semantic", ["title=a=b"]).title == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate", "has no value; write section.field=value"),
        ("training.alhpa=1", "unknown field 'training.alhpa'. Did you mean 'alpha'?"),
        ("trainig.alpha=1", "unknown field 'trainig'. Did you mean 'training'?"),
        ("task.name=chat", "goes into 'task', which is no section"),
        ("train=[a", "is no YAML"),
        ("train.7=projector", "goes into a list of 3 items as '7'; count them from 0"),
        ("train.last=projector", "goes into a list of 3 items as 'last'; count them from 0"),
    ],
)
def test_what_is_wrong_in_an_override_is_named(override, message):
    with pytest.raises(ValueError) as caught:
        load_recipe("stage2_semantic", [override])
    assert message in str(caught.value)


# The size of a step


@pytest.mark.parametrize(("per_device", "devices", "steps"), [(16, 64, 1), (16, 8, 8), (4, 1, 256)])
def test_accumulation_follows_from_the_global_batch(per_device, devices, steps):
    assert accumulation_steps(1024, per_device, devices) == steps


def test_training_accumulates_to_the_global_batch(arguments):
    args = arguments(global_batch_size=6, per_device_train_batch_size=2)
    assert args.gradient_accumulation_steps == 3


def test_the_papers_batches_can_be_kept_on_one_node_and_on_one_device():
    for name, batch in [("tokenizer", 256), ("stage1_alignment", 1024), ("stage3_gen", 1024)]:
        training = load_recipe(name).training
        assert training["global_batch_size"] == batch
        for devices in (1, 8, 64):
            assert accumulation_steps(batch, training["per_device_train_batch_size"], devices) >= 1


def test_a_global_batch_that_the_devices_do_not_divide_is_an_error(arguments):
    with pytest.raises(ValueError, match="global_batch_size=10 is no multiple of 4, the examples that 1 devices"):
        arguments(global_batch_size=10, per_device_train_batch_size=4)


def test_a_global_batch_beside_another_accumulation_is_an_error(arguments):
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 3, but 2 follows from global_batch_size=4"):
        arguments(global_batch_size=4, gradient_accumulation_steps=3)


# Types and ranges


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps=abc", "training.max_steps is 'abc'; expected a whole number above 0, or -1 for none."),
        ("training.max_steps=1.5", "training.max_steps is 1.5; expected a whole number above 0, or -1 for none."),
        ("training.learning_rate=abc", "training.learning_rate is 'abc'; expected 0 or a number above 0."),
        ("training.learning_rate=.nan", "training.learning_rate is nan; expected 0 or a number above 0."),
        ("training.bf16=1", "training.bf16 is 1; expected true or false."),
        (
            "training.per_device_train_batch_size=0",
            "training.per_device_train_batch_size is 0; expected a whole number from 1 to 65536.",
        ),
        ("training.part_learning_rates={projector: x}", "expected a mapping of names to numbers, 0 or above 0"),
        (
            "training.save_strategy=sometimes",
            "training.save_strategy is 'sometimes'; expected one of no, steps, epoch",
        ),
        ("training.lr_scheduler_type=cosin", "training.lr_scheduler_type is 'cosin'; expected one of linear, cosine"),
        ("data.source=[1]", "data.source is [1]; expected text, or null."),
        ("data.length=0", "data.length is 0; expected a whole number above 0."),
        ("data.prompt_dropout=2", "data.prompt_dropout is 2; expected a number from 0 to 1."),
        ("data.in_memory=maybe", "data.in_memory is 'maybe'; expected true or false."),
        ("data.mixture={a: {source: [1]}}", "data.mixture.a.source is [1]; expected text, or null."),
        ("data.mixture={a: {weight: 0}}", "data.mixture.a.weight is 0; expected a number above 0."),
        ("model.image_size=big", "model.image_size is 'big'; expected a whole number above 0, or null."),
        ("model.visual_embedding=idx", "model.visual_embedding is 'idx'; expected one of codebook, index, or null."),
        ("lora.rank=1.5", "lora.rank is 1.5; expected a whole number from 1 to 65536, or null."),
        ("lora.rank=65537", "lora.rank is 65537; expected a whole number from 1 to 65536, or null."),
        ("lora.target_modules=q_proj", "lora.target_modules is 'q_proj'; expected a list of texts, or null."),
        ("train=projector", "train is 'projector'; expected a list of texts."),
        ("lora=3", "The recipe's 'lora' is 3; it is a section of fields."),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_one_sentence(override, message):
    with pytest.raises(ValueError) as caught:
        load_recipe("stage2_semantic", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_field_of_training_refuses_a_value_of_no_type(recipe_file):
    for name in TRAINING_FIELDS:
        if name not in ("parallelism_config",):
            with pytest.raises(ValueError, match=rf"training\.{name} is "):
                load_recipe(recipe_file(f"training: {{{name}: [[1]]}}"))


def test_what_yaml_makes_of_words_and_numbers_is_what_was_written(recipe_file):
    strategies = "save_strategy: no\n  eval_strategy: no\n  logging_strategy: no"
    recipe = load_recipe(
        recipe_file(f"training:\n  {strategies}\n  run_name: '42'\n  max_steps: 1e3\n  report_to: no")
    )
    assert recipe.training == {
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "run_name": "42",
        "max_steps": 1000,
        "report_to": "none",
    }
    ETTTrainingArguments(output_dir="unused", use_cpu=True, **recipe.training)
    assert load_recipe(recipe_file("training: {run_name: 42}")).training["run_name"] == "42"


def test_an_empty_section_is_one_of_defaults(recipe_file):
    assert load_recipe(recipe_file("training:\nlora:\nmodel:")) == load_recipe(recipe_file(""))


# Fields without an effect


@pytest.mark.parametrize("name", available_recipes())
def test_every_field_of_the_packages_recipes_has_an_effect(name, caplog):
    check_recipe(load_recipe(name))
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("stage2_semantic", "training.label_smoothing_factor=0.1", "training.label_smoothing_factor has no effect"),
        (
            "stage2_semantic",
            "training.eval_strategy=steps",
            "training.eval_strategy has no effect here: a recipe has no",
        ),
        ("stage2_semantic", "training.load_best_model_at_end=true", "training.load_best_model_at_end has no effect"),
        ("stage2_semantic", "training.output_dir=x", "training.output_dir has no effect here: the folder is given as"),
        (
            "stage2_semantic",
            "training.push_to_hub=true",
            "training.push_to_hub has no effect here: publish the finished",
        ),
        ("stage2_semantic", "training.part_learning_rates={visual_head: 1}", "part_learning_rates.visual_head has no"),
        ("stage2_semantic", "training.report_to=nothing", "training.report_to names the unknown tool 'nothing'"),
        ("stage2_semantic", "train=[projecter]", "unknown part 'projecter'. Did you mean 'projector'?"),
        ("stage3_chat", "training.alpha=0.5", "training.alpha has no effect here: the vision tokenizer is frozen"),
        ("tokenizer", "training.alpha=0.5", "training.alpha has no effect here: a tokenizer alone"),
        ("tokenizer", "model.visual_head=true", "model.visual_head has no effect here: a tokenizer alone"),
        ("tokenizer", "data.packing=true", "data.packing has no effect here: images alone"),
        ("stage2_semantic", "data.prompt_dropout=0.1", "data.prompt_dropout has no effect here: task caption"),
        ("stage2_semantic", "data.independent_turns=true", "data.independent_turns has no effect here: task caption"),
        ("stage2_semantic", "data.shuffle_rows=5", "data.shuffle_rows has no effect here: only streamed data"),
        ("stage2_semantic", "model.linear_start=true", "model.linear_start has no effect here: only the tokenizer's"),
        ("stage2_semantic", "model.codebook_images=5", "model.codebook_images has no effect here: the codebook"),
        ("stage2_semantic", "model.vision_tokenizer=other", "model.vision_tokenizer has no effect here: the model"),
        ("stage2_semantic", "model.language_model=other", "model.language_model has no effect here: the model"),
    ],
)
def test_a_field_without_an_effect_is_an_error_that_names_it(name, override, message):
    with pytest.raises(ValueError) as caught:
        check_recipe(load_recipe(name, [override]))
    assert message in str(caught.value)


def test_a_tool_for_curves_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setattr("ett.train.consistency.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=r"report_to names wandb, which is not installed: pip install wandb, or"):
        check_recipe(load_recipe("stage2_semantic", ["training.report_to=wandb"]))


def test_a_model_path_takes_the_place_of_the_parts_that_a_recipe_names():
    model = load_recipe("stage1_alignment", ["model.path=mine"]).model
    assert (model.vision_tokenizer, model.language_model, model.image_size) == (None, None, None)
    assert load_recipe("tokenizer", ["model.path=mine"]).model.image_size == 256
    assert load_recipe("stage3_gen", ["model.path=mine"]).model.visual_head is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.image_size=32", "model.image_size is 32, but the model '{folder}' has 16; remove the former."),
        ("model.code_positions=true", "model.code_positions is true, but the model '{folder}' has false"),
        ("model.visual_head=false", "model.visual_head is false, but the model '{folder}' has true"),
        ("model.visual_embedding=index", "model.visual_embedding is 'index', but the model '{folder}' has 'codebook'"),
    ],
)
def test_a_field_that_contradicts_the_model_is_an_error(tmp_path, override, message):
    (tmp_path / "config.json").write_text('{"model_type": "ett", "image_size": 16, "visual_head": true}')
    with pytest.raises(ValueError) as caught:
        check_recipe(load_recipe("stage2_semantic", [f"model.path={tmp_path}", override]))
    assert message.format(folder=tmp_path) in str(caught.value)


def test_every_recipe_names_its_limit_of_the_gradient_norm():
    limits = {name: load_recipe(name).training["max_grad_norm"] for name in available_recipes()}
    assert limits.pop("tokenizer") == 0
    assert set(limits.values()) == {1.0}


def test_a_stage_without_the_tokenizer_has_none_of_its_losses(caplog):
    recipe = load_recipe("demo_semantic", ["train=[projector, language_model]"])
    check_recipe(recipe)
    assert "squared_error_weight" not in recipe.training and not caplog.records
    assert load_recipe("demo_semantic").training["squared_error_weight"] == 8.0


def test_an_index_model_has_no_positions_of_codes():
    recipe = load_recipe("demo_language", ["model.visual_embedding=index"])
    assert recipe.model.code_positions is None and load_recipe("demo_language").model.code_positions is True
