"""`mrl-redimnet verify` and `identify` on small files: decisions, names and exit statuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import lists, refusal, run
from conftest import tiny_model
from sounds import write_speaker

from mrl_redimnet.adapters import AdapterBank
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.saving import load_model, save_model
from mrl_redimnet.scoring.calibration import Thresholds


def unit_mean(folder: Path, files, dim: int) -> np.ndarray:
    """Average of the normalised prefixes of some files, normalised."""
    prefixes = SpeakerEncoder(load_model(folder)).embed(list(files))[:, :dim].astype(float)
    mean = (prefixes / np.linalg.norm(prefixes, axis=1, keepdims=True)).mean(axis=0)
    return mean / np.linalg.norm(mean)


@pytest.fixture
def calibrated(folder, speech) -> Path:
    """A model with thresholds at its dimensions."""
    assert run("calibrate", folder, *lists(speech), "--false-accept", 0.1) == 0
    return folder


@pytest.fixture
def files(speech) -> list[Path]:
    """Of id0, enrolled twice and tested, and of id7."""
    wav = speech / "wav"
    return [wav / "id0/0.wav", wav / "id0/1.wav", wav / "id0/2.wav", wav / "id7/0.wav"]


# ---------------------------------------------------------------- verify


def test_verify_decides_by_the_saved_threshold(calibrated, files, capsys):
    capsys.readouterr()
    assert run("verify", calibrated, *files[:2], "--test", *files, "--dim", 16) == 1
    heading, *lines = capsys.readouterr().out.splitlines()
    entry = Thresholds.load(calibrated).find(16)
    assert heading.startswith("model, 16 dimensions, cosine: accepted from a score of")
    assert f"{entry.threshold:.4f} on, set on all for 10 % false accepts" in heading
    for line, file in zip(lines, files, strict=True):
        score = float(unit_mean(calibrated, files[:2], 16) @ unit_mean(calibrated, [file], 16))
        told, _, printed, _, llr, path = line.split()
        assert float(printed) == pytest.approx(score, abs=1e-4) and path == str(file)
        assert float(llr) == pytest.approx(entry.calibration([score])[0], abs=0.02)
        assert told == ("accepted" if score >= entry.threshold else "rejected")
    assert {line.split()[0] for line in lines} == {"accepted", "rejected"}


def test_verify_takes_the_threshold_of_as_many_enrolment_utterances(folder, files, speech, capsys):
    assert run("calibrate", folder, *lists(speech), "--false-accept", 0.1, "--enrolments", 1, 3) == 0
    thresholds = Thresholds.load(folder)
    enrol = list(files[0].parent.glob("*.wav"))
    expected = {
        1: (1, None),
        2: (3, "Not calibrated: for 2 enrolled utterances the threshold of 3 is used"),
        3: (3, None),
    }
    for count, (used, told) in expected.items():
        capsys.readouterr()
        run("verify", folder, *enrol[:count], "--test", files[3])
        heading = capsys.readouterr().out.splitlines()[0]
        entry = thresholds.find(32, enrolments=used)
        assert f"accepted from a score of {entry.threshold:.4f} on, set on all for 10 % false accepts" in heading
        assert f"% misses there) with {used} enrolled utterance" in heading
        assert ("Not calibrated" in heading) == (told is not None) and (told or "") in heading
    assert f"{thresholds.find(32).threshold:.4f}" != f"{thresholds.find(32, enrolments=3).threshold:.4f}"
    run("verify", folder, *enrol[:3], "--test", files[3], "--thresholds", folder)
    assert (
        run("calibrate", folder, *lists(speech), "--false-accept", 0.1, "--enrolments", 1, "--out", folder.parent) == 0
    )
    capsys.readouterr()
    run("verify", folder, *enrol[:2], "--test", files[3], "--thresholds", folder.parent)
    assert "Not calibrated: for 2 enrolled utterances the threshold of 1 is used; how many" in capsys.readouterr().out


@pytest.mark.parametrize(("threshold", "status", "told"), [(-1, 0, "accepted"), (1.01, 1, "rejected")])
def test_the_exit_status_tells_the_decision(folder, files, capsys, threshold, status, told):
    assert run("verify", folder, files[0], "--test", files[1], "--threshold", threshold) == status
    assert capsys.readouterr().out.splitlines()[1].startswith(told)


def test_too_little_speech_is_noted_on_both_sides(folder, files, capsys):
    assert run("verify", folder, *files[:2], "--test", files[2], "--threshold", -1) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Note: ")]
    assert len(notes) == 2 and notes[0].startswith("Note: the enrolment has 0.") and f"{files[2]} has 0." in notes[1]
    assert all("s of speech: below 2 s" in note for note in notes)


def test_without_thresholds_nothing_is_decided(folder, files, capsys):
    assert run("verify", folder, files[0], "--test", files[1]) == 3
    heading, line = capsys.readouterr().out.splitlines()
    assert "no decision: there is no thresholds.json beside the model. `mrl-redimnet calibrate` makes one" in heading
    assert line.startswith("undecided  score ") and "LLR" not in line


def test_a_threshold_by_hand_comes_before_the_saved_one(calibrated, files, capsys):
    assert run("verify", calibrated, files[0], "--test", files[1], "--threshold", 1.5, "--dim", 16) == 1
    assert "accepted from a score of 1.5 on, as given" in capsys.readouterr().out
    assert run("verify", calibrated, files[0], "--test", files[1], "--threshold", 0.1, "--dim", 5) in (0, 1)
    assert "LLR" not in capsys.readouterr().out.splitlines()[-1]  # nothing is calibrated at 5


def test_verify_says_where_no_threshold_fits(calibrated, files, adapters, tmp_path, capsys):
    capsys.readouterr()
    test = [files[0], "--test", files[1]]
    message = refusal(capsys, "verify", calibrated, *test, "--dim", 5)
    assert "no threshold for 5 dims, no adapter, cosine; there are: 8 dims" in message
    message = refusal(capsys, "verify", calibrated, *test, "--adapter", adapters / "noisy")
    assert "no threshold for 32 dims, noisy, cosine" in message
    save_model(tiny_model(seed=1), tmp_path / "other")
    shutil.copy(calibrated / "thresholds.json", tmp_path / "other")
    assert "was set on other weights" in refusal(capsys, "verify", tmp_path / "other", *test)
    message = refusal(capsys, "verify", calibrated, *test, "--thresholds", tmp_path)
    assert "thresholds.json: `mrl-redimnet calibrate` sets thresholds" in message
    assert "[0] are not between 1 and" in refusal(capsys, "verify", calibrated, *test, "--dim", 0)


def test_an_adapter_has_thresholds_of_its_own(calibrated, files, adapters, speech, capsys):
    more = ["--adapter", adapters / "telephony"]
    assert run("calibrate", calibrated, *lists(speech), "--false-accept", 0.1, "--dims", 16, *more) == 0
    capsys.readouterr()
    run("verify", calibrated, files[0], "--test", files[1], "--dim", 16, *more)
    heading, line = capsys.readouterr().out.splitlines()
    weights = SpeakerEncoder.from_pretrained(calibrated, more[1]).fingerprint
    entry = Thresholds.load(calibrated).find(16, "telephony", weights=weights)
    assert "model with telephony, 16 dimensions" in heading and f"{entry.threshold:.4f}" in heading
    merged = AdapterBank.load(str(calibrated), {"x": adapters / "telephony"}).merged("x")
    one, other = SpeakerEncoder(merged).embed(files[:2])[:, :16].astype(float)
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert float(line.split()[2]) == pytest.approx(cosine, abs=1e-4)


def test_verify_gives_a_calibration_with_durations_both_sides(folder, files, speech, capsys):
    assert run("calibrate", folder, *lists(speech), "--false-accept", 0.1, "--durations") == 0
    capsys.readouterr()
    assert run("verify", folder, *files[:2], "--test", files[2]) in (0, 1)
    heading, line = capsys.readouterr().out.splitlines()
    assert "accepted from an LLR of" in heading
    score = float(unit_mean(folder, files[:2], 32) @ unit_mean(folder, files[2:3], 32))
    seconds = [soundfile.info(file).duration for file in files[:3]]
    calibration = Thresholds.load(folder).find(32).calibration
    expected = calibration([score], [[seconds[0] + seconds[1], seconds[2]]])[0]
    assert float(line.split()[4]) == pytest.approx(expected, abs=0.02)


def test_verify_lists_files_that_are_not_there_or_no_audio(folder, files, tmp_path, capsys):
    message = refusal(capsys, "verify", folder, files[0], tmp_path / "a.wav", "--test", tmp_path, tmp_path / "b.wav")
    assert f"ENROL: 1 of 2: no file {tmp_path / 'a.wav'}; TEST: 2 of 2: {tmp_path} is not a file, no file" in message
    (tmp_path / "c.wav").write_text("thesis")
    assert "c.wav cannot be read as audio" in refusal(capsys, "verify", folder, files[0], "--test", tmp_path / "c.wav")


# ---------------------------------------------------------------- identify


@pytest.fixture
def tests(tmp_path) -> Path:
    """Other utterances of id0 and id1, who are enrolled, and one of a stranger."""
    for speaker in (0, 1, 12):
        write_speaker(tmp_path / "tests", speaker, 1, seed=2)
    return tmp_path / "tests"


@pytest.fixture
def enrolled(speech, tmp_path) -> Path:
    for speaker in ("id0", "id1", "id2"):
        shutil.copytree(speech / "wav" / speaker, tmp_path / "enrolled" / speaker)
    return tmp_path / "enrolled"


def identified(capsys) -> tuple[str, dict[str, tuple[str, list[str]]]]:
    heading, *lines = capsys.readouterr().out.splitlines()
    rows = [line.split("\t") for line in lines]
    return heading, {test: (name, ranked.split(", ")) for name, test, ranked in rows}


def test_identify_names_the_nearest_speakers(folder, enrolled, tests, capsys):
    assert run("identify", folder, "--enrolled", enrolled, "--test", tests, "--dim", 16, "--top-k", 2) == 0
    heading, found = identified(capsys)
    assert heading.startswith("model, 16 dimensions, 3 enrolled speakers: no decision: there is no thresholds.json")
    assert set(found) == {"id0/0.wav", "id1/0.wav", "id12/0.wav"}
    for test, (name, ranked) in found.items():
        scores = {
            speaker.name: float(
                unit_mean(folder, sorted(speaker.iterdir()), 16) @ unit_mean(folder, [tests / test], 16)
            )
            for speaker in enrolled.iterdir()
        }
        best = sorted(scores, key=lambda each: -scores[each])[:2]
        assert name == best[0] and [entry.split()[0] for entry in ranked] == best
        assert [float(entry.split()[1]) for entry in ranked] == pytest.approx([scores[each] for each in best], abs=2e-4)


def test_identify_calls_unknown_what_no_enrolled_speaker_is_near(folder, enrolled, tests, capsys):
    scores = {}
    assert run("identify", folder, "--enrolled", enrolled, "--test", tests) == 0
    for test, (_, ranked) in identified(capsys)[1].items():
        scores[test] = float(ranked[0].split()[1])
    ordered = sorted(scores.values())
    between = (ordered[0] + ordered[1]) / 2
    arguments = ["--enrolled", enrolled, "--test", tests, "--threshold", between, "--top-k", 9]
    assert run("identify", folder, *arguments) == 0
    found = identified(capsys)[1]
    assert {test: name == "unknown" for test, (name, _) in found.items()} == {
        test: score < between for test, score in scores.items()
    }
    assert {len(ranked) for _, ranked in found.values()} == {3}


@pytest.mark.parametrize("durations", [[], ["--durations"]])
def test_identify_applies_the_rate_to_the_whole_search(folder, speech, enrolled, tests, capsys, durations):
    more = ["--false-accept", 0.1, "--dims", 16, "--enrolments", 1, 2, 3, *durations]
    assert run("calibrate", folder, *lists(speech), *more) == 0
    shutil.rmtree(enrolled / "id2")
    for file in sorted((enrolled / "id1").iterdir())[3:]:
        file.unlink()
    for file in sorted((enrolled / "id0").iterdir())[2:]:
        file.unlink()
    capsys.readouterr()
    assert run("identify", folder, "--enrolled", enrolled, "--test", tests, "--dim", 16) == 0
    heading, found = identified(capsys)
    entries = {
        "id0": Thresholds.load(folder).find(16, enrolments=2),
        "id1": Thresholds.load(folder).find(16, enrolments=3),
    }
    lowest = {name: entry.for_search(2)[0] for name, entry in entries.items()}
    assert all(lowest[name] > entry.threshold for name, entry in entries.items())
    assert all(f"{threshold:.4f}" in heading for threshold in lowest.values())
    assert "so that about 10 % of strangers, or fewer, are taken for one of the 2 (5.1 % in each comparison" in heading
    assert "Not calibrated" not in heading
    for test, (name, ranked) in found.items():
        speaker, score = ranked[0].split()
        of_speaker = sum(soundfile.info(file).duration for file in (enrolled / speaker).iterdir())
        (llr,) = entries[speaker].calibration([float(score)], [[of_speaker, soundfile.info(tests / test).duration]])
        assert name == (speaker if (llr if durations else float(score)) >= lowest[speaker] else "unknown")


def test_identify_says_whose_threshold_is_not_calibrated(calibrated, enrolled, tests, capsys):
    capsys.readouterr()
    assert run("identify", calibrated, "--enrolled", enrolled, "--test", tests, "--dim", 16) == 0
    heading, _ = identified(capsys)
    (threshold, _) = Thresholds.load(calibrated).find(16).for_search(3)
    assert f"accepted from a score of {threshold:.4f} on, meant so that about 10 % of strangers" in heading
    assert "Not calibrated: for 4 enrolled utterances the threshold of 1 is used; how many false accepts" in heading


def test_identify_says_how_many_impostors_a_search_takes(folder, speech, enrolled, tests, capsys):
    assert run("calibrate", folder, *lists(speech), "--false-accept", 0.004) == 0
    capsys.readouterr()
    assert run("identify", folder, "--enrolled", enrolled, "--test", tests) == 0
    heading, found = identified(capsys)
    assert "no decision: 3 speakers are searched, and 448 impostor trials cannot show" in heading
    assert "rate of 0.00134: it takes at least 749, and 22,470 to know it within 30 %" in heading
    assert "unknown" not in {name for name, _ in found.values()}


def test_identify_does_not_decide_by_thresholds_without_a_tail(calibrated, enrolled, tests, capsys):
    file = calibrated / "thresholds.json"
    content = json.loads(file.read_text())
    for record in content["entries"]:
        del record["tail"], record["enrolments"]
    file.write_text(json.dumps(content))
    capsys.readouterr()
    arguments = ["identify", calibrated, "--enrolled", enrolled, "--test", tests]
    assert run(*arguments) == 0
    assert "no decision: 3 speakers are searched, and the threshold was saved by an earlier" in identified(capsys)[0]
    for speaker in ("id1", "id2"):
        shutil.rmtree(enrolled / speaker)
    for path in sorted((enrolled / "id0").iterdir())[1:]:
        path.unlink()
    assert run(*arguments) == 0
    entry = Thresholds.load(calibrated).find(32)
    assert f"accepted from a score of {entry.threshold:.4f} on, set on all for 10 %" in identified(capsys)[0]


def test_identify_needs_folders_of_speakers(folder, enrolled, tests, tmp_path, capsys):
    arguments = ["identify", folder, "--test", tests, "--enrolled"]
    assert f"ENROLLED: no folder {tmp_path / 'nowhere'}" in refusal(capsys, *arguments, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "0 audio files" in refusal(capsys, *arguments, tmp_path / "empty")
    shutil.copy(tests / "id0/0.wav", enrolled / "loose.wav")
    assert "loose.wav lies in no speaker's folder" in refusal(capsys, *arguments, enrolled)
    (enrolled / "loose.wav").unlink()
    assert "--top-k: got 0, expected at least 1" in refusal(capsys, *arguments, enrolled, "--top-k", 0)
    assert "TEST: no file or folder" in refusal(
        capsys, "identify", folder, "--enrolled", enrolled, "--test", tmp_path / "x"
    )


# ---------------------------------------------------------------- from the Hub


def test_thresholds_travel_with_the_model(hub, calibrated, files, folder, capsys):
    assert run("push", calibrated, "anna/base") == 0
    capsys.readouterr()
    run("verify", "anna/base", files[0], "--test", files[1])
    entry = Thresholds.load(calibrated).find(32)
    printed = capsys.readouterr().out
    assert printed.startswith(f"anna/base, 32 dimensions, cosine: accepted from a score of {entry.threshold:.4f} on")


def test_a_model_on_the_hub_without_thresholds(hub, folder, files, capsys):
    assert run("push", folder, "anna/base") == 0
    capsys.readouterr()
    assert run("verify", "anna/base", files[0], "--test", files[1]) == 3
    assert "no decision: there is no thresholds.json beside the model" in capsys.readouterr().out
