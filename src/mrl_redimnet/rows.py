"""Rows of results, and how tables show them, apart from what measures them: a card is written without a simulator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

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


SHARES = ("accuracy", "balanced accuracy")
METRICS = (*SHARES, "mean absolute error")  # of attributes


@dataclass(frozen=True)
class VerificationRow:
    """Results of one trial list at one dimension; rates in [0, 1], the interval over speakers or None."""

    dim: int
    eer: float
    min_dcf: float
    eer_low: float | None = None
    eer_high: float | None = None


@dataclass(frozen=True)
class AttributeRow:
    """Result of an attribute on labelled utterances: accuracy in [0, 1] or mean absolute error in the label's unit,
    the interval over speakers or None.
    """

    metric: str
    value: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric: got {self.metric!r}, expected one of {', '.join(METRICS)}.")


BETWEEN = "between groups"


@dataclass(frozen=True)
class Rate:
    """An error rate in [0, 1], or a difference of two in [-1, 1], with its 95 % interval over speakers or None."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class GroupRow:
    """One group at one dimension: how many speakers and trials, and rates, None where these are too few to tell.

    group: its name, or `BETWEEN` for the impostor trials across groups, which have a false-alarm rate alone.
    miss, false_alarm: at `threshold`, accepted when the score reaches it. against: the group that the differences are
    to, this group's rate less that one's; None for that group itself and where there is none.
    """

    group: str
    dim: int | None
    threshold: float
    speakers: int
    targets: int
    impostors: int
    eer: Rate | None = None
    miss: Rate | None = None
    false_alarm: Rate | None = None
    against: str | None = None
    eer_difference: Rate | None = None
    miss_difference: Rate | None = None
    false_alarm_difference: Rate | None = None


RATES = ("eer", "miss", "false_alarm")
RATE_NAMES = dict(zip(RATES, ("EER", "miss", "false alarm"), strict=True))


def row_from(record: Mapping) -> GroupRow:
    """The row that `dataclasses.asdict` made `record` of; unknown names, a later version's, are left out.

    Raises TypeError or ValueError for what is no such record.
    """
    known = {field.name for field in fields(GroupRow)}
    values = {name: value for name, value in record.items() if name in known}
    whole: dict[str, Any] = {
        name: Rate(**value) if isinstance(value, dict) else value for name, value in values.items()
    }
    return GroupRow(**whole)


# ---------------------------------------------------------------- as text


def group_cells(rows: Sequence[GroupRow]) -> list[list[str]]:
    """Rows as lines of cells, headings first, rates in %; "too few" where there is none to tell."""
    return [
        ["group", "dims", "speakers", "targets", "impostors", *(f"{name} %" for name in RATE_NAMES.values())],
        *map(_cells, rows),
    ]


def group_notes(rows: Sequence[GroupRow]) -> list[str]:
    """Sentences: what the table does not show."""
    notes = []
    for row in rows:
        if row.against is not None:
            at = "" if row.dim is None else f" at {row.dim} dimensions"
            parts = (f"{name} {_percent(getattr(row, f'{key}_difference'), '+')}" for key, name in RATE_NAMES.items())
            notes.append(f"{row.group} less {row.against}{at}, in points: {', '.join(parts)}.")
    of_all = sum(row.impostors for row in rows if row.dim == rows[0].dim)
    across = next((row.impostors for row in rows if row.group == BETWEEN), 0)
    if of_all:
        notes.append(f"{100 * across / of_all:.0f} % of the impostor trials are between groups.")
    return notes


def _cells(row: GroupRow) -> list[str]:
    counts = [f"{number:,}" for number in (row.speakers, row.targets, row.impostors)]
    rates = ["too few" if (rate := getattr(row, name)) is None else _percent(rate) for name in RATES]
    if row.group == BETWEEN:
        rates[:2] = "", ""  # without target trials there are no such rates
    return [row.group, "" if row.dim is None else str(row.dim), *counts, *rates]


def _percent(rate: Rate, sign: str = "") -> str:
    bounds = ""
    if rate.low is not None and rate.high is not None:
        bounds = f" [{100 * rate.low:{sign}.1f}, {100 * rate.high:{sign}.1f}]"
    return f"{100 * rate.value:{sign}.2f}{bounds}"
