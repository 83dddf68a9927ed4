"""The types of a recipe's settings, and one sentence for a value that does not fit.

A type says in words what it expects (`Expected`): the same words stand in error messages, in `--help` and on the
reference page. Numbers that YAML 1.1 takes for text ("1e-4") count as numbers; true and false, NaN and infinities never
do.
"""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mrl_redimnet.extras import extra
from mrl_redimnet.settings import as_number, near

with extra("train"):
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        PydanticUserError,
        TypeAdapter,
        ValidationError,
    )
    from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Expected:
    """What a type accepts, in words that go on from "expected"."""

    text: str


# ----------------------------------------------------------------------------------------------------------------------
# Lengths of a part of the run


@dataclass(frozen=True)
class Length:
    """A part of a run: a number of optimiser steps, of epochs (passes over the training utterances), or a ratio of the
    whole run.

    unit: "steps", "epochs" or "ratio".
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, value: object) -> "Length":
        """100 -> steps, 0.05 -> a ratio of the run, "2 epochs" or "0.5 epochs" -> epochs. Raises ValueError."""
        words = value.split() if isinstance(value, str) else []
        if len(words) == 2 and words[1] in ("epoch", "epochs"):
            amount, unit = as_number(words[0]), "epochs"
        else:
            amount = as_number(value)
            unit = "steps" if isinstance(amount, int) else "ratio"
        if amount is None or amount < 0 or (unit == "ratio" and amount >= 1):
            raise ValueError(f"got {value!r}, expected {LENGTH_IN_WORDS}")
        return cls(amount, unit)

    def in_steps(self, steps: int, epoch_steps: float) -> float:
        """How many steps that is, possibly with a fraction. steps: of the run; epoch_steps: of one epoch."""
        return self.amount * {"steps": 1, "epochs": epoch_steps, "ratio": steps}[self.unit]


LENGTH_IN_WORDS = "a whole number of steps, a ratio of the run between 0 and 1, or epochs such as '2 epochs'"


def _length(value: object) -> int | float | str:
    """The value as it was written, with text that is a number as a number."""
    length = Length.parse(value)
    return value if length.unit == "epochs" else length.amount


def _above_zero(value: int | float | str) -> int | float | str:
    if not Length.parse(value).amount:
        raise ValueError("a length of 0")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Types


def _float(value: object) -> object:
    """Text that is a number in writing, such as 1e-4, as that number."""
    number = as_number(value) if isinstance(value, str) else None
    return value if number is None else number


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("a text that is empty")
    return value


def _no(value: object) -> object:
    """A bare `no` is false to YAML."""
    return "no" if value is False else value


def _rising(value: list[float]) -> list[float]:
    if len(value) != 2 or value[0] > value[1]:
        raise ValueError("not two rising numbers")
    return value


def numbers_in(value: object) -> object:
    """Nested options with "1e-3", which YAML takes for text, as a number; names of folders stay as they are."""
    if isinstance(value, dict):
        texts = ("kind", "folder", "noise", "rooms")
        return {key: each if key in texts else numbers_in(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbers_in(each) for each in value]
    return _float(value)


def _number(text: str, **limits: float) -> Any:
    return Annotated[float, BeforeValidator(_float), Field(allow_inf_nan=False, **limits), Expected(text)]


def choice(*words: str) -> Any:
    """One of several words."""
    return Annotated[Literal[words], BeforeValidator(_no if "no" in words else lambda value: value)]


Text = Annotated[str, AfterValidator(_not_blank), Expected("non-empty text")]
Count = Annotated[int, Field(ge=1), Expected("a whole number of at least 1")]
CountOr0 = Annotated[int, Field(ge=0), Expected("a whole number of at least 0")]
Seed = Annotated[int, Field(ge=0, lt=2**32), Expected("a whole number of at least 0 and below 4294967296")]
Positive = _number("a number above 0", gt=0)
NotNegative = _number("a number of at least 0", ge=0)
AtLeast1 = _number("a number of at least 1", ge=1)
Ratio = _number("a ratio from 0 to below 1", ge=0, lt=1)
WholeRatio = _number("a ratio from 0 to 1", ge=0, le=1)
Between0And1 = _number("a ratio above 0 and below 1", gt=0, lt=1)
Rise = Annotated[list[WholeRatio], AfterValidator(_rising), Expected("two rising ratios between 0 and 1")]
Counts = Annotated[list[Count], Expected("a list of whole numbers of at least 1")]
LengthOr0 = Annotated[int | float | str, BeforeValidator(_length), Expected(LENGTH_IN_WORDS)]
LengthAbove0 = Annotated[
    int | float | str,
    BeforeValidator(_length),
    AfterValidator(_above_zero),
    Expected(f"{LENGTH_IN_WORDS}, more than 0"),
]
Options = Annotated[dict[str, Any], BeforeValidator(numbers_in), Expected("a mapping of options")]


class Group(BaseModel):
    """Settings that belong together. They cannot be changed after they were read.

    main: the setting that is meant where the group is given as one value (`model: nano` is `model: {start: nano}`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    main: typing.ClassVar[str | None] = None


# ----------------------------------------------------------------------------------------------------------------------
# Sentences


def expected_of(hint: Any, metadata: typing.Iterable = ()) -> str:
    """What a type hint accepts, in words."""
    for marker in metadata:
        if isinstance(marker, Expected):
            return marker.text
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return expected_of(parts[0], hint.__metadata__)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys("null" if part is type(None) else expected_of(part) for part in parts))
    if _is_group(hint):
        return "a mapping"
    if (origin or hint) is dict:
        keys = choices_of(parts[0]) if parts else []
        return f"a mapping with some of the keys {', '.join(keys)}" if keys else "a mapping"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", list: "a list"}
    return words.get(origin or hint, getattr(hint, "__name__", str(hint)))


