import json
import os
import shutil

import av
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.data import prepare
from mrl_redimnet.data.corpus import SpeakerTable, audio_source, load_corpus, split_usable
from mrl_redimnet.data.prepare import EXPECTED, IncompleteError, PreparedIndex, Published, read_listing
from mrl_redimnet_cli import main

RATE = 16_000


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    yield
    datasets.enable_progress_bars()


def noise(seconds, seed):
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def write_m4a(path, wave):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono", options={"aac_pns": "0"})
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """aac/<speaker>/<video>/<utterance>.m4a and .wav: 4 speakers, 24 utterances."""
    root = tmp_path_factory.mktemp("vox2")
    for i in range(24):
        suffix = "m4a" if i % 3 == 0 else "wav"
        path = root / "aac" / f"id{i % 4}" / f"video{i % 8}" / f"{i:05d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = noise(0.1 + 0.01 * i, i)
        write_m4a(path, wave) if suffix == "m4a" else sf.write(path, wave, RATE)
    return root


@pytest.fixture
def corpus(template, tmp_path):
    return shutil.copytree(template, tmp_path / "vox2")


def prepared(corpus, out, **options):
    return prepare.prepare(corpus, out, "voxceleb2", **{"shard_mb": 0.03, "cache_dir": out.parent / "cache", **options})


def rows_of(folder):
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_prepared_speech_is_the_speech_of_the_folder(corpus, tmp_path):
    index = prepared(corpus, tmp_path / "out")
    folder = load_corpus(corpus, cache_dir=tmp_path / "cache")
    data = load_corpus(tmp_path / "out", cache_dir=tmp_path / "cache")
    assert data.column_names == folder.column_names and data.features == folder.features
    assert (index.rows, index.speakers, index.seconds) == (24, 4, pytest.approx(sum(folder["seconds"])))
    assert index == PreparedIndex.parse((tmp_path / "out" / "index.json").read_text(), "index.json")
    assert SpeakerTable.load(tmp_path / "out" / "speakers.json").names == ("id0", "id1", "id2", "id3")
    assert sum(shard["rows"] for shard in index.shards) == 24 and len(index.shards) > 3
    of_path = {row["path"]: number for number, row in enumerate(folder)}
    assert sorted(data["path"][:]) == sorted(of_path) and data["path"][:] != folder["path"][:]
    for number, row in enumerate(data):
        same = of_path[row["path"]]
        assert {**row, "audio": None} == {**folder[same], "audio": None}
        source, file = audio_source(data, number), audio_source(folder, same)
        assert open(file, "rb").read() == source.data
        np.testing.assert_array_equal(read_audio(source, 0.02, 0.05), read_audio(file, 0.02, 0.05))


def test_any_reader_of_parquet_finds_audio(corpus, tmp_path):
    prepared(corpus, tmp_path / "out")
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "out" / "*.parquet"), streaming=True)["train"]
    assert isinstance(data.features["audio"], datasets.Audio)
    assert set(data.features) == {"audio", "speaker", "session", "path", "seconds"}


def test_shards_are_shuffled_by_the_seed_alone(corpus, tmp_path):
    def order(name, **options):
        prepared(corpus, tmp_path / name, **options)
        return [row["path"] for row in rows_of(tmp_path / name)]

    first = order("a")
    assert order("b") == first
    assert sorted(order("c", seed=1)) == sorted(first) and order("d", seed=1) != first
    assert len({path.split("/")[0] for path in first[:6]}) > 1  # not sorted by speaker


def test_processes_and_threads_do_not_change_the_files(corpus, tmp_path):
    prepared(corpus, tmp_path / "one", shard_mb=0.08)
    prepared(corpus, tmp_path / "two", shard_mb=0.08, num_proc=2)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")


class Stopped(Exception):
    pass


def stop_at(monkeypatch, shard):
    """Makes writing fail in the middle of a shard, and counts what is written."""
    calls, real = [], prepare.read_rows

    def read(usable, rows):
        calls.append(len(rows))
        if len(calls) == shard:
            raise Stopped
        return real(usable, rows)

    monkeypatch.setattr(prepare, "read_rows", read)
    return calls


