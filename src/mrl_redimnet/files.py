"""Folders and files that are written whole or not at all, below their folder; and text files of any common encoding."""

import codecs
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from configuration_mrl_redimnet import MRLReDimNetError

# What a text file may begin with. UTF-32's mark begins with UTF-16's, so it comes first.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class NotTextError(MRLReDimNetError, ValueError):
    """A text file is not in the encoding it should be in. The message says where."""


def refuse_missing(source: str | Path, names: Iterable[str] = (), nearest: Iterable[str] = ()) -> None:
    """Raises FileNotFoundError where `source` reads like a folder, not like a Hub id OWNER/NAME, and there is none.

    names: what could have been given as well, for the message. nearest: names that `source` may be a misspelling of; if
    there are any, it is not taken for a Hub id.
    """
    nearest = ", ".join(nearest)
    may_be_hub_id = isinstance(source, str) and "/" in source and not source.startswith(("/", ".", "~")) and not nearest
    if not may_be_hub_id and not Path(source).is_dir():
        or_name = f", or one of {', '.join(names)}" if names else ""
        near = f" The nearest names: {nearest}." if nearest else ""
        raise FileNotFoundError(
            f"{source} is not a folder: give a saved folder, or a Hub id (OWNER/NAME){or_name}.{near}"
        )


def refuse_existing(folder: Path) -> None:
    """Raises FileExistsError where `folder` is there already."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: give a new folder, or remove it.")


def check_output(file: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Raises, before the work, for a file that could not be written after it; None is no file.

    Raises ValueError for another suffix than one of `suffixes`, FileNotFoundError for a folder, or without its folder.
    """
    if file is None:
        return
    if suffixes and file.suffix not in suffixes:
        raise ValueError(f"{file}: expected a file that ends in {' or '.join(suffixes)}.")
    if not file.parent.is_dir() or file.is_dir():
        raise FileNotFoundError(f"{file} is a folder, or there is no folder {file.parent}: give a file to write.")


def path_below(folder: str | Path, name: str, what: str) -> Path:
    """`folder`/`name` for a relative path that came from data. what: it is, for the message.

    Raises ValueError for one that would lead out of the folder (absolute, or with ".."), or names no file.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in parts or "\0" in name:
        raise ValueError(
            f"{what}: {name!r} does not name a file below {folder}, and nothing is written elsewhere: give relative "
            "paths without '..'"
        )
    return Path(folder) / name


def text_lines(file: str | os.PathLike) -> Iterator[str]:
    """The lines of a text file with their ends, as the csv module takes them: UTF-8, or UTF-16 or UTF-32 (as Excel
    saves) where the file begins with a byte order mark.

    Raises NotTextError, with the line, where that is not its encoding.
    """
    with open(file, "rb") as opened:
        start = opened.read(4096)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    if encoding == "utf-8" and 0 in start[:2]:
        raise NotTextError(f"{file}: not UTF-8 text (it has zero bytes, as UTF-16 does; save it as UTF-8)")
    try:
        with open(file, encoding=encoding, newline="") as lines:
            yield from lines
    except UnicodeError as error:
        raise NotTextError(_not_text(Path(file), encoding)) from error


def _not_text(file: Path, encoding: str) -> str:
    data, name = file.read_bytes(), encoding.removesuffix("-sig").upper()
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "replace")
        line = len(re.split("\r\n|\r|\n", before))
        return f"{file}: not {name} text (line {line}, byte 0x{data[error.start]:02x}; save it as UTF-8)"
    return f"{file}: not {name} text (save it as UTF-8)"


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Fills a temporary file with `write(file)`, then puts it in `target`'s place; an error leaves no trace."""
    temporary = target.with_name(f".{target.name}.writing")
    try:
        write(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(target: Path, text: str, newline: str | None = None) -> None:
    """Puts a file of this text, UTF-8, in `target`'s place, whole or not at all. newline: as of `open`."""
    replace_file(target, lambda file: file.write_text(text, encoding="utf-8", newline=newline))


def recover_folder(target: Path) -> None:
    """Puts back what `replace_folder` had moved aside when it was killed between its two renamings."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        os.replace(old, target)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
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
