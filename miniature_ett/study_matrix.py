"""The study's matrix as data: stages of training, the arms that measure them, and the cells of both.

- A stage is one of the demo's recipes with few overrides. All that the study changes stands here.
- An arm is a row of the study's tables: what is measured of which stages.
- A cell is an arm on one ground with one seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ett.common_ett.suggestions import suggestion

SEEDS = {"textured": 5, "flat": 3}
"""Seeds of each ground; `flat` is the study's plain ground."""
CONTROL_SEEDS = {"textured": 3}
QUICK_SEEDS = {"textured": 2, "flat": 1}

# The study's own changes to the demo's recipes. The paper's proportions: a long stage 2 and a short chat stage.
# Code positions are part of the projector, which the index arm lacks, and the paper has none.
LANGUAGE = ("model.code_positions=false",)
SEMANTIC = ("training.max_steps=1500", "training.per_device_train_batch_size=8", "data.length=12000")
LONG_SEMANTIC = ("training.max_steps=3000", "training.per_device_train_batch_size=8", "data.length=24000")
CHAT = ("training.max_steps=400", "training.per_device_train_batch_size=8", "data.length=3200")
LONG_CHAT = ("training.max_steps=1700", "training.per_device_train_batch_size=8", "data.length=8000")
GENERATION = ("training.max_steps=2000", "training.per_device_train_batch_size=24", "data.length=14000")
# Codes of a frozen tokenizer are made once.
FROZEN = ("train=[projector, language_model]", "data.in_memory=true")
INDEX_FROZEN = ("train=[index_embedding, language_model]", "data.in_memory=true")

MEASURING = {
    "scenes": 400,
    "questions_per_scene": 6,
    "captions": 200,
    "prompts": 144,
    "guidance_scale": 2.0,
    "temperature": 1.0,
    "probe_train": 1500,
    "probe_test": 500,
}
"""Sizes of the held-out sets, and settings of image generation. These were chosen on prompts of other seeds."""

QUICK = (
    "training.max_steps=2",
    "training.per_device_train_batch_size=4",
    "training.warmup_steps=1",
    "training.discriminator_start_step=1",
    "data.length=16",
)
QUICK_MEASURING = {**MEASURING, "scenes": 6, "captions": 2, "prompts": 6, "probe_train": 12, "probe_test": 6}


@dataclass(frozen=True)
class Stage:
    """A stage of training.

    Args:
        recipe: Name of a recipe; `None` for the tokenizer of an ETT model, taken out of it.
        start: The stages that it starts from, by the recipe's field for each.
        seconds: Expected time on one core.
        overrides: Fields of the recipe that the study changes.
        seed_offset: Added to the cell's seed.
    """

    recipe: str | None
    start: dict[str, str]
    seconds: float
    overrides: tuple[str, ...] = ()
    seed_offset: int = 0


@dataclass(frozen=True)
class Arm:
    """A row of the study's tables.

    Args:
        measures: What is measured, see [`study_tasks.MEASUREMENTS`].
        stages: The stages that the measurement needs, by their role in it.
        tuned: Whether stage 2 changes the tokenizer.
        is_control: Runs on [`CONTROL_SEEDS`] alone.
    """

    measures: str
    stages: dict[str, str] = field(default_factory=dict)
    tuned: bool = False
    is_control: bool = False


STAGES = {
    "tokenizer": Stage("demo_tokenizer", {}, 250),
    "language": Stage("demo_language", {"model.vision_tokenizer": "tokenizer"}, 40, LANGUAGE),
    "alignment": Stage("demo_alignment", {"model.path": "language"}, 25),
    # The same seed gives the same language model; what stands for a code is another.
    "language-index": Stage(
        "demo_language", {"model.vision_tokenizer": "tokenizer"}, 40, (*LANGUAGE, "model.visual_embedding=index")
    ),
    "alignment-index": Stage("demo_alignment", {"model.path": "language-index"}, 25, ("train=[index_embedding]",)),
}
SHARED = tuple(STAGES)
"""Stages that cells of a ground and seed share: where one diverges, its cells are skipped."""

ARMS = {"tokenizer": Arm("tokenizer", {"tokenizer": "tokenizer"})}


def _add_arm(
    name: str,
    overrides: tuple[str, ...],
    seconds: float,
    start: str = "alignment",
    steps: tuple[str, ...] = SEMANTIC,
    chat: tuple[str, ...] = CHAT,
    **fields,
):
    """Adds stage 2 with these overrides, the short chat stage that follows, and the arm that measures both."""
    stages = {"semantic": f"semantic-{name}", "chat": f"chat-{name}"}
    STAGES[stages["semantic"]] = Stage("demo_semantic", {"model.path": start}, seconds, (*steps, *overrides))
    STAGES[stages["chat"]] = Stage("demo_chat", {"model.path": stages["semantic"]}, 105, chat)
    ARMS[name] = Arm("understanding", stages, **fields)


