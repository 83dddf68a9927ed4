import json
import os
from collections import Counter

import datasets
import fsspec.asyn
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import at_most
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mrl_redimnet.audio.io import Encoded
from mrl_redimnet.data import prepare
from mrl_redimnet.data.corpus import SpeakerTable
from mrl_redimnet.data.prepare import PreparedIndex
from mrl_redimnet.data.streaming import Collated, SpeechStream, StreamState, stream_contents

SIZES = (7, 12, 1, 9, 4, 10, 3)  # rows per file
WINDOW = 4


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files as `prepare` writes them, of made-up bytes, each row's its own; the speaker of row n is s(n mod 5)."""
    root = tmp_path_factory.mktemp("stream")
    first = 0
    for file, size in enumerate(SIZES):
        rows = [
            {
                "audio": {"bytes": b"%d" % n, "path": f"s{n % 5}/v/{n}.wav"},
                "speaker": f"s{n % 5}",
                "session": "v",
                "path": f"s{n % 5}/v/{n}.wav",
                "seconds": 1.0 + n,
            }
            for n in range(first, first + size)
        ]
        pq.write_table(
            pa.Table.from_pylist(rows, prepare.FEATURES.arrow_schema), root / f"{file}.parquet", row_group_size=3
        )
        first += size
    return root


TOTAL = sum(SIZES)


def make(source, row, rng):
    """The row's number and a draw of its generator."""
    assert isinstance(source, Encoded) and source.name == row["path"]
    return int(source.data), float(rng.random())


def as_batch(examples):
    return {"examples": examples}


def stream_of(folder, **options):
    return SpeechStream(str(folder), make, **{"window": WINDOW, **options})


def loader_of(stream, batch_size=3):
    return DataLoader(stream, batch_size, num_workers=stream.workers, collate_fn=Collated(as_batch))


def numbers(examples):
    return [number for number, _ in examples]


@at_most(50)
@given(world=st.integers(1, 3), workers=st.integers(0, 2), seed=st.integers(0, 99), window=st.integers(1, 9))
def test_ranks_and_workers_together_see_every_row_once_in_every_epoch(folder, world, workers, seed, window):
    seen, draws = {0: Counter(), 1: Counter()}, set()
    for rank in range(world):
        stream = stream_of(folder, seed=seed, rank=rank, world=world, workers=workers, window=window, epochs=2)
        for place in stream.places.values():
            for item in stream.examples_from(place):
                seen[item.draw[1]][item.example[0]] += 1
                draws.add(item.draw)
    for epoch in (0, 1):
        assert seen[epoch] == Counter(range(TOTAL))
    assert len(draws) == 2 * TOTAL


@at_most(50)
@given(stop=st.integers(0, 2 * TOTAL - 6), batch=st.integers(1, 5))
def test_a_stream_goes_on_exactly_wherever_it_was_stopped(folder, stop, batch):
    stream = stream_of(folder, seed=3, epochs=2)
    state, before, saved, after = StreamState(stream), [], None, []
    for number, one in enumerate(loader_of(stream, batch)):
        if number == stop // batch:
            saved = state.state_dict()
        (before if saved is None else after).extend(one["examples"])
        state.update(one)
    assert len(before) + len(after) == 2 * TOTAL
    again = stream_of(folder, seed=3, epochs=2)
    StreamState(again).load_state_dict(saved)
    assert [example for one in loader_of(again, batch) for example in one["examples"]] == after


def test_examples_are_those_of_the_seed_and_of_no_other(folder):
    def examples(seed):
        return [item.example for item in stream_of(folder, seed=seed, epochs=1)]

    assert examples(0) == examples(0)
    assert numbers(examples(0)) != numbers(examples(1)) and sorted(numbers(examples(0))) == list(range(TOTAL))


