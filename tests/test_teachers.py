"""Teachers of every kind, what they hear, and runs that learn from them: labelled or not, resumed, in two processes."""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config, tiny_model, waves
from onnx import TensorProto, helper
from safetensors.torch import load_file
from training_runs import command_line, finish, start

from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.data.corpus import SpeakerTable, audio_source, load_corpus, speakers_of
from mrl_redimnet.data.crops import CropDataset, CropMaker, collate
from mrl_redimnet.data.synthetic import make_corpus
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.saving import load_model, save_model
from mrl_redimnet.training.curves import Record
from mrl_redimnet.training.distillation import direction_loss, similarity_loss
from mrl_redimnet.training.parts import Distillation
from mrl_redimnet.training.reading import make_recipe
from mrl_redimnet.training.tasks import check_files
from mrl_redimnet.training.teachers import (
    SOURCES,
    Listener,
    Table,
    imported_function,
    model_function,
    onnx_function,
    read_table,
    rows_by_id,
    source_of,
)
from mrl_redimnet_cli import main as cli_main

NOISE = "[{kind: noise, snr: [0, 5], probability: 1.0}]"
MODULE = """
import numpy as np
import torch

heard = []
GAINS = torch.linspace(1, 2, 6)

def embed(waves):
    assert isinstance(waves, torch.Tensor) and waves.dtype == torch.float32
    heard.append(waves.clone())
    parts = [waves[:, k::6].abs().mean(1) * gain for k, gain in enumerate(GAINS)]
    return torch.stack([*parts, waves[:, :-1].mul(waves[:, 1:]).mean(1)], dim=1).numpy()

def flat(waves):
    return waves.mean(1)

def broken(waves):
    return torch.full((len(waves), 4), float("nan")) if len(heard) else heard.append(1) or torch.randn(len(waves), 4)

Projected = torch.nn.Linear(5, 3)
number = 7
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("train") / "corpus", 6, 2, sessions=2, utterances=2, seconds=(0.6, 0.9))


@pytest.fixture(scope="module")
def rows(corpus):
    """The training speech as a run has it."""
    return load_corpus(corpus / "train", cache_dir=corpus.parent / "rows")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A saved model with its head, of other sizes than the students."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "teacher"
    config = tiny_config(spec_augment=True, embedding_size=24, matryoshka_dims=[8, 24])
    save_model(tiny_model(config, kind=MRLReDimNetForXVector), folder)
    return folder


@pytest.fixture(scope="module")
def table(corpus, teacher) -> Path:
    """What `mrl-redimnet embed` writes of the training speech."""
    folder = corpus.parent / "embedded"
    assert cli_main(["embed", str(teacher), str(corpus / "train"), "--out", str(folder), "--workers", "0"]) == 0
    return folder


@pytest.fixture
def function(tmp_path, monkeypatch) -> str:
    """The import path of a function of waveforms."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "a_teacher.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield "a_teacher:embed"
    sys.modules.pop("a_teacher", None)


def write_onnx(file: Path, shape: tuple = ("batch", "samples"), inputs: int = 1) -> Path:
    """Mean, largest and mean square of the samples, [B, 3]."""
    nodes = [
        helper.make_node("ReduceMean", ["wave", "axis"], ["mean"], keepdims=1),
        helper.make_node("ReduceMax", ["wave", "axis"], ["most"], keepdims=1),
        helper.make_node("Mul", ["wave", "wave" if inputs == 1 else "other"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axis"], ["power"], keepdims=1),
        helper.make_node("Concat", ["mean", "most", "power"], ["embedding"], axis=1),
    ]
    names = ["wave", "other"][:inputs]
    graph = helper.make_graph(
        nodes,
        "statistics",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, (shape[0], 3))],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, file)
    return file


# ---------------------------------------------------------------- kinds


def test_what_a_name_names(tmp_path, teacher, table):
    names = {teacher: "model", "owner/name": "model", table: "table", "a.npz": "table", "a/b.parquet": "table"}
    names |= {"models/x.onnx": "onnx", "package.module:name": "function", "C:/x": "model", tmp_path: "model"}
    assert {name: source_of(str(name)) for name in names} == names


