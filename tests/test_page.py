"""The page of an evaluation: pictures hold what was measured, tables say it, and other folders stay as they are."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from scipy.stats import norm

from mrl_redimnet.evaluation.groups import eer_threshold
from mrl_redimnet.evaluation.measures import ScoredList, measures
from mrl_redimnet.evaluation.page import (
    Table,
    det_picture,
    eer_picture,
    refuse_other_folder,
    results_table,
    score_picture,
    text_of,
    write_page,
)
from mrl_redimnet.scoring.calibration import Threshold
from mrl_redimnet.scoring.metrics import eer, error_curve
from mrl_redimnet.scoring.trials import make_trials

PRIORS = [0.01]


def scored(dims=(8, 64), separation: float = 2.0, saved: bool = False) -> ScoredList:
    """Normally distributed scores of the pairs of 40 utterances, apart by more at more dimensions."""
    paths = [f"s{i // 4}/{i % 4}.wav" for i in range(40)]
    trials = make_trials(paths, [path.split("/")[0] for path in paths])
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(len(trials))
    scores = {dim: noise + separation * trials.labels * np.log2(dim) / 4 for dim in dims}
    options = dict(wanted=0.1, weights="w", trials="dev")
    thresholds = {dim: Threshold.fit(scores[dim], trials.labels, dim=dim, **options) for dim in dims if saved}
    return ScoredList(trials, scores, thresholds)


def report_of(lists: dict[str, ScoredList], resamples: int = 5, **conditions) -> dict:
    return {
        "conditions": {"model": "nano", "adapter": None, "priors": PRIORS, **conditions},
        "lists": {
            name: {**each.counts(), "rows": [each.row(dim, PRIORS, resamples) for dim in each.scores]}
            for name, each in lists.items()
        },
    }


class Page(HTMLParser):
    """What a page shows: texts of cells and headings, sources of pictures, targets of links."""

    def __init__(self, text: str):
        super().__init__()
        self.cells, self.headings, self.sources, self.open, self.tags = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        self.open.pop(len(self.open) - 1 - self.open[::-1].index(tag))

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


@pytest.fixture
def lists():
    return {"vox": scored(saved=True), "far field": scored(separation=1.5)}


# ---------------------------------------------------------------- the folder


def test_a_page_is_complete(lists, tmp_path):
    report = report_of(lists, command="mrl-redimnet evaluate nano")
    write_page(tmp_path / "page", report, lists)
    assert json.loads((tmp_path / "page/evaluation.json").read_text()) == report
    page = Page((tmp_path / "page/index.html").read_text())
    pictures = {"det.png", "eer.png", "scores-1.png", "scores-2.png"}
    assert set(page.sources) == pictures | {"evaluation.json"}  # nothing from elsewhere
    assert {path.name for path in (tmp_path / "page").iterdir()} == pictures | {"index.html", "evaluation.json"}
    assert all(imread(tmp_path / "page" / name)[..., :3].std() > 0.01 for name in pictures)  # not blank
    assert "script" not in page.tags and "link" not in page.tags
    assert page.headings[0] == "Speaker verification: nano" and "mrl-redimnet evaluate nano" in page.cells
    (row, _) = report["lists"]["vox"]["rows"]
    for name, measure in measures(PRIORS).items():
        assert measure.title in page.cells and measure.cell(row, name) in page.cells
    assert f"{100 * row['saved']['misses']:.2f}" in page.cells and "dev" in page.cells


def test_names_are_text_not_markup(tmp_path):
    lists = {"<b>list</b> & $x^2$": scored()}
    write_page(tmp_path / "page", report_of(lists, 0, model="<i>nano</i>"), lists)
    page = Page((tmp_path / "page/index.html").read_text())
    assert page.headings[0].endswith("<i>nano</i>") and page.headings[1].startswith("<b>list</b> & $x^2$: 780 trials")
    assert "b" not in page.tags and "i" not in page.tags


def test_a_page_replaces_a_page_and_nothing_else(lists, tmp_path):
    write_page(tmp_path / "page", report_of(lists), lists)
    one = {"only": scored((8,))}
    write_page(tmp_path / "page", report_of(one), one)
    assert not (tmp_path / "page/scores-2.png").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/index.html").write_text("<html>")
    for other in (tmp_path / "thesis", tmp_path):
        with pytest.raises(FileExistsError, match="is there and no page of evaluate"):
            write_page(other, report_of(one), one)
    assert (tmp_path / "thesis/index.html").read_text() == "<html>"
    refuse_other_folder(tmp_path / "new")


def test_a_page_that_fails_leaves_the_old_one(lists, tmp_path):
    write_page(tmp_path / "page", report_of(lists), lists)
    before = (tmp_path / "page/index.html").read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_page(tmp_path / "page", report_of(lists, odd=float("nan")), lists)
    assert (tmp_path / "page/index.html").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


# ---------------------------------------------------------------- pictures


def test_det_curves_are_the_rates_on_probit_axes(lists):
    figure = det_picture(lists)
    assert len(figure.axes) == 2 and figure.axes[1].get_title() == "far field"
    for ax, each in zip(figure.axes, lists.values(), strict=True):
        *curves, _ = ax.lines  # the last is the diagonal
        assert [line.get_label() for line in curves] == ["8 dimensions", "64 dimensions"]
        for line, scores in zip(curves, each.scores.values(), strict=True):
            miss, false_alarm = error_curve(scores, each.trials.labels)
            assert np.allclose(norm.cdf(line.get_xdata()), false_alarm, atol=1e-8)
            assert np.allclose(norm.cdf(line.get_ydata()), miss, atol=1e-8)
        ticks = {label.get_text(): at for label, at in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True)}
        assert {"0.1", "1", "2", "5", "10", "20", "40"} <= set(ticks)
        assert ticks["10"] == pytest.approx(norm.ppf(0.1)) and ax.get_xlim() == ax.get_ylim()


@pytest.mark.parametrize("separation", [0.0, 0.5, 2.0, 6.0, 30.0])
def test_the_axes_show_where_the_rates_are_equal(separation):
    each = scored((16,), separation)
    (ax,) = det_picture({"a": each}).axes
    low, high = norm.cdf(ax.get_xlim())
    rate = eer(each.scores[16], each.trials.labels)
    assert rate < high and (low < rate or rate < 0.001)


def test_histograms_hold_every_score_and_the_thresholds(lists):
    each = lists["vox"]
    figure = score_picture(each)
    assert [ax.get_title() for ax in figure.axes] == ["8 dimensions", "64 dimensions"]
    for ax, (dim, scores) in zip(figure.axes, each.scores.items(), strict=True):
        assert [line.get_xdata()[0] for line in ax.lines] == [
            eer_threshold(scores, each.trials.labels),
            each.saved[dim].threshold,
        ]
        areas = [sum(bar.get_width() * bar.get_height() for bar in bars) for bars in ax.containers]
        assert areas == pytest.approx([1, 1])
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["impostors", "targets", "equal error rates", "saved for 10 % false accepts"]


def test_scores_that_are_all_alike_can_be_drawn():
    each = scored((8,))
    score_picture(ScoredList(each.trials, {8: np.zeros(len(each.trials))})).canvas.draw()


def test_eer_over_dimensions_has_its_intervals(lists):
    report = report_of(lists, 20)
    (ax,) = eer_picture(report).axes
    assert [container.get_children() != [] for container in ax.containers] == [True, True]
    line, rows = ax.lines[0], report["lists"]["vox"]["rows"]
    assert line.get_xdata().tolist() == [8, 64]
    assert line.get_ydata() == pytest.approx([100 * row["eer"] for row in rows])
    (bars,) = ax.containers[0][2]
    ends = [segment[:, 1] for segment in bars.get_segments()]
    assert np.allclose(ends, [[100 * row["eer_low"], 100 * row["eer_high"]] for row in rows])
    assert not eer_picture(report_of(lists, 0)).axes[0].containers


# ---------------------------------------------------------------- tables


def test_a_results_table_has_a_row_per_dimension(lists):
    record = report_of(lists)["lists"]["vox"]
    table = results_table(record, PRIORS, ["eer", "min_dcf_0.01"])
    assert table.columns == ["dimensions", "EER %", "minDCF 0.01"] and [row[0] for row in table.rows] == ["8", "64"]
    row = record["rows"][0]
    assert table.rows[0][1] == f"{100 * row['eer']:.2f} [{100 * row['eer_low']:.1f}, {100 * row['eer_high']:.1f}]"
    assert table.rows[0][2] == f"{row['min_dcf_0.01']:.3f} [{row['min_dcf_0.01_low']:.2f}, " + (
        f"{row['min_dcf_0.01_high']:.2f}]"
    )


CELLS = st.text(st.characters(whitelist_categories=["L", "N"]), min_size=1, max_size=9)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5))
def test_columns_line_up_whatever_they_hold(rows):
    lines = text_of(Table(rows[0], rows)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [tuple(line.split()) for line in lines] == [rows[0], *rows]
