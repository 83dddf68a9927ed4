"""Robustness: each perturbation does what it says, the measure against plain loops, one audio for all systems."""

import hashlib
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from sounds import power, write

from mrl_redimnet.audio.codecs import CODECS
from mrl_redimnet.audio.domains import simulate
from mrl_redimnet.audio.io import SAMPLING_RATE
from mrl_redimnet.audio.rooms import reverberation_time
from mrl_redimnet.data.synthetic import synthesise
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation import robustness as module
from mrl_redimnet.evaluation.robustness import (
    ALL,
    PERTURBATIONS,
    SIDES,
    SMOOTHING,
    Condition,
    compare,
    format_numbers,
    heat_map,
    load_reports,
    make_grid,
    robustness,
    save_reports,
)
from mrl_redimnet.saving import save_model
from mrl_redimnet.scoring.metrics import eer
from mrl_redimnet.scoring.trials import Trials, UnknownSpeakersError, make_trials, write_trials
from mrl_redimnet_cli import main

CLEAN = Condition("clean", "clean", 0, "", lambda audio, rng: audio)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Five synthetic speakers of three short utterances, of different lengths."""
    folder = tmp_path_factory.mktemp("speech")
    for speaker, utterance in itertools.product(range(5), range(3)):
        seconds = 0.7 + 0.2 * utterance
        wave = synthesise(0, speaker, 0, utterance, (seconds, seconds))
        write(folder / f"s{speaker}" / "x" / f"{utterance}.wav", wave)
    return folder


@pytest.fixture(scope="module")
def noises(tmp_path_factory) -> Path:
    """Two types of noise, and a folder without any."""
    folder = tmp_path_factory.mktemp("noises")
    for i, kind in enumerate(("hum", "wind")):
        write(folder / kind / "a" / "0.wav", 0.1 * np.random.default_rng(i).standard_normal(30000))
    (folder / "papers").mkdir()
    return folder


@pytest.fixture(scope="module")
def trials(corpus) -> Trials:
    paths = sorted(path.relative_to(corpus).as_posix() for path in corpus.rglob("*.wav"))
    return make_trials(paths, [path.split("/")[0] for path in paths])


@pytest.fixture(scope="module")
def grid(noises) -> list[Condition]:
    """Kinds with one, two and three conditions."""
    whole = make_grid(noises, names=["noise", "white_noise", "clipping", "speed"])
    chosen = {"noise 0 dB", "white_noise 10 dB", "clipping 0.1 of peak", "speed 0.9 times", "speed 1.1 times"}
    return [condition for condition in whole if condition.label in {*chosen, "noise 5 dB"}]


@pytest.fixture(scope="module")
def report(corpus, trials, grid):
    return robustness(tiny_model(), trials, corpus, grid, [8, 32], resamples=20, system="tiny")


def speech(seconds: float = 1.0) -> np.ndarray:
    return synthesise(0, 1, 0, 0, (seconds, seconds)).astype(np.float32)


def at(name: str, level, noise=None):
    """The callable of a level, always with the same draws."""
    perturb = PERTURBATIONS[name].build(level, noise)
    return lambda audio, seed=0: perturb(audio, np.random.default_rng(seed))


# ---------------------------------------------------------------- perturbations


def test_every_perturbation_returns_audio_and_leaves_its_input_alone(noises):
    audio = speech()
    before = audio.copy()
    for condition in make_grid(noises):
        wave = condition.perturb(audio, np.random.default_rng(0))
        assert wave.dtype == np.float32 and wave.ndim == 1 and np.isfinite(wave).all(), condition.label
        if condition.kind not in ("speed", "duration"):
            assert len(wave) == len(audio), condition.label
        if condition.label not in ("duration 5 s", "duration 3 s", "duration 2 s", "duration 1 s"):
            assert len(wave) != len(audio) or not np.allclose(wave, audio, atol=1e-4), condition.label
    np.testing.assert_array_equal(audio, before)


@pytest.mark.parametrize("name", ["noise", "white_noise"])
def test_noise_has_the_snr_and_is_the_same_at_every_level(noises, name):
    audio, added = speech(), {}
    for snr in PERTURBATIONS[name].levels:
        added[snr] = at(name, snr, noises)(audio) - audio
        assert 10 * math.log10(power(audio) / power(added[snr])) == pytest.approx(snr, abs=0.02)
    first, *others = (noise / np.linalg.norm(noise) for noise in added.values())
    for other in others:
        np.testing.assert_allclose(first, other, atol=1e-4)


@given(
    samples=st.integers(1, 100_000), level=st.sampled_from(PERTURBATIONS["duration"].levels), seed=st.integers(0, 99)
)
def test_duration_is_exact_and_a_stretch_of_the_utterance(samples, level, seed):
    audio = np.arange(samples, dtype=np.float32)
    cut = at("duration", level)(audio, seed)
    assert len(cut) == min(samples, round(level * SAMPLING_RATE))
    np.testing.assert_array_equal(cut, audio[int(cut[0]) : int(cut[0]) + len(cut)])


def test_durations_come_from_all_over_the_utterance():
    starts = {int(at("duration", 0.5)(np.arange(8003, dtype=np.float32), seed)[0]) for seed in range(100)}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("speed", PERTURBATIONS["speed"].levels)
def test_speed_changes_length_and_pitch(speed):
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / SAMPLING_RATE).astype(np.float32)
    wave = at("speed", speed)(tone)
    assert len(wave) == pytest.approx(16000 / speed, abs=1)
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    assert np.argmax(spectrum) * SAMPLING_RATE / len(wave) == pytest.approx(1000 * speed, abs=2)


@pytest.mark.parametrize("cutoff", PERTURBATIONS["bandwidth"].levels)
def test_bandwidth_leaves_what_is_below(cutoff):
    audio = np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    kept = np.abs(np.fft.rfft(at("bandwidth", cutoff)(audio))) ** 2 / np.abs(np.fft.rfft(audio)) ** 2
    hertz = np.fft.rfftfreq(32000, 1 / SAMPLING_RATE)
    assert np.median(kept[hertz < 0.8 * cutoff]) == pytest.approx(1, abs=0.05)
    assert np.median(kept[hertz > 1.3 * cutoff]) < 1e-4


@pytest.mark.parametrize("level", PERTURBATIONS["clipping"].levels)
def test_clipping_cuts_at_a_share_of_the_peak(level):
    audio = speech()
    clipped = at("clipping", level)(audio)
    most = level * np.abs(audio).max()
    np.testing.assert_array_equal(clipped, np.clip(audio, -np.float32(most), np.float32(most)))


def test_reverberation_has_the_time_of_its_level():
    """A click's echo is the room's response."""
    click = np.zeros(24000, dtype=np.float32)
    click[0] = 1
    for rt60 in PERTURBATIONS["reverberation"].levels:
        assert reverberation_time(at("reverberation", rt60)(click)[:16000]) == pytest.approx(rt60, rel=0.15)


def test_codecs_are_those_of_the_package():
    assert set(PERTURBATIONS["codec"].levels) <= set(CODECS)
    narrow = at("codec", "mulaw")(speech())
    spectrum = np.abs(np.fft.rfft(narrow)) ** 2
    assert spectrum[len(spectrum) * 9 // 16 :].sum() < 1e-3 * spectrum.sum()  # nothing above 4.5 of 8 kHz


# ---------------------------------------------------------------- the grid


def test_grid_covers_every_level(noises):
    grid = make_grid(noises)
    assert [c.label for c in grid] == [
        f"{name} {level} {entry.unit}".strip() for name, entry in PERTURBATIONS.items() for level in entry.levels
    ]
    assert 25 <= len(grid) <= 30
    assert not any(c.name == "noise" for c in make_grid())
    assert [c.level for c in make_grid(noises, quick=True)] == [e.levels[-1] for e in PERTURBATIONS.values()]


def test_noise_types_are_perturbations_of_one_kind(noises):
    grid = make_grid(noises, [], ["noise"])
    assert {(c.kind, c.name) for c in grid} == {("noise", "noise/hum"), ("noise", "noise/wind")}
    (wind,) = make_grid(noises, ["wind"], ["noise"], quick=True)
    added = wind.perturb(speech(), np.random.default_rng(0)) - speech()
    (hum,) = make_grid(noises, ["hum"], ["noise"], quick=True)
    folders = {"wind": wind, "hum": hum}
    for name, condition in folders.items():
        assert [Path(file).parts[-3] for file in condition.perturb.files] == [name]
    assert np.std(added) > 0 and not np.allclose(added, hum.perturb(speech(), np.random.default_rng(0)) - speech())


@pytest.mark.parametrize(
    "arguments, error",
    [
        (dict(names=["nosie"]), "unknown nosie; known: noise, white_noise"),
        (dict(names=[]), "expected one at least"),
        (dict(names=["speed", "speed"]), "none twice"),
        (dict(names=["noise"]), "noise: .* needs a folder"),
        (dict(noise_types=["rain"]), "no folder of noise"),
        (dict(noise="NOISES", noise_types=["rain"]), "no sub-folder rain with audio; it has hum, wind"),
        (dict(noise="NOISES", noise_types=["papers"]), "no sub-folder papers"),
        (dict(noise="NOISES/hum/a", noise_types=[]), "no sub-folder any with audio; it has 0"),
        (dict(noise="NOISES/papers"), "no audio"),
        (dict(noise="NOISES/none", noise_types=[]), "is not a folder of noise"),
    ],
)
def test_wrong_grids_are_refused(noises, arguments, error):
    if "noise" in arguments:
        arguments = {**arguments, "noise": arguments["noise"].replace("NOISES", str(noises))}
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        make_grid(**arguments)


# ---------------------------------------------------------------- the measure


def test_clean_audio_changes_nothing_at_all(corpus, trials):
    report = robustness(tiny_model(), trials, corpus, [CLEAN], resamples=10)
    assert report.dims == [8, 16, 32]
    for row in (*report.points, *report.numbers):
        assert (row.change, row.change_low, row.change_high) == (0, 0, 0)
        assert row.eer == next(clean.eer for clean in report.clean if clean.dim == row.dim)


def loop_eer(trials: Trials, enrol: dict, test: dict, dim: int) -> float:
    """EER from embeddings by path, trial by trial."""
    scores = []
    for name, path in zip(trials.enrol, trials.test, strict=True):
        units = [enrol[p][:dim] / np.linalg.norm(enrol[p][:dim]) for p in (trials.models or {name: [name]})[name]]
        a, b = np.mean(units, axis=0), test[path][:dim]
        scores.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return eer(scores, trials.labels)


def by_hand(model, trials: Trials, folder: Path, condition: Condition) -> dict[str, np.ndarray]:
    """Embeddings of the perturbed utterances, by path."""

    def prepare(file, audio):
        key = f"{condition.name}/{file.relative_to(folder)}"
        return simulate(condition.perturb, audio, key, 0)

    files = [folder / path for path in trials.utterances]
    return dict(
        zip(trials.utterances, SpeakerEncoder(model).embed(files, prepare=prepare).astype(np.float64), strict=True)
    )


def with_models(trials: Trials) -> Trials:
    """Every speaker's first two utterances are the enrolment, the third is tested."""
    speakers = sorted({path.split("/")[0] for path in trials.utterances})
    models = {f"model of {name}": [f"{name}/x/{i}.wav" for i in range(2)] for name in speakers}
    pairs = list(itertools.product(speakers, speakers))
    labels = np.array([one == other for one, other in pairs], dtype=np.int8)
    return Trials(labels, [f"model of {one}" for one, _ in pairs], [f"{other}/x/2.wav" for _, other in pairs], models)


