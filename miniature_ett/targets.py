"""What the demo is built to reach on held-out scenes, and whether a run did."""

from dataclasses import dataclass

QUESTION_TARGETS = {"colour": 0.85, "count": 0.95, "shape": 0.60, "position": 0.75, "reading": 0.20}


@dataclass(frozen=True)
class Target:
    """`reached` and `bound` in `unit`: "%" (both in 0..1), "points" (of 100), "dB", "nats" or "levels" (of 255)."""

    name: str
    bound: float
    reached: float | None
    unit: str
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether `reached` lies on the right side of `bound`; what could not be measured is not met."""
        if self.reached is None:
            return False
        return self.reached >= self.bound if self.at_least else self.reached <= self.bound


def compare_with_targets(results: dict) -> list[Target]:
    """The targets and what `results` (see [`write_report`]) reached."""
    frozen, tuned = results["understanding"]["frozen"], results["understanding"]["tuned"]
    before, after = results["reconstruction"]["before"], results["reconstruction"]["after"]
    drawings = results["drawings"]
    rows = [
        Target(f"{name.capitalize()} questions", bound, tuned["types"].get(name, {}).get("accuracy"), "%")
        for name, bound in QUESTION_TARGETS.items()
    ]
    captions = results["captions"]
    return [
        *rows,
        Target("Mean accuracy over the frozen tokenizer", 4, 100 * (tuned["mean"] - frozen["mean"]), "points"),
        Target(
            "Caption loss over the frozen tokenizer",
            0,
            captions["tuned"]["loss"] - captions["frozen"]["loss"],
            "nats",
            at_least=False,
        ),
        Target("PSNR before end-to-end tuning", 23, before["psnr"], "dB"),
        Target("PSNR lost in tuning", 1, before["psnr"] - after["psnr"], "dB", at_least=False),
        Target("Shift of the background's tint", 5, after["background_shift"], "levels", at_least=False),
        Target("Codebook usage before tuning", 0.9, before["codebook_usage"], "%"),
        Target("Codebook usage after tuning", 0.5, after["codebook_usage"], "%"),
        Target("Drawings right, mean of six categories", 0.25, drawings["mean"], "%"),
        Target("Drawings with the colours asked for", 2 / 3, drawings["color_score"], "%"),
    ]


__all__ = ["Target", "compare_with_targets"]
