"""An evaluation as a folder to look at: index.html with its tables, pictures beside it, and the numbers as JSON.

The page refers to nothing outside its folder and runs no scripts. Its pictures: DET curves (Martin et al., "The DET
curve in assessment of detection task performance", Eurospeech 1997: miss over false-alarm rate on axes scaled by the
normal quantile, so that normally distributed scores give straight lines), histograms of scores, EER over dimensions.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment

from mrl_redimnet.evaluation.groups import eer_threshold
from mrl_redimnet.evaluation.measures import ScoredList, measures
from mrl_redimnet.extras import extra
from mrl_redimnet.files import replace_folder
from mrl_redimnet.plotting import new_figure, new_panels, plain, save_figure, shades
from mrl_redimnet.rows import group_cells, group_notes, row_from
from mrl_redimnet.scoring.calibration import THRESHOLDS_FILE, Threshold
from mrl_redimnet.scoring.metrics import error_curve
from mrl_redimnet.tables import text_table

with extra("evaluation"):
    from markupsafe import Markup
    from scipy.stats import norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE, REPORT = "index.html", "evaluation.json"
_MARK = '<meta name="generator" content="mrl-redimnet evaluate">'
_RATE_TICKS = (0.0001, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.98)
_BINS = 50
_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{{ mark }}
<meta name="viewport" content="width=device-width">
<title>Speaker verification: {{ model }}</title>
<style>
:root { color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.4 }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100%; background: white }
div { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin-bottom: 1.5rem }
caption { text-align: left; font-weight: bold; padding: .3rem 0 }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid #8886; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere }
</style>
</head>
<body>
<h1>Speaker verification: {{ model }}</h1>
<table class="facts">
{% for name, value in facts.items() %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% for name, tables in lists.items() %}
<h2>{{ name }}</h2>
{% for table in tables %}
<div><table>
{% if table.caption %}
<caption>{{ table.caption }}</caption>
{% endif %}
<tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% for note in table.notes %}
<p>{{ note }}</p>
{% endfor %}
{% endfor %}
{% endfor %}
{% for title, file in pictures.items() %}
<h2>{{ title }}</h2>
<img src="{{ file }}" alt="{{ title }}">
{% endfor %}
<p>Brackets: 95 % intervals over speakers. All numbers: <a href="{{ report }}">{{ report }}</a>.</p>
</body>
</html>
"""


def refuse_other_folder(folder: Path) -> None:
    """Raises FileExistsError where `folder` is there and is no page, which `write_page` would replace."""
    page = folder / PAGE
    ours = page.is_file() and _MARK in page.read_text(encoding="utf-8", errors="replace")
    if folder.exists() and not ours:
        raise FileExistsError(f"{folder} is there and no page of evaluate: give a new folder, or that of a page.")


def write_page(folder: Path, report: dict, lists: dict[str, ScoredList]) -> None:
    """Writes `folder` whole, or replaces the page in it.

    report: as `mrl_redimnet.evaluation.measures` describes, of `lists`.

    Raises FileExistsError for a folder of something else.
    """
    refuse_other_folder(folder)

    def write(target: Path) -> None:
        pictures = {
            "Error trade-off at every dimension": ("det.png", det_picture(lists)),
            "EER over dimensions": ("eer.png", eer_picture(report)),
            **{
                f"Scores: {name}": (f"scores-{number}.png", score_picture(scored))
                for number, (name, scored) in enumerate(lists.items(), start=1)
            },
        }
        for file, figure in pictures.values():
            save_figure(figure, target / file)
        (target / REPORT).write_text(as_json(report), encoding="utf-8")
        (target / PAGE).write_text(_page(report, {title: file for title, (file, _) in pictures.items()}), "utf-8")

    replace_folder(folder, write)


def as_json(report: dict) -> str:
    """The report as the text of a file."""
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# ---------------------------------------------------------------- pictures


