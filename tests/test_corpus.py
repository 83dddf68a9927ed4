import io
import json
import os

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet.audio.io import Encoded, read_audio
from mrl_redimnet.data import corpus
from mrl_redimnet.data.corpus import (
    LAYOUTS,
    SpeakerTable,
    audio_source,
    check_problems,
    evaluation_speakers,
    labels_of,
    load_corpus,
    seconds_of,
    speakers_of,
    split_usable,
    without_evaluation_speakers,
)

RATE = 16_000
COLUMNS = ["audio", "path", "speaker", "session", "seconds", "problem"]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def utterance(path, seconds=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.zeros(round(seconds * RATE), np.float32), RATE)


@pytest.fixture
def voxceleb1(tmp_path):
    """vox1/wav/<speaker>/<video>/<utterance>.wav with the lists that lie beside it; returns vox1."""
    root = tmp_path / "vox1"
    for speaker, video, name, seconds in [
        ("id10002", "xTV-jFAUKcw", "00001.wav", 0.3),
        ("id10001", "J9lHsKG98U8", "00002.wav", 0.2),
        ("id10001", "J9lHsKG98U8", "00001.wav", 0.1),
        ("id10001", "1zcIwhmdeo4", "00001.wav", 0.4),
    ]:
        utterance(root / "wav" / speaker / video / name, seconds)
    (root / "vox1_meta.csv").write_text("VoxCeleb1 ID\tName\n")
    (root / "wav" / "id10001" / "notes.txt").write_text("not audio")
    return root


@pytest.mark.parametrize("inner", ["", "wav"])
def test_voxceleb1_tree(voxceleb1, tmp_path, inner):
    data = load_corpus(voxceleb1 / inner, cache_dir=tmp_path / "cache")
    assert data.column_names == COLUMNS
    assert data.features["audio"] == datasets.Audio(decode=False)
    assert data.features["seconds"] == datasets.Value("float64")
    assert data["path"][:] == [
        "id10001/1zcIwhmdeo4/00001.wav",
        "id10001/J9lHsKG98U8/00001.wav",
        "id10001/J9lHsKG98U8/00002.wav",
        "id10002/xTV-jFAUKcw/00001.wav",
    ]
    assert data["speaker"][:] == ["id10001"] * 3 + ["id10002"]
    assert data["session"][:] == ["1zcIwhmdeo4", "J9lHsKG98U8", "J9lHsKG98U8", "xTV-jFAUKcw"]
    assert data["seconds"][:] == [0.4, 0.1, 0.2, 0.3]
    assert data["problem"][:] == [""] * 4
    absolute = str(voxceleb1 / "wav" / "id10002" / "xTV-jFAUKcw" / "00001.wav")
    assert data[3]["audio"] == {"path": absolute, "bytes": None}
    assert len(read_audio(data[3]["audio"]["path"])) == 4_800


def test_voxceleb2_tree(tmp_path):
    path = tmp_path / "vox2" / "dev" / "aac" / "id00012" / "21Uxsk56VDQ" / "00001.m4a"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    (row,) = load_corpus(tmp_path / "vox2" / "dev", cache_dir=tmp_path / "cache")
    assert (row["speaker"], row["session"], row["problem"]) == ("id00012", "21Uxsk56VDQ", "")
    assert row["path"] == "id00012/21Uxsk56VDQ/00001.m4a"
    assert row["seconds"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("path", "layout", "speaker", "session"),
    [
        ("ann/one.flac", "speaker/utterance", "ann", "one"),
        ("ann/far/monday/one.FLAC", "speaker/*/session/utterance", "ann", "monday"),
        ("part1/monday/ann/one.flac", "*/session/speaker/utterance", "ann", "monday"),
        ("ann/far/one.flac", "speaker/*/utterance", "ann", "one"),
        ("wav/ann/one.two.flac", "speaker/utterance", "ann", "one.two"),
        (
            "CN-Celeb_flac/data/id00000/live_broadcast-01-001.flac",
            "*/*/speaker/session-utterance",
            "id00000",
            "live_broadcast-01",
        ),
        ("data/id00000/singing-01-001.flac", "cnceleb1", "id00000", "singing-01"),
        ("id10000/singing-01-001.flac", "cnceleb2", "id10000", "singing-01"),
        ("wav/id10001/1zcIwhmdeo4/00001.wav", "voxceleb1", "id10001", "1zcIwhmdeo4"),
        ("id000000/DwgYRqnQZHM/00000.wav", "voxblink2", "id000000", "DwgYRqnQZHM"),
        ("part/84-121123-0001.flac", "*/speaker-session-utterance", "84", "121123"),
        ("a_b_1.wav", "speaker_session_utterance", "a", "b"),
    ],
)
def test_other_layouts(tmp_path, path, layout, speaker, session):
    utterance(tmp_path / "data" / path)
    (row,) = load_corpus(tmp_path / "data", layout, cache_dir=tmp_path / "cache")
    assert (row["speaker"], row["session"]) == (speaker, session)


