"""Files that people have, good and bad, given to `embed`, `verify`, `identify`, `evaluate` and a training folder: what
can be read is used, what cannot is named, and nothing else is lost."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import tiny_model
from test_cli import refusal, run

from mrl_redimnet.audio.augmentation import AddNoise
from mrl_redimnet.audio.io import SAMPLING_RATE, AudioWarning
from mrl_redimnet.data.corpus import load_corpus, split_usable
from mrl_redimnet.extraction.bulk import read_embeddings
from mrl_redimnet.saving import save_model

LATIN = os.fsdecode(b"caf\xe9.wav")
SECONDS = 0.5


def voice(seed: int = 0, seconds: float = SECONDS) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLING_RATE))).astype(np.float32)


def write(path: Path, wave: np.ndarray | None = None, rate: int = SAMPLING_RATE, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(os.fsencode(path), voice() if wave is None else wave, rate, **options)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def no_rate(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[24:28] = bytes(4)
    path.write_bytes(content)
    return path


def bad_files(folder: Path) -> dict[str, str]:
    """Writes files that cannot be used: {name as it is printed: a part of the reason}."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("not audio\n" * 50)
    (folder / "linked.wav").symlink_to(folder / "gone.wav")
    os.mkfifo(folder / "pipe.wav")
    write(folder / "one.wav", voice()[:1])
    write(folder / "nan.wav", np.where(np.arange(8000) == 99, np.nan, voice()), subtype="FLOAT")
    write(folder / "loud.wav", 1000 * voice(), subtype="FLOAT")
    write(folder / "hush.wav", 0 * voice())
    no_rate(write(folder / "rate.wav"))
    cut(write(folder / "cut.flac", voice(seconds=4)))
    write(folder / LATIN)
    return {
        "empty.wav": "0 bytes",
        "text.wav": "cannot be read as audio",
        "linked.wav": "is a link to",
        "pipe.wav": "a pipe, a device or a socket",
        "one.wav": "1 samples",
        "nan.wav": "NaN",
        "loud.wav": "values up to",
        "hush.wav": "is silent (level -inf dBFS, 0.00 s of 0.50 s with sound",
        "rate.wav": "cannot be read as audio",
        "cut.flac": "cannot be read as audio",
        "caf\\xe9.wav": "not UTF-8",
    }