@pytest.mark.parametrize("several", [False, True])
def test_test_side_and_both_sides(corpus, trials, grid, several):
    """On side test the enrolment is clean, on side both it is perturbed, whether of one utterance or of several."""
    trials = with_models(trials) if several else trials
    model = tiny_model()
    report = robustness(model, trials, corpus, grid, [8, 32], resamples=0)
    clean = by_hand(model, trials, corpus, CLEAN)
    apart = 0
    for condition in grid:
        perturbed = by_hand(model, trials, corpus, condition)
        for dim in (8, 32):
            before = loop_eer(trials, clean, clean, dim)
            for side, enrol in (("test", clean), ("both", perturbed)):
                (row,) = (r for r in report.points if (r.condition, r.side, r.dim) == (condition.label, side, dim))
                assert row.eer == pytest.approx(loop_eer(trials, enrol, perturbed, dim), abs=1e-9)
                assert row.change == pytest.approx((row.eer + SMOOTHING) / (before + SMOOTHING) - 1)
                assert (row.eer_low, row.change_high) == (None, None)
            apart += loop_eer(trials, clean, perturbed, dim) != loop_eer(trials, perturbed, perturbed, dim)
    assert apart > len(grid)


def test_numbers_are_means_over_levels_then_over_kinds(report):
    for side, dim in itertools.product(SIDES, report.dims):
        rows = [row for row in report.points if (row.side, row.dim) == (side, dim)]
        kinds = {kind: [r for r in rows if r.kind == kind] for kind in ("noise", "speed", "clipping")}
        assert [len(of_kind) for of_kind in kinds.values()] == [3, 2, 1]
        growths = []
        for kind, of_kind in kinds.items():
            growths.append(math.prod(1 + row.change for row in of_kind) ** (1 / len(of_kind)))
            assert report.number(side, dim, kind).change == pytest.approx(growths[-1] - 1)
        number = report.number(side, dim)
        assert number.change == pytest.approx(math.prod(growths) ** (1 / 3) - 1)
        assert number.eer == pytest.approx(np.mean([np.mean([r.eer for r in of_kind]) for of_kind in kinds.values()]))
        assert number.change_low <= number.change_high and number.change_low < number.change + 1e-12