MALFORMED = ["", "speaker", "session/utterance", "utterance/speaker", "speaker/spk/utterance", "voxceleb3"]
MALFORMED += ["speaker/utterance-session", "speaker/session-*-utterance", "speaker-session_utterance"]


@pytest.mark.parametrize("layout", MALFORMED)
def test_malformed_layouts(tmp_path, layout):
    with pytest.raises(ValueError, match="'utterance' last"):
        load_corpus(tmp_path, layout)


def test_files_at_another_depth_are_listed_with_the_layout_that_fits(tmp_path):
    for speaker in "abcd":
        utterance(tmp_path / "data" / speaker / "one.wav")
    with pytest.raises(ValueError) as error:
        load_corpus(tmp_path / "data")
    assert "4 of 4 audio files" in str(error.value)
    assert "a/one.wav, b/one.wav, c/one.wav: layout='speaker/utterance'" in str(error.value)
    utterance(tmp_path / "data" / "a" / "b" / "c" / "one.wav")
    with pytest.raises(ValueError, match=r"1 of 5 .* a/b/c/one.wav: layout='\*/speaker/session/utterance'"):
        load_corpus(tmp_path / "data", "speaker/utterance")


def test_file_names_that_do_not_fit_are_listed(tmp_path):
    for name in ("singing-01-001.wav", "plain.wav"):
        utterance(tmp_path / "data" / "id00000" / name)
    with pytest.raises(ValueError, match="1 of 2 audio files .* names that fit layout .*, first id00000/plain.wav"):
        load_corpus(tmp_path / "data", LAYOUTS["cnceleb1"])


def test_two_format_folders_are_ambiguous(tmp_path):
    for inner in ("wav", "aac"):
        utterance(tmp_path / "data" / inner / "a" / "s" / "one.wav")
    with pytest.raises(ValueError, match="2 of 2"):
        load_corpus(tmp_path / "data")


