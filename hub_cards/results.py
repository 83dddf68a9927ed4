"""What was measured, as a published folder keeps it: evaluation.json, which the card and its picture repeat."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard

from mrl_redimnet.files import replace_text
from mrl_redimnet.rows import SIDES, AttributeRow, GroupRow, NumberRow, VerificationRow, row_from

EVALUATION_FILE = "evaluation.json"
BENCHMARK = re.compile(r"[\w.-]+/[\w.-]+:\S+")  # a data set of the Hub, and the task of its eval.yaml

Row = VerificationRow | AttributeRow


@dataclass(frozen=True)
class Evaluation:
    """The content of evaluation.json.

    saved: the system whose weights lie in the folder, such as "adapter". results: per trial list and system, its rows;
    systems beside the saved one (such as "base", the adapter switched off) are there for comparison. conditions: a
    sentence on machine, command and data. groups: of the saved system, per trial list, the rows of
    `groups.error_rates`, one dimension after the other. robustness: of the saved system, per trial list, the numbers of
    a `RobustnessReport`. benchmarks: trial lists that are a benchmark of the Hub, each as OWNER/DATASET:TASK.

    Raises ValueError, saying where, for a list without the saved system, rows of two kinds in a list, two rows of one
    dimension or metric (or group, or kind and side), values that are no such rates or errors, and a benchmark of no
    list or form.
    """

    saved: str
    results: dict[str, dict[str, list[Row]]]
    conditions: str = ""
    groups: dict[str, list[GroupRow]] = field(default_factory=dict)
    robustness: dict[str, list[NumberRow]] = field(default_factory=dict)
    benchmarks: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.results or not isinstance(self.conditions, str):
            raise ValueError("an evaluation has results of a trial list at least, and its conditions are text.")
        for name, systems in self.results.items():
            _check_list(name, systems, self.saved)
        for name, rows in self.groups.items():
            _check_distinct(f"{name}, groups", rows, [(row.group, row.dim) for row in rows])
            for row in rows:
                _check_group(row, f"{name}, group {row.group}")
        for name, numbers in self.robustness.items():
            keys = [(number.kind, number.side, number.dim) for number in numbers]
            _check_distinct(f"{name}, robustness", numbers, keys)
            for number in numbers:
                _check_number(number, f"{name}, robustness, {number.kind}")
        for name, benchmark in self.benchmarks.items():
            if name not in self.results or not BENCHMARK.fullmatch(benchmark):
                raise ValueError(f"{name}: {benchmark!r} is no benchmark of these lists, expected OWNER/DATASET:TASK.")

    @property
    def systems(self) -> list[str]:
        """The systems of all the lists, the saved one first."""
        return list(dict.fromkeys([self.saved, *(system for systems in self.results.values() for system in systems)]))

    def lists_of(self, kind: type) -> dict[str, dict[str, list[Row]]]:
        """The part of the results whose rows are of a kind, VerificationRow or AttributeRow."""
        return {name: systems for name, systems in self.results.items() if isinstance(systems[self.saved][0], kind)}

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/evaluation.json, whole or not at all."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
        replace_text(Path(folder) / EVALUATION_FILE, text)

    @classmethod
    def load(cls, folder: str | Path) -> "Evaluation | None":
        """What `save` wrote, None where there is no such file.

        Raises ValueError, naming the file, when it is not what `save` writes.
        """
        file = Path(folder) / EVALUATION_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            results = {
                name: {system: [_row(record) for record in records] for system, records in systems.items()}
                for name, systems in content["results"].items()
            }
            groups = {name: [row_from(record) for record in rows] for name, rows in content.get("groups", {}).items()}
            robustness = {
                name: [_known(NumberRow, record) for record in rows]
                for name, rows in content.get("robustness", {}).items()
            }
            benchmarks = content.get("benchmarks", {})
            return cls(content["saved"], results, content.get("conditions", ""), groups, robustness, benchmarks)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is not an evaluation: {error!r}") from error


def column(row: Row) -> int | str:
    """What tells a row from the others of its system: its dimension, or its metric."""
    return row.dim if isinstance(row, VerificationRow) else row.metric


def interval(row: Row) -> tuple[float, float] | None:
    """The 95 % interval of a row's EER or value."""
    low, high = (row.eer_low, row.eer_high) if isinstance(row, VerificationRow) else (row.low, row.high)
    return None if low is None or high is None else (low, high)


