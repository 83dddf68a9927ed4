"""`mrl-redimnet evaluate` and `calibrate` on small files: the numbers are those of the metrics, once embedded."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import lists, refusal, run
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from sounds import write_speaker

from mrl_redimnet.adapters import AdapterBank
from mrl_redimnet.adapters.facts import adapter_digest
from mrl_redimnet.audio import waveforms
from mrl_redimnet.audio.cuts import CUTS, cut
from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.audio.scan import files_below
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation.lists import EmbeddedSpeech, at_drawn_lengths, cut_name, list_names
from mrl_redimnet.evaluation.results import LISTED, embed_trials, evaluate_trials
from mrl_redimnet.fingerprints import fingerprint
from mrl_redimnet.saving import load_model, save_model
from mrl_redimnet.scoring.calibration import Thresholds
from mrl_redimnet.scoring.metrics import act_dcf, auc, bootstrap_interval, cllr, eer, eer_convex_hull, min_cllr, min_dcf
from mrl_redimnet.scoring.scorers import make_scorer, score, with_enrolments
from mrl_redimnet.scoring.trials import Trials, make_trials, read_trials


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cohort")
    for speaker in range(10):
        write_speaker(root, speaker, 1, seed=1)
    return root


def report_of(tmp_path: Path, *argv) -> dict:
    assert run("evaluate", *argv, "--json", tmp_path / "report.json") == 0
    return json.loads((tmp_path / "report.json").read_text())


def scores_of(folder: Path, speech: Path, name: str, dim: int, scorer=None):
    trials = read_trials(speech / f"{name}.txt")
    embeddings = embed_trials(load_model(folder), trials, speech / "wav")
    return trials, score(trials, trials.utterances, embeddings, dim, scorer)


# ---------------------------------------------------------------- evaluate


def test_a_row_holds_the_metrics_of_the_scores(folder, speech, tmp_path):
    report = report_of(tmp_path, folder, *lists(speech), "--dims", 16, "--resamples", 20, "--priors", 0.1)
    (row,) = report["lists"]["all"]["rows"]
    trials, scores = scores_of(folder, speech, "all", 16)
    measured = {"eer": eer, "eer_convex_hull": eer_convex_hull, "auc": auc, "min_cllr": min_cllr}
    for name, metric in measured.items():
        assert row[name] == pytest.approx(metric(scores, trials.labels), abs=1e-6)
    assert row["min_dcf_0.1"] == pytest.approx(min_dcf(scores, trials.labels, 0.1), abs=1e-6)
    ends = bootstrap_interval(scores, trials.labels, *trials.speakers, resamples=20)
    assert (row["eer_low"], row["eer_high"]) == pytest.approx(ends, abs=1e-6)
    assert row["auc_low"] <= row["auc"] <= row["auc_high"]
    assert 0.5 < row["auc"] < 1  # neither chance nor perfect: the numbers above could differ
    assert row["saved"] is None and "cllr" not in row


def test_the_report_says_what_was_evaluated(folder, speech, tmp_path):
    report = report_of(tmp_path, folder, *lists(speech, "all", "few"), "--resamples", 0)
    conditions = report["conditions"]
    assert conditions["command"].startswith(f"mrl-redimnet evaluate {folder} --trials")
    assert conditions["model"] == "model" and conditions["weights"] == fingerprint(load_model(folder))
    assert (conditions["adapter"], conditions["scoring"], conditions["domain"]) == (None, "cosine", "clean")
    assert list(report["lists"]) == ["all", "few"]
    counts = {"trials": 32 * 31 // 2, "targets": 48, "utterances": 32, "speakers": 8}
    assert {name: report["lists"]["all"][name] for name in counts} == counts
    assert not [name for row in report["lists"]["all"]["rows"] for name in row if name.endswith(("_low", "_high"))]


def test_the_screen_shows_every_list_and_dimension(folder, speech, capsys):
    assert run("evaluate", folder, *lists(speech, "all", "few"), "--resamples", 10) == 0
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert first.startswith("all: 496 trials (48 of targets), 32 utterances, 8 speakers\n")
    heading, *rows = first.splitlines()[1:]
    assert heading.split("  ")[0] == "dimensions" and "minDCF 0.05" in heading
    assert [row.split()[0] for row in rows] == ["8", "16", "32"] and all(row.count("[") == 3 for row in rows)
    assert second.startswith("few: ")


def test_the_screen_agrees_with_the_training_loops_evaluation(folder, speech, capsys):
    assert run("evaluate", folder, *lists(speech), "--resamples", 0) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:5]]
    expected = evaluate_trials(load_model(folder), read_trials(speech / "all.txt"), speech / "wav")
    assert [row[:3] for row in rows] == [[str(r.dim), f"{100 * r.eer:.2f}", f"{r.min_dcf:.3f}"] for r in expected]


def test_every_utterance_is_read_once(folder, speech, tmp_path, monkeypatch):
    read = Counter()
    original = waveforms.read_audio
    monkeypatch.setattr(waveforms, "read_audio", lambda file: (read.update([str(file)]), original(file))[1])
    report_of(tmp_path, folder, *lists(speech, "all", "few"), "--resamples", 2, "--page", tmp_path / "page")
    assert set(read.values()) == {1} and len(read) == 32


def test_scores_are_written_as_text_and_as_arrays(folder, speech, tmp_path):
    for file in ("scores.tsv", "scores.npz"):
        assert run("evaluate", folder, *lists(speech, "all", "few"), "--resamples", 0, "--scores", tmp_path / file) == 0
    trials, scores = scores_of(folder, speech, "all", 16)
    arrays = np.load(tmp_path / "scores.npz")
    of_all = arrays["list"] == "all"
    assert arrays["dims"].tolist() == [8, 16, 32] and arrays["enrol"][of_all].tolist() == trials.enrol
    assert np.allclose(arrays["scores"][of_all, 1], scores, atol=1e-6)
    with (tmp_path / "scores.tsv").open(newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    assert len(lines) == len(arrays["label"]) and lines[0]["list"] == "all" and lines[-1]["list"] == "few"
    assert [float(line["16"]) for line in lines] == pytest.approx(arrays["scores"][:, 1].tolist(), abs=1e-8)
    assert [line["label"] for line in lines] == list(map(str, arrays["label"].tolist()))


def test_evaluate_puts_an_adapter_on_the_model(folder, adapters, speech, tmp_path):
    report = report_of(tmp_path, folder, *lists(speech), "--resamples", 0, "--adapter", adapters / "telephony")
    assert report["conditions"]["adapter"] == "telephony"
    merged = AdapterBank.load(str(folder), {"x": adapters / "telephony"}).merged("x")
    adapted = evaluate_trials(merged, read_trials(speech / "all.txt"), speech / "wav")
    plain = evaluate_trials(load_model(folder), read_trials(speech / "all.txt"), speech / "wav")
    assert [row["eer"] for row in report["lists"]["all"]["rows"]] == [row.eer for row in adapted]
    assert [row.eer for row in plain] != [row.eer for row in adapted]


def test_evaluate_in_a_domain(folder, speech, cohort, tmp_path):
    arguments, trials = [folder, *lists(speech, "few"), "--resamples", 0], read_trials(speech / "few.txt")
    found = {}
    for name, more in {"telephony": [], "noisy": ["--noise", cohort]}.items():
        report = report_of(tmp_path, *arguments, "--domain", name, *more)
        found[name] = [row["auc"] for row in report["lists"]["few"]["rows"]]
        domain = make_domain(name, noise=cohort)
        embeddings = embed_trials(load_model(folder), trials, speech / "wav", domain=domain)
        expected = [auc(score(trials, trials.utterances, embeddings, dim), trials.labels) for dim in (8, 16, 32)]
        assert found[name] == pytest.approx(expected, abs=1e-9)
    assert found["telephony"] != found["noisy"]


@pytest.mark.parametrize("scoring", ["centred", "as_norm"])
def test_evaluate_with_a_cohort(folder, speech, cohort, tmp_path, scoring):
    arguments = ["--scoring", scoring, "--cohort", cohort, "--top", 5]
    report = report_of(tmp_path, folder, *lists(speech), "--resamples", 0, *arguments)
    embedded = SpeakerEncoder(load_model(folder)).embed(files_below(cohort))
    for row in report["lists"]["all"]["rows"]:
        trials, scores = scores_of(folder, speech, "all", row["dim"], make_scorer(scoring, embedded, 5))
        assert row["auc"] == pytest.approx(auc(scores, trials.labels), abs=1e-4)
    assert report["conditions"]["scoring"].startswith(scoring)


def test_enrolments_of_several_utterances_and_another_format(folder, speech, tmp_path):
    (tmp_path / "enrol.map").write_text("".join(f"m{i} id{i}/0.wav id{i}/1.wav\n" for i in range(3)))
    lines = [f"m{i} id{j}/2.wav {'target' if i == j else 'nontarget'}\n" for i in range(3) for j in range(3)]
    (tmp_path / "list.txt").write_text("".join(lines))
    arguments = ["--trials", tmp_path / "list.txt", "--folder", speech / "wav", "--enrolments", tmp_path / "enrol.map"]
    record = report_of(tmp_path, folder, *arguments, "--resamples", 5)["lists"]["list"]
    assert (record["trials"], record["targets"], record["utterances"], record["speakers"]) == (9, 3, 9, 3)


def test_a_list_that_does_not_name_speakers_has_no_intervals(folder, speech, tmp_path, capsys):
    (tmp_path / "wav").mkdir()
    for i in range(4):
        (tmp_path / "wav" / f"{i}.wav").write_bytes((speech / f"wav/id{i // 2}/{i % 2}.wav").read_bytes())
    (tmp_path / "list.txt").write_text("1 0.wav 1.wav\n1 2.wav 3.wav\n0 0.wav 2.wav\n0 1.wav 3.wav\n")
    record = report_of(tmp_path, folder, "--trials", tmp_path / "list.txt", "--folder", tmp_path / "wav")["lists"][
        "list"
    ]
    printed = capsys.readouterr()
    assert record["speakers"] is None and "eer_low" not in record["rows"][0]
    assert "does not tell whose speech is whose: no intervals" in printed.err and "speakers unknown" in printed.out


def test_groups_are_told_apart(folder, speech, tmp_path, capsys):
    report = report_of(tmp_path, folder, *lists(speech), "--resamples", 5, "--groups", speech / "speakers.csv")
    rows = report["lists"]["all"]["groups"]
    assert {row["group"] for row in rows} == {"f", "m", "between groups"} and {row["dim"] for row in rows} == {
        8,
        16,
        32,
    }
    assert [row["speakers"] for row in rows if row["group"] in "fm"] == [4] * 6
    assert "Groups of speakers" in capsys.readouterr().out


def test_groups_must_know_every_speaker(folder, speech, tmp_path, capsys):
    (tmp_path / "some.csv").write_text("speaker,gender\nid0,f\nid1,m\n")
    message = refusal(capsys, "evaluate", folder, *lists(speech), "--groups", tmp_path / "some.csv")
    assert "no gender for 6 of the 8 speakers: id2, id3, id4, id5, id6" in message
    more = ["--groups", speech / "speakers.csv", "--group-column", "age"]
    assert "age" in refusal(capsys, "evaluate", folder, *lists(speech), *more)


@pytest.mark.parametrize("dim", [0, 33])
def test_dimensions_the_model_has_not_are_refused(folder, speech, capsys, dim):
    message = refusal(capsys, "evaluate", folder, *lists(speech), "--dims", 8, dim)
    assert f"[{dim}] are not between 1 and the embedding's 32 dimensions" in message


def test_what_is_missing_is_told_before_anything_is_embedded(folder, speech, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(waveforms, "read_audio", lambda file: pytest.fail("embedded"))
    told = {
        "TRIALS: no file": ["--trials", tmp_path / "t", "--folder", tmp_path],
        "32 of the trial list's 32 utterances are not below": ["--trials", speech / "all.txt", "--folder", tmp_path],
        "no folder": [*lists(speech), "--json", tmp_path / "nowhere" / "report.json"],
        "is a folder": [*lists(speech), "--json", tmp_path],
        "ends in .tsv or .npz": [*lists(speech), "--scores", tmp_path / "scores.csv"],
        "is there and no page of evaluate": [*lists(speech), "--page", folder],
        "--priors: [1.0] are not between 0 and 1": [*lists(speech), "--priors", 0.01, 1],
        "--resamples: got -1": [*lists(speech), "--resamples", -1],
        "a list is given twice": lists(speech, "all", "all"),
        "--scoring as_norm needs --cohort": [*lists(speech), "--scoring", "as_norm"],
        "noise: the noisy domain needs": [*lists(speech), "--domain", "noisy"],
    }
    before = sorted(path.name for path in folder.iterdir())
    for message, arguments in told.items():
        assert message in refusal(capsys, "evaluate", folder, *arguments)
    assert sorted(path.name for path in folder.iterdir()) == before
    missing = refusal(capsys, "evaluate", folder, "--trials", speech / "all.txt", "--folder", tmp_path)
    assert missing.count(".wav") == LISTED and f" and {32 - LISTED} more" in missing


def test_lists_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = [tmp_path / "a" / "dev" / "trials.txt", tmp_path / "b" / "dev" / "trials.txt"]
    assert list_names(paths) == ["a/dev/trials", "b/dev/trials"]
    assert list_names([tmp_path / "vox1.o.txt", tmp_path / "vox1.e.txt"]) == ["vox1.o", "vox1.e"]


def test_an_adapter_of_another_base_is_refused(adapters, speech, tmp_path, capsys):
    save_model(tiny_model(seed=1), tmp_path / "other")
    for command in ("evaluate", "calibrate"):
        message = refusal(capsys, command, tmp_path / "other", *lists(speech), "--adapter", adapters / "noisy")
        assert "'noisy' was trained on me/base" in message
    missing = ["--adapter", tmp_path / "nothing"]
    assert "is not a folder" in refusal(capsys, "evaluate", tmp_path / "other", *lists(speech), *missing)


def test_audio_of_any_rate_and_channels_is_evaluated_and_broken_audio_named(folder, speech, tmp_path, capsys):
    for i in range(2):
        for j in range(2):
            wave, _ = soundfile.read(speech / f"wav/id{i}/{j}.wav")
            path = tmp_path / f"wav/id{i}/{j}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.stack([wave, wave], 1) if i else wave, 8_000)
    (tmp_path / "t.txt").write_text("1 id0/0.wav id0/1.wav\n0 id0/0.wav id1/0.wav\n1 id1/0.wav id1/1.wav\n")
    arguments = ["--trials", tmp_path / "t.txt", "--folder", tmp_path / "wav"]
    assert run("evaluate", folder, *arguments, "--resamples", 0) == 0
    capsys.readouterr()
    (tmp_path / "wav/id1/1.wav").write_bytes(b"")
    assert "id1/1.wav is empty (0 bytes)" in refusal(capsys, "evaluate", folder, *arguments)
    soundfile.write(tmp_path / "wav/id1/1.wav", np.zeros(20), 16_000)
    assert "id1/1.wav: 20 samples" in refusal(capsys, "evaluate", folder, *arguments)


# ---------------------------------------------------------------- calibrate


def test_calibrate_saves_a_threshold_per_dimension(folder, speech, capsys):
    assert run("calibrate", folder, *lists(speech), "--false-accept", 0.1) == 0
    printed = capsys.readouterr().out
    thresholds = Thresholds.load(folder)
    assert [(entry.dim, entry.adapter, entry.wanted) for entry in thresholds.entries] == [
        (dim, None, 0.1) for dim in (8, 16, 32)
    ]
    for entry in thresholds.entries:
        trials, scores = scores_of(folder, speech, "all", entry.dim)
        impostors = scores[trials.labels == 0]
        assert entry.false_accepts == pytest.approx(np.mean(impostors >= entry.threshold), abs=1 / len(impostors))
        assert 0.08 < entry.false_accepts <= 0.1 and entry.weights == fingerprint(load_model(folder))
        assert f"{entry.threshold:.4f}" in printed and entry.trials == "all"
    assert "Written: " in printed


def test_an_uncertain_threshold_is_warned_of(folder, speech, capsys):
    assert run("calibrate", folder, *lists(speech), "--false-accept", 0.01) == 0
    assert "Note: a false-accept rate of 0.01 rests on 4 of 448 impostor trials: uncertain" in capsys.readouterr().out


def test_calibrate_adds_to_what_is_there(folder, adapters, speech):
    for more in ([], ["--adapter", adapters / "telephony", "--dims", 16], ["--false-accept", 0.2, "--dims", 8]):
        assert run("calibrate", folder, *lists(speech), "--false-accept", 0.1, *more) == 0
    thresholds = Thresholds.load(folder)
    assert [(entry.adapter, entry.dim, entry.wanted) for entry in thresholds.entries] == [
        (None, 8, 0.2),
        (None, 16, 0.1),
        (None, 32, 0.1),
        ("telephony", 16, 0.1),
    ]
    model = load_model(folder)
    assert thresholds.find(16, "telephony").weights == f"{fingerprint(model)}+{adapter_digest(adapters / 'telephony')}"


def test_calibrate_for_averaged_enrolments(folder, speech, tmp_path, capsys):
    more = ["--false-accept", 0.1, "--dims", 16, 8]
    assert run("calibrate", folder, *lists(speech), *more, "--enrolments", 3, 1, 2) == 0
    thresholds = Thresholds.load(folder)
    assert [(entry.dim, entry.enrolments) for entry in thresholds.entries] == [
        (d, n) for d in (8, 16) for n in (1, 2, 3)
    ]
    trials, model = with_enrolments(read_trials(speech / "all.txt"), 3), load_model(folder)
    scores = score(trials, trials.utterances, embed_trials(model, trials, speech / "wav"), 16)
    entry = thresholds.find(16, enrolments=3)
    assert entry.false_accepts == pytest.approx(np.mean(scores[trials.labels == 0] >= entry.threshold), abs=1e-9)
    assert 0.08 < entry.false_accepts <= 0.1 and entry.targets == trials.labels.sum()
    capsys.readouterr()
    for values, message in (
        ([0], "--enrolments: got 0, expected numbers from 1 on, or one file"),
        ([1, "list.map"], "--enrolments: got list.map, expected numbers"),
        ([5], "--enrolments 5: no speaker of all has so many utterances beside a test"),
        (["nowhere.map"], "nowhere.map"),
    ):
        assert message in refusal(capsys, "calibrate", folder, *lists(speech), *more, "--enrolments", *values)
    assert Thresholds.load(folder) == thresholds


def test_lists_with_enrolments_have_the_threshold_of_their_number(folder, speech, tmp_path, capsys):
    wav = speech / "wav"
    (tmp_path / "enrol.map").write_text(
        "".join(f"m{i} id{i}/0.wav id{i}/1.wav{' id1/2.wav' if i == 1 else ''}\n" for i in range(8))
    )
    tests = [path.relative_to(wav).as_posix() for path in sorted(wav.rglob("[23].wav"))]
    rows = [(i, test) for i in range(8) for test in tests if (i, test) != (1, "id1/2.wav")]
    lines = [f"{int(test.startswith(f'id{i}/'))} m{i} {test}\n" for i, test in rows]
    (tmp_path / "several.txt").write_text("".join(lines))
    (tmp_path / "two.txt").write_text("".join(line for line in lines if " m1 " not in line))
    given = ["--folder", wav, "--enrolments", tmp_path / "enrol.map", "--trials"]
    several, two = [*given, tmp_path / "several.txt"], [*given, tmp_path / "two.txt"]
    assert run("calibrate", folder, *several, "--false-accept", 0.1, "--dims", 16) == 0
    printed = capsys.readouterr().out
    assert [entry.enrolments for entry in Thresholds.load(folder).entries] == [2, 3]
    assert "rate of 0.1 rests on 1 of 14 impostor trials: uncertain" in printed
    report = report_of(tmp_path, folder, *two, "--resamples", 0, "--dims", 16)
    saved = report["lists"]["two"]["rows"][0]["saved"]
    assert saved["enrolments"] == 2 and saved["threshold"] == Thresholds.load(folder).find(16, enrolments=2).threshold
    capsys.readouterr()
    report = report_of(tmp_path, folder, *several, "--resamples", 0, "--dims", 16)
    assert "several averages 2 to 3 enrolment utterances: no saved threshold is for it" in capsys.readouterr().err
    assert report["lists"]["several"]["rows"][0]["saved"] is None
    report = report_of(tmp_path, folder, *lists(speech), "--resamples", 0, "--dims", 16)
    assert "no threshold for 16 dims, no adapter, cosine; there are" in capsys.readouterr().err
    assert report["lists"]["all"]["rows"][0]["saved"] is None


def test_evaluate_applies_what_calibrate_saved(folder, speech, tmp_path, capsys):
    assert run("calibrate", folder, *lists(speech), "--false-accept", 0.1, "--dims", 16) == 0
    capsys.readouterr()
    report = report_of(tmp_path, folder, *lists(speech), "--resamples", 3, "--dims", 16, "--priors", 0.05)
    (row,) = report["lists"]["all"]["rows"]
    entry = Thresholds.load(folder).find(16)
    assert row["saved"]["false_accepts"] == entry.false_accepts and row["saved"]["misses"] == entry.misses
    trials, scores = scores_of(folder, speech, "all", 16)
    assert row["cllr"] == pytest.approx(cllr(entry.calibration(scores), trials.labels), abs=1e-5)
    assert row["act_dcf_0.05"] == pytest.approx(act_dcf(entry.calibration(scores), trials.labels, 0.05), abs=1e-5)
    assert row["min_cllr"] <= row["cllr"] and row["cllr_low"] <= row["cllr_high"]
    assert "Thresholds of thresholds.json" in capsys.readouterr().out


def test_calibrate_with_durations(folder, speech, tmp_path, capsys):
    assert run("calibrate", folder, *lists(speech), "--false-accept", 0.1, "--durations", "--dims", 16) == 0
    entry = Thresholds.load(folder).find(16)
    assert entry.calibration.uses_seconds and f"{entry.threshold:.4f} (LLR)" in capsys.readouterr().out
    report = report_of(tmp_path, folder, *lists(speech), "--resamples", 0, "--dims", 16, "--page", tmp_path / "page")
    assert report["lists"]["all"]["rows"][0]["saved"]["false_accepts"] == pytest.approx(entry.false_accepts, abs=0.005)
    assert f"{entry.threshold:.4f} (LLR)" in capsys.readouterr().out


def test_calibrate_with_durations_hears_stretches_of_the_speech(folder, longer_speech, capsys):
    more = ["--false-accept", 0.1, "--durations", "--dims", 16, "--enrolments", 1, 2]
    assert run("calibrate", folder, *lists(longer_speech), *more) == 0
    encoder, trials, wav = (
        SpeakerEncoder.from_pretrained(folder),
        read_trials(longer_speech / "all.txt"),
        longer_speech / "wav",
    )
    speech = EmbeddedSpeech.of(encoder, [trials], wav)
    cut_too = speech.with_cuts(encoder, wav)
    waves = {path: read_audio(wav / path) for path in trials.utterances}
    wanted = {
        cut_name(path, kind): cut(wave, path, kind)
        for kind, (_, high) in CUTS.items()
        for path, wave in waves.items()
        if len(wave) >= 16_000 * high
    }
    assert cut_too.utterances == [*speech.utterances, *wanted] and 30 < len(wanted) < 90
    assert cut_too.embeddings[32:] == pytest.approx(encoder.embed([*wanted.values()]), abs=1e-5)
    assert cut_too.seconds[32:] == pytest.approx([len(wave) / 16_000 for wave in wanted.values()])
    assert f"{len(wanted)} stretches were cut of 32 utterances." in capsys.readouterr().out
    for count in (1, 2):
        entry = Thresholds.load(folder).find(16, enrolments=count)
        whole = with_enrolments(trials, count)
        both = [whole, at_drawn_lengths(whole, cut_too.utterances)]
        scores, seconds = (
            np.concatenate(each)
            for each in zip(
                *[(cut_too.scores(part, 16, make_scorer("cosine")), cut_too.trial_seconds(part)) for part in both],
                strict=True,
            )
        )
        accepted, _ = entry.judge(scores, seconds)
        impostors = np.tile(whole.labels, 2) == 0
        assert accepted[impostors].mean() == pytest.approx(entry.false_accepts, abs=1e-9)
        assert entry.impostors == 2 * np.sum(whole.labels == 0) and entry.trials == "all, whole and cut"
        assert entry.calibration.seconds == (seconds.min(), seconds.max()) and 0.5 <= seconds.min() < 0.7


@given(st.integers(0, 10**6), st.booleans())
def test_lengths_are_drawn_for_each_side_of_each_trial(seed, averaged):
    rng = np.random.default_rng(seed)
    there = {f"{speaker}/{number}.wav": int(rng.integers(4)) for speaker in range(4) for number in range(3)}
    known = [*there, *(cut_name(path, kind) for path, count in there.items() for kind in [*CUTS][:count])]
    trials = make_trials([*there], [path.split("/")[0] for path in there])
    trials = with_enrolments(trials, 2) if averaged else trials
    drawn = at_drawn_lengths(trials, known, seed)
    assert np.array_equal(drawn.labels, trials.labels) and set(drawn.utterances) <= set(known)
    assert [path.split(" (")[0] for path in drawn.test] == trials.test
    given = [trials.enrolments[name] for name in trials.enrol]
    assert [[path.split(" (")[0] for path in drawn.enrolments[name]] for name in drawn.enrol] == given
    again = at_drawn_lengths(trials, known, seed)
    assert (again.enrol, again.test, again.models) == (drawn.enrol, drawn.test, drawn.models)


def test_every_length_of_an_utterance_is_drawn_as_often():
    known = ["a", "b", *(cut_name("a", kind) for kind in CUTS)]
    drawn = at_drawn_lengths(Trials(np.zeros(4000), ["a"] * 4000, ["b"] * 4000), known)
    assert Counter(drawn.test) == {"b": 4000}
    assert set(drawn.enrol) == {*known} - {"b"} and min(Counter(drawn.enrol).values()) > 900


def test_thresholds_of_other_weights_are_left_out_with_a_note(folder, speech, tmp_path, capsys):
    assert run("calibrate", folder, *lists(speech), "--false-accept", 0.1) == 0
    save_model(tiny_model(seed=1), tmp_path / "other")
    arguments = [tmp_path / "other", *lists(speech), "--resamples", 0, "--thresholds", folder]
    report = report_of(tmp_path, *arguments)
    assert "was set on other weights" in capsys.readouterr().err
    assert [row["saved"] for row in report["lists"]["all"]["rows"]] == [None] * 3


def test_calibrate_needs_a_folder_and_enough_impostors(folder, speech, tmp_path, capsys):
    message = refusal(capsys, "calibrate", "anna/base", *lists(speech))
    assert "anna/base is not a folder: give --out" in message
    message = refusal(capsys, "calibrate", folder, *lists(speech), "--false-accept", 0.001)
    assert "448 impostor trials cannot show a false-accept rate of 0.001" in message
    assert "--false-accept: got 1.0" in refusal(capsys, "calibrate", folder, *lists(speech), "--false-accept", 1)
    assert not (folder / "thresholds.json").exists()
    (tmp_path / "thresholds.json").write_text("{}")
    assert "does not hold thresholds" in refusal(capsys, "calibrate", folder, *lists(speech), "--out", tmp_path)