def test_a_model_answers_as_it_was_saved(teacher):
    crops = torch.stack(waves(6000, 6000, 6000))
    with torch.inference_mode():
        expected = load_model(teacher)(crops).embeddings
    listener = Listener(model_function(teacher), "it")
    answer = listener({"input_values": crops})
    assert answer.crops is None and not answer.embeddings.requires_grad
    torch.testing.assert_close(answer.embeddings, expected)
    assert torch.equal(listener({"input_values": crops}).embeddings, answer.embeddings)  # no mask, no new statistics


def test_a_model_works_in_the_precision_it_is_given(teacher):
    @contextlib.contextmanager
    def autocast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield

    batch = {"input_values": torch.stack(waves(6000, 6000))}
    plain = Listener(model_function(teacher), "it")(batch).embeddings
    rounded = Listener(model_function(teacher, "cpu", autocast), "it")(batch).embeddings
    assert rounded.dtype == torch.float32 and not torch.equal(plain, rounded)
    torch.testing.assert_close(plain, rounded, rtol=0.1, atol=0.2)


def test_an_onnx_file_answers(tmp_path):
    crops = torch.stack(waves(600, 600, 600))
    answer = onnx_function(write_onnx(tmp_path / "t.onnx"))(crops)
    expected = torch.stack([crops.mean(1), crops.amax(1), crops.square().mean(1)], dim=1)
    torch.testing.assert_close(answer, expected)


OTHER_FORMS = [dict(shape=(1, "samples")), dict(shape=("batch", 16000)), dict(shape=("b", "c", "t")), dict(inputs=2)]


@pytest.mark.parametrize("options", OTHER_FORMS)
def test_an_onnx_file_of_another_form_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"t.onnx has the inputs wave tensor\(float\) .* export it with dynamic axes"):
        onnx_function(write_onnx(tmp_path / "t.onnx", **options))


def test_a_function_answers(function):
    crops = torch.stack(waves(600, 600))
    answer = Listener(imported_function(function), function)({"input_values": crops})
    assert answer.embeddings.shape == (2, 7) and answer.embeddings.dtype == torch.float32
    module = imported_function("a_teacher:Projected")
    assert module(torch.ones(2, 5)).shape == (2, 3)
    assert not any(p.requires_grad for p in sys.modules["a_teacher"].Projected.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_module:embed", "no_module:embed cannot be imported .*PYTHONPATH"),
        ("a_teacher:nothing", "a_teacher:nothing cannot be imported"),
        ("a_teacher:number", "is a int, expected a function"),
    ],
)
def test_what_is_no_function_is_said(function, name, message):
    with pytest.raises(ValueError, match=message):
        imported_function(name)


def test_an_answer_of_another_shape_is_said(function):
    with pytest.raises(ValueError, match=r"a_teacher:flat answers \(2, 600\) samples with \(2,\) numbers"):
        Listener(imported_function("a_teacher:flat"), "a_teacher:flat")({"input_values": torch.stack(waves(600, 600))})


@pytest.mark.parametrize("name", ["/nowhere/model", "/nowhere/t.onnx", "/nowhere/t.parquet", "/nowhere/t.npz"])
def test_a_teacher_that_is_not_there_is_said(name):
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        SOURCES[source_of(name)].check(name)


# ---------------------------------------------------------------- tables


def lookup(table, *utterances: int):
    return table({"utterances": torch.tensor(utterances), "input_values": torch.zeros(1)})


