"""Bulk extraction: every utterance once whatever is killed, from every kind of input, and `mrl-redimnet embed`."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from commands import refusal, run
from conftest import at_most, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.data.prepare import prepare
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.extraction import bulk
from mrl_redimnet.extraction.bulk import (
    Extraction,
    Made,
    Parts,
    Process,
    Work,
    embed_corpus,
    holds,
    part_files,
    part_size,
    read_embeddings,
    share,
    whole,
)
from mrl_redimnet.extraction.inputs import Inputs, Listing, Utterance, in_blocks, read_manifest
from mrl_redimnet.saving import load_model, save_model

SPEAKERS, UTTERANCES = 8, 9
SMALL = Extraction(part_size=32, workers=0)


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """speaker/session/number.wav, 72 of them, of noise of drawn lengths; one of each speaker is .flac."""
    root, rng = tmp_path_factory.mktemp("bulk") / "wav", np.random.default_rng(0)
    for number in range(SPEAKERS * UTTERANCES):
        suffix = "flac" if number % UTTERANCES == 0 else "wav"
        path = root / f"s{number // UTTERANCES}" / "v" / f"{number:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(rng.integers(1000, 5000)), 16_000)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bulk_model") / "model"
    save_model(tiny_model(kind=MRLReDimNetForXVector), root)  # on which the fixture's adapters were trained
    return root


@pytest.fixture(scope="module")
def system(folder) -> SpeakerEncoder:
    return SpeakerEncoder(load_model(folder), "tiny")


@pytest.fixture(scope="module")
def expected(speech, system) -> dict[str, np.ndarray]:
    """Every file's embedding, by its path below the corpus."""
    files = sorted(path for path in speech.rglob("*") if path.is_file())
    embeddings = system.embed(files)
    return {file.relative_to(speech).as_posix(): row for file, row in zip(files, embeddings, strict=True)}


def same(out: Path, expected: dict[str, np.ndarray]):
    """Every expected utterance is in the parts once, and nothing else is."""
    ids, embeddings = read_embeddings(out)
    assert Counter(ids) == Counter(expected.keys())
    assert np.allclose(embeddings, [expected[name] for name in ids], atol=1e-4)


# ---------------------------------------------------------------- the plan


class Rows:
    """A shard of numbered utterances."""

    def __init__(self, number: int, rows: int, sequential: bool):
        self.name, self.rows, self.sequential = f"{number}", rows, sequential

    def known_ids(self):
        return None

    def blocks(self, size, wanted):
        made = (f"{self.name}/{row}" for row in range(self.rows))
        if self.sequential:
            yield from in_blocks(made, lambda name: Utterance(name, name), size, wanted)
        else:
            yield from Listing.of((name, name) for name in made).blocks(size, wanted)


def work_of(inputs: Inputs, size: int, done: dict, number: int, count: int, worker: int, workers: int):
    """The blocks of one worker of a process that begins when `done` is done."""
    sequential = [shard.sequential for shard in inputs.shards]
    turns = share(share(whole(inputs), sequential, number, count), sequential, worker, workers)
    parts = Parts(Path(), Made("", "", "", "", ""), "", done=dict(done))
    return Work(inputs, turns, parts, size, {}, None, Extraction()).blocks(turns)


SHARDS = st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=6)
LAUNCHES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**20)), max_size=4)


@given(shards=SHARDS, size=st.integers(1, 9), launches=LAUNCHES, last=st.tuples(st.integers(1, 5), st.integers(1, 3)))
def test_any_launches_killed_anywhere_give_every_utterance_once(shards, size, launches, last):
    inputs = Inputs([Rows(number, *shard) for number, shard in enumerate(shards)])
    written: dict[tuple[int, int], list[str]] = {}
    done: dict[tuple[int, int], int] = {}
    for count, workers, draw in [*launches, (*last, None)]:
        rng = np.random.default_rng(draw)
        for number in range(count):  # a process looks at what is there when it begins, after others have written
            for worker, blocks in enumerate(
                [work_of(inputs, size, done, number, count, worker, workers) for worker in range(workers)]
            ):
                lived = np.inf if draw is None else rng.integers(0, 4)
                for written_of_worker, (key, utterances) in enumerate(blocks):
                    if written_of_worker >= lived:
                        break
                    assert key not in done and worker < workers
                    written[key] = [utterance.id for utterance in utterances]
                    done[key] = len(utterances)
    wanted = Counter(f"{number}/{row}" for number, (rows, _) in enumerate(shards) for row in range(rows))
    assert Counter(name for names in written.values() for name in names) == wanted
    again = [block for number in range(3) for block in work_of(inputs, size, done, number, 3, 0, 1)]
    assert again == []


