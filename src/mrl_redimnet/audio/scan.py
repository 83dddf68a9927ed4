"""Which files of a folder are audio: the one scan that training, evaluation, extraction, noise and rooms share."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mrl_redimnet.audio.io import AudioWarning

# What libsndfile or FFmpeg's libraries in PyAV read, see `mrl_redimnet.audio.io`. A file that is named alone may have
# any suffix: its content decides.
AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac"),
    *(".mp4", ".m4b", ".3gp", ".mov", ".webm", ".weba", ".mka", ".mkv"),
    *(".sph", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".voc"),
    *(".wv", ".wma", ".amr", ".ac3", ".mp2", ".tta"),
)
_NAMED = 5  # suffixes or folders that a message names


@dataclass
class LeftOut:
    """What a scan passes over. suffixes: how many files of each that is not audio's; hidden: entries whose names begin
    with a point (as macOS's ._x) and __MACOSX; others: folders and links that were not followed, and why.
    """

    suffixes: Counter = field(default_factory=Counter)
    hidden: int = 0
    others: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = []
        if self.suffixes:
            common = sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0]))[:_NAMED]
            kinds = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in common)
            more = ", ..." if len(self.suffixes) > _NAMED else ""
            parts.append(f"{self.suffixes.total():,} files that are not named as audio ({kinds}{more})")
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden files or folders")
        if self.others:
            more = f"; and {len(self.others) - _NAMED:,} more" if len(self.others) > _NAMED else ""
            parts.append(f"{len(self.others):,} folders or links ({'; '.join(self.others[:_NAMED])}{more})")
        return ", ".join(parts)

    def warn(self, where: str | os.PathLike) -> None:
        """One AudioWarning of all that was left out of the folder `where`, none where that is nothing."""
        if text := str(self):
            warnings.warn(f"{printable(where)}: left out {text}.", AudioWarning, stacklevel=3)


def audio_files(folder: str | os.PathLike) -> Iterator[str]:
    """The audio files below `folder` at any depth, as sorted paths relative to it with "/" between their parts.

    Links to folders and files are followed, but for a link to a folder that it lies in. Names that begin with a point
    and __MACOSX are passed over. A file is audio by its suffix (`AUDIO_SUFFIXES`, in any case); one that cannot be
    read, such as a broken link, is told by whoever reads it. At the end an AudioWarning says in one line what was left
    out. A name that is no UTF-8 has surrogates for its bytes, as Python's `os.fsdecode` gives it.

    Raises OSError where the folder itself cannot be read.
    """
    left_out = LeftOut()
    yield from walk(folder, left_out=left_out)
    left_out.warn(folder)


def walk(folder: str | os.PathLike, inside: str = "", left_out: LeftOut | None = None) -> Iterator[str]:
    """As `audio_files`, of one entry (a file or a folder) `inside` the folder if it is given, and without a warning:
    what is left out is counted in `left_out`.
    """
    folder, left_out = os.fspath(folder), LeftOut() if left_out is None else left_out
    top = os.path.join(folder, inside)
    if inside and not os.path.isdir(top):
        yield inside
        return
    entries = _entries(top)
    yield from _below(folder, inside, entries, {_identity(folder), _identity(top)}, left_out)


def _below(
    root: str, inside: str, entries: list[tuple[str, bool]], above: set[tuple[int, int]], left_out: LeftOut
) -> Iterator[str]:
    """above: the folders that the walk is in, by which it notices that it goes round."""
    prefix = f"{inside}/" if inside else ""
    for name, is_folder in entries:
        path = prefix + name
        if is_hidden(name):
            left_out.hidden += 1
        elif is_folder:
            try:
                here = _identity(os.path.join(root, path))
                if here in above:
                    left_out.others.append(f"{printable(path)}: a link to a folder that it lies in")
                    continue
                found = _entries(os.path.join(root, path))
            except OSError as error:
                left_out.others.append(f"{printable(path)}: {error.strerror}")
                continue
            yield from _below(root, path, found, {*above, here}, left_out)
        elif name.lower().endswith(AUDIO_SUFFIXES):
            yield path
        else:
            left_out.suffixes[suffix_of(name)] += 1


def _entries(folder: str) -> list[tuple[str, bool]]:
    """Names in a folder, and whether each is a folder, in the order of the paths below them: with "/" after a folder's
    name.
    """
    with os.scandir(folder) as entries:
        found = [(entry.name, _is_folder(entry)) for entry in entries]
    return sorted(found, key=lambda entry: entry[0] + "/" * entry[1])


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: str) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def suffix_of(path: str) -> str:
    """The suffix of a path in small letters, to be printed."""
    return printable(os.path.splitext(path)[1].lower())


def is_hidden(path: str) -> bool:
    """Whether a part of a path is hidden, or is macOS's folder of facts about files."""
    return any(part.startswith(".") and part not in (".", "..") or part == "__MACOSX" for part in path.split("/"))


def files_below(folder: str | os.PathLike, what: str = "") -> list[Path]:
    """The paths of `audio_files`, sorted. what: for the message, what they are wanted for.

    Raises FileNotFoundError where `folder` is none or there are none.
    """
    folder, none = Path(folder), f"{what}: no audio" if what else "0 audio files"
    if not folder.is_dir():
        raise FileNotFoundError(f"{f'{what}: no audio, ' if what else ''}{folder} is not a folder with audio.")
    files = sorted(folder / path for path in audio_files(folder))
    if not files:
        raise FileNotFoundError(f"{none} ({', '.join(AUDIO_SUFFIXES)}) below {folder}.")
    return files


def speakers_files(folder: str | os.PathLike) -> dict[str, list[Path]]:
    """The audio below `folder`/SPEAKER of every speaker, by the names of these folders.

    Raises FileNotFoundError where there is none, ValueError for a file that lies in no speaker's folder.
    """
    folder = Path(folder)
    speakers: dict[str, list[Path]] = {}
    for file in files_below(folder):
        if file.parent == folder:
            raise ValueError(f"{file} lies in no speaker's folder: expected {folder}/SPEAKER/FILE.")
        speakers.setdefault(file.relative_to(folder).parts[0], []).append(file)
    return speakers


def named_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Files, and the audio below folders: {name: file}, in a folder the path relative to it, else the path itself.

    Raises FileNotFoundError for a folder without audio, ValueError for a name that comes twice.
    """
    files: dict[str, Path] = {}
    for path in paths:
        for file in files_below(path) if path.is_dir() else [path]:
            name = file.relative_to(path).as_posix() if path.is_dir() else str(path)
            if name in files:
                raise ValueError(f"{name} comes twice, as {files[name]} and {file}: give each once, or one folder.")
            files[name] = file
    return files


def printable(path: str | os.PathLike) -> str:
    r"""A path as text that every file and terminal takes: bytes that are no UTF-8 as \xe9, line ends as \n."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(repr(letter)[1:-1] if not letter.isprintable() else letter for letter in text)


def is_text(path: str | os.PathLike) -> bool:
    """Whether a path is UTF-8, so that tables and JSON can hold it."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def drawn(files: Sequence[Path], most: int) -> list[Path]:
    """All of the files, or `most` of them, drawn always the same way and in their order."""
    chosen = np.random.default_rng(0).permutation(len(files))[:most]
    return [files[i] for i in sorted(chosen)]
