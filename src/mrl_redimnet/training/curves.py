"""A run's record, one JSON line per log point and evaluation, and the picture of it.

    {"step": 50, "kind": "train", "loss": 9.1, "prefix_losses": {"64": 9.3, "256": 8.9}, "learning_rate": 0.001,
     "margin": 0.1, "crops_per_s": 80.0, "loader_crops_per_s": 310.0, "step_crops_per_s": 95.0}
    {"step": 200, "kind": "evaluation", "set": "development", "eer": {"64": 0.06, "256": 0.05}, "validation_loss": 7.2}

A run with a teacher also has its teacher_loss. Rates of errors are in [0, 1], margins in radians. A line may hold less
or more; the picture shows what there is.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mrl_redimnet.files import replace_text
from mrl_redimnet.plotting import legend_line, new_panels, plain, save_figure, shades

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

HISTORY = "history.jsonl"
PICTURE = "curves.png"
KINDS = ("train", "evaluation")

# ----------------------------------------------------------------------------------------------------------------------
# Record


class Record:
    """The lines of `folder`/history.jsonl. Under several processes the main one writes."""

    def __init__(self, folder: str | Path) -> None:
        self.file = Path(folder) / HISTORY

    def begin(self, step: int) -> None:
        """Drops what was written after `step`, from which a run is resumed and writes it anew (0: all, it is new).

        So does it drop a last line that a kill cut short. The file is replaced whole or not at all.
        """
        kept = [line for line in self.lines() if 0 < step and line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.file, text)

    def add(self, step: int, kind: str, values: dict) -> None:
        """Appends a line. values: numbers (NaN and infinity become null), text, and dictionaries of them.

        Raises ValueError for another kind than "train" and "evaluation", and for values named "step" or "kind".
        """
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}.")
        if taken := {"step", "kind"} & set(values):
            raise ValueError(f"values: {', '.join(sorted(taken))} would replace what the line already says.")
        line = json.dumps({"step": step, "kind": kind, **_plain(values)}, allow_nan=False)
        with self.file.open("a") as lines:
            lines.write(line + "\n")

    def lines(self, kind: str | None = None) -> list[dict]:
        """The lines of one kind, or of both, oldest first; none where nothing was recorded. A last line that was cut
        short is left out. Raises ValueError for any other line that cannot be read.
        """
        if not self.file.is_file():
            return []
        texts = self.file.read_text(errors="replace").splitlines()  # a cut may fall within a letter
        lines = []
        for number, text in enumerate(texts, start=1):
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError as error:
                if number < len(texts):
                    raise ValueError(f"{self.file}, line {number}: no JSON ({error}); remove the line.") from error
        return [line for line in lines if kind in (None, line["kind"])]


def _plain(value: Any) -> Any:
    """The value as JSON has it: keys are text, numbers of any library are Python's."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


# ----------------------------------------------------------------------------------------------------------------------
# Picture

POINTS = 1000  # of a curve: more are averaged in groups, else a long run's noise would be all there is to see
SET_STYLES = ("-", "--", ":", "-.")
EER_TICKS = (0, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 100)  # %
RATES = {"loader_crops_per_s": "loader", "step_crops_per_s": "step", "crops_per_s": "overall"}


class Lines:
    """Recorded lines as curves."""

    def __init__(self, record: Record) -> None:
        self.train, self.evaluation = record.lines("train"), record.lines("evaluation")
        self.last = max((line["step"] for line in (*self.train, *self.evaluation)), default=0)
        sets = dict.fromkeys(line.get("set", "development") for line in self.evaluation)
        # What is judged by comes first, and solid; then, for the gap, the speech that is trained on.
        ranked = sorted(sets, key=lambda name: not name.startswith("development"))
        self.dims = sorted(_dims(self.train, "prefix_losses") | _dims(self.evaluation, "eer"))
        self.colors = dict(zip(self.dims, shades(len(self.dims)), strict=True))
        self.styles = {name: SET_STYLES[i % len(SET_STYLES)] for i, name in enumerate(ranked)}

    def of_set(self, name: str) -> list[dict]:
        """Evaluations of one set."""
        return [line for line in self.evaluation if line.get("set", "development") == name]


def draw(folder: str | Path) -> bool:
    """Draws `folder`/history.jsonl as `folder`/curves.png, whole or not at all; returns whether there was anything.

    Up to four panels over the steps: losses; EER per dimension and evaluated set; learning rate and margin; crops per
    second. What was not recorded is left out.
    """
    lines = Lines(Record(folder))
    panels = [panel for panel, present in PANELS if present(lines)]
    if not panels:
        return False
    figure, axes = new_panels(len(panels), across=2, width=6.2, height=4.4)
    for panel, ax in zip(panels, axes, strict=True):
        panel(ax, lines)
        ax.set_xlabel("step")
        ax.set_xlim(0, 1.02 * max(1, lines.last))
        ax.grid(alpha=0.3)
    save_figure(figure, Path(folder) / PICTURE)
    return True


def _has(lines: Iterable[dict], *keys: str) -> bool:
    return any(line.get(key) not in (None, {}) for line in lines for key in keys)


def _dims(lines: Iterable[dict], key: str) -> set[int]:
    """The dimensions there are values of."""
    return {int(dim) for line in lines for dim in line.get(key) or {}}


