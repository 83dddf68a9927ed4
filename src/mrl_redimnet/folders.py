"""Folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def refuse_missing(source: str | Path):
    """Raises FileNotFoundError where `source` reads like a folder, not like a Hub id, and there is none."""
    if (isinstance(source, Path) or source.startswith(("/", ".", "~"))) and not Path(source).is_dir():
        raise FileNotFoundError(f"{source} is not a folder: give a saved folder, or a Hub id.")


def refuse_existing(folder: Path):
    """Raises FileExistsError where `folder` is there already."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: give a new folder, or remove it.")


def replace_folder(target: Path, write: Callable[[Path], None]):
    """Fills a temporary folder with `write(folder)`, then puts it in `target`'s place; an error leaves no trace."""
    temporary, old = target.with_name(f".{target.name}.writing"), target.with_name(f".{target.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if target.exists():
        os.replace(target, old)
    os.replace(temporary, target)
    shutil.rmtree(old, ignore_errors=True)