def test_intervals_are_of_paired_resamples(report, corpus, trials, grid):
    """A condition that changes nothing has an interval without width, though the EER's own is wide."""
    both = robustness(tiny_model(), trials, corpus, [CLEAN, *grid], [8, 32], resamples=20, system="tiny")
    rows = [row for row in both.points if row.condition == "clean 0"]
    assert all(row.change_low == row.change_high == 0 for row in rows)
    assert any(row.eer_high - row.eer_low > 0.05 for row in rows)
    assert both.points[len(rows) :] == report.points  # and the others are as without it


def test_order_changes_nothing(report, corpus, trials, grid):
    order = np.random.default_rng(0).permutation(len(trials)).tolist()
    shuffled = Trials(trials.labels[order], [trials.enrol[i] for i in order], [trials.test[i] for i in order])
    other = robustness(tiny_model(), shuffled, corpus, grid[::-1], [8, 32], resamples=20, system="tiny")
    assert set(other.points) == set(report.points)
    assert [row.eer for row in other.clean] == [row.eer for row in report.clean]


def test_seed_changes_the_audio(report, corpus, trials, grid):
    other = robustness(tiny_model(), trials, corpus, grid, [8, 32], resamples=0, seed=1)
    assert [row.eer for row in other.points] != [row.eer for row in report.points]


