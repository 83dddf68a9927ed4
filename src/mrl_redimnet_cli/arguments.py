"""What several commands take, and the check that the paths on a command line are there."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mrl_redimnet_cli.names import CHOICES, VALUES


def add_command(commands, name: str, help: str, **options) -> argparse.ArgumentParser:
    """The parser of a new command, whose own help begins with what the list of commands says of it."""
    return commands.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}.".replace("?.", "?"), **options
    )


def add_model(parser: argparse.ArgumentParser):
    """Adds `model`, and --adapter."""
    parser.add_argument("model", help="path or Hub id")
    parser.add_argument("--adapter", help="path or Hub id of an adapter to put on the model")
    must_be_there(parser, model=source, adapter=source)


def add_scoring(parser: argparse.ArgumentParser):
    """Adds --scoring, --cohort and --top."""
    top = VALUES["scoring.TOP"]
    parser.add_argument("--scoring", choices=CHOICES["scoring.SCORERS"], default="cosine", help="[cosine]")
    parser.add_argument(
        "--cohort", type=Path, metavar="AUDIO_DIR", help="speech of other speakers, for all scoring but cosine"
    )
    parser.add_argument("--top", type=int, default=top, help=f"of the cohort's scores, for as_norm [{top}]")
    must_be_there(parser, cohort=folder)


def add_thresholds(parser: argparse.ArgumentParser):
    """Adds --thresholds."""
    file = VALUES["calibration.THRESHOLDS_FILE"]
    parser.add_argument("--thresholds", type=Path, metavar="FOLDER", help=f"where {file} lies [the model's folder]")
    must_be_there(parser, thresholds=folder)


# ---------------------------------------------------------------- paths


LISTED = 5  # paths that a message names


def file(path: str | Path) -> str | None:
    """What is wrong with a path that must be a file; None for nothing."""
    return None if Path(path).is_file() else f"{path} is not a file" if Path(path).exists() else f"no file {path}"


def folder(path: str | Path) -> str | None:
    """What is wrong with a path that must be a folder; None for nothing."""
    return None if Path(path).is_dir() else f"{path} is not a folder" if Path(path).exists() else f"no folder {path}"


def anything(path: str | Path) -> str | None:
    """What is wrong with a path that must be there; None for nothing."""
    return None if Path(path).exists() else f"no file or folder {path}"


def source(model: str) -> str | None:
    """What is wrong with a model or an adapter: a folder, or a Hub id, which is not looked for here."""
    may_be_hub_id = "/" in model and not model.startswith(("/", ".", "~"))
    if may_be_hub_id or Path(model).is_dir():
        return None
    return f"{model} is not a folder: give a saved folder, or a Hub id (OWNER/NAME)"


def must_be_there(parser: argparse.ArgumentParser, **checks: Callable[[str], str | None]):
    """Has `check_paths` check arguments of the parser, by their names."""
    parser.set_defaults(paths={**(parser.get_default("paths") or {}), **checks})


def check_paths(arguments: argparse.Namespace):
    """Raises FileNotFoundError for arguments that name what is not there, all of them in one message."""
    told = []
    for name, wrong in arguments.paths.items():
        value = getattr(arguments, name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        problems = [problem for problem in map(wrong, values) if problem is not None]
        if problems:
            count = f"{len(problems)} of {len(values)}: " if len(values) > 1 else ""
            more = " ..." if len(problems) > LISTED else ""
            told.append(f"{name.upper().replace('_', '-')}: {count}{', '.join(problems[:LISTED])}{more}")
    if told:
        raise FileNotFoundError(f"{'; '.join(told)}.")