def test_every_epoch_has_another_order_of_files_and_of_rows(folder):
    items = list(stream_of(folder, epochs=2))
    first, second = items[:TOTAL], items[TOTAL:]
    assert [item.example for item in first] != [item.example for item in second]
    files = np.repeat(range(len(SIZES)), SIZES)
    orders = [list(dict.fromkeys(files[item.example[0]] for item in half)) for half in (first, second)]
    assert orders[0] != orders[1]
    inside = [[item.example[0] for item in half if files[item.example[0]] == 1] for half in (first, second)]
    assert inside[0] != inside[1] and sorted(inside[0]) == sorted(inside[1]) != inside[0]
    # Blocks of a file stay in order, so that one block is all that is held.
    assert max(inside[0][:WINDOW]) < min(inside[0][WINDOW : 2 * WINDOW])


def test_two_workers_take_turns_and_go_on_in_turn(folder):
    def batches(stream, count):
        state, found, states = StreamState(stream), [], []
        for one in loader_of(stream):
            state.update(one)
            found.append(one["examples"])
            states.append(state.state_dict())
            if len(found) == count:
                return found, states

    whole, states = batches(stream_of(folder, seed=5, workers=2), 26)  # into the second epoch
    for stop in (1, 6, 19):  # the next batch is the second worker's, the first's, and after an epoch's end
        stream = stream_of(folder, seed=5, workers=2)
        StreamState(stream).load_state_dict(states[stop - 1])
        assert batches(stream, 5)[0] == whole[stop : stop + 5]
    # The same examples without processes: the worker of a stream changes nothing about it.
    one = stream_of(folder, seed=5, workers=2)
    items = one.examples_from(one.places[1])
    assert whole[1] + whole[3] == [next(items).example for _ in range(6)]


def test_the_last_batches_of_unequal_workers_go_on_in_order(folder):
    stream = stream_of(folder, seed=1, workers=2, epochs=1)
    state, found, states = StreamState(stream), [], []
    for one in loader_of(stream, 2):
        state.update(one)
        found.append(one["examples"])
        states.append(state.state_dict())
    assert sorted(numbers([example for batch in found for example in batch])) == list(range(TOTAL))
    stop = len(found) - 2
    again = stream_of(folder, seed=1, workers=2, epochs=1)
    StreamState(again).load_state_dict(states[stop - 1])
    assert [one["examples"] for one in loader_of(again, 2)] == found[stop:]


def test_rows_that_are_not_kept_do_not_change_the_others(folder):
    all_of = {item.example[0]: item for item in stream_of(folder, epochs=1)}
    kept = list(stream_of(folder, epochs=1, keep=lambda row: row["speaker"] != "s2"))
    assert [item.example[0] for item in kept] == [n for n in all_of if n % 5 != 2]
    assert all(all_of[item.example[0]].example == item.example for item in kept)
    with pytest.raises(ValueError, match="no row of stream 0's 7 files is to be kept"):
        next(iter(stream_of(folder, keep=lambda row: False)))


def test_more_streams_than_files_are_refused_with_advice(folder):
    with pytest.raises(ValueError, match="has 7 files for 8 streams .2 processes of 4 workers.: use at most 3 workers"):
        stream_of(folder, rank=1, world=2, workers=4)


def test_a_loader_of_another_number_of_workers_is_refused(folder):
    with pytest.raises(ValueError, match="made for 2 workers, its DataLoader has 0"):
        next(iter(stream_of(folder, workers=2)))


@pytest.mark.parametrize(("name", "value"), [("workers", 2), ("seed", 1), ("window", 5), ("world", 2)])
def test_a_state_of_other_settings_is_refused(folder, name, value):
    saved = StreamState(stream_of(folder)).state_dict()
    with pytest.raises(ValueError, match=f"{name}: the stream was stopped with .*, this one has {value}"):
        StreamState(stream_of(folder, **{name: value})).load_state_dict(saved)


