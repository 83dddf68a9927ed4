"""The run's record outlives kills and resumed runs, and its picture is whole or not there."""

import gc
import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from mrl_redimnet.training import curves
from mrl_redimnet.training.curves import Record, draw


@pytest.fixture
def record(tmp_path) -> Record:
    made = Record(tmp_path)
    made.begin(0)
    return made


def steps(record: Record, kind: str | None = None) -> list[int]:
    return [line["step"] for line in record.lines(kind)]


# ---------------------------------------------------------------- record


def test_lines_come_back_as_they_were_added(record):
    values = {"loss": 9.5, "prefix_losses": {"64": 9.25, "256": 8.75}, "learning_rate": 1e-3}
    record.add(50, "train", values)
    record.add(200, "evaluation", {"set": "development", "eer": {"64": 0.0625}})
    assert record.lines() == [
        {"step": 50, "kind": "train", **values},
        {"step": 200, "kind": "evaluation", "set": "development", "eer": {"64": 0.0625}},
    ]
    assert steps(record, "train") == [50] and steps(record, "evaluation") == [200]


def test_a_line_is_on_disk_once_it_is_added(record):
    record.add(1, "train", {"loss": 1.0})
    assert record.file.read_text() == '{"step": 1, "kind": "train", "loss": 1.0}\n'


