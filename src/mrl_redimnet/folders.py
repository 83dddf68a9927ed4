"""Folders and files that are written whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path


def refuse_missing(source: str | Path, names: Iterable[str] = ()):
    """Raises FileNotFoundError where `source` reads like a folder, not like a Hub id OWNER/NAME, and there is none.

    names: what could have been given as well, for the message.
    """
    may_be_hub_id = isinstance(source, str) and "/" in source and not source.startswith(("/", ".", "~"))
    if not may_be_hub_id and not Path(source).is_dir():
        or_name = f", or one of {', '.join(names)}" if names else ""
        raise FileNotFoundError(f"{source} is not a folder: give a saved folder, or a Hub id (OWNER/NAME){or_name}.")


def refuse_existing(folder: Path):
    """Raises FileExistsError where `folder` is there already."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: give a new folder, or remove it.")


def replace_file(target: Path, write: Callable[[Path], object]):
    """Fills a temporary file with `write(file)`, then puts it in `target`'s place; an error leaves no trace."""
    temporary = target.with_name(f".{target.name}.writing")
    try:
        write(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def recover_folder(target: Path):
    """Puts back what `replace_folder` had moved aside when it was killed between its two renamings."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        os.replace(old, target)


def replace_folder(target: Path, write: Callable[[Path], None]):
    """Fills a temporary folder with `write(folder)`, then puts it in `target`'s place; an error leaves no trace."""
    recover_folder(target)
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