def test_a_table_has_the_embeddings_of_the_very_utterances(rows, corpus, table, teacher):
    told = []
    found = lookup(read_table(table, rows, str(corpus / "train"), 0.0, told.append), 5, 0, 11)
    expected = SpeakerEncoder.from_pretrained(teacher).embed([audio_source(rows, row) for row in (5, 0, 11)])
    assert found.crops is None and not told
    torch.testing.assert_close(found.embeddings, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def as_npz(ids, values, file):
    np.savez(file.with_suffix(".npz"), ids=np.array(ids), embeddings=values)
    return file.with_suffix(".npz")


def as_parquet(ids, values, file, names=("id", "embedding"), kind=None):
    lists = pa.array([None if row is None else list(map(float, row)) for row in values], kind)
    pq.write_table(pa.table({names[0]: list(ids), names[1]: lists}), file.with_suffix(".parquet"))
    return file.with_suffix(".parquet")


FORMS = {
    "npz": as_npz,
    "lists": as_parquet,
    "float16": lambda *given: as_parquet(*given, kind=pa.list_(pa.float16(), 3)),
    "other names": lambda *given: as_parquet(*given, names=("utt_id", "xvector"), kind=pa.large_list(pa.float64())),
    "path": lambda *given: as_parquet(*given, names=("path", "emb")),
}


@pytest.mark.parametrize("form", FORMS)
def test_anybodys_table_is_read(rows, corpus, tmp_path, form):
    paths, values = rows["path"], np.arange(3 * len(rows), dtype=np.float32).reshape(-1, 3) + 1
    order = np.random.default_rng(0).permutation(len(rows))
    file = FORMS[form]([*(paths[row] for row in order), "more/of/it.wav"], [*values[order], values[0]], tmp_path / "t")
    SOURCES["table"].check(str(file))
    found = read_table(file, rows, str(corpus / "train"), 0.0)
    np.testing.assert_array_equal(lookup(found, *range(len(rows))).embeddings, values)


def test_crops_without_an_embedding_are_left_out(rows, corpus, tmp_path, capsys):
    values = [[1.0, 2.0]] * len(rows)
    values[3], values[4], values[6] = [float("nan"), 1.0], [0.0, 0.0], None
    file = as_parquet(rows["path"][:-1], values[:-1], tmp_path / "t", kind=pa.list_(pa.float32()))
    found = lookup(read_table(file, rows, str(corpus / "train"), 0.5), 0, 3, 5, 4, -1, 6, 7, len(rows) - 1)
    assert found.crops.tolist() == [0, 2, 6] and found.embeddings.shape == (3, 2)
    printed = capsys.readouterr().out
    assert f"no embedding of 4 of the {len(rows)} training utterances" in printed and rows["path"][3] in printed


@pytest.mark.parametrize("known", [0, 10])
def test_too_few_embeddings_are_refused(rows, corpus, tmp_path, known):
    ids = [*rows["path"][:known], *[f"other/{n}.wav" for n in range(known, len(rows))]]
    file = as_parquet(ids, [[1.0, 2.0]] * len(rows), tmp_path / "t")
    with pytest.raises(ValueError, match=rf"no embedding of {len(rows) - known} of the .* may be missing .* the table"):
        read_table(file, rows, str(corpus / "train"), 0.1 if known else 1.0)


@pytest.mark.parametrize(
    ("ids", "values", "options", "message"),
    [
        (["a", "b"], [[1.0], [2.0, 3.0]], {}, "different sizes"),
        (["a"], [[1.0]], dict(names=("who", "embedding")), "columns who, embedding; none is called as the id"),
        (["a"], [[1.0]], dict(names=("id", "numbers")), "none is called as the embedding"),
        (["a"], ["b"], dict(kind=pa.list_(pa.string())), "expected lists of numbers"),
    ],
)
def test_a_table_of_another_form_is_refused(rows, corpus, tmp_path, ids, values, options, message):
    file = tmp_path / "t.parquet"
    if options.get("kind") is not None:
        pq.write_table(pa.table({"id": ids, "embedding": pa.array([values], options["kind"])}), file)
    else:
        as_parquet(ids, values, file, **options)
    with pytest.raises(ValueError, match=message):
        SOURCES["table"].check(str(file))
        read_table(file, rows, str(corpus / "train"), 1.0)


def test_a_table_that_is_damaged_is_said(tmp_path):
    (tmp_path / "t.parquet").write_text("no parquet file, but some text")
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04 cut short")
    np.savez(tmp_path / "other.npz", ids=np.array(["a", "b"]), embeddings=np.zeros((3, 4)))
    np.savez(tmp_path / "older.npz", names=np.array(["a", "b"]), embeddings=np.zeros((2, 4)))
    for name in ("t.parquet", "t.npz", "other.npz", "older.npz"):
        with pytest.raises(ValueError, match=f"teacher: .*{name} is no"):
            SOURCES["table"].check(str(tmp_path / name))


def test_an_id_that_comes_twice_is_refused(rows, corpus, tmp_path):
    paths = rows["path"][:]
    file = as_parquet([*paths, paths[1]], [[1.0, 2.0]] * (len(rows) + 1), tmp_path / "t")
    with pytest.raises(ValueError, match="several embeddings of one utterance"):
        read_table(file, rows, str(corpus / "train"), 0.0)


def test_ids_of_tables_of_speech_may_lack_the_speaker(tmp_path, corpus):
    """Where a path has no folder, the corpus puts the speaker in front of it; `mrl-redimnet embed` does not."""
    source = load_corpus(corpus / "train", cache_dir=tmp_path / "a")
    audio = [{"bytes": Path(audio["path"]).read_bytes(), "path": None} for audio in source["audio"]]
    data = {"audio": audio, "speaker": source["speaker"], "path": [f"{n}.wav" for n in range(len(source))]}
    pq.write_table(pa.table(data), tmp_path / "speech.parquet")
    speech = load_corpus(tmp_path / "speech.parquet", cache_dir=tmp_path / "b")
    ids = rows_by_id(speech, str(tmp_path / "speech.parquet"))
    assert ids["3.wav"] == ids[f"{source['speaker'][3]}/3.wav"] == 3


# ---------------------------------------------------------------- crops and losses


def test_crops_know_their_utterance_and_how_they_sounded(rows):
    """At another speed it is another voice, which no table knows."""
    speakers = SpeakerTable(speakers_of(rows))
    maker = CropMaker(len(speakers), (1.0, 0.9), lambda crop, rng, strength: -0.5 * crop, keep_clean=True)
    dataset = CropDataset(rows, speakers, maker, crop_seconds=(10.0, 10.0))  # all of an utterance, and again
    batch = collate([dataset[draw] for draw in range(30)])
    assert torch.equal(batch["input_values"], -0.5 * batch["clean_values"])
    played = batch["labels"] >= len(speakers)
    assert played.any() and not played.all() and torch.equal(batch["utterances"] == -1, played)
    for row, crop in zip(batch["utterances"].tolist(), batch["clean_values"], strict=True):
        if row >= 0:
            audio = read_audio(audio_source(rows, row))
            assert np.isin(crop.numpy()[:1000], audio).all()


@pytest.mark.parametrize("kind", ["similarity", "direction"])
def test_the_loss_of_a_run_is_that_of_the_crops_that_are_known(kind):
    generator = torch.Generator().manual_seed(0)
    embeddings, values = (torch.randn(6, size, generator=generator) for size in (32, 5))
    known = np.array([True, False, True, True, True, True])
    part = Distillation(kind)
    part.teacher = Table(values.numpy(), known)
    config = SimpleNamespace(matryoshka_dims=[3, 32], prefix_weights=[1.0, 3.0])
    loss = SimpleNamespace(teacher_weight=7.0)
    run = SimpleNamespace(
        model=SimpleNamespace(config=config), recipe=SimpleNamespace(loss=loss), on_device=lambda tensor: tensor
    )

    def found(*utterances: int) -> float:
        batch = {"utterances": torch.tensor(utterances), "input_values": torch.zeros(1)}
        answer = SimpleNamespace(embeddings=embeddings[: len(utterances)])
        return part.loss(run, batch, answer, {"prefix_weights": None}).item()

    student, targets = embeddings[[0, 2, 3]], values[[4, 5, 0]]
    if kind == "direction":
        part.axes.fit(values.numpy())
        expected = direction_loss(student, part.axes.rotated(targets), [3, 32], [1.0, 3.0])
        assert abs(expected - direction_loss(student, targets, [3, 32], [1.0, 3.0])) > 0.01
    else:
        expected = similarity_loss(student, targets, [3, 32], [1.0, 3.0])
    assert found(4, 1, 5, 0, -1) == pytest.approx(7 * expected.item(), rel=1e-5)
    assert part.numbers()["teacher_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found(1, -1) == 0 and (found(1, 4) == 0) == (kind == "similarity")  # which compares two


# ---------------------------------------------------------------- runs


def weights(output: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(output / name / "model.safetensors")


def teacher_losses(output: Path) -> list[float]:
    return [line["teacher_loss"] for line in Record(output).lines("train")]


def changed(one: dict, other: dict) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_a_teacher_hears_the_clean_crop_or_the_same_as_the_student(train, function):
    def heard(**settings) -> torch.Tensor:
        sys.modules.pop("a_teacher", None)
        shutil.rmtree(train(teacher=function, **settings))
        return torch.cat(sys.modules["a_teacher"].heard)

    plain, clean = heard(), heard(augmentations=NOISE)
    assert plain.shape == (8, 8000) and torch.equal(clean, plain)
    assert not torch.equal(heard(augmentations=NOISE, teacher_hears="same"), plain)


def test_a_student_learns_where_its_teacher_points(train, table):
    """Every prefix, from the first step on, without labels."""
    settings = dict(teacher=table, margin_weight=0, batch_size=16, steps=60, learning_rate=0.01, evaluate_every=60)
    losses = teacher_losses(train(**settings, augmentations=NOISE))
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])


def test_without_labels_the_encoder_alone_is_trained_and_saved(train, corpus, function, tmp_path):
    trials = dict(dev_trials=corpus / "test/trials.txt", dev_folder=corpus / "test/wav")
    averages = dict(ema=0.5, weight_averaging=0.9, evaluate_every=1, steps=3)
    output = train(teacher=function, margin_weight=0, layout="utterance", **trials, **averages)
    for name in ("last", "best"):
        assert json.loads((output / name / "config.json").read_text())["architectures"] == ["MRLReDimNetModel"]
        assert not (output / name / "speakers.json").exists()
        assert not any("classifier" in tensor for tensor in weights(output, name))
    lines = Record(output).lines("train")
    assert len(lines) == 3 and all("teacher_loss" in line and "loss" not in line for line in lines)
    card = " ".join((output / "best" / "README.md").read_text().split())
    assert "of unknown speakers (0.0 h), without speaker labels and with the teacher `a_teacher:embed` (direct" in card


def test_margin_and_teacher_are_weighted(train, table, tmp_path):
    alone = weights(train().rename(tmp_path / "alone"))
    unheard = weights(train(teacher=table, teacher_weight=0).rename(tmp_path / "unheard"))
    assert not changed(alone, unheard)
    similar = weights(train(teacher=table).rename(tmp_path / "similar"))
    pointed = weights(train(teacher=table, teacher_loss="direction").rename(tmp_path / "pointed"))
    mixed = weights(train(teacher=table, teacher_loss="direction", margin_weight=0.5).rename(tmp_path / "mixed"))
    name = "redimnet.trunk.stem.conv.weight"
    assert len({tuple(tensors[name].flatten().tolist()) for tensors in (alone, similar, pointed, mixed)}) == 4
    line = Record(tmp_path / "pointed").lines("train")[0]
    assert line["loss"] > 5 and 0 < line["teacher_loss"] < 2  # each without its weight


RESUMED = {
    "table, no labels": dict(margin_weight=0, speed_perturb=[1.0, 0.9], ema=0.5),
    "table, direction and margin": dict(teacher_loss="direction", gradient_accumulation=2),
    "function": dict(margin_weight=0, augmentations=NOISE),
}


@pytest.mark.parametrize("way", RESUMED)
def test_a_resumed_run_ends_with_the_same_weights(train, table, function, way, monkeypatch):
    given = function if way == "function" else table
    settings = dict(teacher=given, steps=6, checkpoint_every=3, evaluate_every=3) | RESUMED[way]
    output = train(**settings)
    whole = weights(output)
    shutil.rmtree(output / "checkpoints/step-00000006")
    shutil.rmtree(output / "last")
    # Other axes, as another processor may find: those of the checkpoint are used.
    monkeypatch.setattr("mrl_redimnet.training.distillation.principal_rotation", None)
    train("--resume", **settings)
    assert whole.keys() == weights(output).keys() and not changed(whole, weights(output))


def test_a_run_from_a_student_keeps_its_axes(train, table, monkeypatch):
    """Without a step nothing turns: the second run's loss on the student begins where the first one's ended."""
    settings = dict(teacher=table, margin_weight=0, steps=3)
    first = train(**settings)
    file = first / "teacher_axes.safetensors"
    kept = load_file(file)["axes"]
    shutil.copy(file, first.parent / "kept.safetensors")
    monkeypatch.setattr("mrl_redimnet.training.distillation.principal_rotation", None)  # none is computed
    shutil.move(first, first.parent / "first")
    student = first.parent / "first/last"
    second = train(**settings, model=student, model_options="{}", teacher_axes=first.parent / "kept.safetensors")
    assert torch.equal(load_file(second / "teacher_axes.safetensors")["axes"], kept)


@pytest.mark.parametrize("finetune", ["head", "projection"])
def test_a_part_learns_from_a_teacher(train, teacher, table, finetune):
    options = dict(model=teacher, model_options="{}", finetune=finetune, margin_weight=0, teacher=table)
    output = train(**options, steps=3)
    before = load_model(teacher).base_model.state_dict()
    parts = {name.split(".")[0] for name in changed(weights(output), before)}
    assert parts == ({"projection"} if finetune == "projection" else {"pooling", "projection"})


@pytest.mark.parametrize("strategy", ["vanilla", "mixed"])
def test_an_adapter_learns_from_a_teacher(train, teacher, table, strategy):
    adapter = dict(model=teacher, model_options="{}", finetune="adapter", rank=2, strategy=strategy, start_rank=4)
    output = train(**adapter, margin_weight=0, teacher=table, steps=4, learning_rate=0.01)
    tensors = load_file(output / "last" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and tensor.abs().sum() > 0 for name, tensor in tensors.items())


def test_a_stream_learns_from_a_teacher_that_hears_it(train, corpus, function, tmp_path):
    assert not cli_main(["prepare", str(corpus / "train"), str(tmp_path / "shards")])
    trials = dict(dev_trials=corpus / "test/trials.txt", dev_folder=corpus / "test/wav")
    stream = dict(train=tmp_path / "shards", streaming=True, sampler="utterance", **trials)
    output = train(**stream, teacher=function, margin_weight=0, augmentations=NOISE, max_unusable_ratio=0.5)
    assert len(teacher_losses(output)) == 2


def test_mixed_precision_learns_from_a_teacher(train, teacher):
    losses = teacher_losses(train(teacher=teacher, margin_weight=0, mixed_precision="bf16"))
    assert len(losses) == 2 and all(0 < loss < 2 for loss in losses)


def test_a_teacher_whose_answer_is_no_number_stops_the_run(train, function):
    with pytest.raises(FloatingPointError, match="The loss is no number"):
        train(teacher="a_teacher:broken", steps=3)


@pytest.mark.slow
def test_two_processes_learn_as_one_with_twice_the_batch(train, corpus, table, tmp_path):
    from test_train_hf import STILL

    settings = dict(STILL, margin_weight=0, teacher=table, teacher_loss="direction")
    output = tmp_path / "two"
    finish(start(corpus, command_line(corpus, output, **settings), processes=2))
    one, two = weights(train(**settings, batch_size=8)), weights(output)
    names = [name for name in one if name.endswith(".weight")]  # not biases before a norm, which have no gradient
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in names)