def det_picture(lists: dict[str, ScoredList]) -> "Figure":
    """A panel per list, a curve per dimension, from bright (the shortest) to dark."""
    figure, panels = new_panels(len(lists), across=2, width=5.4, height=5.2)
    for ax, (name, scored) in zip(panels, lists.items(), strict=True):
        curves = {dim: error_curve(scores, scored.trials.labels) for dim, scores in scored.scores.items()}
        for (dim, (miss, false_alarm)), color in zip(curves.items(), shades(len(curves), 0.85, 0.0), strict=True):
            ax.plot(_probit(false_alarm), _probit(miss), color=color, lw=1.5, label=f"{dim} dimensions")
        _rate_axes(ax, [float(np.max(np.minimum(*curve))) for curve in curves.values()])
        ax.set_title(plain(name, 50), fontsize=10)
        ax.legend(fontsize=8, loc="upper right")
    return figure


def _probit(rates: np.ndarray) -> np.ndarray:
    """Normal quantiles of rates, 0 and 1 far outside any axis."""
    return norm.ppf(np.clip(rates, 1e-9, 1 - 1e-9))


def _rate_axes(ax: "Axes", crossings: Sequence[float]) -> None:
    """Equal axes in per cent, that show the rates at which the curves cross the diagonal."""
    low = max(tick for tick in _RATE_TICKS[:2] if tick <= max(0.3 * min(crossings), _RATE_TICKS[0]))
    high = min(tick for tick in _RATE_TICKS if tick > max(0.35, 1.2 * max(crossings)) or tick == _RATE_TICKS[-1])
    ticks = [tick for tick in _RATE_TICKS if low <= tick <= high]
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(_probit(np.array(ticks)), [f"{100 * tick:g}" for tick in ticks], fontsize=8)
    limits = _probit(np.array([low, high * 1.2 if high < 0.8 else 0.99]))
    ax.set(xlim=limits, ylim=limits, xlabel="false alarms %", ylabel="misses %", aspect="equal")
    ax.plot(limits, limits, color="grey", lw=0.8, ls=":")
    ax.grid(alpha=0.3)


