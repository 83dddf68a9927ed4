"""An evaluation as the text, the picture and the metadata of a card."""

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from mrl_redimnet.hub_cards.results import EVALUATION_FILE, AttributeRow, Evaluation, Row, column, interval
from mrl_redimnet.plotting import legend_line, legend_patch, new_panels, plain, save_figure
from mrl_redimnet.rows import ALL, SHARES, SIDES, NumberRow, VerificationRow, group_cells, group_notes
from mrl_redimnet.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NO_RESULTS = "No results are recorded for these weights."
PICTURE = "eer.png"
HUB_RESULTS = ".eval_results"  # the folder whose YAML files the Hub shows on the page of a benchmark

_METRIC_IDS = {"accuracy": "accuracy", "balanced accuracy": "balanced_accuracy", "mean absolute error": "mae"}
_LINE_STYLES = ("-", "--", ":", "-.")


def results_section(evaluation: Evaluation | None) -> str:
    """Markdown: a table per measure, the picture when `eer_plot` draws one, where the numbers come from."""
    if evaluation is None:
        return NO_RESULTS
    parts = []
    for kind, caption, cell in (
        (VerificationRow, "EER % by cosine scoring, per dimension.", _value_cell),
        (VerificationRow, "minDCF (target prior 0.01), per dimension.", _min_dcf_cell),
        (AttributeRow, "Speaker attributes.", _value_cell),
    ):
        if lists := evaluation.lists_of(kind):
            rows = [row for systems in lists.values() for rows in systems.values() for row in rows]
            intervals = cell is _value_cell and any(interval(row) for row in rows)
            parts.append(caption + " Brackets: 95 % intervals." * intervals)
            parts.append(_table(lists, evaluation.saved, cell))
    if evaluation.lists_of(VerificationRow):
        parts.append(f"![EER per dimension]({PICTURE})")
    parts += [*_groups_part(evaluation), *_robustness_part(evaluation)]
    conditions = " ".join(evaluation.conditions.split())
    parts.append(f"Bold: the weights of this repository. All numbers: [{EVALUATION_FILE}]({EVALUATION_FILE}).")
    return "\n\n".join([*parts, conditions] if conditions else parts)


def _groups_part(evaluation: Evaluation) -> list[str]:
    """What is said of groups of speakers, a table and notes per trial list; nothing where there are none."""
    if not evaluation.groups:
        return []
    parts = [
        "Error rates by group of speakers, of trials within each: EER, and misses and false alarms at one threshold "
        "for all. Brackets: 95 % intervals over speakers. Groups with few speakers or trials have no rates."
    ]
    for name, rows in evaluation.groups.items():
        heading, *lines = group_cells(rows)
        parts.append(_markdown([["trials", *heading], *([name, *line] for line in lines)]))
        parts += [" ".join(" ".join(note.split()) for note in group_notes(rows))]
    return parts


def _robustness_part(evaluation: Evaluation) -> list[str]:
    """What is said of robustness: the one number per trial list, side and dimension; nothing where there is none."""
    lists = {name: [row for row in rows if row.kind == ALL] for name, rows in evaluation.robustness.items()}
    if not any(lists.values()):
        return []
    dims = sorted({row.dim for rows in lists.values() for row in rows})
    lines = [["trials", "perturbed", *map(str, dims)]]
    for name, rows in lists.items():
        for side, title in zip(SIDES, ("test", "enrolment and test"), strict=True):
            cells = {row.dim: _number_cell(row) for row in rows if row.side == side}
            if cells:
                lines.append([name, title, *(cells.get(dim, "") for dim in dims)])
    kinds = sorted({row.kind for rows in evaluation.robustness.values() for row in rows} - {ALL})
    caption = (
        f"Robustness, per dimension: relative EER change in % when audio is perturbed{_over(kinds)}, as "
        "`mrl_redimnet.evaluation.robustness` defines it. Brackets: 95 % intervals over speakers."
    )
    return [caption, _markdown(lines)]


def _over(kinds: list[str]) -> str:
    return f" by {', '.join(kinds)}, each counting the same" if kinds else ""


def _number_cell(row: NumberRow) -> str:
    bounds = ""
    if row.change_low is not None and row.change_high is not None:
        bounds = f" [{100 * row.change_low:+.0f}, {100 * row.change_high:+.0f}]"
    return f"{100 * row.change:+.0f}{bounds}"


def _table(lists: dict[str, dict[str, list[Row]]], saved: str, cell: Callable[[Row], str]) -> str:
    """A line per trial list and system, a column per dimension or metric; blank where nothing was measured."""
    columns = sorted({column(row) for systems in lists.values() for rows in systems.values() for row in rows})
    lines = [["trials", "weights", *map(_heading, columns)]]
    for name, systems in lists.items():
        for system, rows in systems.items():
            cells = {column(row): cell(row) for row in rows}
            label = f"**{system.strip()}**" if system == saved else system
            lines.append([name, label, *(cells.get(key, "") for key in columns)])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    """The first two columns are names, the others numbers."""
    return markdown_table(lines, left=(0, 1), aligned=False)