def curve_of(lines: Iterable[dict], key: str, dim: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and values [N] of the lines that have one, a gap where it was no number; N at most POINTS."""
    if dim is not None:
        lines = [{"step": line["step"], **(line.get(key) or {})} for line in lines]
        key = str(dim)
    points = [(line["step"], math.nan if line[key] is None else line[key]) for line in lines if key in line]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    size = -(-len(steps) // POINTS)
    if size > 1:
        starts = np.arange(0, len(steps), size)
        counts = np.diff([*starts, len(steps)])
        steps, values = np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts
    return steps, values


def add_line(ax: "Axes", curve: tuple[np.ndarray, np.ndarray], **style: Any) -> None:
    """Draws steps [N] and values [N] into a panel; few of them are marked."""
    marker = "o" if len(curve[0]) <= 20 else ""  # a lone point has no line
    ax.plot(*curve, marker=marker, markersize=3, **style)


def _legend(ax: "Axes", handles: "list[Artist]"):
    """Below the panel: inside it there is no place that curves keep clear of."""
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize=8, frameon=False)


def _losses(ax: "Axes", lines: Lines):
    for dim in sorted(_dims(lines.train, "prefix_losses")):
        curve = curve_of(lines.train, "prefix_losses", dim)
        add_line(ax, curve, color=lines.colors[dim], lw=0.7, label=f"{dim} dimensions")
    if _has(lines.train, "loss"):
        add_line(ax, curve_of(lines.train, "loss"), color="black", lw=1.6, label="training")
    for name, style in lines.styles.items():
        if _has(lines.of_set(name), "validation_loss"):
            curve = curve_of(lines.of_set(name), "validation_loss")
            add_line(ax, curve, color="C3", lw=1.6, ls=style, label=f"validation: {plain(name)}")
    handles = ax.get_legend_handles_labels()[0]
    ax.set(title="Loss", ylabel="loss, nats" if handles else "")
    if _has(lines.train, "teacher_loss"):  # in other units than the losses in nats
        right = ax.twinx() if handles else ax
        add_line(right, curve_of(lines.train, "teacher_loss"), color="C2", lw=1.6, label="teacher's loss")
        right.set(ylabel="teacher's loss")
        right.set_ylim(bottom=0)
        handles += right.lines
    _legend(ax, handles)


def _eers(ax: "Axes", lines: Lines):
    of_dims, of_sets, values = {}, {}, []
    for name, style in lines.styles.items():
        for dim in sorted(_dims(lines.of_set(name), "eer")):
            steps, rates = curve_of(lines.of_set(name), "eer", dim)
            add_line(ax, (steps, 100 * rates), color=lines.colors[dim], lw=1.4, ls=style)
            of_dims[dim] = legend_line(color=lines.colors[dim], lw=2, label=f"{dim} dimensions")
            of_sets[name] = legend_line(color="grey", ls=style, label=plain(name))
            values += [100 * rate for rate in rates if math.isfinite(rate)]
    _eer_axis(ax, min(values, default=0), max(values, default=0))
    ax.set(title="Equal error rate", ylabel="EER %")
    _legend(ax, [*(of_dims[dim] for dim in sorted(of_dims)), *of_sets.values()])


def _eer_axis(ax: "Axes", low: float, high: float):
    """From tick to tick around low and high, in %: logarithmic, yet with a 0, which training speakers may reach."""
    ax.set_yscale("symlog", linthresh=1, linscale=0.5)
    bottom = max(tick for tick in EER_TICKS[:-1] if tick <= low)
    top = min(tick for tick in EER_TICKS if tick > high or tick == EER_TICKS[-1])
    ticks = [tick for tick in EER_TICKS if bottom <= tick <= top]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(bottom, top)


def _schedule(ax: "Axes", lines: Lines):
    handles = []
    ax.set(title="Learning rate and margin", ylabel="learning rate")
    if _has(lines.train, "learning_rate"):
        handles += ax.plot(*curve_of(lines.train, "learning_rate"), color="C0", label="learning rate")
        ax.set_ylim(bottom=0)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if _has(lines.train, "margin"):
        right = ax.twinx() if handles else ax
        handles += right.plot(*curve_of(lines.train, "margin"), color="C1", ls="--", label="margin")
        right.set(ylabel="margin, radians")
        right.set_ylim(bottom=0)
    _legend(ax, handles)


def _rates(ax: "Axes", lines: Lines):
    for key, label in RATES.items():
        if _has(lines.train, key):
            add_line(ax, curve_of(lines.train, key), lw=1.2, label=label)
    ax.set(title="Speed", ylabel="crops/s")
    ax.set_ylim(bottom=0)
    _legend(ax, ax.get_legend_handles_labels()[0])


# What draws a panel, and whether there is anything for it.
PANELS: tuple[tuple[Callable[["Axes", Lines], None], Callable[[Lines], bool]], ...] = (
    (
        _losses,
        lambda lines: (
            _has(lines.train, "loss", "prefix_losses", "teacher_loss") or _has(lines.evaluation, "validation_loss")
        ),
    ),
    (_eers, lambda lines: _has(lines.evaluation, "eer")),
    (_schedule, lambda lines: _has(lines.train, "learning_rate", "margin")),
    (_rates, lambda lines: _has(lines.train, *RATES)),
)
