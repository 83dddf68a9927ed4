"""What is found about a recording as files: RTTM for tools, JSON for programs, a picture for people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrl_redimnet.diarization.pipeline import Diarization
from mrl_redimnet.diarization.turns import RTTM, Turn, rttm_text
from mrl_redimnet.files import replace_text
from mrl_redimnet.plotting import new_figure, plain, save_figure
from mrl_redimnet.scoring.decisions import Decision


def write_diarization(
    found: Diarization, stem: Path, facts: Mapping[str, Any], recognised: Mapping[str, Decision] | None = None
) -> list[Path]:
    """Writes STEM.rttm, STEM.json and STEM.png; their folder is made.

    facts: about the model, for the JSON. recognised: how speakers who were enrolled were recognised.

    Returns the three paths. Raises OSError for what cannot be written, ModuleNotFoundError without matplotlib.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    rttm, record, picture = (stem.with_name(stem.name + suffix) for suffix in (RTTM, ".json", ".png"))
    replace_text(rttm, rttm_text(stem.name, found.turns))
    replace_text(record, json.dumps(as_record(found, facts, recognised or {}), indent=1) + "\n")
    figure = new_figure(10, 1 + 0.4 * max(len(found.voices), 1))
    draw_turns(figure.subplots(), found.turns, found.seconds, found.recording)
    save_figure(figure, picture)
    return [rttm, record, picture]


def as_record(found: Diarization, facts: Mapping[str, Any], recognised: Mapping[str, Decision]) -> dict:
    """What was found, as JSON takes it. Times are in seconds; embeddings are comparable under the same facts only."""
    speakers = []
    for name, voice in found.voices.items():
        decision = recognised.get(name)
        speakers.append(
            {
                "name": name,
                "seconds": round(found.spoken(name), 3),
                "enrolled": decision is not None,
                **({} if decision is None else {"score": decision.score, "threshold": decision.threshold}),
                "embedding": [round(float(value), 5) for value in voice],
            }
        )
    turns = [{"start": round(t.start, 3), "end": round(t.end, 3), "speaker": t.speaker} for t in found.turns]
    return {
        "recording": found.recording,
        "seconds": round(found.seconds, 3),
        **facts,
        "speakers": speakers,
        "turns": turns,
    }


def draw_turns(panel: Any, turns: Sequence[Turn], seconds: float, title: str) -> None:
    """Draws turns into a panel of matplotlib: a row for each speaker, who speaks longest at the top."""
    spoken: dict[str, float] = {}
    for turn in turns:
        spoken[turn.speaker] = spoken.get(turn.speaker, 0.0) + turn.seconds
    names = sorted(spoken, key=lambda name: -spoken[name])
    for row, name in enumerate(names):
        own = [(turn.start, turn.seconds) for turn in turns if turn.speaker == name]
        panel.broken_barh(own, (row - 0.4, 0.8), color=f"C{row % 10}")
    labels = [f"{plain(name)} ({spoken[name]:.0f} s)" for name in names]
    panel.set_yticks(range(len(names)), labels)
    panel.set_ylim(max(len(names), 1) - 0.5, -0.5)
    panel.set_xlim(0, seconds)
    panel.set_xlabel("seconds")
    panel.set_title(plain(title), loc="left", fontsize="medium")
    if not names:
        panel.text(seconds / 2, 0, "nobody speaks", ha="center", va="center")