def test_a_stopped_run_leaves_no_output_and_is_taken_up(corpus, tmp_path, monkeypatch):
    prepared(corpus, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stopped):
            prepared(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.writing").glob("*.parquet"))) == 3
    with monkeypatch.context() as patch:
        calls = stop_at(patch, 0)
        index = prepared(corpus, tmp_path / "out")
    assert len(calls) == len(index.shards) - 3  # the complete ones were kept
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))
    assert (tmp_path / "out" / "index.json").read_text() == (tmp_path / "whole" / "index.json").read_text()
    assert not (tmp_path / ".out.writing").exists()


def test_a_stopped_run_of_another_state_is_not_taken_up(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stopped):
            prepared(corpus, tmp_path / "out")
    sf.write(corpus / "aac" / "id1" / "video1" / "00001.wav", noise(0.11, 99), RATE)  # of the same length
    prepared(corpus, tmp_path / "out")
    prepared(corpus, tmp_path / "whole")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


def test_an_existing_folder_is_not_touched(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists already"):
        prepared(corpus, tmp_path / "out")


def test_unusable_files_are_reported_not_lost(corpus, tmp_path, monkeypatch):
    (corpus / "aac" / "id1" / "video1" / "00001.wav").write_bytes(b"")
    real = prepare.read_rows

    def vanish(usable, rows):
        (corpus / "aac" / "id2" / "video2" / "00002.wav").unlink(missing_ok=True)
        return real(usable, rows)

    monkeypatch.setattr(prepare, "read_rows", vanish)
    index = prepared(corpus, tmp_path / "out")
    assert index.rows == 22 == len(rows_of(tmp_path / "out"))
    lines = (tmp_path / "out" / "problems.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines[1:]] == ["id1/video1/00001.wav", "id2/video2/00002.wav"]
    assert "0 bytes" in lines[1] and "not read" in lines[2]


def test_published_counts_are_verified_before_anything_is_written(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(EXPECTED, "small", Published(26, 5, "a paper"))
    with pytest.raises(IncompleteError) as error:
        prepared(corpus, tmp_path / "out", expect="small")
    assert "24 usable utterances, published are 26 (2 are missing)" in str(error.value)
    assert "4 usable speakers, published are 5 (1 are missing)" in str(error.value) and "a paper" in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.writing").exists()
    index = prepared(corpus, tmp_path / "out", expect="small", allow_incomplete=True)
    assert len(index.incomplete) == 2
    monkeypatch.setitem(EXPECTED, "small", Published(24, None, "a paper"))
    assert prepared(corpus, tmp_path / "complete", expect="small").incomplete == []
    monkeypatch.setitem(EXPECTED, "small", Published(23, 4, "a paper"))
    with pytest.raises(IncompleteError, match="1 too many"):
        prepared(corpus, tmp_path / "more", expect="small")


def test_missing_utterances_of_a_list_are_named(corpus, tmp_path):
    lost = ["aac/id3/video3/00003.m4a", "aac/id3/video7/00007.wav", "aac/id0/video0/00000.m4a"]
    paths = sorted(path.relative_to(corpus / "aac").with_suffix(".wav") for path in corpus.rglob("0*"))
    (tmp_path / "list.txt").write_text("".join(f"{path.parts[0]} {path}\n" for path in paths))
    assert prepared(corpus, tmp_path / "whole", listing=tmp_path / "list.txt").incomplete == []
    for path in lost:
        (corpus / path).unlink()
    with pytest.raises(IncompleteError) as error:
        prepared(corpus, tmp_path / "out", listing=tmp_path / "list.txt")
    assert "3 of 24 listed utterances" in str(error.value) and "id0/video0/00000, id3/video3/00003" in str(error.value)
    assert "of 2 speakers: id3 (2 of 6), id0 (1 of 6)" in str(error.value)


def test_lists_of_every_kind_name_utterances(tmp_path):
    file = tmp_path / "veri_test2.txt"
    file.write_text("1 a/v/1.wav a/v/2.wav\n0 a/v/1.wav b/v/1.wav\n\n")
    assert read_listing(file) == ({"a/v/1", "a/v/2", "b/v/1"}, 2)
    file.write_text("a a/v/1.m4a\nb/v/1.wav\n")
    assert read_listing(file) == ({"a/v/1", "b/v/1"}, 0)
    file.write_text("a/v/1.m4a\nnothing\n")
    with pytest.raises(ValueError, match="line 2: 'nothing' names no utterance"):
        read_listing(file)


def test_a_known_trial_list_that_is_cut_off_is_noticed(corpus, tmp_path):
    (tmp_path / "veri_test2.txt").write_text("1 id0/video0/00000.wav id0/video4/00004.wav\n")
    with pytest.raises(IncompleteError, match="1 trials of 2 utterances, published are 37,611 of 4,708"):
        prepared(corpus, tmp_path / "out", listing=tmp_path / "veri_test2.txt")


def test_damaged_indices_are_refused():
    for text in ("{}", "[", json.dumps({"rows": 1, "colour": "red"})):
        with pytest.raises(ValueError, match="x/index.json is not the index"):
            PreparedIndex.parse(text, "x/index.json")


def test_prepared_speech_can_be_prepared_again(corpus, tmp_path):
    prepared(corpus, tmp_path / "out")
    prepare.prepare(tmp_path / "out", tmp_path / "again", shard_mb=1, cache_dir=tmp_path / "cache")
    by_path = {row["path"]: row for row in rows_of(tmp_path / "out")}
    assert {row["path"]: row for row in rows_of(tmp_path / "again")} == by_path


def test_settings_out_of_range_are_named(corpus, tmp_path):
    with pytest.raises(ValueError, match="shard_mb: got 0"):
        prepared(corpus, tmp_path / "out", shard_mb=0)
    with pytest.raises(ValueError, match="expect: got 'vox', expected one of .*voxceleb2-dev"):
        prepared(corpus, tmp_path / "out", expect="vox")


def test_a_corpus_without_usable_files_is_refused(tmp_path):
    (tmp_path / "data" / "a" / "s").mkdir(parents=True)
    (tmp_path / "data" / "a" / "s" / "1.wav").touch()
    with pytest.raises(ValueError, match="none of its 1 files can be used.*0 bytes"):
        prepare.prepare(tmp_path / "data", tmp_path / "out", cache_dir=tmp_path / "cache")
    usable, _ = split_usable(load_corpus(tmp_path / "data", cache_dir=tmp_path / "cache"), 0.0)
    assert len(usable) == 0


def test_the_command_prepares_and_tells_what_it_wrote(corpus, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("id9/video0/00000.wav\n")
    line = [str(corpus), str(tmp_path / "out"), "--layout", "voxceleb2", "--shard-mb", "0.03", "--num-proc", "2"]
    line += ["--list", str(tmp_path / "list.txt")]
    assert main(["prepare", *line]) == 2
    assert "id9/video0/00000" in capsys.readouterr().err
    assert main(["prepare", *line, "--allow-incomplete"]) == 0
    told = capsys.readouterr().out
    assert "Note: " in told and "1 of 1 listed utterances are missing" in told
    assert "24 utterances of 4 speakers, 0.0 h, in 5 parquet files" in told


def test_the_speakers_of_an_evaluation_part_are_left_out_unless_they_are_wanted(tmp_path, capsys):
    for name in ("id00000", "id00001", "id00800"):
        for session in ("01", "02"):
            path = tmp_path / "CN-Celeb_flac/data" / name / f"singing-{session}-001.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            sf.write(path, noise(0.1, 0), RATE)
    (tmp_path / "CN-Celeb_flac/dev").mkdir()
    (tmp_path / "CN-Celeb_flac/dev/dev.lst").write_text("id00000\nid00001\n")
    for flags, speakers in (([], 2), (["--evaluation-speakers"], 3)):
        out = tmp_path / f"out{speakers}"
        assert main(["prepare", str(tmp_path / "CN-Celeb_flac"), str(out), "--layout=cnceleb1", *flags]) == 0
        told = "1 of 3 speakers (2 utterances) are those of CN-Celeb's evaluation part" in capsys.readouterr().out
        index = PreparedIndex.parse((out / "index.json").read_text(), "index.json")
        assert (index.speakers, bool(index.notes), told) == (speakers, speakers == 2, speakers == 2)