@given(sequential=st.lists(st.booleans(), min_size=1, max_size=8), takers=st.integers(1, 6), workers=st.integers(1, 4))
def test_shares_hold_each_block_once(sequential, takers, workers):
    all_of = dict.fromkeys(range(len(sequential)), (0, 1))
    shares = [
        share(share(all_of, sequential, taker, takers), sequential, worker, workers)
        for taker in range(takers)
        for worker in range(workers)
    ]
    for key in ((shard, block) for shard in all_of for block in range(30)):
        assert sum(holds(turns, key) for turns in shares) == 1


@pytest.mark.parametrize(("rows", "sizes"), [(5, [2, 2, 1]), (4, [2, 2, 0]), (0, [0])])
def test_the_last_block_of_a_stream_is_short(rows, sizes):
    blocks = list(in_blocks(range(rows), int, 2, lambda block: True))
    assert [(block, len(made)) for block, made in blocks] == list(enumerate(sizes))
    assert [row for _, made in blocks for row in made] == list(range(rows))


def test_many_sequential_shards_are_read_by_one_process_each():
    turns = [share(dict.fromkeys(range(5), (0, 1)), [True] * 5, taker, 2) for taker in range(2)]
    assert turns == [{0: (0, 1), 2: (0, 1), 4: (0, 1)}, {1: (0, 1), 3: (0, 1)}]
    one = [share({0: (0, 1)}, [True], taker, 3) for taker in range(3)]  # too few: all of them read it
    assert one == [{0: (0, 3)}, {0: (1, 3)}, {0: (2, 3)}]


def test_a_small_corpus_is_cut_for_many_processes():
    assert [part_size(rows, 512) for rows in (None, 10, 3200, 10**6)] == [512, 16, 50, 512]
    assert part_size(10**6, 20) == 20


# ---------------------------------------------------------------- stopped and taken up


class Stopped(Exception):
    """In place of a kill."""


@at_most(50)
@given(runs=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), max_size=3), last=st.integers(1, 4))
def test_parts_of_stopped_runs_and_of_the_last_hold_every_utterance_once(
    speech, system, expected, tmp_path_factory, runs, last
):
    out, inputs = tmp_path_factory.mktemp("stopped") / "out", Inputs.find([speech])
    real = Parts.write
    for count, writes in runs:
        for number in range(count):
            left = iter(range(writes))

            def write(parts, *arguments, left=left):
                if next(left, None) is None:
                    parts.write_problems(*arguments[::3])  # the last thing that is done before the part
                    raise Stopped
                real(parts, *arguments)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Parts, "write", write)
                try:
                    embed_corpus(system, inputs, out, SMALL, Process(number, count))
                except Stopped:
                    pass
    reports = [embed_corpus(system, inputs, out, SMALL, Process(number, last)) for number in range(last)]
    same(out, expected)
    assert sum(report.embedded + report.before for report in reports) == len(expected)


def entries(speech: Path, file: Path, count: int) -> list[str]:
    """A manifest that lists the corpus's files under `count` ids."""
    paths = sorted(path.relative_to(speech).as_posix() for path in speech.rglob("*") if path.is_file())
    ids = [f"{number:05d}-{paths[number % len(paths)]}" for number in range(count)]
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("id", "path"), *((name, name[6:]) for name in ids)])
    return ids