def test_numbers_of_other_libraries_are_taken_and_dimensions_become_text(record):
    values = {
        "loss": torch.tensor(0.5),
        "margin": np.float32(0.25),
        "eer": {64: np.float64(0.125)},
        "crops": np.int64(3),
    }
    record.add(1, "train", values)
    assert record.lines()[0] == {
        "step": 1,
        "kind": "train",
        "loss": 0.5,
        "margin": 0.25,
        "eer": {"64": 0.125},
        "crops": 3,
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_no_number_becomes_null_which_every_reader_of_json_knows(record, value):
    record.add(1, "train", {"loss": value, "prefix_losses": {"8": value}})
    line = json.loads(record.file.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert line["loss"] is None and line["prefix_losses"] == {"8": None}


def test_other_kinds_are_refused(record):
    with pytest.raises(ValueError, match="kind: got 'test', expected one of train, evaluation"):
        record.add(1, "test", {})


@pytest.mark.parametrize("name", ["step", "kind"])
def test_values_cannot_replace_what_a_line_says_of_itself(record, name):
    with pytest.raises(ValueError, match=f"values: {name} would replace"):
        record.add(1, "train", {name: 3})
    assert record.lines() == []


def test_nothing_recorded_is_no_lines(tmp_path):
    assert Record(tmp_path / "none").lines() == []


@pytest.mark.parametrize(
    ("resumed", "expected"), [(0, []), (10, [0, 10, 10]), (15, [0, 10, 10]), (20, [0, 10, 10, 20])]
)
def test_a_resumed_run_drops_the_lines_after_its_step(record, resumed, expected):
    for step, kind in ((0, "evaluation"), (10, "train"), (10, "evaluation"), (20, "train"), (30, "train")):
        record.add(step, kind, {"loss": 1.0})
    record.begin(resumed)
    assert steps(record) == expected
    record.add(40, "train", {})
    assert steps(record) == [*expected, 40]


def test_a_new_run_begins_in_a_folder_that_is_not_there(tmp_path):
    record = Record(tmp_path / "a" / "b")
    record.begin(0)
    record.add(1, "train", {})
    assert steps(record) == [1]


@given(cut=st.integers(1, 200), name=st.text(max_size=8))
def test_a_last_line_cut_short_anywhere_is_dropped_and_the_others_stay(tmp_path_factory, cut, name):
    record = Record(tmp_path_factory.mktemp("run"))
    record.begin(0)
    for step in (1, 2, 3):
        record.add(step, "evaluation", {"set": name, "eer": {"64": 0.5}})
    whole, lines = record.file.read_bytes(), record.lines()
    last = len(whole.splitlines(keepends=True)[-1])
    kept = last - 1 if cut % last == last - 1 else cut % last
    record.file.write_bytes(whole[: len(whole) - last + kept])
    expected = lines if kept == last - 1 else lines[:2]  # of a whole line only its end of line may be missing
    assert record.lines() == expected
    record.begin(3)
    record.add(4, "train", {})
    assert record.lines() == [*expected, {"step": 4, "kind": "train"}]


def test_a_damaged_line_before_the_last_is_named(record):
    record.add(1, "train", {})
    record.file.write_text("{half\n" + record.file.read_text())
    with pytest.raises(ValueError, match=r"history.jsonl, line 1: no JSON"):
        record.begin(1)


def test_an_error_while_lines_are_dropped_leaves_the_file(record, monkeypatch):
    def full_disk(source, target):
        raise OSError("No space left on device")

    record.add(1, "train", {})
    record.add(2, "train", {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="No space"):
            record.begin(1)
    assert steps(record) == [1, 2] and len(list(record.file.parent.iterdir())) == 1


# ---------------------------------------------------------------- picture

PARTS = {
    "losses": ("train", {"loss": 9.0, "prefix_losses": {"8": 9.5, "32": 8.5}}),
    "no prefixes": ("train", {"loss": 9.0, "prefix_losses": None}),
    "teacher's loss": ("train", {"teacher_loss": 0.4}),
    "validation loss": ("evaluation", {"set": "development", "validation_loss": 8.0}),
    "eer": ("evaluation", {"set": "development", "eer": {"8": 0.3, "32": 0.2}}),
    "eer of 0": ("evaluation", {"set": "training speakers", "eer": {"32": 0.0}}),
    "eer of all": ("evaluation", {"set": "costs $5 and $6", "eer": {"32": 1.0}}),
    "eer unknown": ("evaluation", {"set": "development", "eer": {"32": math.nan}}),
    "learning rate": ("train", {"learning_rate": 1e-3}),
    "margin": ("train", {"margin": 0.0}),
    "rates": ("train", {"crops_per_s": 80.0, "loader_crops_per_s": 300.0, "step_crops_per_s": 100.0}),
    "one rate": ("train", {"crops_per_s": 80.0}),
}


def size(folder) -> tuple[int, int]:
    """Height and width of the picture, which reads as a PNG and is not blank."""
    file = folder / "curves.png"
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(file)
    assert pixels.std() > 0.01
    return pixels.shape[:2]


def add(record: Record, *parts: str):
    for step in (10, 20, 30):
        for part in parts:
            record.add(step, *PARTS[part])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", PARTS)
def test_a_single_part_is_drawn(record, tmp_path, part):
    add(record, part)
    assert draw(tmp_path)
    height, width = size(tmp_path)
    assert 300 < height < 700 and 500 < width < 900


@pytest.mark.filterwarnings("error")
def test_all_parts_are_drawn_in_a_picture_that_fits_a_screen(record, tmp_path):
    add(record, *PARTS)
    assert draw(tmp_path)
    height, width = size(tmp_path)
    assert 700 < height < 1200 and 1000 < width < 1600


@pytest.mark.parametrize(("points", "marker"), [(1, "o"), (20, "o"), (21, "")])
def test_few_points_are_marked_for_a_lone_one_has_no_line(points, marker):
    ax = Figure().subplots()
    curves.add_line(ax, (np.arange(points), np.ones(points)))
    assert ax.lines[0].get_marker() == marker


def test_nothing_to_draw_is_no_error_and_no_picture(record, tmp_path):
    assert not draw(tmp_path)
    record.add(1, "train", {"other": 3.0})
    record.add(1, "evaluation", {"set": "development", "eer": {}})
    assert not draw(tmp_path) and not draw(tmp_path / "none")
    assert not (tmp_path / "curves.png").exists()


def test_an_error_while_drawing_leaves_the_earlier_picture(record, tmp_path, monkeypatch):
    def full_disk(figure, file, **options):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    add(record, "losses")
    draw(tmp_path)
    before = (tmp_path / "curves.png").read_bytes()
    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space"):
        draw(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "history.jsonl"]


def test_figures_do_not_pile_up(record, tmp_path):
    add(record, "learning rate")
    gc.collect()
    before = sum(type(thing) is Figure for thing in gc.get_objects())
    for _ in range(5):
        draw(tmp_path)
    gc.collect()
    assert sum(type(thing) is Figure for thing in gc.get_objects()) == before


# ---------------------------------------------------------------- curves


def test_a_curve_has_the_lines_that_hold_it_and_gaps_where_there_was_no_number():
    lines = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": None}, {"step": 4, "loss": 1.0}]
    at, values = curves.curve_of(lines, "loss")
    np.testing.assert_array_equal(at, [1, 3, 4])
    np.testing.assert_array_equal(values, [2.0, math.nan, 1.0])


def test_a_curve_of_a_dimension_skips_lines_without_it():
    lines = [
        {"step": 1, "eer": {"8": 0.5}},
        {"step": 2, "eer": {"64": 0.1}},
        {"step": 3},
        {"step": 4, "eer": {"8": 0.25}},
    ]
    at, values = curves.curve_of(lines, "eer", 8)
    assert at.tolist() == [1, 4] and values.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("points", [0, 1, 1000, 1001, 2500, 10_007])
def test_long_curves_are_means_of_groups(points):
    values = np.random.default_rng(0).normal(size=points)
    at, means = curves.curve_of([{"step": i, "loss": value} for i, value in enumerate(values)], "loss")
    group = max(1, math.ceil(points / 1000))
    expected = [values[i : i + group].mean() for i in range(0, points, group)]
    np.testing.assert_allclose(means, expected)
    np.testing.assert_allclose(at, [np.arange(points)[i : i + group].mean() for i in range(0, points, group)])
    assert len(means) <= 1000


def test_what_is_judged_by_is_solid_and_training_speakers_are_dashed(record):
    for name in ("training speakers", "development, noisy", "development, as it is"):
        record.add(10, "evaluation", {"set": name, "eer": {"8": 0.1}})
    styles = curves.Lines(record).styles
    assert styles == {"development, noisy": "-", "development, as it is": "--", "training speakers": ":"}
    record.begin(0)
    for name in ("training speakers", "development"):
        record.add(10, "evaluation", {"set": name, "eer": {"8": 0.1}})
    assert curves.Lines(record).styles == {"development": "-", "training speakers": "--"}