def test_draws_depend_on_seed_perturbation_and_path_alone(corpus, trials):
    """Not on the level, the order, or anything of the process: the generator's seed is a digest of these."""
    seen = {}

    def perturb(audio, rng):
        seen.setdefault(len(audio), []).append(rng.random())
        return audio

    grid = [Condition("noise", name, level, "", perturb) for name, level in (("hiss", 1), ("hiss", 2), ("hum", 1))]
    robustness(tiny_model(), Trials(np.array([1, 0]), ["s1/x/1.wav"] * 2, ["s1/x/2.wav", "s2/x/0.wav"]), corpus, grid,
               resamples=0, seed=7)  # fmt: skip
    for utterance, samples in (("s1/x/1.wav", 14400), ("s2/x/0.wav", 11200)):
        wanted = []
        for name in ("hiss", "hiss", "hum"):
            key = hashlib.sha256(f"{name}/{utterance}".encode()).digest()[:8]
            wanted.append(np.random.default_rng([7, int.from_bytes(key, "little")]).random())
        assert seen[samples] == wanted


# ---------------------------------------------------------------- several systems


def test_systems_hear_the_same_audio_made_once(corpus, trials, noises):
    made = []

    def perturb(audio, rng):
        made.append(len(audio))
        return audio + rng.standard_normal(len(audio)).astype(np.float32)

    odd = Condition("noise", "hiss", 1, "", perturb)
    models = {"a": tiny_model(), "b": tiny_model(seed=1), "a again": tiny_model()}
    (a, b, again), differences = compare(models, trials, corpus, [odd], [8], resamples=15)
    assert len(made) == len(trials.utterances)
    assert replace(again, system="a") == a and a.points != b.points
    alone = robustness(tiny_model(), trials, corpus, [odd], [8], resamples=15, system="a")
    assert alone == a
    assert {row.system for row in differences} == {"b", "a again"}
    for row in differences:
        if row.system == "a again":
            assert (row.change, row.change_low, row.change_high, row.eer, row.eer_high) == (0, 0, 0, 0, 0)
        else:
            one, other = (each.number(row.side, row.dim, row.kind) for each in (a, b))
            assert row.change == pytest.approx((1 + other.change) / (1 + one.change) - 1)
            assert row.eer == pytest.approx(other.eer - one.eer)