def test_roots_without_audio(tmp_path):
    (tmp_path / "empty" / "speaker").mkdir(parents=True)
    (tmp_path / "empty" / "speaker" / "list.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="gone is not there"):
        load_corpus(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no audio \(\.wav, .* below .*empty"):
        load_corpus(tmp_path / "empty")
    with pytest.raises(ValueError, match="is a file"):
        load_corpus(tmp_path / "empty" / "speaker" / "list.txt")


def test_headers_are_read_again_only_when_the_folder_changed(voxceleb1, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(corpus, "audio_info", lambda path, info=corpus.audio_info: calls.append(path) or info(path))

    def load():
        calls.clear()
        return load_corpus(voxceleb1, cache_dir=tmp_path / "cache")

    assert len(load()) == 4 and len(calls) == 4
    assert len(load()) == 4 and not calls
    added = voxceleb1 / "wav" / "id10003" / "v" / "00001.wav"
    utterance(added, 0.1)
    assert load()["speaker"][-1] == "id10003" and len(calls) == 5
    os.utime(added, ns=(1, 1))
    assert len(load()) == 5 and len(calls) == 5
    utterance(added, 0.5)
    assert load()["seconds"][-1] == 0.5
    added.unlink()
    assert len(load()) == 4


def test_processes_do_not_change_the_rows(voxceleb1, tmp_path):
    one = load_corpus(voxceleb1, cache_dir=tmp_path / "one")
    two = load_corpus(voxceleb1, cache_dir=tmp_path / "two", num_proc=2)
    assert one[:] == two[:]
    assert len(two.cache_files) == 2


def test_folder_that_changes_between_listing_and_scanning(voxceleb1, tmp_path):
    builder = corpus.SpeechFolder(cache_dir=str(tmp_path / "cache"), folder=str(voxceleb1), fingerprint="of yesterday")
    with pytest.raises(RuntimeError, match="changed while"):
        builder.download_and_prepare()


def test_unreadable_and_short_files_leave_with_a_reason(voxceleb1, tmp_path):
    (voxceleb1 / "wav" / "id10001" / "1zcIwhmdeo4" / "00002.wav").write_bytes(b"")
    (voxceleb1 / "wav" / "id10001" / "1zcIwhmdeo4" / "00003.wav").symlink_to(tmp_path / "nowhere.wav")
    data = load_corpus(voxceleb1, cache_dir=tmp_path / "cache")
    assert data["seconds"][:] == [0.4, 0.0, 0.0, 0.1, 0.2, 0.3]
    usable, problems = split_usable(data, 0.2)
    assert usable["seconds"][:] == [0.4, 0.2, 0.3]
    assert usable.column_names == COLUMNS
    assert [path.split("/", 1)[1] for path, _ in problems] == [
        "1zcIwhmdeo4/00002.wav",
        "1zcIwhmdeo4/00003.wav",
        "J9lHsKG98U8/00001.wav",
    ]
    assert "0 bytes" in problems[0][1]
    assert "not there" in problems[1][1]
    assert problems[2][1] == "0.100 s long, shorter than 0.2 s"


def test_usable_rows_without_problems_are_the_same_data(voxceleb1, tmp_path):
    data = load_corpus(voxceleb1, cache_dir=tmp_path / "cache")
    assert split_usable(data, 0.1)[0] is data


def test_columns_as_arrays(voxceleb1, tmp_path):
    data = load_corpus(voxceleb1, cache_dir=tmp_path / "cache")
    table = SpeakerTable(["id10002", "nobody", "id10001"])
    for rows in (range(4), [3, 0, 3], [2]):
        some = data.select(rows)
        labels = labels_of(some, table)
        assert labels.dtype == np.int32 and labels.tolist() == [table.id(name) for name in some["speaker"]]
        assert seconds_of(some).dtype == np.float64 and seconds_of(some).tolist() == some["seconds"][:]
        assert speakers_of(some) == sorted(set(some["speaker"]))
    with pytest.raises(ValueError, match="'id10001' is not among"):
        labels_of(data, SpeakerTable(["id10002"]))
    nothing = data.select([])
    assert len(labels_of(nothing, table)) == len(seconds_of(nothing)) == len(speakers_of(nothing)) == 0


def audio_bytes(seconds, format="flac"):
    buffer = io.BytesIO()
    sf.write(buffer, np.zeros(round(seconds * RATE), np.float32), RATE, format=format)
    return buffer.getvalue()


def write_parquet(path, features, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, datasets.Features(features).arrow_schema), path)


def test_parquet_with_a_class_label_and_no_lengths(tmp_path):
    features = {"audio": datasets.Audio(decode=False), "label": datasets.ClassLabel(names=["ann", "bob"])}
    rows = [{"audio": {"bytes": audio_bytes(0.1 * (n + 1)), "path": "a.flac"}, "label": n % 2} for n in range(3)]
    rows.append({"audio": {"bytes": b"", "path": None}, "label": None})
    write_parquet(tmp_path / "set" / "b.parquet", features, rows[:2])
    write_parquet(tmp_path / "set" / "c.parquet", features, rows[2:])
    for source in (tmp_path / "set", str(tmp_path / "set" / "*.parquet"), f"file://{tmp_path}/set"):
        data = load_corpus(source, cache_dir=tmp_path / "cache")
        assert data.column_names == COLUMNS and data.features["audio"] == datasets.Audio(decode=False)
        assert data["path"][:] == ["ann/00000000-a.flac", "bob/00000001-a.flac", "ann/00000002-a.flac", "/00000003"]
        assert data["speaker"][:] == ["ann", "bob", "ann", ""]
        np.testing.assert_allclose(data["seconds"][:], [0.1, 0.2, 0.3, 0])
        assert len(set(data["session"][:])) == 4
        assert data["problem"][:] == ["", "", "", "no label is given"]
        source = audio_source(data, 1)
        assert isinstance(source, Encoded) and len(read_audio(source, 0.05, 0.1)) == 1600
        usable, problems = split_usable(data, 0.15)
        assert usable["path"][:] == ["bob/00000001-a.flac", "ann/00000002-a.flac"] and len(problems) == 2


def test_parquet_of_other_column_names(tmp_path):
    features = {name: datasets.Value("string") for name in ("who", "video_id", "file")}
    features |= {"clip": datasets.Audio(), "length": datasets.Value("float32")}
    row = {"who": "7", "video_id": "v", "file": "x.wav", "clip": {"bytes": audio_bytes(0.2), "path": None}, "length": 2}
    write_parquet(tmp_path / "a.parquet", features, [row])
    columns = {"speaker": "who", "seconds": "length"}  # the audio is known by its type
    (found,) = load_corpus(tmp_path / "a.parquet", cache_dir=tmp_path / "cache", columns=columns)
    assert (found["speaker"], found["session"], found["path"], found["seconds"]) == ("7", "v", "7/x.wav", 2.0)
    with pytest.raises(ValueError, match=r"no column is named as the speaker usually is .*clip \(Audio\)"):
        load_corpus(tmp_path / "a.parquet", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"no column whom; there are who \(string\)"):
        load_corpus(tmp_path / "a.parquet", cache_dir=tmp_path / "cache", columns={"speaker": "whom"})
    with pytest.raises(ValueError, match="columns: got voice, expected some of audio, speaker"):
        load_corpus(tmp_path / "a.parquet", cache_dir=tmp_path / "cache", columns={"voice": "clip"})


def test_numbers_in_a_label_column_are_no_speakers(tmp_path):
    features = {"audio": datasets.Audio(decode=False), "label": datasets.Value("int64")}
    write_parquet(tmp_path / "a.parquet", features, [{"audio": {"bytes": b"x", "path": None}, "label": 1}])
    with pytest.raises(ValueError, match=r"the speaker usually is .*label \(int64\)"):
        load_corpus(tmp_path / "a.parquet", cache_dir=tmp_path / "cache")


def test_changed_parquet_is_read_again(tmp_path):
    features = {"audio": datasets.Audio(decode=False), "speaker": datasets.Value("string")}
    for speaker in ("ann", "bob"):
        row = {"audio": {"bytes": audio_bytes(0.1), "path": None}, "speaker": speaker}
        write_parquet(tmp_path / "a.parquet", features, [row] * len(speaker))
        os.utime(tmp_path / "a.parquet", (len(os.listdir(tmp_path)), 5 if speaker == "ann" else 9))
        assert set(load_corpus(tmp_path / "a.parquet", cache_dir=tmp_path / "cache")["speaker"]) == {speaker}


def test_a_hub_data_set_is_loaded_by_its_name_and_split(tmp_path, monkeypatch):
    features = {"audio": datasets.Audio(decode=False), "speaker_id": datasets.Value("int64")}
    row = {"audio": {"bytes": audio_bytes(0.1), "path": "a.flac"}, "speaker_id": 12}
    write_parquet(tmp_path / "owner" / "name" / "data" / "test-00000-of-00001.parquet", features, [row])
    asked, load = [], datasets.load_dataset

    def local(path, **options):  # the Hub's part: its name and split arrive, the loader is the real one
        asked.append((path, options["split"]))
        return load(str(tmp_path / path), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    (found,) = load_corpus("owner/name:test", cache_dir=tmp_path / "cache")
    assert asked == [("owner/name", "test")]
    assert (found["speaker"], found["path"]) == ("12", "12/00000000-a.flac")


def test_a_source_that_is_nowhere_is_named(tmp_path, monkeypatch):
    def missing(path, **options):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(FileNotFoundError, match="own/gone is no folder or file here.*doesn't exist on the Hub"):
        load_corpus("own/gone")
    with pytest.raises(FileNotFoundError, match=r"\*\.parquet: no file has such a path"):
        load_corpus(str(tmp_path / "*.parquet"))
    with pytest.raises(FileNotFoundError, match="gone.parquet is not there"):
        load_corpus(tmp_path / "gone.parquet")


def test_problems_are_summed_up_and_reported(tmp_path):
    problems = [(f"s/{i}.wav", f"broken\tin\n{i} ways") for i in range(7)]
    summary = check_problems(problems, 1_400, 0.005, tmp_path / "problems.tsv")
    assert summary.startswith("7 of 1,400 files cannot be used (0.50 %): s/0.wav (broken")
    assert "s/4.wav" in summary and "s/5.wav" not in summary and "2 more" in summary
    lines = (tmp_path / "problems.tsv").read_text().splitlines()
    assert lines[0] == "path\treason" and lines[7] == "s/6.wav\tbroken in 6 ways" and len(lines) == 8


def test_too_many_problems_raise_after_the_report_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"2 of 10 files cannot be used \(20.00 %\).*At most 10 %"):
        check_problems([("a", "bad"), ("b", "bad")], 10, 0.1, tmp_path / "problems.tsv")
    assert len((tmp_path / "problems.tsv").read_text().splitlines()) == 3


def test_no_problems(tmp_path):
    assert check_problems([], 1_199, 0.0, tmp_path / "problems.tsv") == "all 1,199 files can be used"
    assert not (tmp_path / "problems.tsv").exists()


names = st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=8)


@given(known=names, batches=st.lists(names, max_size=3))
def test_labels_never_change_as_a_table_grows(known, batches):
    table = SpeakerTable(known)
    for batch in batches:
        grown = table.extended(batch)
        assert grown.names[: len(table)] == table.names
        assert set(grown.names) == {*table.names, *batch}
        assert list(grown.names[len(table) :]) == sorted(set(batch) - set(table.names))
        assert grown.names == table.extended(list(reversed(batch))).names
        table = grown
    assert [table.id(table.name(label)) for label in range(len(table))] == list(range(len(table)))


def test_table_survives_saving(tmp_path):
    table = SpeakerTable(["id2", "id1", "Zoë"])
    SpeakerTable(["old"]).save(tmp_path / "speakers.json")
    table.save(tmp_path / "speakers.json")
    assert SpeakerTable.load(tmp_path / "speakers.json").names == table.names
    assert json.loads((tmp_path / "speakers.json").read_text(encoding="utf-8")) == ["id2", "id1", "Zoë"]
    assert os.listdir(tmp_path) == ["speakers.json"]


def test_unknown_speakers_and_labels():
    table = SpeakerTable(["id10001", "id10002", "nobody"])
    with pytest.raises(ValueError, match="'id1001' is not among the 3 .*id10001, id10002"):
        table.id("id1001")
    for label in (-1, 3):
        with pytest.raises(ValueError, match="outside this table of 3"):
            table.name(label)


@pytest.mark.parametrize("content", ["", "{}", '"ab"', '["a", 1]', '["a", "a"]', "[1"])
def test_damaged_tables_are_refused(tmp_path, content):
    (tmp_path / "speakers.json").write_text(content)
    with pytest.raises(ValueError, match="speakers.json is not a speaker table"):
        SpeakerTable.load(tmp_path / "speakers.json")


# ---------------------------------------------------------------- CN-Celeb's evaluation part


@pytest.fixture
def cnceleb(tmp_path):
    """CN-Celeb_flac as it unpacks, in small: one speaker of the first eight hundred is not in dev.lst."""
    root = tmp_path / "CN-Celeb_flac"
    for name in ("id00000", "id00001", "id00017", "id00800", "id00999"):
        utterance(root / "data" / name / "singing-01-001.flac")
        utterance(root / "data" / name / "live_broadcast-02-003.flac")
    (root / "dev").mkdir()
    (root / "dev/dev.lst").write_text("id00000\nid00001\n")
    utterance(root / "eval/enroll/id00800-enroll.flac")
    return root


@pytest.mark.parametrize("layout", ["cnceleb1", "cnceleb2", "speaker/utterance", "speaker/session-utterance"])
@pytest.mark.parametrize("inside", ["", "data"])
def test_speakers_that_dev_lst_does_not_list_are_left_out(cnceleb, tmp_path, layout, inside):
    """Whatever the layout is called: the list lies beside the speakers."""
    data = load_corpus(cnceleb / inside, layout, tmp_path / "cache")
    kept, said = without_evaluation_speakers(data, layout, cnceleb / inside)
    assert len(data) == 10 and speakers_of(kept) == ["id00000", "id00001"] and len(kept) == 4
    assert "3 of 5 speakers (6 utterances) are those of CN-Celeb's evaluation part (id00017 ... id00999)" in said


@pytest.mark.parametrize("layout", ["cnceleb1", "cnceleb2", "speaker/utterance"])
def test_without_the_list_they_are_known_by_their_numbers(cnceleb, tmp_path, layout):
    """As where both corpora lie in one folder."""
    (cnceleb / "dev/dev.lst").unlink()
    utterance(cnceleb / "data/id10000/vlog-01-001.flac")
    data = load_corpus(cnceleb / "data", layout, tmp_path / "cache")
    kept, said = without_evaluation_speakers(data, layout, cnceleb / "data")
    assert speakers_of(kept) == ["id00000", "id00001", "id00017", "id10000"] and "2 of 6 speakers" in said


def test_speakers_of_other_corpora_with_such_numbers_stay(tmp_path):
    """VoxCeleb2 has an id00812, too; and any corpus may have a file dev/dev.lst."""
    for name in ("id00812", "id00913"):
        utterance(tmp_path / "vox2/aac" / name / "21Uxsk56VDQ" / "00001.wav")
    (tmp_path / "vox2/dev").mkdir()
    (tmp_path / "vox2/dev/dev.lst").write_text("utterance-1\n")
    data = load_corpus(tmp_path / "vox2", "voxceleb2", tmp_path / "cache")
    assert without_evaluation_speakers(data, "voxceleb2", tmp_path / "vox2") == (data, None)
    assert evaluation_speakers(["id00812"], "voxceleb2", tmp_path / "vox2") == []
    assert evaluation_speakers(["id00812", "id00001", "anna"], "cnceleb1", tmp_path) == ["id00812"]


def test_in_a_mix_of_corpora_theirs_are_left_out_alone(tmp_path):
    """In parquet files, too: there are no lists beside them."""
    for name in ("id00812", "id00913"):
        utterance(tmp_path / "mix" / name / "21Uxsk56VDQ-00001.wav")
    for name in ("id00000", "id00850"):
        utterance(tmp_path / "celebs" / name / "singing-01-001.flac")
    data = {part: load_corpus(tmp_path / part, "speaker/utterance", tmp_path / "cache") for part in ("mix", "celebs")}
    assert without_evaluation_speakers(data["mix"], "speaker/utterance", "s3://x") == (data["mix"], None)
    kept, said = without_evaluation_speakers(data["celebs"], "speaker/utterance", "s3://x")
    assert speakers_of(kept) == ["id00000"] and "1 of 2 speakers (1 utterances)" in said


@pytest.mark.parametrize(("files", "given", "expected"), [(4, None, None), (4, 3, 3), (5, None, "all"), (5, 3, 3)])
def test_the_headers_of_many_files_are_read_by_several_processes(monkeypatch, files, given, expected):
    monkeypatch.setattr(corpus, "MANY_FILES", 5)
    assert corpus.processes_for(given, files) == (len(os.sched_getaffinity(0)) if expected == "all" else expected)


def test_a_large_new_folder_is_read_by_several_processes(voxceleb1, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MANY_FILES", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    assert len(load_corpus(voxceleb1, cache_dir=tmp_path / "cache").cache_files) == 2