def choices_of(hint: Any) -> list[str]:
    """The words that a type hint allows, none where it allows others as well."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return [str(part) for part in parts]
    if origin in (Annotated, typing.Union, types.UnionType):
        return [word for part in parts for word in choices_of(part)]
    return []


def problems_of(error: ValidationError, model: type[BaseModel], given: dict) -> Iterator[tuple[str, str]]:
    """What is wrong in `given`, which does not fit `model`: the full name of a setting, and a sentence about it.

    A setting comes once. Where settings do not go together, the sentence is the check's own and names them.
    """
    seen = set()
    for each in error.errors():
        hint, names, wrong_key = _hint_at(model, each["loc"])
        name = ".".join(names)
        if each["type"] == "value_error" and _is_group(hint):
            yield name, str(each["ctx"]["error"])
            continue
        if name in seen:
            continue
        seen.add(name)
        if each["type"] == "missing":
            yield name, f"{name}: is missing, expected {expected_of(hint)}."
        elif each["type"] == "extra_forbidden":
            parent = _hint_at(model, each["loc"][:-1])[0]
            yield name, f"{name}: no such entry.{near(names[-1], parent.model_fields)}"
        else:
            value = wrong_key if wrong_key is not None else _value_at(given, names)
            yield name, refusal(name, value, hint)


def refusal(name: str, value: object, hint: Any) -> str:
    """The sentence about a value that does not fit its type, with the nearest of the words that do."""
    return f"{name}: got {value!r}, expected {expected_of(hint)}.{near(value, choices_of(hint))}"


def check_value(name: str, value: object, hint: Any) -> None:
    """Raises ValueError for a value that does not have the type that another class's field is declared with."""
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))
    except PydanticUserError:  # a class that has a configuration of its own
        adapter = TypeAdapter(hint)
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError(refusal(name, value, hint)) from error


def _hint_at(model: Any, place: tuple) -> tuple[Any, list[str], object]:
    """The type hint at an error's place, the names that lead there, and the key where a mapping's key is wrong.

    Below mappings and groups nothing is followed: a list is wrong as a whole.
    """
    hint, names = model, []
    for number, step in enumerate(place):
        if typing.get_origin(hint) is dict and typing.get_args(hint):
            key, value = typing.get_args(hint)
            if place[number + 1 : number + 2] == ("[key]",):
                return key, names, step
            hint = value
        elif _is_group(hint):
            field = hint.model_fields.get(step)
            hint = None if field is None else _with_metadata(field)
        else:
            break
        names.append(str(step))
    return hint, names, None


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


def _with_metadata(field: FieldInfo) -> Any:
    """A field's type hint, with the words of its `Expected`."""
    words = [marker for marker in field.metadata if isinstance(marker, Expected)]
    return Annotated[field.annotation, words[0]] if words else field.annotation


def _value_at(given: Any, names: list[str]) -> object:
    for name in names:
        given = given.get(name) if isinstance(given, dict) else given
    return given