def _row(record: dict) -> Row:
    return _known(AttributeRow if "metric" in record else VerificationRow, record)


def _known(kind: type, record: dict):
    known = {f.name for f in fields(kind)}  # a later version's additions are not ours to judge
    return kind(**{name: value for name, value in record.items() if name in known})


def _check_list(name: str, systems: dict[str, list[Row]], saved: str) -> None:
    if saved not in systems:
        raise ValueError(f"{name}: no results of the saved system {saved!r}, only of {', '.join(systems)}.")
    if not all(label.strip() for label in (name, *systems)):
        raise ValueError(f"{name!r} of {', '.join(map(repr, systems))}: lists and systems need names.")
    kinds = {type(row) for rows in systems.values() for row in rows}
    if len(kinds) > 1 or not kinds <= {VerificationRow, AttributeRow}:
        raise ValueError(f"{name}: expected rows of one kind, got {', '.join(sorted(k.__name__ for k in kinds))}.")
    for system, rows in systems.items():
        columns = [column(row) for row in rows]
        if not rows or len(set(columns)) < len(columns):
            raise ValueError(f"{name}, {system}: expected a row per dimension or metric, got rows of {columns}.")
        for row in rows:
            _check_row(row, f"{name}, {system}, {column(row)}")


def _check_row(row: Row, where: str) -> None:
    if isinstance(row, VerificationRow) and (type(row.dim) is not int or row.dim < 1):
        raise ValueError(f"{where}: {row.dim!r} is no dimension.")
    required = (row.eer, row.min_dcf) if isinstance(row, VerificationRow) else (row.value,)
    bounds = (row.eer_low, row.eer_high) if isinstance(row, VerificationRow) else (row.low, row.high)
    given = (*required, *(bound for bound in bounds if bound is not None))
    largest = math.inf if column(row) == "mean absolute error" else 1.0
    if not all(_is_number(value) and 0 <= value <= largest for value in given):
        raise ValueError(f"{where}: expected finite numbers from 0 to {largest:g}, got {given}.")
    if bounds.count(None) == 1:
        raise ValueError(f"{where}: an interval has two ends, got {bounds}.")


def _check_distinct(where: str, rows: list, keys: list) -> None:
    if not rows or len(set(keys)) < len(keys):
        raise ValueError(f"{where}: expected some rows, and none twice, got rows of {keys}.")


def _check_group(row: GroupRow, where: str) -> None:
    counts = (row.speakers, row.targets, row.impostors)
    if not all(type(count) is int and count >= 0 for count in counts) or not row.group.strip():
        raise ValueError(f"{where}: expected a name, and counts of speakers and trials, got {counts}.")
    if not _is_number(row.threshold):
        raise ValueError(f"{where}: {row.threshold!r} is no threshold.")
    for name in ("eer", "miss", "false_alarm"):
        for rate, least in ((getattr(row, name), 0.0), (getattr(row, f"{name}_difference"), -1.0)):
            if rate is not None:
                _check_bounds(f"{where}, {name}", rate.value, rate.low, rate.high, least, 1.0)


def _check_number(row: NumberRow, where: str) -> None:
    if row.side not in SIDES or type(row.dim) is not int or row.dim < 1:
        raise ValueError(f"{where}: expected a side of {', '.join(SIDES)} and a dimension, got {row.side}, {row.dim}.")
    _check_bounds(where, row.eer, row.eer_low, row.eer_high, 0.0, 1.0)
    _check_bounds(where, row.change, row.change_low, row.change_high, -1.0, math.inf)


def _check_bounds(where: str, value: object, low: object, high: object, least: float, most: float) -> None:
    given = [number for number in (value, low, high) if number is not None]
    if len(given) == 2 or value is None or not all(_is_number(number) and least <= number <= most for number in given):
        raise ValueError(
            f"{where}: expected a number from {least:g} to {most:g}, and both ends of its interval or "
            f"none, got {value}, {low}, {high}."
        )


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
