"""Turns of speakers, and the RTTM files that hold them."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mrl_redimnet.files import text_lines

RTTM = ".rttm"


@dataclass(frozen=True, order=True)
class Turn:
    """A speaker speaks from `start` to `end`, in seconds."""

    start: float
    end: float
    speaker: str

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end - self.start


def joined(turns: Iterable[Turn], pause: float = 0.0) -> list[Turn]:
    """Turns in the order of their starts, those of one speaker joined where at most `pause` seconds lie between them,
    or where they overlap.
    """
    found: list[Turn] = []
    last: dict[str, int] = {}  # the place in `found` of each speaker's last turn
    for turn in sorted(turns):
        before = found[last[turn.speaker]] if turn.speaker in last else None
        if before is not None and turn.start - before.end <= pause:
            found[last[turn.speaker]] = Turn(before.start, max(before.end, turn.end), turn.speaker)
        else:
            last[turn.speaker] = len(found)
            found.append(turn)
    return sorted(found)  # a turn that grew may now come after one of the same start


def rttm_name(text: str) -> str:
    """A name as RTTM takes it, whose fields are separated by white space: with "_" for each run of it."""
    return re.sub(r"\s+", "_", text.strip()) or "_"


def rttm_text(recording: str, turns: Sequence[Turn]) -> str:
    """The lines of an RTTM file (NIST's Rich Transcription Time Marked format) on one recording."""
    return "".join(
        f"SPEAKER {rttm_name(recording)} 1 {turn.start:.3f} {turn.seconds:.3f} <NA> <NA> {rttm_name(turn.speaker)} "
        "<NA> <NA>\n"
        for turn in turns
    )


def read_rttm(file: str | Path) -> dict[str, list[Turn]]:
    """The turns of each recording in an RTTM file, in the order of their starts. Lines of other types are passed over.

    Raises OSError for a file that cannot be read, ValueError, with the line, for one that is no RTTM.
    """
    found: dict[str, list[Turn]] = {}
    for number, line in enumerate(text_lines(file), 1):
        fields = line.split()
        if not fields or fields[0].startswith(";") or fields[0] != "SPEAKER":
            continue
        try:
            start, seconds = float(fields[3]), float(fields[4])
            if len(fields) < 8 or not (math.isfinite(start) and math.isfinite(seconds)) or min(start, seconds) < 0:
                raise ValueError
        except (IndexError, ValueError):
            raise ValueError(
                f"{file}, line {number}: expected `SPEAKER RECORDING CHANNEL START SECONDS <NA> <NA> NAME ...`, got "
                f"{line.strip()!r}."
            ) from None
        found.setdefault(fields[1], []).append(Turn(start, start + seconds, fields[7]))
    if not found:
        raise ValueError(f"{file}: holds no turn of a speaker (no line begins with SPEAKER).")
    return {recording: sorted(turns) for recording, turns in found.items()}
