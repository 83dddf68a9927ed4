"""What crops are augmented with (noise, rooms, talkers): checked when a run starts, never a crop's problem."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mrl_redimnet.audio.io import AudioError, AudioWarning, audio_info
from mrl_redimnet.audio.scan import files_below, printable

OTHER_DRAWS = 20  # after one that could not be read
_NAMED = 3  # files that a message names

T = TypeVar("T")


class MaterialError(AudioError):
    """Noise, rooms or talkers cannot be read, again and again: the run's fault, not that of the speech."""


def usable_files(folder: str | Path, what: str) -> list[str]:
    """The audio files below a folder whose headers can be read, sorted, by `usable`; FileNotFoundError for none."""
    return usable([str(file) for file in files_below(folder, what)], what)


def usable(files: Sequence[str], what: str) -> list[str]:
    """Those of some files whose headers can be read; an AudioWarning tells the others as `what` they are.

    Raises AudioError where that is none.
    """
    good, reasons = [], []
    for file in files:
        try:
            audio_info(file)
            good.append(file)
        except AudioError as error:
            reasons.append(str(error))
    if reasons:
        more = f"; and {len(reasons) - _NAMED:,} more" if len(reasons) > _NAMED else ""
        text = f"{what}: {len(reasons):,} of {len(files):,} files cannot be used: {'; '.join(reasons[:_NAMED])}{more}"
        if not good:
            raise AudioError(text)
        warnings.warn(f"{printable(text)}. They are left out", AudioWarning, stacklevel=3)
    return good


def draw_readable(draw: Callable[[], T], what: str) -> T:
    """`draw()`, again where what it draws cannot be read, which an AudioWarning tells.

    Raises MaterialError after `OTHER_DRAWS` further ones that could not be read either.
    """
    error = None
    for _ in range(OTHER_DRAWS + 1):
        try:
            return draw()
        except AudioError as found:
            error = found
            warnings.warn(f"{what}: {error}. Another one is used", AudioWarning, stacklevel=3)
    raise MaterialError(f"{what}: {OTHER_DRAWS + 1} draws in a row cannot be read, the last: {error}") from error