def test_a_state_of_other_files_is_refused(folder, tmp_path):
    saved = StreamState(stream_of(folder)).state_dict()
    (tmp_path / "fewer").mkdir()
    os.link(folder / "0.parquet", tmp_path / "fewer" / "0.parquet")
    with pytest.raises(ValueError, match="files: the stream was stopped with 7, this one has 1"):
        StreamState(stream_of(tmp_path / "fewer")).load_state_dict(saved)


def test_states_are_plain_numbers(folder):
    stream = stream_of(folder)
    state = StreamState(stream)
    state.update(next(iter(loader_of(stream))))
    assert json.loads(json.dumps(state.state_dict())) == state.state_dict()
    assert state.epoch == 0


@pytest.mark.parametrize("form", ["{}/*.parquet", "file://{}", "file://{}/*.parquet"])
def test_patterns_and_stores_are_streamed(folder, form):
    found = [item.example for item in SpeechStream(form.format(folder), make, window=WINDOW, epochs=1)]
    assert found == [item.example for item in stream_of(folder, epochs=1)]


def test_contents_in_one_pass_without_the_audio(folder, monkeypatch):
    asked = []
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(k.get("columns")) or real(*a, **k))
    found = stream_contents(str(folder))
    assert (found.speakers.names, found.rows) == (("s0", "s1", "s2", "s3", "s4"), TOTAL)
    assert found.seconds == sum(1.0 + n for n in range(TOTAL))
    assert asked[-1] == ["speaker", "seconds"]


def test_contents_of_prepared_speech_are_its_index(folder, tmp_path):
    for file in folder.glob("*.parquet"):
        os.link(file, tmp_path / file.name)
    SpeakerTable(["x", "y"]).save(tmp_path / "speakers.json")
    PreparedIndex(5, 6.0, 2, "", 0, []).save(tmp_path)
    for source in (str(tmp_path), f"file://{tmp_path}"):
        found = stream_contents(source)
        assert (found.speakers.names, found.rows, found.seconds) == (("x", "y"), 5, 6.0)
    SpeakerTable(["x"]).save(tmp_path / "speakers.json")
    with pytest.raises(ValueError, match="speakers.json has 1 speakers, index.json 2"):
        stream_contents(str(tmp_path))


def test_columns_of_other_names_and_numbered_speakers(tmp_path):
    features = datasets.Features(
        {"clip": datasets.Audio(decode=False), "label": datasets.ClassLabel(names=["ann", "bob"])}
    )
    rows = [{"clip": {"bytes": b"%d" % n, "path": f"{n}.wav"}, "label": n % 2} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), tmp_path / "a.parquet")

    def speaker(source, row, rng):
        return int(source.data), row["speaker"], row["path"]

    found = sorted(item.example for item in SpeechStream(str(tmp_path), speaker, epochs=1))
    assert [name for _, name, _ in found] == ["ann", "bob"] * 3
    assert found[1][2] == "bob/00000001-1.wav"
    contents = stream_contents(str(tmp_path))
    assert (contents.speakers.names, contents.rows, contents.seconds) == (("ann", "bob"), 6, None)


def test_sources_that_cannot_be_streamed(folder, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.wav").touch()
    with pytest.raises(ValueError, match="folder of audio files, which cannot be streamed"):
        stream_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone is not there"):
        stream_of(tmp_path / "gone")
    with pytest.raises(ValueError, match="columns: there is no column who; there are audio"):
        stream_of(folder, columns={"speaker": "who"})


def test_a_forked_worker_does_not_wait_for_a_lock_that_was_held(folder):
    """fsspec's, of remote stores; what reads from one needs fsspec's loop."""

    def read_remotely(source, row, rng):
        fsspec.asyn.get_loop()
        return 0

    stream = SpeechStream(folder, read_remotely, workers=1)
    loader = DataLoader(
        stream,
        batch_size=2,
        num_workers=1,
        collate_fn=Collated(lambda items: {}),
        timeout=20,
        multiprocessing_context="fork",
    )
    with fsspec.asyn.get_lock():
        assert "place" in next(iter(loader))