def score_picture(scored: ScoredList) -> "Figure":
    """A panel per dimension: targets and impostors, the threshold of equal error rates and those that are saved."""
    figure, panels = new_panels(len(scored.scores), across=3, width=3.6, height=2.7, below=0.4)
    targets = scored.trials.labels == 1
    for ax, (dim, scores) in zip(panels, scored.scores.items(), strict=True):
        bins = np.linspace(*_span(scores), _BINS + 1).tolist()
        for kind, name, color in ((~targets, "impostors", "C0"), (targets, "targets", "C1")):
            ax.hist(scores[kind], bins, density=True, color=color, alpha=0.6, label=name)
        ax.axvline(eer_threshold(scores, scored.trials.labels), color="black", lw=1, ls=":", label="equal error rates")
        saved = scored.saved.get(dim)
        if saved is not None and not saved.calibration.uses_seconds:  # else it is of no score alone
            label = f"saved for {100 * saved.wanted:g} % false accepts"
            ax.axvline(saved.threshold, color="C2", lw=1.2, label=label)
        ax.set_title(f"{dim} dimensions", fontsize=9)
        ax.set_yticks([])
        ax.tick_params(labelsize=8)
        ax.set_xlabel("score", fontsize=8)
    handles = {label: handle for ax in panels for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _span(scores: np.ndarray) -> tuple[float, float]:
    low, high = float(scores.min()), float(scores.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def eer_picture(report: dict) -> "Figure":
    """A line per list, with its intervals where there are any."""
    figure = new_figure(6.4, 4.0)
    ax = figure.subplots()
    for number, (name, record) in enumerate(report["lists"].items()):
        rows = sorted(record["rows"], key=lambda row: row["dim"])
        dims, eers = [row["dim"] for row in rows], 100 * np.array([row["eer"] for row in rows])
        color, marker = f"C{number % 10}", "osD^v<>"[number % 7]
        ax.plot(dims, eers, color=color, marker=marker, markersize=4, label=plain(name, 60))
        if all("eer_low" in row for row in rows):
            ends = 100 * np.array([[row["eer_low"], row["eer_high"]] for row in rows]).T
            ax.errorbar(dims, eers, abs(ends - eers), color=color, lw=0, elinewidth=1, capsize=3, alpha=0.6)
    dims = sorted({row["dim"] for record in report["lists"].values() for row in record["rows"]})
    ax.set_xscale("log", base=2)
    ax.set_xticks(dims, [str(dim) for dim in dims])
    ax.minorticks_off()
    ax.set(xlabel="dimensions", ylabel="EER %")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """Cells as text, a column name over each; a caption above, sentences below."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    notes: Sequence[str] = ()


def results_table(record: dict, priors: Sequence[float], names: Sequence[str] | None = None) -> Table:
    """A list's measures, a row per dimension, with intervals where there are any. names: which of them [all]."""
    known = {
        name: measure
        for name, measure in measures(priors).items()
        if name in record["rows"][0] and (names is None or name in names)
    }
    rows = [[str(row["dim"]), *(m.cell(row, name) for name, m in known.items())] for row in record["rows"]]
    return Table(["dimensions", *(measure.title for measure in known.values())], rows)


def threshold_cell(threshold: float, of_llrs: bool) -> str:
    """A threshold of scores, or of log-likelihood ratios."""
    return f"{threshold:.4f}" + (" (LLR)" if of_llrs else "")


def decisions_table(record: dict) -> Table:
    """What the saved thresholds do on the list, a row per dimension that has one."""
    rows = [
        [
            str(row["dim"]),
            threshold_cell(row["saved"]["threshold"], row["saved"].get("of_llrs", False)),
            row["saved"]["set_on"],
            str(row["saved"].get("enrolments", 1)),
            *(f"{100 * row['saved'][rate]:.2f}" for rate in ("wanted_false_accepts", "false_accepts", "misses")),
        ]
        for row in record["rows"]
        if row["saved"] is not None
    ]
    columns = ["dimensions", "threshold", "set on", "enrolled utterances", "for false accepts %"]
    columns += ["false accepts here %", "misses here %"]
    return Table(columns, rows, f"Thresholds of {THRESHOLDS_FILE}")


def groups_table(record: dict) -> Table:
    """Error rates of groups of speakers, a row per dimension and group; empty where no groups were asked for."""
    groups = [row_from(row) for row in record.get("groups", [])]
    if not groups:
        return Table([], [])
    heading, *rows = group_cells(groups)
    return Table(heading, rows, "Groups of speakers", group_notes(groups))


def thresholds_table(entries: Sequence[Threshold]) -> Table:
    """What was set by a calibration, a line per threshold."""
    rows = [
        [
            str(entry.dim),
            str(entry.enrolments),
            threshold_cell(entry.threshold, entry.calibration.uses_seconds),
            *(f"{100 * rate:.2f}" for rate in (entry.wanted, entry.false_accepts, entry.misses)),
            f"{entry.impostors:,}",
            f"{entry.targets:,}",
        ]
        for entry in entries
    ]
    columns = [
        *("dimensions", "enrolled utterances", "threshold", "false accepts wanted %", "measured %", "misses %"),
        *("impostors", "targets"),
    ]
    return Table(columns, rows)


def text_of(table: Table) -> str:
    """A table for the screen, columns aligned to the right."""
    text = text_table([table.columns, *table.rows], left=())
    return "\n".join([*([table.caption] if table.caption else []), text, *table.notes])


def counts_text(record: dict) -> str:
    """How large a list is, in words."""
    return f"{record['trials']:,} trials ({record['targets']:,} of targets), {record['utterances']:,} utterances, " + (
        "speakers unknown" if record["speakers"] is None else f"{record['speakers']:,} speakers"
    )


def _page(report: dict, pictures: dict[str, str]) -> str:
    """The whole of index.html; pictures: {title: file}."""
    conditions = report["conditions"]
    lists = {}
    for name, record in report["lists"].items():
        tables = [results_table(record, conditions["priors"]), decisions_table(record), groups_table(record)]
        lists[f"{name}: {counts_text(record)}"] = [table for table in tables if table.rows]
    facts = {name.replace("_", " "): value for name, value in conditions.items() if value not in (None, [])}
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_TEMPLATE)
        .render(
            mark=Markup(_MARK), facts=facts, lists=lists, pictures=pictures, model=conditions["model"], report=REPORT
        )
    )