def _heading(key: int | str) -> str:
    return f"{key} %" if key in SHARES else str(key)


def _value(row: Row) -> tuple[float, int]:
    """What the tables and the metadata show of a row, and the factor to its unit: rates are per cent."""
    if isinstance(row, VerificationRow):
        return row.eer, 100
    return row.value, 100 if row.metric in SHARES else 1


def _value_cell(row: Row) -> str:
    value, unit = _value(row)
    bounds = interval(row)
    return f"{unit * value:.2f}" + (f" [{unit * bounds[0]:.1f}, {unit * bounds[1]:.1f}]" if bounds else "")


def _min_dcf_cell(row: VerificationRow) -> str:
    return f"{row.min_dcf:.3f}"


def eval_results(evaluation: Evaluation) -> list[EvalResult]:
    """The saved system's EERs or attribute results, rounded as in the tables, for a card's model-index."""
    entries = []
    for (name, systems), dataset in zip(evaluation.results.items(), _dataset_ids(evaluation.results), strict=True):
        for row in systems[evaluation.saved]:
            value, unit = _value(row)
            verification = isinstance(row, VerificationRow)
            entries.append(
                EvalResult(
                    task_type="speaker-verification" if verification else "audio-classification",
                    task_name="Speaker verification" if verification else "Speaker attributes",
                    dataset_type=dataset,
                    dataset_name=name,
                    metric_type="equal-error-rate" if verification else _METRIC_IDS[row.metric],
                    metric_name=f"EER % at {row.dim} dimensions" if verification else _heading(row.metric),
                    metric_value=round(unit * value, 2),
                )
            )
    return entries


def hub_results(evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """The same results on lists that are benchmarks of the Hub, as its pages of benchmarks read them: {name of a file:
    its content}, a file for each number. The form is that of https://huggingface.co/docs/hub/eval-results.
    """
    found = {}
    names = [*evaluation.benchmarks]
    for name, stem in zip(names, _dataset_ids(names), strict=True):
        dataset, _, task = evaluation.benchmarks[name].partition(":")
        for row in evaluation.results[name][evaluation.saved]:
            value, unit = _value(row)
            verification = isinstance(row, VerificationRow)
            notes = f"EER % by cosine, {row.dim} dimensions" if verification else _heading(row.metric)
            entry = EvalResultEntry(dataset, task, round(unit * value, 2), notes=notes)
            file = f"{stem}-{column(row)}.yaml".replace(" ", "-")
            found[file] = eval_result_entries_to_yaml([entry])
    return found


def _dataset_ids(names: Iterable[str]) -> list[str]:
    """Trial lists' names in the letters the Hub takes in dataset.type, made distinct: equal ones become one entry."""
    ids: list[str] = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "trials"
        distinct = (stem if count == 1 else f"{stem}-{count}" for count in itertools.count(1))
        ids.append(next(candidate for candidate in distinct if candidate not in ids))
    return ids


def eer_plot(evaluation: Evaluation, file: Path) -> bool:
    """Draws EER over dimensions, a panel per trial list, with 95 % intervals; returns whether there was anything."""
    lists = evaluation.lists_of(VerificationRow)
    if not lists:
        return False
    across = min(2, len(lists))
    figure, panels = new_panels(len(lists), across, width=6.4 / across, height=2.9, below=0.7)
    styles = {
        system: {"color": f"C{i % 10}", "linestyle": _LINE_STYLES[i % len(_LINE_STYLES)], "marker": "o"}
        for i, system in enumerate(evaluation.systems)
    }
    for panel, (name, systems) in zip(panels, lists.items(), strict=True):
        _draw(panel, systems, styles)
        panel.set_title(plain(name, 76 // across), fontsize=9)
    shown = [system for system in styles if any(system in systems for systems in lists.values())]
    handles = [legend_line(**styles[system]) for system in shown]
    rows = (row for systems in lists.values() for rows in systems.values() for row in rows)
    if any(interval(row) for row in rows):
        handles.append(legend_patch(color="grey", alpha=0.25))
        shown.append("95 % interval")
    figure.legend(handles, [plain(label) for label in shown], loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, file, dpi=150)
    return True


def _draw(panel: "Axes", systems: dict[str, list[VerificationRow]], styles: dict[str, dict]) -> None:
    for system, rows in systems.items():
        rows = sorted(rows, key=column)
        panel.plot([row.dim for row in rows], [100 * row.eer for row in rows], markersize=4, **styles[system])
        bounds = [(row.dim, *interval(row)) for row in rows if interval(row)]
        if bounds:
            dims, low, high = zip(*bounds, strict=True)
            low, high = (tuple(100 * rate for rate in rates) for rates in (low, high))
            panel.fill_between(dims, low, high, color=styles[system]["color"], alpha=0.15, linewidth=0)
    widths = sorted({row.dim for rows in systems.values() for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(widths, [str(dim) for dim in widths], fontsize=8, rotation=45)
    panel.minorticks_off()
    panel.set(xlabel="dimensions", ylabel="EER %")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