def good_files(folder: Path) -> list[str]:
    """Writes files that can be used, of odd kinds; their names as they are printed, sorted."""
    write(folder / "eight.wav", np.repeat(voice()[:, None], 8, axis=1), subtype="PCM_24")
    write(folder / "fast.wav", voice(seconds=6), 192_000)
    write(folder / "over.wav", 20 * voice(), subtype="FLOAT")
    write(folder / "gsm.wav", voice(), 8_000, subtype="GSM610")
    write(folder / "sphere.sph", format="NIST")
    write(folder / "quiet.wav", 0.01 * voice())
    write(folder / "100%s {x}.wav")
    write(folder / "two\nlines.wav")
    write(folder / ("x" * 240 + ".wav"))
    write(folder / "folder.wav" / "inside.aiff")
    names = ["eight.wav", "fast.wav", "over.wav", "gsm.wav", "sphere.sph", "quiet.wav", "100%s {x}.wav"]
    return sorted([*names, "two\nlines.wav", "x" * 240 + ".wav", "folder.wav/inside.aiff"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad_files") / "model"
    save_model(tiny_model(), folder)
    return folder


# ---------------------------------------------------------------- embed


def test_embed_goes_on_and_lists_every_bad_file_with_its_reason(model, tmp_path, capsys):
    reasons, good = bad_files(tmp_path / "in"), good_files(tmp_path / "in")
    (tmp_path / "in/notes.txt").touch()
    (tmp_path / "in/._x.wav").touch()
    assert run("embed", model, tmp_path / "in", "--out", tmp_path / "out", "--workers", 0) == 1
    printed = capsys.readouterr()
    assert sorted(read_embeddings(tmp_path / "out")[0]) == good
    lines = [line for file in (tmp_path / "out").glob("problems-*.jsonl") for line in file.read_text().splitlines()]
    told = {problem["id"]: problem["reason"] for problem in map(json.loads, lines)}
    assert told.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in told[name], name
        assert f"Left out: {name}: " in printed.err
    assert "left out 1 files that are not named as audio (1 .txt), 1 hidden files or folders." in printed.err
    assert f"{len(good)} utterances embedded" in printed.out and "11 could not be embedded" in printed.out


@pytest.mark.slow
def test_embed_by_a_process_of_its_own_writes_names_of_any_bytes(model, tmp_path):
    """With a worker, and a terminal that takes UTF-8 only."""
    write(tmp_path / "in" / LATIN)
    write(tmp_path / "in/a.wav")
    command = [sys.executable, "-m", "mrl_redimnet_cli", "embed", model, tmp_path / "in", tmp_path / "in" / LATIN]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 1 and b"caf\\xe9.wav: its name is not UTF-8 text" in done.stderr
    assert read_embeddings(tmp_path / "out")[0] == ["a.wav"]


# ---------------------------------------------------------------- verify and identify


@pytest.mark.parametrize("side", ["enrolment", "test"])
def test_verify_refuses_a_bad_file_by_name(model, tmp_path, capsys, side):
    reasons = bad_files(tmp_path / "in")
    good = write(tmp_path / "good.wav")
    for name, reason in reasons.items():
        if name in ("linked.wav", "pipe.wav", "caf\\xe9.wav"):
            continue
        bad = tmp_path / "in" / name
        files = [bad, "--test", good] if side == "enrolment" else [good, "--test", bad]
        message = refusal(capsys, "verify", model, *files, "--threshold", 0.3)
        assert str(bad) in message and reason in message


def test_verify_takes_odd_names(model, tmp_path, capsys):
    good = [*(tmp_path / "in" / name for name in good_files(tmp_path / "in")), write(tmp_path / LATIN)]
    assert run("verify", model, good[0], "--test", *good, "--threshold", -2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(good) and any(line.endswith("two\\nlines.wav") for line in lines)
    assert lines[-1].endswith("caf\\xe9.wav")


def test_identify_knows_linked_speakers_and_names_every_bad_file(model, tmp_path, capsys):
    write(tmp_path / "enrolled/anna/1.wav", voice(1))
    write(tmp_path / "elsewhere/1.wav", voice(2))
    (tmp_path / "enrolled/bob").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "enrolled" / "._1.wav").touch()
    test = write(tmp_path / "test.wav", voice(2))
    arguments = ["identify", model, "--enrolled", tmp_path / "enrolled", "--test"]
    assert run(*arguments, test) == 0
    printed = capsys.readouterr()
    assert "2 enrolled speakers" in printed.out and "\nbob\t" in printed.out and "1 hidden" in printed.err
    (tmp_path / "enrolled" / "._1.wav").unlink()
    write(tmp_path / "enrolled/anna/hush.wav", 0 * voice())
    write(tmp_path / "tests/click.wav", np.eye(1, 8000, 4000)[0])
    write(tmp_path / "tests/a.wav")
    message = refusal(capsys, *arguments, tmp_path / "tests")
    assert "2 of 5 files cannot be used" in message and "hush.wav is silent (level -inf dBFS" in message
    assert "click.wav holds no speech, a few clicks at most (level -39.0 dBFS, 0.00 s of 0.50 s" in message


def test_evaluate_scores_a_silent_file_and_says_so(model, tmp_path, capsys):
    for speaker in "ab":
        for number in range(2):
            write(tmp_path / f"wav/{speaker}/{number}.wav", voice(10 * ord(speaker) + number))
    write(tmp_path / "wav/b/2.wav", 0 * voice())
    lines = ["1 a/0.wav a/1.wav", "0 a/0.wav b/1.wav", "1 b/0.wav b/1.wav", "0 a/1.wav b/2.wav"]
    (tmp_path / "trials.txt").write_text("\n".join(lines) + "\n")
    arguments = ["evaluate", model, "--trials", tmp_path / "trials.txt", "--folder", tmp_path / "wav"]
    assert run(*arguments, "--resamples", 0) == 0
    printed = capsys.readouterr()
    assert "4 trials" in printed.out
    assert "Note: " in printed.err and "b/2.wav is silent" in printed.err and "used as it is" in printed.err


def test_a_bad_file_in_a_cohort_is_left_out_and_named(model, tmp_path, capsys):
    good = write(tmp_path / "good.wav", voice(9))
    for number in range(4):
        write(tmp_path / f"cohort/{number}.wav", voice(number))
    (tmp_path / "cohort/bad.wav").write_text("no audio")
    arguments = ["--scoring", "as_norm", "--cohort", tmp_path / "cohort", "--top", 3, "--threshold", -99]
    assert run("verify", model, good, "--test", good, *arguments) == 0
    assert "Note: cohort: 1 of 5 files cannot be used: " in capsys.readouterr().err


# ---------------------------------------------------------------- training


def test_a_training_folder_lists_bad_files_and_trains_on_the_rest(tmp_path):
    reasons = bad_files(tmp_path / "speech/anna")
    good = [f"bob/{name}" for name in good_files(tmp_path / "speech/bob") if "/" not in name]
    write(tmp_path / "speech/._anna/1.wav")
    (tmp_path / "speech/bob/folder.wav/inside.aiff").unlink()
    with pytest.warns(AudioWarning, match="1 hidden"):
        corpus = load_corpus(tmp_path / "speech", "speaker/utterance", cache_dir=tmp_path / "cache")
    usable, problems = split_usable(corpus, min_seconds=0.1)
    told = dict(problems)
    by_header = {"empty.wav", "text.wav", "linked.wav", "pipe.wav", "one.wav", "rate.wav", "caf\\xe9.wav"}
    assert told.keys() == {f"anna/{name}" for name in by_header}
    assert all(reasons[name] in told[f"anna/{name}"] for name in by_header - {"one.wav"})
    assert sorted(path for path in usable["path"] if path.startswith("bob")) == good


def test_hidden_files_among_noise_are_no_noise(tmp_path):
    write(tmp_path / "noise/a.wav")
    (tmp_path / "noise/._a.wav").touch()
    with pytest.warns(AudioWarning, match="1 hidden"):
        assert AddNoise(tmp_path / "noise").files == [str(tmp_path / "noise/a.wav")]


# ---------------------------------------------------------------- archives and tables


def test_an_archive_of_a_mac_and_a_hidden_archive(model, tmp_path, capsys):
    write(tmp_path / "a.wav")
    with tarfile.open(tmp_path / "speech.tar", "w") as archive:
        for name in ("s/a.wav", "s/._a.wav", "__MACOSX/s/a.wav", "notes.txt", "s/caf\udce9.wav"):
            archive.add(tmp_path / "a.wav", name)
        link = tarfile.TarInfo("s/link.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (tmp_path / "in").mkdir()
    (tmp_path / "speech.tar").rename(tmp_path / "in/speech.tar")
    (tmp_path / "in/._speech.tar").touch()
    assert run("embed", model, tmp_path / "in", "--out", tmp_path / "out", "--workers", 0) == 1
    printed = capsys.readouterr()
    assert read_embeddings(tmp_path / "out")[0] == ["speech.tar/s/a.wav"]
    assert "Left out: speech.tar/s/caf\\xe9.wav: " in printed.err
    assert "speech.tar: left out 1 files that are not named as audio (1 .txt), 2 hidden" in printed.err
    assert "s/link.wav: a link, a pipe or a device" in printed.err


def table(file: Path, audio: list, **columns) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"audio": pa.array(audio, kind), **columns}), file)
    return file