def test_many_files_come_in_parts(corpus, trials, grid, report, monkeypatch):
    monkeypatch.setattr(module, "_FILES_AT_ONCE", 4)
    (one, _), _ = compare({"tiny": tiny_model(), "b": tiny_model()}, trials, corpus, grid, [8, 32], resamples=20)
    for row, whole in zip(one.points, report.points, strict=True):
        assert row.eer == pytest.approx(whole.eer, abs=1e-6)


def test_dims_are_those_of_all_models(corpus, trials):
    narrow = tiny_model(tiny_config(embedding_size=16, matryoshka_dims=[4, 8, 16]))
    (one, _), _ = compare({"a": tiny_model(), "b": narrow}, trials, corpus, [CLEAN], resamples=0)
    assert one.dims == [8, 16]


@pytest.mark.parametrize(
    "change, error",
    [
        (dict(models={}), "models: got none"),
        (dict(dims=[8, 64]), r"dims: got \[8, 64\], expected some, none twice, from 1 to the embeddings' 32"),
        (dict(dims=[]), "dims: got"),
        (dict(dims=[8, 8]), "none twice"),
        (dict(grid=[]), "grid: expected a condition"),
        (dict(grid=[CLEAN, CLEAN]), "none twice"),
        (dict(resamples=-1), "resamples: got -1"),
        (dict(folder=Path("nowhere")), "nowhere"),
    ],
)
def test_wrong_settings_are_refused(corpus, trials, change, error):
    settings = dict(models={"a": tiny_model()}, trials=trials, folder=corpus, grid=[CLEAN], resamples=0)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        compare(**{**settings, **change})


def test_speakers_are_needed_for_intervals_alone(corpus, trials):
    odd = replace(trials, speaker_names={})
    with pytest.raises(UnknownSpeakersError, match="resamples 0"):
        robustness(tiny_model(), odd, corpus, [CLEAN], resamples=5)
    assert robustness(tiny_model(), odd, corpus, [CLEAN], resamples=0).points[0].change == 0


# ---------------------------------------------------------------- what is written


