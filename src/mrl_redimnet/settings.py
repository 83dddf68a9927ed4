"""What values a setting may have: checks that name the setting, the value, what is allowed, and the nearest choice.

A check is a function (name, value) -> the value as it is to be used; it raises ValueError. Numbers that YAML 1.1 takes
for strings ("1e-4") are numbers here; true and false, NaN and infinities never are.
"""

import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Check = Callable[[str, Any], Any]
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def near(name: object, known: Iterable[str]) -> str:
    """A question to end an error with: the known name that is most like `name`; nothing where none is alike."""
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else ""


def nearest(name: object, known: Iterable[str]) -> str:
    """As `near`, but all known names where none is alike."""
    known = list(known)
    return near(name, known) or f" Known: {', '.join(known)}."


def as_number(value: object) -> float | int | None:
    """A finite number as it is, a string that is one in writing as a float, and None for everything else."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class Number:
    """A finite number within limits: `least` and `most` are allowed, `above` and `below` are not.

    whole: it has no fraction. empty: None is a value, too. expected: the limits in words, instead of the usual ones.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    whole: bool = False
    empty: bool = False
    expected: str | None = None

    def __call__(self, name: str, value: object) -> float | int | None:
        if value is None and self.empty:
            return None
        number = as_number(value)
        if number is None or (self.whole and not isinstance(number, int)):
            raise ValueError(f"{name}: got {value!r}, expected {self.expected or self._kind()}.")
        if not self._fits(number):
            raise ValueError(f"{name}: got {value!r}, expected {self.expected or self._limits()}.")
        return number if self.whole else float(number)

    def _fits(self, number: float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def _kind(self) -> str:
        return "a whole number" if self.whole else "a finite number"

    def _limits(self) -> str:
        limits = {"at least": self.least, "a number above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {limit:.10g}" for words, limit in limits.items() if limit is not None)


SHARE = Number(least=0, below=1, expected="a share from 0 to below 1")


@dataclass(frozen=True)
class OneOf:
    """One of several words. empty: None is a value, too."""

    choices: Sequence[str]
    empty: bool = False

    def __call__(self, name: str, value: object) -> str | None:
        if value is None and self.empty:
            return None
        if not isinstance(value, str) or value not in self.choices:
            raise ValueError(
                f"{name}: got {value!r}, expected one of {', '.join(self.choices)}.{near(value, self.choices)}"
            )
        return value


@dataclass(frozen=True)
class Text:
    """A string that is not empty. empty: None is a value, too."""

    empty: bool = False

    def __call__(self, name: str, value: object) -> str | None:
        if value is None and self.empty:
            return None
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name}: got {value!r}, expected a text that is not empty.")
        return value


def yes_or_no(name: str, value: object) -> bool:
    """True or false, and nothing that might stand for them."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected true or false.")
    return value


@dataclass(frozen=True)
class ListOf:
    """A list whose every value passes a check. expected: the list in words. empty: None is a value, too."""

    check: Check
    expected: str
    empty: bool = False

    def __call__(self, name: str, value: object) -> list | None:
        if value is None and self.empty:
            return None
        try:
            if not isinstance(value, (list, tuple)):
                raise ValueError
            return [self.check(name, each) for each in value]
        except ValueError:
            raise ValueError(f"{name}: got {value!r}, expected {self.expected}.") from None


@dataclass(frozen=True)
class MappingOf:
    """A mapping with some of `keys`, whose values pass a check."""

    check: Check
    keys: Sequence[str]

    def __call__(self, name: str, value: object) -> dict:
        if not isinstance(value, dict):
            raise ValueError(f"{name}: got {value!r}, expected a mapping.")
        if unknown := [str(key) for key in value if key not in self.keys]:
            raise ValueError(
                f"{name}: got {', '.join(unknown)}, expected some of {', '.join(self.keys)}."
                + near(unknown[0], self.keys)
            )
        return {key: self.check(f"{name}.{key}", each) for key, each in value.items()}


# ---------------------------------------------------------------- stretches of a run


@dataclass(frozen=True)
class Length:
    """A stretch of a run: a number of optimiser steps, of passes over the training utterances, or a share of the run.

    unit: "steps", "epochs" or "share".
    """

    amount: float
    unit: str

    EXPECTED = "a whole number of steps, a share of the run between 0 and 1, or passes such as '2 epochs'"

    @classmethod
    def parse(cls, name: str, value: object) -> "Length":
        """100 -> steps, 0.05 -> a share of the run, "2 epochs" or "0.5 epochs" -> passes. Raises ValueError."""
        words = value.split() if isinstance(value, str) else []
        if len(words) == 2 and words[1] in ("epoch", "epochs"):
            amount, unit = as_number(words[0]), "epochs"
        else:
            amount = as_number(value)
            unit = "steps" if isinstance(amount, int) else "share"
        if amount is None or amount < 0 or (unit == "share" and amount >= 1):
            raise ValueError(f"{name}: got {value!r}, expected {cls.EXPECTED}.")
        return cls(amount, unit)

    def in_steps(self, steps: int, epoch_steps: float) -> float:
        """How many steps that is, perhaps with a fraction. steps: of the run; epoch_steps: of one pass."""
        return self.amount * {"steps": 1, "epochs": epoch_steps, "share": steps}[self.unit]


@dataclass(frozen=True)
class Stretch:
    """A `Length`, which stays as it was written. none: whether it may be 0."""

    none: bool = False

    def __call__(self, name: str, value: object) -> int | float | str:
        length = Length.parse(name, value)
        if not length.amount and not self.none:
            least = "at least 1" if length.unit == "steps" else Length.EXPECTED
            raise ValueError(f"{name}: got {value!r}, expected {least}.")
        return length.amount if length.unit != "epochs" else str(value)


# ---------------------------------------------------------------- fields of classes elsewhere


def typed(name: str, value: object, hint: object) -> object:
    """A value for a field with a type hint, numbers as numbers; what a hint does not say is not checked.

    Raises ValueError for a value of another type, with the nearest of the words that are allowed.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _of_any(name, value, parts)
    if origin is typing.Literal:
        return OneOf(parts)(name, value)
    if hint is bool:
        return yes_or_no(name, value)
    if hint is int:
        return Number(whole=True)(name, value)
    if hint is float:
        return Number()(name, value)
    if hint is str and not isinstance(value, str):
        raise ValueError(f"{name}: got {value!r}, expected a text.")
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}: got {value!r}, expected a list.")
        return [typed(name, each, parts[0]) for each in value]
    if (origin or hint) is dict and not isinstance(value, dict):
        raise ValueError(f"{name}: got {value!r}, expected a mapping.")
    return value


def _of_any(name: str, value: object, hints: Sequence) -> object:
    """The value for the first of several hints that it fits."""
    if value is None and type(None) in hints:
        return None
    reasons = []
    for hint in hints:
        if hint is type(None):
            continue
        try:
            return typed(name, value, hint)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[-1])