def start(arguments: list, launcher=(), **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "mrl_redimnet_cli", *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_killed_processes_and_other_numbers_of_them(folder, speech, system, expected, tmp_path, capsys):
    """Two processes under torchrun, one killed in its work and its launcher with it; then one of two that never hears
    of the other; then three."""
    ids, out = entries(speech, tmp_path / "all.csv", 2000), tmp_path / "out"
    arguments = ["embed", folder, tmp_path / "all.csv", "--folder", speech, "--out", out, "--part-size", 20]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--log-dir", tmp_path / "log"]
    launched = start(arguments, [*map(str, torchrun[:-1]), str(torchrun[-1])])
    deadline = time.monotonic() + 120
    while len(list(out.glob("part-*"))) < 4:
        assert launched.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    family = [psutil.Process(launched.pid), *psutil.Process(launched.pid).children(recursive=True)]
    for member in family:  # the launcher first: nothing stops its processes in an orderly way
        member.kill()
    launched.communicate()
    there = len(read_embeddings(out)[0])
    assert 80 <= there < 1900
    alone = start(arguments, RANK="1", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="9")
    printed, _ = alone.communicate(timeout=120)
    assert alone.returncode == 0 and "process 1 of 2: " in printed, printed
    assert 1000 <= len(read_embeddings(out)[0]) < 2000
    inputs, how = Inputs.find([tmp_path / "all.csv"], folder=str(speech)), Extraction(part_size=20, workers=0)
    for number in range(3):
        embed_corpus(system, inputs, out, how, Process(number, 3))
    same(out, {name: expected[name[6:]] for name in ids})


def test_what_a_stopped_process_left_is_cleared_away_later(speech, system, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    old, young = out / ".host-1-part-x.parquet.writing", out / ".host-2-part-x.parquet.writing"
    other = out / ".gitignore"
    for file in (old, young, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (0, 0))
    embed_corpus(system, Inputs.find([speech / "s0"]), out, SMALL)
    assert not old.exists() and young.exists() and other.exists()


def test_two_processes_may_write_the_same_part(speech, system, expected, tmp_path):
    """As when a run's launcher is killed, but not its processes, and it is started again."""
    inputs = Inputs.find([speech])
    real, nested = Parts.write, []

    def write(parts, *arguments):
        if not nested:
            nested.append(True)
            embed_corpus(system, inputs, tmp_path, SMALL)
        real(parts, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "write", write)
        embed_corpus(system, inputs, tmp_path, SMALL)
    same(tmp_path, expected)


def test_workers_change_nothing(speech, system, expected, tmp_path):
    for workers in (0, 2):
        embed_corpus(system, Inputs.find([speech]), tmp_path / f"{workers}", Extraction(part_size=32, workers=workers))
        same(tmp_path / f"{workers}", expected)
    alone, together = (read_embeddings(tmp_path / f"{workers}") for workers in (0, 2))
    assert alone[0] == together[0] == sorted(expected)


def test_a_corpus_that_grew_is_embedded_where_it_grew(speech, system, expected, tmp_path):
    grown = Path(shutil.copytree(speech, tmp_path / "wav", ignore=shutil.ignore_patterns("s0", "s5")))
    assert embed_corpus(system, Inputs.find([grown]), tmp_path / "out", SMALL).embedded == 54
    for speaker in ("s0", "s5"):
        shutil.copytree(speech / speaker, grown / speaker)
    reports = [embed_corpus(system, Inputs.find([grown]), tmp_path / "out", SMALL, Process(n, 2)) for n in range(2)]
    assert sum(report.embedded for report in reports) == 18
    same(tmp_path / "out", expected)
    shutil.rmtree(grown / "s1")
    assert embed_corpus(system, Inputs.find([grown]), tmp_path / "out", SMALL).embedded == 0
    same(tmp_path / "out", expected)


def test_another_part_size_goes_on_where_it_was(speech, system, expected, tmp_path):
    embed_corpus(system, Inputs.find([speech]), tmp_path, SMALL, Process(0, 2))
    embed_corpus(system, Inputs.find([speech]), tmp_path, Extraction(part_size=7, workers=0))
    same(tmp_path, expected)


def test_archives_that_two_part_sizes_were_stopped_in(speech, system, tmp_path):
    """What an earlier plan embedded counts in the blocks of a later one, so that none looks like a last one."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(speech, "wav")
    inputs, real = Inputs.find([tmp_path / "a.tar"]), Parts.write
    for size in (20, 10):
        left = iter(range(1))

        def write(parts, *arguments, left=left):
            if next(left, None) is None:
                raise Stopped
            real(parts, *arguments)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Parts, "write", write)
            embed_corpus(system, inputs, tmp_path / "out", Extraction(part_size=size, workers=0))
    embed_corpus(system, inputs, tmp_path / "out", Extraction(part_size=10, workers=0))
    ids, _ = read_embeddings(tmp_path / "out")
    assert len(ids) == len(set(ids)) == 72


def test_small_blocks_are_sorted_by_length_together(speech, system):
    inputs, how = Inputs.find([speech]), Extraction(part_size=64, workers=0)
    parts = Parts(Path(), Made("", "", "", "", ""), "")
    work = Work(inputs, whole(inputs), parts, 16, {}, None, how)
    together = [[len(task.utterances) for task in tasks] for tasks in work.together(work.turns)]
    assert together == [[16, 16, 16, 16], [8]]


# ---------------------------------------------------------------- problems


@pytest.fixture
def broken(speech, tmp_path) -> Path:
    """The corpus with an empty file, text, 30 samples, and NaN."""
    wav = Path(shutil.copytree(speech, tmp_path / "wav"))
    (wav / "s0/v/001.wav").write_bytes(b"")
    (wav / "s3/v/030.wav").write_text("thesis")
    soundfile.write(wav / "s4/v/040.wav", np.zeros(30), 16_000)
    soundfile.write(wav / "s5/v/050.wav", np.full(5000, np.nan), 16_000, subtype="FLOAT")
    return wav


BROKEN = {"s0/v/001.wav", "s3/v/030.wav", "s4/v/040.wav", "s5/v/050.wav"}


def reported(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for file in out.glob("problems-*.jsonl") for line in file.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def test_bad_files_are_reported_and_only_retried_when_asked(broken, speech, folder, expected, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["embed", folder, broken, "--out", out, "--part-size", 32, "--workers", 1]
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert "68 utterances embedded" in printed.out and "4 could not be embedded (all in " in printed.out
    assert {line.split(": ")[1] for line in printed.err.splitlines() if line.startswith("Left out: ")} == BROKEN
    problems = reported(out)
    assert set(problems) == BROKEN
    assert problems["s3/v/030.wav"]["path"] == f"{broken}/s3/v/030.wav"
    for name, reason in (("s0/v/001", "0 bytes"), ("s3/v/030", "cannot be read as audio"), ("s5/v/050", "NaN")):
        assert reason in problems[f"{name}.wav"]["reason"]
    assert "30 samples" in problems["s4/v/040.wav"]["reason"]
    same(out, {name: row for name, row in expected.items() if name not in BROKEN})

    for name in sorted(BROKEN)[:3]:
        shutil.copy(speech / name, broken / name)
    assert run(*arguments) == 1
    assert "0 utterances embedded, 72 were there before" in capsys.readouterr().out
    assert set(reported(out)) == BROKEN
    assert run(*arguments, "--retry") == 1
    assert "3 utterances embedded" in capsys.readouterr().out
    assert set(reported(out)) == {"s5/v/050.wav"}
    shutil.copy(speech / "s5/v/050.wav", broken / "s5/v/050.wav")
    assert run(*arguments, "--retry") == 0
    assert reported(out) == {} and not list(out.glob("problems-*"))
    same(out, expected)


def test_a_retry_that_is_stopped_anywhere_loses_and_doubles_nothing(
    broken, speech, system, expected, tmp_path, monkeypatch
):
    inputs, out = Inputs.find([broken]), tmp_path / "out"
    embed_corpus(system, inputs, out, SMALL)
    for name in BROKEN:
        shutil.copy(speech / name, broken / name)
    again, real, put = Extraction(part_size=32, workers=0, retry=True), Parts.write_problems, Parts.put
    monkeypatch.setattr(Parts, "put", stop)
    with pytest.raises(Stopped):
        embed_corpus(system, inputs, out, again)  # before the part is there
    monkeypatch.setattr(Parts, "put", put)
    monkeypatch.setattr(Parts, "write_problems", stop)
    with pytest.raises(Stopped):
        embed_corpus(system, inputs, out, again)  # between the part and its problems
    monkeypatch.setattr(Parts, "write_problems", real)
    assert len(embed_corpus(system, inputs, out, SMALL).problems) == 3  # of the other parts
    assert embed_corpus(system, inputs, out, again).problems == []
    same(out, expected)


def stop(*arguments):
    raise Stopped


def test_two_processes_may_retry_the_same_part(broken, speech, system, expected, tmp_path, monkeypatch):
    inputs, out, real, nested = Inputs.find([broken]), tmp_path / "out", Parts.add, []
    embed_corpus(system, inputs, out, SMALL)
    for name in BROKEN:
        shutil.copy(speech / name, broken / name)
    again = Extraction(part_size=32, workers=0, retry=True)

    def add(parts, *arguments):
        if not nested:
            nested.append(True)
            embed_corpus(system, inputs, out, again)
        real(parts, *arguments)

    monkeypatch.setattr(Parts, "add", add)
    assert embed_corpus(system, inputs, out, again).problems == []
    same(out, expected)


def test_a_process_embeds_on_the_accelerator_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    devices = [Process(number, 4, number).device for number in range(4)]
    assert [str(device) for device in devices] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert Process().device == torch.device("cpu")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert Process().device == torch.device("cpu")


def test_problems_do_not_stop_other_processes_under_a_launcher(broken, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("embed", folder, broken, "--out", tmp_path / "out", "--workers", 0) == 0
    assert "process 0 of 2: " in capsys.readouterr().out and reported(tmp_path / "out")


def test_embeddings_that_cannot_be_stored_are_problems(speech, system, tmp_path, monkeypatch):
    real = bulk.Embedder.__call__
    monkeypatch.setattr(
        bulk.Embedder,
        "__call__",
        lambda self, batch: np.where(np.array(batch.ids)[:, None] == "v/002.wav", np.inf, real(self, batch)),
    )
    report = embed_corpus(system, Inputs.find([speech / "s0"]), tmp_path, SMALL)
    assert report.embedded == 8 and [problem.id for problem in report.problems] == ["v/002.wav"]
    assert "not finite" in report.problems[0].reason


def test_a_worker_that_dies_ends_the_run_with_the_reason(speech, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bulk, "batches_of", lambda *_: os._exit(9))
    message = refusal(capsys, "embed", folder, speech, "--out", tmp_path / "out", "--workers", 1)
    assert "a process that decodes audio died" in message and "what is embedded is kept" in message


# ---------------------------------------------------------------- what is written


def test_parts_say_what_made_them(speech, folder, system, expected, tmp_path, adapters):
    arguments = ["embed", folder, speech, "--out", tmp_path / "out", "--dim", 16, "--storage", "float16"]
    assert run(*arguments, "--adapter", adapters / "telephony") == 0
    for file in part_files(tmp_path / "out"):
        table = pq.read_table(file)
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        assert (metadata["model"], metadata["adapter"], metadata["dim"]) == ("model", "telephony", "16")
        assert metadata["weights"] == SpeakerEncoder.from_pretrained(folder, adapters / "telephony").fingerprint
        assert str(table.schema.field("embedding").type) == "fixed_size_list<element: halffloat>[16]"
        for row in table.to_pylist():
            assert row["path"] == f"{speech}/{row['id']}"
            assert row["seconds"] == pytest.approx(soundfile.info(row["path"]).duration)
    loaded = datasets.load_dataset("parquet", data_files=f"{tmp_path}/out/*.parquet", split="train")
    assert sorted(loaded["id"]) == sorted(expected)


def test_float16_is_the_rounded_embedding(speech, system, tmp_path, expected):
    how = Extraction(storage="float16", workers=0)
    embed_corpus(system, Inputs.find([speech]), tmp_path, how)
    ids, embeddings = read_embeddings(tmp_path)
    assert embeddings.dtype == np.float16
    assert np.allclose(embeddings, [expected[name] for name in ids], rtol=1e-3, atol=1e-3)


def test_another_system_is_refused_by_name(speech, folder, tmp_path, adapters, capsys):
    base = ["embed", folder, speech / "s0", "--out", tmp_path / "out", "--workers", 0]
    assert run(*base, "--dim", 16) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert "was made with dim 16, this run has 32" in refusal(capsys, *base)
    assert "was made with storage float32, this run has float16" in refusal(
        capsys, *base, "--dim", 16, "--storage", "float16"
    )
    other = [*base, "--dim", 16, "--adapter", adapters / "telephony"]
    assert "was made with adapter none, this run has telephony" in refusal(capsys, *other)
    save_model(tiny_model(seed=1), tmp_path / "other")
    message = refusal(capsys, "embed", tmp_path / "other", *base[2:], "--dim", 16)
    assert "was made with weights model (sha256:" in message and "this run has other (sha256:" in message
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_files_of_before_fingerprints_knew_the_configuration_are_gone_on_with():
    made = bulk.Made("model", "", "sha256:aa+config:11", "32", "float32")
    of_before = {"model": "model", "adapter": "", "weights": "sha256:aa", "dim": "32", "storage": "float32"}
    made.refuse_others(Path("part"), of_before)
    for weights in ("sha256:bb", "sha256:aa+config:22", None):
        with pytest.raises(ValueError, match="part was made with weights model"):
            made.refuse_others(Path("part"), of_before | {"weights": weights})


def test_a_damaged_part_is_named(speech, system, tmp_path):
    embed_corpus(system, Inputs.find([speech]), tmp_path, SMALL)
    part_files(tmp_path)[1].write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="part-.*-000001.parquet is no parquet file"):
        embed_corpus(system, Inputs.find([speech]), tmp_path, SMALL)


def test_training_mode_is_left_as_it_was(speech, folder, tmp_path):
    model = load_model(folder).train()
    embed_corpus(SpeakerEncoder(model, "tiny"), Inputs.find([speech / "s0"]), tmp_path, SMALL)
    assert model.training


# ---------------------------------------------------------------- inputs


def embedded(system: SpeakerEncoder, tmp_path: Path, *sources, how: Extraction = SMALL, processes: int = 1, **options):
    out = tmp_path / "embedded"
    for number in range(processes):
        report = embed_corpus(system, Inputs.find(sources, **options), out, how, Process(number, processes))
        assert report.problems == []
    return dict(zip(*read_embeddings(out), strict=True))


def check(found: dict, expected: dict, name_of=lambda name: name):
    assert set(found) == {name_of(name) for name in expected}
    for name, row in expected.items():
        assert np.allclose(found[name_of(name)], row, atol=1e-4)


@pytest.mark.parametrize("form", ["csv", "csv without ids", "tsv", "txt", "absolute", "url"])
def test_manifests(speech, system, expected, tmp_path, form):
    root = {"absolute": f"{speech}/", "url": f"file://{speech}/"}.get(form, "")
    suffix = form[:3] if form[:3] in ("csv", "tsv") else "txt"
    lines = [f"{root}{name}" for name in expected]
    if suffix != "txt":
        separator = {"csv": ",", "tsv": "\t"}[suffix]
        named = form != "csv without ids"
        lines = [f"x{line}{separator}{line}" if named else line for line in lines]
        lines.insert(0, f"id{separator}path" if named else "path")
    manifest = tmp_path / f"list.{suffix}"
    manifest.write_text("\n".join(lines) + "\n\n")
    options = {} if root else {"folder": str(speech)}
    prefix = root if suffix == "txt" else "" if form == "csv without ids" else "x"
    check(embedded(system, tmp_path, manifest, **options), expected, lambda name: prefix + name)


def test_manifests_that_are_wrong(speech, tmp_path):
    wrong = {
        "no column is called path; the first line has file, id": ("a.csv", "file,id\na,b\n"),
        "no column is called path; the first line has nothing": ("b.csv", ""),
        "c.csv, line 3: the path is empty": ("c.csv", "path,id\na,b\n,c\n"),
        "d.csv, line 2: the id is empty": ("d.csv", "path,id\na,\n"),
        "1 ids come twice, first a": ("e.txt", "a\nb\na\n"),
    }
    for message, (name, text) in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            Inputs.find([tmp_path / name])
    (tmp_path / "f.txt").write_text("a/b.wav\n")
    assert list(read_manifest(tmp_path / "f.txt")) == [("a/b.wav", f"{tmp_path}/a/b.wav")]


def test_lists_of_kaldi_and_nemo_are_read(tmp_path):
    """Paths with spaces, ids of their own, lengths that are not needed."""
    (tmp_path / "wav.scp").write_text("u1 /data/a b.wav\nu2\tc.wav\n\n")
    assert list(read_manifest(tmp_path / "wav.scp")) == [("u1", "/data/a b.wav"), ("u2", f"{tmp_path}/c.wav")]
    lines = [{"audio_filepath": "a.wav", "duration": 1.5, "text": ""}, {"path": "/b.wav", "id": 7, "offset": 0.0}]
    for name in ("train.jsonl", "train.json"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)) + "\n")
        assert list(read_manifest(tmp_path / name)) == [("a.wav", f"{tmp_path}/a.wav"), ("7", "/b.wav")]
        assert len(Inputs.find([tmp_path / name]).shards[0].ids) == 2


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("wav.scp", "u1 sox a.wav -t wav - |", "wav.scp, line 1: u1 is a command, which is not run"),
        ("wav.scp", "u1 /data/raw.ark:2047", "wav.scp, line 1: u1 lies in a Kaldi archive, which is not read"),
        ("wav.scp", "u1", "wav.scp, line 1: the path is empty"),
        ("a.jsonl", "a.wav", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", '["a.wav"]', "a.jsonl, line 1: expected a mapping with audio_filepath"),
        ("a.jsonl", '{"audio_filepath": "a.wav", "offset": 2.5}', "a part of a.wav .offset 2.5., only whole files"),
        ("list", "a.wav", "list is a text file, no audio. If it is a list of files, its name must end"),
        ("raw.list", '{"key": "u1", "wav": "a.wav"}', "raw.list is a text file, no audio"),
    ],
)
def test_lists_that_are_no_audio_say_what_they_are(tmp_path, name, line, message):
    (tmp_path / name).write_text(f"{line}\n")
    with pytest.raises(ValueError, match=message):
        Inputs.find([tmp_path / name])


def test_audio_without_a_known_suffix_is_no_text(tmp_path):
    """NIST SPHERE files begin with a header of text."""
    rng = np.random.default_rng(0)
    header = b"NIST_1A\n   1024\nsample_count -i 800\nend_head\n".ljust(1024)
    (tmp_path / "a.sph").write_bytes(header + rng.integers(-500, 500, 800, dtype=np.int16).tobytes())
    (tmp_path / "b").write_bytes(b"RIFF\x24\x00\x00\x00WAVEfmt ")
    assert len(Inputs.find([tmp_path / "a.sph", tmp_path / "b"]).shards[0].ids) == 2


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("processes", [1, 3])
def test_tar_archives(speech, system, expected, tmp_path, suffix, processes):
    """Two archives, one of them with as many files as two blocks."""
    names = {"one": sorted(expected)[:40], "two": sorted(expected)[40:]}
    (tmp_path / "tars").mkdir()
    for stem, members in names.items():
        with tarfile.open(tmp_path / "tars" / f"{stem}.{suffix}", "w:gz" if suffix == "tar.gz" else "w") as archive:
            for member in members:
                archive.add(speech / member, member)
            archive.add(__file__, "not_audio.py")
    where = {name: f"{stem}.{suffix}/{name}" for stem, members in names.items() for name in members}
    how = Extraction(part_size=20, workers=0)
    check(embedded(system, tmp_path, tmp_path / "tars", how=how, processes=processes), expected, where.get)
    pattern = f"file://{tmp_path}/tars/*.{suffix}"
    assert [shard.name for shard in Inputs.find([pattern]).shards] == [
        f"file://{tmp_path}/tars/{stem}.{suffix}" for stem in names
    ]


def test_an_archive_with_a_file_twice_is_refused(speech, system, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.wav", "b.wav", "./a.wav"):
            archive.add(speech / "s0/v/001.wav", name)
    with pytest.raises(ValueError, match="a.tar holds ./a.wav twice"):
        embedded(system, tmp_path, tmp_path / "a.tar")


def test_a_finished_archive_is_not_read_again(speech, system, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(speech, "wav")
    inputs, how = Inputs.find([tmp_path / "a.tar"]), Extraction(part_size=36, workers=0)
    assert embed_corpus(system, inputs, tmp_path / "out", how).embedded == 72
    (tmp_path / "a.tar").unlink()
    assert embed_corpus(system, inputs, tmp_path / "out", how).embedded == 0
    part_files(tmp_path / "out")[-1].unlink()
    with pytest.raises(FileNotFoundError):
        embed_corpus(system, inputs, tmp_path / "out", how)


def test_an_archive_that_was_cut_off_keeps_what_was_read(speech, folder, tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(speech, "wav")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2])
    arguments = ["embed", folder, tmp_path / "a.tar", "--out", tmp_path / "out", "--part-size", 10, "--workers", 1]
    assert "a.tar cannot be read as a tar archive" in refusal(capsys, *arguments)
    assert len(read_embeddings(tmp_path / "out")[0]) in range(10, 60, 10)
    (tmp_path / "a.tar").write_bytes(data)
    assert run(*arguments) == 0 and len(set(read_embeddings(tmp_path / "out")[0])) == 72


def test_a_finished_table_is_not_read_again(speech, system, expected, tmp_path):
    """Of as many rows as two blocks: the third, which is empty, says that there are no more."""
    rows = [{"audio": {"bytes": (speech / name).read_bytes(), "path": name}, "path": name} for name in expected][:10]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    inputs, how = Inputs.find([tmp_path / "a.parquet"]), Extraction(part_size=5, workers=0)
    assert embed_corpus(system, inputs, tmp_path / "out", how).embedded == 10
    (tmp_path / "a.parquet").unlink()
    assert embed_corpus(system, inputs, tmp_path / "out", how).embedded == 0


@pytest.fixture(scope="module")
def prepared(speech, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bulk_prepared")
    prepare(speech, root / "shards", shard_mb=0.2, cache_dir=root / "cache")
    assert len(list((root / "shards").glob("*.parquet"))) == 2
    return root / "shards"


@pytest.mark.parametrize(
    ("form", "processes"), [("{}", 1), ("{}", 2), ("{}", 5), ("file://{}", 2), ("{}/*.parquet", 1)]
)
def test_parquet_files(prepared, system, expected, tmp_path, form, processes):
    how = Extraction(part_size=9, workers=0)
    check(embedded(system, tmp_path, form.format(prepared), how=how, processes=processes), expected)


def test_a_table_without_paths_or_with_other_names(speech, system, expected, tmp_path):
    names = sorted(expected)[:10]
    features = datasets.Features({"clip": datasets.Audio(decode=False), "utt": datasets.Value("string")})
    rows = [{"clip": {"bytes": (speech / name).read_bytes(), "path": None}, "utt": name} for name in names]
    pq.write_table(pa.Table.from_pylist(rows, features.arrow_schema), tmp_path / "a.parquet")
    wanted, source = {name: expected[name] for name in names}, str(tmp_path / "a.parquet")
    by_row = {name: f"{source}/00000-{row:08d}" for row, name in enumerate(names)}
    check(embedded(system, tmp_path / "rows", source), wanted, by_row.get)
    check(embedded(system, tmp_path / "names", source, columns={"path": "utt"}), wanted)
    with pytest.raises(ValueError, match="there is no column who"):
        Inputs.find([source], columns={"audio": "who"})


def test_saved_data_sets_and_their_splits(speech, system, expected, tmp_path):
    parts = {"train": sorted(expected)[:5], "test": sorted(expected)[5:9]}
    features = datasets.Features({"audio": datasets.Audio(decode=False), "path": datasets.Value("string")})
    data = {}
    for split, names in parts.items():
        rows = [{"audio": {"bytes": None, "path": str(speech / name)}, "path": name} for name in names]
        data[split] = datasets.Dataset(pa.Table.from_pylist(rows, features.arrow_schema))
    datasets.DatasetDict(data).save_to_disk(str(tmp_path / "saved"))
    for split, names in parts.items():
        found = embedded(system, tmp_path / split, tmp_path / "saved", split=split)
        check(found, {name: expected[name] for name in names})
    with pytest.raises(ValueError, match="has no split dev, it has train, test"):
        Inputs.find([tmp_path / "saved"], split="dev")


def test_inputs_of_several_kinds_together(speech, prepared, system, expected, tmp_path):
    (tmp_path / "list.csv").write_text(f"id,path\nlisted,{speech}/s0/v/001.wav\n")
    sources = [tmp_path / "list.csv", speech / "s1", prepared]
    found = embedded(system, tmp_path, *sources, processes=2)
    assert len(found) == 1 + UTTERANCES + len(expected)
    assert np.allclose(found["listed"], expected["s0/v/001.wav"], atol=1e-4)
    with pytest.raises(ValueError, match=f"{len(expected)} ids come twice, first s"):
        Inputs.find([speech, prepared])


# ---------------------------------------------------------------- the command


def test_embed_to_one_file(folder, speech, expected, system, tmp_path, capsys):
    out = tmp_path / "embedded.npz"
    assert run("embed", folder, speech, "--out", out, "--dim", 16, "--part-size", 7) == 0
    assert f"{out}: 72 utterances embedded, by model, 16 dimensions." in capsys.readouterr().out
    content = np.load(out)
    assert content["ids"].tolist() == sorted(expected) and content["weights"] == system.fingerprint
    assert content["embeddings"].dtype == np.float32
    assert np.allclose(content["embeddings"], [expected[name][:16] for name in sorted(expected)], atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["embedded.npz"]


def test_embed_takes_files_of_any_rate_and_channels_by_the_names_given(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wave = 0.1 * np.random.default_rng(0).standard_normal((4000, 2))
    soundfile.write("stereo.wav", wave, 16_000)
    soundfile.write("telephone.wav", wave[:, 0], 8_000)
    assert run("embed", folder, "telephone.wav", "stereo.wav", "--out", "out.npz") == 0
    assert np.load("out.npz")["ids"].tolist() == ["telephone.wav", "stereo.wav"]


def test_embed_refuses_what_it_cannot_do_and_leaves_nothing(folder, speech, tmp_path, capsys, monkeypatch):
    out = ["--out", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.wav").write_text("thesis")
    told = {
        "bad.wav is a file": [speech, "--out", tmp_path / "bad.wav"],
        "there is no folder": [speech, "--out", tmp_path / "nowhere" / "out.npz"],
        "3 of 4 paths are not there: a.wav, b, c/d.wav": [speech, "a.wav", "b", "c/d.wav", *out],
        "0 audio files": [tmp_path / "empty", *out],
        "9 ids come twice, first v/": [speech / "s0", speech / "s0", *out],
        "[33] are not between 1 and": [speech, *out, "--dim", 33],
        "workers: got -1, expected 0 or more": [speech, *out, "--workers", -1],
        "part_size: got 0, expected 1 or more": [speech, *out, "--part-size", 0],
        "expected ROLE=NAME": [speech, *out, "--columns", "audio"],
        "none of 1 utterances could be embedded": [tmp_path / "bad.wav", "--out", tmp_path / "out.npz"],
        "no file has such a path": [tmp_path / "*.tar", *out],
    }
    for message, arguments in told.items():
        assert run("embed", folder, *arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "process 2 of 2" in refusal(capsys, "embed", folder, speech, *out)
    monkeypatch.setenv("RANK", "1")
    assert "one file is written by one process" in refusal(capsys, "embed", folder, speech, "--out", "a.npz")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "hf") == ["bad.wav", "empty"]
    with pytest.raises(FileNotFoundError, match="no parts"):
        read_embeddings(tmp_path / "empty")


# ---------------------------------------------------------------- as a Ray job


@pytest.fixture
def local_ray(monkeypatch):
    """Ray on this machine, with two processors, quiet."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    examples = str(Path(__file__).parents[1] / "examples")
    monkeypatch.syspath_prepend(examples)
    monkeypatch.setenv("PYTHONPATH", examples)  # of Ray's workers
    import ray  # here: importing it takes a second

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_ray_job_gives_the_rows_of_the_command(local_ray, broken, folder, expected, tmp_path, capsys):
    """It starts Ray and a process with the model: some ten seconds."""
    import embed_with_ray

    embed_with_ray.main([str(folder), str(broken), "--out", str(tmp_path / "out"), "--dim", "16"])
    table = pq.read_table(tmp_path / "out")
    rows = {row["id"]: row for row in table.to_pylist()}
    assert len(rows) == len(table) == len(expected)
    assert {name for name, row in rows.items() if row["problem"] is not None} == BROKEN
    for name, row in rows.items():
        if name in BROKEN:
            assert row["embedding"] is None and name in row["problem"]
        else:
            assert np.allclose(row["embedding"], expected[name][:16], atol=1e-4)
            assert row["seconds"] == pytest.approx(soundfile.info(broken / name).duration)
