"""Recipes from YAML files and command lines, and the names that settings had in earlier versions.

A file has groups (`adapter: {rank: 4}`). On the command line a setting has its full name (`--adapter.rank 4`) or its
last part (`--rank 4`), and its value is read as YAML. The command line replaces the file, the file the defaults.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mrl_redimnet.extras import extra
from mrl_redimnet.settings import closest
from mrl_redimnet.training.fields import Group, expected_of, problems_of
from mrl_redimnet.training.recipe import LOSS_FIELDS, Recipe

with extra("train"):
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo

GROUPS: dict[str, type[Group]] = {name: field.annotation for name, field in Recipe.model_fields.items()}
SETTINGS: dict[str, FieldInfo] = {
    f"{group}.{name}": field for group, kind in GROUPS.items() for name, field in kind.model_fields.items()
}
# By the last part of a name, which is unique; and the group's name, where that stands for one of its settings.
FULL_NAMES = {name.rpartition(".")[2]: name for name in SETTINGS} | {
    group: f"{group}.{kind.main}" for group, kind in GROUPS.items() if kind.main
}
# Names of earlier versions, whose recipes had no groups. Names that stayed are found in FULL_NAMES.
RENAMED = {
    "accumulation": "optimizer.gradient_accumulation",
    "augmentation_rise": "augmentation.augmentation_schedule",
    "average_last": "optimizer.weight_averaging",
    "base_share": "augmentation.clean_ratio",
    "carry_classifier": "model.reuse_classifier",
    "chance_steps": "run.chance_until",
    "learning_rate_batch": "optimizer.reference_batch",
    "learning_rates": "optimizer.part_learning_rates",
    "margin_rise": "schedule.margin_schedule",
    "max_problem_share": "data.max_unusable_ratio",
    "prefixes_from": "schedule.prefix_starts",
    "resamples": "evaluation.bootstrap_samples",
    "speeds": "augmentation.speed_perturb",
    "synchronise_norms": "model.sync_batch_norm",
    "trains": "model.finetune",
    "weight_decays": "optimizer.part_weight_decays",
}


class _Loader(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error: one of the two values would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)}: given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def read_recipe(file: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Defaults, then the YAML file's groups, then `overrides`: {full name or last part of it: value}.

    Raises ValueError with one sentence for every setting that is unknown, or whose value does not fit.
    """
    problems, values, places = [], {}, {}

    def take(where: str, name: str, value: Any):
        try:
            name = full_name(name)
            values[name], places[name] = value, where
        except ValueError as error:
            problems.append(f"{where}: {error}")

    if file is not None:
        loaded = _yaml(Path(file).read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise ValueError(f"{file}: expected groups of settings, got {type(loaded).__name__}.")
        for name, value in _in_groups(loaded):
            if "." in name or name in GROUPS:
                take(str(file), name, value)
            else:
                problems.append(f"{file}: {_unknown(name)}")
    for name, value in (overrides or {}).items():
        take("command line", name, value)
    if problems:
        raise ValueError("\n".join(problems))
    return _validated(values, places)


def make_recipe(**settings: Any) -> Recipe:
    """A recipe of the defaults and `settings`, which are called by the last parts of their names.

        make_recipe(steps=10, rank=4)

    Raises ValueError as `read_recipe` does.
    """
    return _validated({full_name(name): value for name, value in settings.items()}, {})


def in_groups(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{full name: value} -> {group: {name: value}}, as a YAML file has them."""
    groups: dict[str, dict[str, Any]] = {}
    for full, value in settings.items():
        group, _, name = full.partition(".")
        groups.setdefault(group, {})[name] = value
    return groups


def flat(recipe: Recipe) -> dict[str, Any]:
    """{full name: value} of all settings, with values as in JSON."""
    dumped = recipe.model_dump(mode="json")
    return {f"{group}.{name}": value for group, values in dumped.items() for name, value in values.items()}


def of_older_version(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without groups, as earlier versions stored them in checkpoints -> {full name of today: value}.

    What the model's configuration got for its loss was given by `model_options` then. Settings that are no more are
    left out.
    """
    values = {}
    for name, value in settings.items():
        if full := RENAMED.get(name) or FULL_NAMES.get(name):
            values[full] = value
    options = dict(values.get("model.model_options") or {})
    values |= {f"loss.{setting}": options.pop(name) for name, setting in LOSS_FIELDS.items() if name in options}
    return values | {"model.model_options": options}


def full_name(name: str) -> str:
    """The full name of a setting, of which the last part is enough. Raises ValueError with the nearest known name."""
    if name in SETTINGS:
        return name
    if name in FULL_NAMES:
        return FULL_NAMES[name]
    raise ValueError(_unknown(name))


def _unknown(name: str) -> str:
    last = name.rpartition(".")[2]
    if name in GROUPS:
        return f"{name}: is a group, expected its settings, such as {name}.{next(iter(GROUPS[name].model_fields))}."
    if now := RENAMED.get(last) or FULL_NAMES.get(last):
        return f"{name}: now {now}."
    if (similar := closest(last, FULL_NAMES)) is not None:
        return f"no setting named {name!r}. Did you mean {FULL_NAMES[similar]}?"
    return f"no setting named {name!r}. Known: {', '.join(SETTINGS)}."


def _in_groups(loaded: dict) -> Iterator[tuple[str, Any]]:
    for name, value in loaded.items():
        if name in GROUPS and value is None:
            continue  # a group whose settings are all commented out
        if name in GROUPS and isinstance(value, dict):
            yield from ((f"{name}.{inner}", each) for inner, each in value.items())
        else:
            yield str(name), value


def _validated(values: dict[str, Any], places: dict[str, str]) -> Recipe:
    """The recipe of {full name: value}. Raises ValueError; places: where each value was given."""
    groups = in_groups(values)
    try:
        return Recipe.model_validate(groups)
    except ValidationError as error:
        problems = []
        for name, sentence in problems_of(error, Recipe, groups):
            where = places.get(".".join(name.split(".")[:2]))
            problems.append(f"{where}: {sentence}" if where else sentence)
    raise ValueError("\n".join(problems))


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parse_command_line(argv: list[str] | None, description: str) -> tuple[Recipe, bool]:
    """`[recipe.yaml] [--group.setting value ...] [--resume]` -> the recipe, and whether to resume."""
    parser = argparse.ArgumentParser(
        usage="train_hf.py [RECIPE.yaml] [--group.setting VALUE ...] [--resume]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", help="YAML file of groups of settings; without one, the defaults")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in `output`")
    for group, kind in GROUPS.items():
        section = parser.add_argument_group(group, " ".join((kind.__doc__ or "").split()))
        for name, field in kind.model_fields.items():
            options = [f"--{group}.{name}", f"--{name}"] + ([f"--{group}"] if name == kind.main else [])
            text = f"{field.description} [{shown_default(field)}; {shown_values(field)}]".replace("%", "%%")
            section.add_argument(
                *options, dest=f"{group}.{name}", metavar="VALUE", default=argparse.SUPPRESS, help=text
            )
    known, rest = parser.parse_known_args(argv)
    overrides = {name: value for name, value in vars(known).items() if name in SETTINGS}
    if (known.recipe or "").startswith("--"):  # argparse takes an unknown option with a space in it for the recipe
        rest.insert(0, known.recipe)
    try:
        for unknown in rest:
            name = unknown.removeprefix("--").partition("=")[0]
            if unknown.startswith("--") or name in FULL_NAMES:
                raise ValueError(f"command line: {_unknown(name)}")
            raise ValueError(f"command line: got {unknown!r}, expected --group.setting value.")
        overrides = {name: _yaml(value) for name, value in overrides.items()}
        return read_recipe(known.recipe, overrides), known.resume
    except (ValueError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))


def shown_default(field: FieldInfo) -> str:
    """A setting's default as YAML has it."""
    value = field.get_default(call_default_factory=True)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def shown_values(field: FieldInfo) -> str:
    """What values a setting takes, in words."""
    return expected_of(field.annotation, field.metadata)