def _add_variant(name: str, kind: str, recipe: str, overrides: tuple[str, ...], seconds: float):
    """Adds a further stage 3 to an arm, and an arm that measures it."""
    stage = f"{kind}-{name}"
    STAGES[stage] = Stage(recipe, {"model.path": f"semantic-{name}"}, seconds, overrides)
    role = "generation" if kind == "generation" else "chat"
    ARMS[f"{name}-{kind}"] = Arm(role, {role: stage})


# Table 4 and Table 5
_add_arm("index-frozen", INDEX_FROZEN, 280, start="alignment-index", chat=(*CHAT, INDEX_FROZEN[0]))
_add_arm("embedding-frozen", FROZEN, 280)
for _alpha in ("0", "0.25", "0.5", "1"):
    _add_arm(f"alpha-{_alpha}", (f"training.alpha={_alpha}",), 600, tuned=True)
INDEX_GENERATION = "train=[index_embedding, language_model, visual_head]"
_add_variant("index-frozen", "generation", "demo_gen", (*GENERATION, INDEX_GENERATION), 820)
for _name in ("embedding-frozen", "alpha-0.25"):
    _add_variant(_name, "generation", "demo_gen", GENERATION, 820)
    _add_variant(_name, "long-chat", "demo_chat", LONG_CHAT, 450)

# Controls: does the gain come from the caption gradient, from compute, and does it live in the tokenizer?
VQ_ONLY = ("training.alpha=0.25", "training.caption_gradient_to_tokenizer=false")
_add_arm("vq-only", VQ_ONLY, 600, tuned=True, is_control=True)
_add_arm("frozen-twice-as-long", FROZEN, 550, steps=LONG_SEMANTIC, is_control=True)
STAGES["tuned-tokenizer"] = Stage(None, {"model.path": "semantic-alpha-0.25"}, 10)
STAGES["language-fresh"] = Stage(
    "demo_language", {"model.vision_tokenizer": "tuned-tokenizer"}, 40, LANGUAGE, seed_offset=1000
)
STAGES["alignment-fresh"] = Stage("demo_alignment", {"model.path": "language-fresh"}, 25)
_add_arm("fresh-language-model", FROZEN, 280, start="alignment-fresh", is_control=True)

MEASURING_SECONDS = {"tokenizer": 60, "understanding": 150, "chat": 100, "generation": 90}


@dataclass(frozen=True, order=True)
class Cell:
    """An arm on one ground with one seed."""

    seed: int
    ground: str
    arm: str

    @property
    def group(self) -> str:
        """Name of what cells of the same ground and seed share."""
        return f"{self.ground}-{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.group}-{self.arm}"


def choose_cells(
    grounds: Sequence[str] = (), seeds: int | None = None, only: Sequence[str] = (), quick: bool = False
) -> list[Cell]:
    """The cells of a study in the order of their work: seed by seed.

    Raises:
        ValueError: An unknown ground or arm, a number of seeds below 1, or no cell is left.
    """
    for given, known, what in ((grounds, SEEDS, "ground"), (only, ARMS, "arm")):
        for name in given:
            if name not in known:
                raise ValueError(f"There is no {what} '{name}'.{suggestion(name, list(known))}")
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds is {seeds}; expected at least 1.")
    cells = []
    for ground in grounds or SEEDS:
        for name in only or ARMS:
            counts = QUICK_SEEDS if quick else SEEDS
            if ARMS[name].is_control:
                counts = {each: min(counts[each], CONTROL_SEEDS[each]) for each in CONTROL_SEEDS}
            count = counts.get(ground, 0)
            cells += [Cell(seed, ground, name) for seed in range(seeds if seeds and count else count)]
    if not cells:
        raise ValueError(f"The arm {' and '.join(only)} is a control, which runs on {', '.join(CONTROL_SEEDS)} alone.")
    order = list(ARMS)
    return sorted(cells, key=lambda cell: (cell.seed, list(SEEDS).index(cell.ground), order.index(cell.arm)))


def chain(names: Sequence[str]) -> list[str]:
    """Stages with all the stages that they start from, each after its own start."""
    ordered: dict[str, None] = {}
    for name in names:
        ordered |= dict.fromkeys([*chain(list(STAGES[name].start.values())), name])
    return list(ordered)


def stage_overrides(name: str, cell: Cell, output_dir: Path, quick: bool) -> list[str]:
    """What a stage of a cell changes in its recipe."""
    stage = STAGES[name]
    overrides = [f"training.seed={cell.seed + stage.seed_offset}", *constant_overrides(stage, cell.ground, quick)]
    return overrides + [f"{key}={stage_folder(output_dir, cell, start)}" for key, start in stage.start.items()]


def constant_overrides(stage: Stage, ground: str, quick: bool) -> list[str]:
    """The part of [`stage_overrides`] that is the same for all seeds."""
    return [f"data.ground={ground}", "training.report_to=none", *stage.overrides, *(QUICK if quick else ())]


def stage_folder(output_dir: Path, cell: Cell, stage: str) -> Path:
    return output_dir / cell.group / stage


__all__ = ["ARMS", "MEASURING", "QUICK_MEASURING", "SHARED", "STAGES", "Arm", "Cell", "Stage", "chain", "choose_cells"]
