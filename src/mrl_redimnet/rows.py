"""Rows of results that model cards show, apart from what measures them: a card is written without a simulator."""

from dataclasses import dataclass

SIDES = ("test", "both")  # what is perturbed in a robustness test
ALL = "all"  # in place of a kind: the one number


@dataclass(frozen=True)
class NumberRow:
    """A kind's number, or over all kinds (`ALL`) the one number, with the mean perturbed EER in [0, 1] beside it."""

    kind: str
    side: str
    dim: int
    change: float
    eer: float
    change_low: float | None = None
    change_high: float | None = None
    eer_low: float | None = None
    eer_high: float | None = None