def test_json_round_trip(tmp_path, report):
    save_reports([report, replace(report, system="ü")], tmp_path / "r.json")
    assert load_reports(tmp_path / "r.json") == ([report, replace(report, system="ü")], [])
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"systems": [{}], "differences": []}', '{"systems": 3}'])
def test_other_files_are_no_reports(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match="r.json holds no robustness reports"):
        load_reports(tmp_path / "r.json")


def test_table_has_the_numbers(report):
    heading, rule, *lines = format_numbers(report).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert len({len(line) for line in (heading, rule, *lines)}) == 1
    assert list(cells) == [
        "clean EER %",
        "noise",
        "clipping",
        "speed",
        "all",
        "all, 95 % interval",
        "mean perturbed EER %",
    ]
    columns = list(itertools.product(SIDES, report.dims))
    for kind in ("noise", "speed", ALL):
        told = [report.number(side, dim, kind).change for side, dim in columns]
        assert cells[kind] == [f"{round(100 * change):+d}" if round(100 * change) else "0" for change in told]
    assert cells["clean EER %"] == 2 * [f"{100 * row.eer:.2f}" for row in report.clean]
    assert "interval" not in format_numbers(replace(report, resamples=0))
    with pytest.raises(ValueError, match="no number of 'hail', side 'test', 8 dimensions; there are kinds noise"):
        report.number("test", 8, "hail")


def test_heat_map(tmp_path, report):
    heat_map([report], tmp_path / "one.png")
    heat_map([report, replace(report, system="with a $ and a long name")], tmp_path / "two.png", dim=8)
    for name in ("one.png", "two.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2
    fewer = replace(report, points=[row for row in report.points if row.kind != "speed"])
    for reports, dim, error in (
        ([], None, "got none"),
        ([report], 16, "16.* not all measured of tiny"),
        ([report, fewer], None, "grids differ"),
    ):
        with pytest.raises(ValueError, match=error):
            heat_map(reports, tmp_path / "none.png", dim)


def test_heat_map_shows_the_rows_at_their_place(tmp_path, report, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        module, "draw_cells", lambda *drawn: seen.update(factors=drawn[0], texts=drawn[1], labels=drawn[2])
    )
    heat_map([report], tmp_path / "x.png")
    columns = list(itertools.product(SIDES, report.dims))
    for row in report.points:
        down, across = seen["labels"].index(row.condition), columns.index((row.side, row.dim))
        assert seen["factors"][down, across] == pytest.approx(math.log2(1 + row.change))
        assert seen["texts"][down][across].endswith(f"({100 * row.eer:.1f})")
    assert seen["factors"][-1, 0] == pytest.approx(math.log2(1 + report.number("test", 8).change))


def run(*arguments):
    return main(["robustness", *map(str, arguments)])


def test_command(tmp_path, corpus, trials, noises, capsys):
    save_model(tiny_model(), tmp_path / "model")
    write_trials(trials, tmp_path / "trials.txt")
    given = ["--trials", tmp_path / "trials.txt", "--folder", corpus, "--dims", "8", "--resamples", "5"]
    given += ["--noise", noises, "--noise-types", "hum", "--perturbations", "noise", "clipping", "--quick-grid"]
    assert run(tmp_path / "model", *given, "--out", tmp_path / "new" / "out") == 0
    printed = capsys.readouterr().out
    (report,), _ = load_reports(tmp_path / "new" / "out" / "robustness.json")
    assert [row.condition for row in report.points if row.side == "test"] == ["noise/hum 0 dB", "clipping 0.1 of peak"]
    assert format_numbers(report) in printed and report.system == "model"
    assert f"test side alone perturbed, 8 dimensions: {100 * report.number('test', 8).change:+.0f} % EER [" in printed
    assert (tmp_path / "new" / "out" / "robustness.png").is_file()
    assert run(tmp_path / "model", *given, "--out", tmp_path / "trials.txt") == 2
    assert "trials.txt is not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "model", *given[:6], "--perturbations", "hail")
    assert "invalid choice: 'hail'" in capsys.readouterr().err