# ---------------------------------------------------------------- recipes

TRIALS = dict(dev_trials="trials.txt", dev_folder="wav")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(margin_weight=0), "margin_weight: with 0 there is nothing to learn but from a teacher"),
        (dict(margin_weight=0, teacher="a/b", teacher_weight=0), "margin_weight: with 0 there is nothing to learn"),
        (dict(margin_weight=0, teacher="a/b", classifier_sample=9), "classifier_sample: with margin_weight: 0"),
        (dict(teacher="a/b", teacher_loss="direction", rotate_at=[0.5]), "rotate_at: with teacher_loss: direction"),
        (dict(teacher="a/b", margin_weight=0, rotate_at=[0.5]), "rotate_at: with teacher_loss: direction"),
        (dict(layout="utterance", **TRIALS), "layout: utterance says that no speaker is known; give margin_weight: 0"),
        (dict(layout="utterance", margin_weight=0, teacher="a/b"), "layout: utterance .* dev_trials with dev_folder"),
        (
            dict(teacher="t.npz", streaming=True, sampler="utterance", **TRIALS),
            "teacher: a table has embeddings of known utterances, a stream has none",
        ),
        (dict(label_file="l.csv", label_column="age", margin_weight=0.5), "margin_weight: belongs to the learning of"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(**settings)


def test_a_misspelt_published_teacher_is_refused_with_the_nearest_names():
    with pytest.raises(FileNotFoundError, match=r"nearest names: .*b2-vox2-ft_lm"):
        check_files(make_recipe(teacher="b2-vox2-ft_l", train=str(Path(__file__).parent)))


def test_defaults_of_what_is_taught():
    assert make_recipe(teacher="a/b").loss.taught == "similarity" and make_recipe(teacher="a/b").rotations
    alone = make_recipe(teacher="a/b", margin_weight=0)
    assert alone.loss.taught == "direction" and alone.rotations == []
    assert make_recipe(teacher="a/b", teacher_loss="direction").rotations == []
    assert make_recipe(teacher="a/b", margin_weight=0, teacher_loss="similarity").rotations