def test_rows_without_audio_are_problems(model, tmp_path, capsys):
    data = write(tmp_path / "a.wav").read_bytes()
    audio = [{"bytes": data, "path": "a.wav"}, None, {"bytes": None, "path": None}, {"bytes": b"", "path": "b.wav"}]
    file = table(tmp_path / "rows/rows.parquet", audio, path=["0", "1", "2", "3"])
    assert run("embed", model, file, "--out", tmp_path / "out", "--workers", 0) == 1
    assert read_embeddings(tmp_path / "out")[0] == ["0"]
    assert capsys.readouterr().err.count("Left out: ") == 3


def test_data_from_elsewhere_does_not_read_files_of_this_machine(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    secret = str(write(tmp_path / "secret/a.wav"))
    audio = [{"bytes": write(tmp_path / "b.wav").read_bytes(), "path": secret}, {"bytes": None, "path": secret}]
    file = table(tmp_path / "rows/rows.parquet", audio, path=["s/0", "s/1"], speaker=["s", "s"])
    url = f"file://{file}"
    assert run("embed", model, url, "--out", tmp_path / "out", "--workers", 0) == 1
    assert read_embeddings(tmp_path / "out")[0] == ["s/0"]
    assert "is named by the data set, but is no part of it" in capsys.readouterr().err
    corpus = load_corpus(url, cache_dir=tmp_path / "hf")
    usable, problems = split_usable(corpus, 0.1)
    assert usable["path"] == ["s/0"] and "names a file of this machine" in problems[0][1]
    assert load_corpus(file, cache_dir=tmp_path / "hf")["problem"] == ["", ""]  # parquet files of this machine may
