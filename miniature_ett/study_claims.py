"""What the ETT paper reports in Tables 4 and 5, the directions that follow from it, and the study's own controls."""

from dataclasses import dataclass

from .study_results import BEFORE, FROZEN, TUNED, Statistic

PAPER_TABLE_4 = {
    "index-frozen": ("54.8", "50.9", "40.1", "1028.7", "0.40"),
    "embedding-frozen": ("54.8", "52.6", "40.9", "1034.0", "0.34"),
    "alpha-0.25": ("60.0", "54.8", "46.9", "1124.7", "0.43"),
}
"""SEED, GQA, TextVQA, MME, GenEval (overall)."""
PAPER_TABLE_5 = {
    "embedding-frozen": ("54.8", "52.6", "40.9", "1034.0", "1.033"),
    "alpha-0": ("61.2", "55.2", "48.0", "1164.3", "45.701"),
    "alpha-0.25": ("60.0", "54.8", "46.9", "1124.7", "1.648"),
    "alpha-0.5": ("59.9", "54.7", "46.9", "1118.1", "1.655"),
    "alpha-1": ("59.3", "53.9", "45.7", "1088.2", "1.500"),
}
"""SEED, GQA, TextVQA, MME, rFID."""


@dataclass(frozen=True)
class Claim:
    """A direction to check.

    Args:
        text: What is claimed, with the measure at its end left out.
        measure: Key of [`MEASURES`].
        arm, other: The arms that are compared.
        sign: 1 where `arm` is expected above `other`, -1 below.
        paper: The paper's figures; empty for a control, which is no claim of the paper.
    """

    text: str
    measure: str
    arm: str
    other: str
    sign: int
    paper: str = ""


PAPER_CLAIMS = (
    Claim("Embeddings beat indices, both frozen", "questions.general", FROZEN, "index-frozen", 1, "GQA 50.9 to 52.6"),
    Claim("Embeddings beat indices, both frozen", "captions.semantic.loss", FROZEN, "index-frozen", -1, "no figure"),
    Claim("Embeddings beat indices, both frozen", "questions.reading", FROZEN, "index-frozen", 1, "TQA 40.1 to 40.9"),
    Claim(
        "Embeddings generate worse than indices", "generation.mean", FROZEN, "index-frozen", -1, "GenEval 0.40 to 0.34"
    ),
    Claim("Tuning beats frozen embeddings", "questions.general", TUNED, FROZEN, 1, "SEED 54.8 to 60.0"),
    Claim("Tuning beats frozen embeddings", "captions.semantic.loss", TUNED, FROZEN, -1, "no figure"),
    Claim("Tuning beats frozen embeddings", "captions.chat.true", TUNED, FROZEN, 1, "no figure"),
    Claim("Tuning beats frozen embeddings", "questions.reading", TUNED, FROZEN, 1, "TQA 40.9 to 46.9"),
    Claim("Tuning beats frozen embeddings", "generation.mean", TUNED, FROZEN, 1, "GenEval 0.34 to 0.43"),
    Claim("Tuning beats frozen indices", "generation.mean", TUNED, "index-frozen", 1, "GenEval 0.40 to 0.43"),
    Claim("Understanding only reads best", "questions.general", "alpha-0", TUNED, 1, "SEED 60.0 to 61.2"),
    Claim("A weight of 1 reads worse than 0.25", "questions.general", "alpha-1", TUNED, -1, "SEED 60.0 to 59.3"),
    Claim("A weight of 1 still beats frozen", "questions.general", "alpha-1", FROZEN, 1, "SEED 54.8 to 59.3"),
    Claim("Understanding only ruins images", "tokenizer.frechet", "alpha-0", TUNED, 1, "rFID 1.648 to 45.701"),
    Claim("Understanding only ruins images", "tokenizer.psnr", "alpha-0", TUNED, -1, "no figure"),
    Claim("A weight of 1 keeps images better", "tokenizer.frechet", "alpha-1", TUNED, -1, "rFID 1.648 to 1.500"),
    Claim("Tuning costs some reconstruction", "tokenizer.frechet", TUNED, FROZEN, 1, "rFID 1.033 to 1.648"),
    Claim("Tuning costs some reconstruction", "tokenizer.psnr", TUNED, FROZEN, -1, "no figure"),
    Claim("Tuning renders text better (Figure 3)", "tokenizer.texts_read", TUNED, FROZEN, 1, "by eye"),
)
CONTROLS = (
    Claim("Tuning beats L_vq alone", "questions.general", TUNED, "vq-only", 1),
    Claim("Tuning beats L_vq alone", "captions.semantic.loss", TUNED, "vq-only", -1),
    Claim("Tuning beats a frozen stage 2 of twice the length", "questions.general", TUNED, "frozen-twice-as-long", 1),
    Claim(
        "Tuning beats a frozen stage 2 of twice the length",
        "captions.semantic.loss",
        TUNED,
        "frozen-twice-as-long",
        -1,
    ),
    Claim(
        "A fresh language model reads the tuned tokenizer better",
        "questions.general",
        "fresh-language-model",
        FROZEN,
        1,
    ),
    Claim(
        "A fresh language model reads the tuned tokenizer better",
        "captions.semantic.loss",
        "fresh-language-model",
        FROZEN,
        -1,
    ),
    Claim("A linear probe reads the tuned codes better", "probe.colour", TUNED, BEFORE, 1),
    Claim("A linear probe reads the tuned codes better", "probe.shape", TUNED, BEFORE, 1),
    Claim("A linear probe reads the tuned codes better", "probe.letter", TUNED, BEFORE, 1),
    Claim(
        "Tuning still beats frozen after a long chat stage",
        "questions.general",
        "alpha-0.25-long-chat",
        "embedding-frozen-long-chat",
        1,
    ),
)


def judge(claim: Claim, difference: Statistic | None) -> str:
    """`"holds"`, `"does not hold"`, `"open"`, `"one seed"` or `"not measured"`."""
    if difference is None:
        return "not measured"
    if difference.half is None:
        return "one seed"
    if abs(difference.mean) <= difference.half:
        return "open"
    return "holds" if difference.mean * claim.sign > 0 else "does not hold"


__all__ = ["CONTROLS", "PAPER_CLAIMS", "PAPER_TABLE_4", "PAPER_TABLE_5", "Claim", "judge"]
