"""Numbers within limits, and the known word that is nearest to an unknown one: for error messages about settings.

Numbers that YAML 1.1 takes for text ("1e-4") are numbers here; true and false, NaN and infinities never are.
"""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def closest(name: object, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, None where none is alike."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)), None)


def near(name: object, known: Iterable[str]) -> str:
    """A question to end an error with: the known name that is most like `name`; nothing where none is alike."""
    found = closest(name, known)
    return "" if found is None else f" Did you mean {found}?"


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
    """A check of a number between `least` and `most`, both included: (name, value) -> the number, or ValueError.

    whole: it has no fraction. expected: the limits in words, instead of the usual ones.
    """

    least: float | None = None
    most: float | None = None
    whole: bool = False
    expected: str | None = None

    def __call__(self, name: str, value: object) -> float | int:
        """The number; ValueError, which names the setting, what it was given and the limits."""
        number = as_number(value)
        if number is None or (self.whole and not isinstance(number, int)):
            raise ValueError(f"{name}: got {value!r}, expected {self.expected or self._kind()}.")
        if not self._fits(number):
            raise ValueError(f"{name}: got {value!r}, expected {self.expected or self._limits()}.")
        return number if self.whole else float(number)

    def _fits(self, number: float) -> bool:
        return (self.least is None or number >= self.least) and (self.most is None or number <= self.most)

    def _kind(self) -> str:
        return "a whole number" if self.whole else "a finite number"

    def _limits(self) -> str:
        limits = {"at least": self.least, "at most": self.most}
        return " and ".join(f"{words} {limit:.10g}" for words, limit in limits.items() if limit is not None)
