"""What a run learns and is judged by: trials of held-out speakers, or labels; domains; where a model starts from."""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY, tiny_config, tiny_model, waves
from huggingface_hub import HfApi
from transformers.utils.logging import add_handler, get_verbosity, remove_handler, set_verbosity, set_verbosity_warning

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.audio.domains import Noisy, Telephony, simulate
from mrl_redimnet.audio.io import AudioError, read_audio
from mrl_redimnet.data.corpus import SpeakerTable, load_corpus
from mrl_redimnet.data.crops import CropDataset, CropMaker
from mrl_redimnet.data.prepare import prepare
from mrl_redimnet.data.streaming import stream_contents
from mrl_redimnet.data.synthetic import make_corpus
from mrl_redimnet.evaluation.groups import error_rates, read_groups
from mrl_redimnet.evaluation.results import check_present, embed_trials, evaluate_trials
from mrl_redimnet.rows import AttributeRow, VerificationRow
from mrl_redimnet.saving import save_model
from mrl_redimnet.scoring.scorers import score
from mrl_redimnet.scoring.trials import read_trials
from mrl_redimnet.training import tasks
from mrl_redimnet.training.reading import make_recipe
from mrl_redimnet.training.recipe import EvaluationSet, Recipe
from mrl_redimnet.training.tasks import Attribute, Verification, classes_of, hold_out, make_task

SIZE = {key: value for key, value in TINY.items() if key != "num_speakers"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six speakers to train on, two to test on, of four utterances each."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield make_corpus(folder / "corpus", 6, 2, sessions=2, utterances=2, seconds=(0.5, 0.8))


@pytest.fixture(scope="module")
def speech(root):
    return load_corpus(root / "train")


@pytest.fixture(scope="module")
def shards(root) -> Path:
    """The training speech as parquet files."""
    prepare(root / "train", root / "shards", cache_dir=root.parent / "cache", shard_mb=0.1)
    return root / "shards"


@pytest.fixture
def recipe(root, tmp_path):
    """A recipe over the corpus: recipe(**settings)."""

    def make(**settings) -> Recipe:
        small = dict(train=str(root / "train"), output=str(tmp_path / "run"), model_options=SIZE, dev_speakers=2)
        return make_recipe(**{**small, **settings})

    return make


@pytest.fixture
def labelled(recipe, tmp_path):
    """A recipe whose labels are these: labelled({speaker or path: label}, key=..., **settings)."""

    def make(table: dict, key: str = "speaker", **settings) -> Recipe:
        lines = [f"{key},other,wanted", *(f"{row},-,{label}" for row, label in table.items())]
        (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
        return recipe(
            label_file=str(tmp_path / "labels.csv"), **{"label_column": "wanted", "label_key": key, **settings}
        )

    return make


def trial_test(root: Path, **more) -> dict:
    return {"trials": str(root / "test/trials.txt"), "folder": str(root / "test/wav"), **more}


def everyone(root: Path) -> list[str]:
    """All speakers of both parts, by name."""
    return sorted(path.name for part in ("train", "test") for path in (root / part / "wav").iterdir())


def genders(root: Path) -> dict[str, str]:
    return {name: "fm"[int(name[2:]) % 2] for name in everyone(root)}


# ---------------------------------------------------------------- speakers held out


@pytest.mark.parametrize("count", [2, 4])
def test_held_out_speakers_are_not_trained_on(speech, recipe, count):
    training, held_out = hold_out(speech, recipe(dev_speakers=count))
    assert len(set(held_out["speaker"])) == count and len(set(training["speaker"])) == 6 - count
    assert not set(held_out["speaker"]) & set(training["speaker"])
    assert sorted([*training["path"], *held_out["path"]]) == speech["path"]


def test_who_is_held_out_is_set_by_the_seed(speech, recipe):
    chosen = [frozenset(hold_out(speech, recipe(seed=seed))[1]["speaker"]) for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1] and len(set(chosen)) > 1
    shuffled = speech.select(np.random.default_rng(0).permutation(len(speech)))
    assert set(hold_out(shuffled, recipe())[1]["speaker"]) == chosen[0]


def test_only_speakers_with_two_utterances_can_be_held_out(speech, recipe):
    names = sorted(set(speech["speaker"]))
    first_only = [row for row, path in enumerate(speech["path"]) if path.split("/")[0] in names[3:]]
    few = [speech["speaker"].index(name) for name in names[:3]]
    corpus = speech.select([*few, *first_only])
    for seed in range(5):
        assert set(hold_out(corpus, recipe(seed=seed))[1]["speaker"]) <= set(names[3:])
    with pytest.raises(ValueError, match="dev_speakers: 3 speakers are to be held out, but only 3 of 6 have two"):
        hold_out(corpus, recipe(dev_speakers=3))


# ---------------------------------------------------------------- verification


def test_without_labels_the_speakers_are_learnt(root, speech, recipe):
    task = make_task(recipe(), speech)
    assert type(task) is Verification and (task.name, task.labels, task.targets) == ("verification", (), None)
    held_out = {path.split("/")[0] for path in task.development["development"].trials.utterances}
    assert len(held_out) == 2 and set(task.speakers.names) == set(task.corpus["speaker"])
    assert held_out | set(task.speakers.names) == set(speech["speaker"])
    assert len(task.development["development"]) == len(task.development["development"].trials.labels) > 0


def test_development_trials_may_be_given(root, speech, recipe):
    given = dict(dev_trials=str(root / "test/trials.txt"), dev_folder=str(root / "test/wav"), dev_speakers=0)
    task = make_task(recipe(**given), speech)
    assert len(task.corpus) == len(speech) and len(task.speakers) == 6
    assert list(task.development) == ["development", "training speakers"]
    test = task.development["development"]
    assert test.folder == root / "test/wav" and test.trials.enrol == read_trials(root / "test/trials.txt").enrol


def test_utterances_that_are_missing_stop_a_run_before_it_begins(root, speech, recipe):
    with pytest.raises(FileNotFoundError, match="utterances are not below"):
        make_task(recipe(tests={"vox": trial_test(root, folder=str(root / "train/wav"))}), speech)


def test_trials_are_scored_in_the_domain_of_their_test(root, speech, recipe):
    telephone = dict(domain="telephony", domain_options={"codecs": ["mulaw"]})
    task = make_task(recipe(tests={"plain": trial_test(root), "phone": trial_test(root, **telephone)}), speech)
    model, dims = tiny_model(kind=MRLReDimNetForXVector), [2, 8, 32]
    rows = {name: task.evaluate(model, test, dims, resamples=10) for name, test in task.tests.items()}
    trials = read_trials(root / "test/trials.txt")
    assert rows["plain"] == evaluate_trials(model, trials, root / "test/wav", dims, 10)
    assert rows["phone"] == evaluate_trials(model, trials, root / "test/wav", dims, 10, domain=Telephony(["mulaw"]))
    assert rows["phone"] != rows["plain"]


def test_a_test_with_groups_is_judged_by_group_at_the_whole_embedding(root, speech, recipe, tmp_path):
    trials = read_trials(root / "test/trials.txt")
    speakers = sorted({*trials.speakers[0]})
    table = tmp_path / "voices.csv"
    table.write_text("speaker,voice\n" + "".join(f"{name},{'hl'[i % 2]}\n" for i, name in enumerate(speakers)))
    tests = {"plain": trial_test(root), "voices": trial_test(root, groups=str(table), group_column="voice")}
    task = make_task(recipe(tests=tests), speech)
    model = tiny_model(kind=MRLReDimNetForXVector)
    embeddings = embed_trials(model, trials, root / "test/wav")
    scores = score(trials, trials.utterances, embeddings, model.config.embedding_size)
    group_of = read_groups(table, "voice")
    expected = error_rates(trials, scores, group_of, 10, dim=model.config.embedding_size)
    assert task.by_group(model, task.tests["voices"], 10) == expected and len(expected) == 3
    assert task.by_group(model, task.tests["plain"], 10) == []
    table.write_text(f"speaker,voice\n{speakers[0]},h\n")
    with pytest.raises(ValueError, match=f"no voice for {len(speakers) - 1} of the {len(speakers)} speakers"):
        make_task(recipe(tests=tests), speech)


def test_of_two_models_the_one_with_fewer_errors_scores_lower():
    better = [VerificationRow(8, 0.1, 1.0), VerificationRow(32, 0.05, 1.0)]
    worse = [VerificationRow(8, 0.3, 0.1), VerificationRow(32, 0.04, 0.1)]
    assert Verification.score(better) == pytest.approx(0.075)
    assert Verification.score(worse) == pytest.approx(0.17)


def test_the_record_of_an_evaluation_has_the_error_rate_of_each_dimension():
    rows = [VerificationRow(8, 0.1, 1.0), VerificationRow(32, 0.05, 1.0)]
    assert Verification.curve(rows) == {"eer": {"8": 0.1, "32": 0.05}}
    assert Attribute.curve([AttributeRow("accuracy", 0.75)]) == {"accuracy": 0.75}


def test_a_task_says_what_there_is_to_learn_from(speech, recipe):
    task = make_task(recipe(dev_speakers=2), speech)
    assert task.utterances == len(task.corpus) == 16
    assert task.speech == f"16 utterances of 4 speakers ({sum(task.corpus['seconds']) / 3600:.1f} h)"


def test_classes_are_the_speakers_and_then_the_speakers_at_other_speeds():
    speakers = SpeakerTable(["b", "a"])
    assert classes_of(speakers, [1.0]).names == ("b", "a")
    assert classes_of(speakers, [1.0, 0.9, 1.1]).names == (
        *("b", "a"),
        *("b at speed 0.9", "a at speed 0.9"),
        *("b at speed 1.1", "a at speed 1.1"),
    )


def test_the_classes_of_a_task_are_the_labels_of_its_crops(speech, recipe):
    """Example by example: what `CropMaker` numbers is what `classes` names."""
    settings = recipe(speed_perturb=[1.0, 0.9])
    task = make_task(settings, speech)
    crops = CropDataset(task.corpus, task.speakers, CropMaker(len(task.speakers), (1.0, 0.9)), (0.2, 0.2))
    for draw in range(16):
        row, _ = crops.corpus_row(draw, np.random.default_rng([0, 1, draw]))
        name = task.classes.name(crops[draw]["label"])
        assert name.partition(" at speed ")[0] == task.corpus[row]["speaker"]
    assert len(task.classes) == 8


# ---------------------------------------------------------------- the gap to training speakers


def test_training_speakers_are_judged_last_beside_those_held_out(root, speech, recipe, labelled):
    for settings in (recipe(dev_speakers=2), labelled(genders(root), dev_speakers=2)):
        task = make_task(settings, speech)
        assert list(task.development) == ["development", "training speakers"]
        known = task.development["training speakers"]
        paths = known.trials.utterances if isinstance(task, Verification) else known.corpus["path"]
        names = {path.split("/")[0] for path in paths}
        assert len(names) == 2 and names <= set(task.speakers.names) and known.domain is None


def test_trials_of_training_speakers_are_of_both_kinds_and_their_files_are_there(speech, recipe):
    known = make_task(recipe(), speech).development["training speakers"]
    assert set(known.trials.labels.tolist()) == {0, 1}
    check_present(known.trials, known.folder)
    target = [a.split("/")[0] == b.split("/")[0] for a, b in zip(known.trials.enrol, known.trials.test, strict=True)]
    assert target == known.trials.labels.astype(bool).tolist()


def test_as_many_training_speakers_are_judged_as_are_held_out_but_two_at_least(root, speech, recipe):
    for count, expected in ((2, 2), (3, 3), (5, None)):
        known = tasks.some_training_speakers(
            hold_out(speech, recipe(dev_speakers=count))[0], recipe(dev_speakers=count)
        )
        assert (None if known is None else len(set(known["speaker"]))) == expected
    trials = dict(dev_trials=str(root / "test/trials.txt"), dev_folder=str(root / "test/wav"), dev_speakers=0)
    assert len(set(tasks.some_training_speakers(speech, recipe(**trials))["speaker"])) == 2


def test_training_speakers_of_one_utterance_are_not_judged(root, speech, recipe):
    """Nor is a run refused for want of others."""
    names = sorted(set(speech["speaker"]))
    several = [row for row, name in enumerate(speech["speaker"]) if name in names[:3]]
    single = [speech["speaker"].index(name) for name in names[3:]]
    corpus = speech.select(sorted([*several, *single]))
    assert list(make_task(recipe(dev_speakers=2), corpus).development) == ["development"]  # one has several utterances
    trials = dict(dev_trials=str(root / "test/trials.txt"), dev_folder=str(root / "test/wav"))
    task = make_task(recipe(**trials, dev_speakers=8), corpus)
    known = task.development["training speakers"].trials.utterances
    assert {path.split("/")[0] for path in known} == set(names[:3])


def test_the_training_speakers_that_are_judged_are_set_by_the_seed(speech, recipe):
    chosen = [frozenset(tasks.some_training_speakers(speech, recipe(seed=seed))["path"]) for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1] and len(set(chosen)) > 1


# ---------------------------------------------------------------- parquet files and streams


def test_audio_of_parquet_files_is_written_where_trials_are_read(root, shards, recipe, tmp_path):
    task = make_task(recipe(), load_corpus(shards))
    for name, test in task.development.items():
        assert test.folder == tmp_path / "run" / "development", name
        for path in test.trials.utterances:
            assert (test.folder / path).read_bytes() == (root / "train/wav" / path).read_bytes()
    written = {path.relative_to(test.folder).as_posix() for path in test.folder.rglob("*.wav")}
    assert written == {path for test in task.development.values() for path in test.trials.utterances}


def test_speakers_of_parquet_files_are_judged_as_those_of_the_folder(root, shards, speech, recipe):
    model = tiny_model(kind=MRLReDimNetForXVector)
    rows = []
    for corpus in (speech, load_corpus(shards)):
        task = make_task(recipe(), corpus)
        rows.append([task.evaluate(model, test) for test in task.development.values()])
    assert rows[0] == rows[1]


def test_what_is_written_already_is_left_and_what_was_broken_off_is_written_again(shards, recipe):
    corpus, settings = load_corpus(shards), recipe()
    folder = tasks.development_folder(corpus, settings)
    files = sorted(folder.rglob("*.wav"))
    assert len(files) == len(corpus)
    whole, stamp = files[0].read_bytes(), files[1].stat().st_mtime_ns
    files[0].write_bytes(whole[:100])
    assert tasks.development_folder(corpus, settings) == folder
    assert files[0].read_bytes() == whole and files[1].stat().st_mtime_ns == stamp


def test_attributes_of_parquet_files_are_judged_as_those_of_the_folder(root, shards, speech, labelled):
    ages = {path: 30 + row for row, path in enumerate(speech["path"])}
    model = tiny_model(tiny_config(num_labels=1), kind=MRLReDimNetForSequenceClassification)
    rows = []
    for corpus in (speech, load_corpus(shards)):
        task = make_task(labelled(ages, key="path"), corpus)
        rows.append([task.evaluate(model, test)[0].value for test in task.development.values()])
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


def test_a_stream_is_learnt_from_by_what_is_in_it(root, shards, recipe):
    """No row is at hand: trials are given, and no training speakers are judged."""
    given = dict(dev_trials=str(root / "test/trials.txt"), dev_folder=str(root / "test/wav"))
    settings = recipe(train=str(shards), streaming=True, sampler="utterance", speed_perturb=[1.0, 0.9], **given)
    task = make_task(settings, stream_contents(str(shards)))
    assert list(task.development) == ["development"] and task.utterances == 24
    assert task.speech.startswith("24 utterances of 6 speakers (")
    assert len(task.classes) == 12 and task.build_model(settings)[0].config.num_speakers == 12


# ---------------------------------------------------------------- labels


def test_classes_by_speaker(root, speech, labelled):
    task = make_task(labelled(genders(root), tests={"other": {"folder": str(root / "test")}}), speech)
    assert type(task) is Attribute and (task.name, task.labels) == ("classification", ("f", "m"))
    assert [task.labels[i] for i in task.targets] == [genders(root)[name] for name in task.corpus["speaker"]]
    for test in (*task.tests.values(), *task.development.values()):
        assert [task.labels[i] for i in test.targets] == [genders(root)[name] for name in test.corpus["speaker"]]
        assert len(test) == len(test.corpus) == 8
    assert not set(task.development["development"].corpus["speaker"]) & set(task.corpus["speaker"])
    assert set(task.tests["other"].corpus["speaker"]) == {"id10001", "id10002"}


def test_numbers_by_path(root, speech, labelled):
    """Paths are those below the folder that holds the speakers."""
    ages = {path: 20.5 + row for row, path in enumerate(speech["path"])}
    task = make_task(labelled(ages, key="path"), speech)
    assert (task.name, task.labels) == ("regression", ())
    assert task.targets.dtype == np.float32
    assert task.targets.tolist() == [ages[path] for path in task.corpus["path"]]
    test = task.development["development"]
    assert test.targets.tolist() == [ages[path] for path in test.corpus["path"]]


def test_the_order_of_labels_is_not_that_of_the_files(root, speech, labelled):
    names = everyone(root)
    one = make_task(labelled(dict(zip(names, "zyxzyxzy", strict=True))), speech)
    assert one.labels == ("x", "y", "z")


def test_one_name_among_numbers_makes_all_of_them_names(root, speech, labelled):
    table = dict(zip(everyone(root), ["1", "2", "1", "2", "1", "x", "1", "2"], strict=True))
    assert make_task(labelled(table), speech).labels == ("1", "2", "x")


@pytest.mark.parametrize("label", ["nan", "inf", "1,5", "-"])
def test_what_is_no_finite_number_is_a_name(label):
    assert not tasks.is_number(label)
    assert tasks.is_number("1.5") and tasks.is_number("-2e1")


def test_a_missing_label_is_named(root, speech, labelled):
    table = genders(root)
    gone = table.popitem()[0]
    tests = {"other": {"folder": str(root / "test")}}
    assert make_task(labelled(table), speech).labels == ("f", "m")  # nobody asks for that one
    with pytest.raises(ValueError, match=f"labels.csv: no wanted for the speaker '{gone}'"):
        make_task(labelled(table, tests=tests), speech)
    with pytest.raises(ValueError, match="no wanted for the speaker 'id00003'"):
        make_task(labelled({**genders(root), "id00003": ""}), speech)


@pytest.mark.parametrize(("column", "key", "missing"), [("age", "speaker", "age"), ("age", "path", "age, path")])
def test_a_missing_column_is_named(tmp_path, column, key, missing):
    (tmp_path / "labels.csv").write_text("speaker,gender\na,f\n")
    with pytest.raises(ValueError, match=rf"labels.csv: no column {missing}; there are \['speaker', 'gender'\]"):
        tasks.read_labels(tmp_path / "labels.csv", column, key)


def test_labels_that_contradict_each_other_are_refused_with_their_line(tmp_path):
    (tmp_path / "labels.csv").write_text("path,speaker,age\nx,a,20\ny,b,30\nz,b,30\nw,a,21\n")
    with pytest.raises(ValueError, match="labels.csv, line 5: a is '21' here and '20' above; give label_key: path"):
        tasks.read_labels(tmp_path / "labels.csv", "age", "speaker")
    assert tasks.read_labels(tmp_path / "labels.csv", "age", "path") == {"x": "20", "y": "30", "z": "30", "w": "21"}


def test_a_label_that_occurs_in_a_test_alone_is_refused(root, speech, labelled):
    table = {**genders(root), "id10002": "x"}
    assert make_task(labelled(table), speech).labels == ("f", "m")
    with pytest.raises(ValueError, match=r"wanted: \['x'\] occur in a test, but in no training speech"):
        make_task(labelled(table, tests={"other": {"folder": str(root / "test")}}), speech)


# ---------------------------------------------------------------- judging labels


def answers_one_by_one(model, test) -> torch.Tensor:
    """What the model says of each file alone."""
    with torch.inference_mode():
        files = [audio["path"] for audio in test.corpus["audio"]]
        return torch.cat([model.eval()(torch.from_numpy(read_audio(file))[None]).logits for file in files])


def test_accuracy_is_that_of_the_models_own_answers(root, speech, labelled):
    task = make_task(labelled(genders(root), tests={"other": {"folder": str(root / "test")}}), speech)
    model = tiny_model(tiny_config(num_labels=2), kind=MRLReDimNetForSequenceClassification)
    test = task.tests["other"]
    logits = answers_one_by_one(model, test)
    with torch.no_grad():  # in the middle, so that some answers are wrong
        model.classifier.bias -= logits.median(0).values
    right = (answers_one_by_one(model, test).argmax(1).numpy() == test.targets).mean()
    (row,) = task.evaluate(model.train(), test, dims=[8])
    assert row == AttributeRow("accuracy", right) and 0 < right < 1
    assert model.training and task.score([row]) == 1 - right
    (with_interval,) = task.evaluate(model, test, resamples=20)
    assert with_interval.low <= right <= with_interval.high


def test_errors_of_numbers_are_those_of_the_models_own_answers(root, speech, labelled):
    ages = {path: 30 + row for row, path in enumerate(speech["path"])}
    task = make_task(labelled(ages, key="path"), speech)
    model = tiny_model(tiny_config(num_labels=1), kind=MRLReDimNetForSequenceClassification)
    test = task.development["development"]
    (row,) = task.evaluate(model, test)
    expected = np.abs(answers_one_by_one(model, test)[:, 0].numpy() - test.targets).mean()
    assert row.metric == "mean absolute error" and row.value == pytest.approx(expected, rel=1e-4)
    assert task.score([row]) == row.value


def test_labelled_speech_is_judged_in_its_domain(root, speech, labelled):
    """Each utterance sounds as its path below the corpus has it, wherever the corpus lies."""
    phone = dict(domain="telephony", domain_options={"codecs": ["alaw"]})
    tests = {"plain": {"folder": str(root / "test")}, "phone": {"folder": str(root / "test"), **phone}}
    task = make_task(labelled({name: i for i, name in enumerate(everyone(root))}, tests=tests), speech)
    model = tiny_model(tiny_config(num_labels=1), kind=MRLReDimNetForSequenceClassification)
    rows = {name: task.evaluate(model, test)[0] for name, test in task.tests.items()}
    errors = []
    for row, target in zip(task.tests["phone"].corpus, task.tests["phone"].targets, strict=True):
        audio = simulate(Telephony(["alaw"]), read_audio(row["audio"]["path"]), row["path"])
        with torch.inference_mode():
            errors.append(abs(model(torch.from_numpy(audio)[None]).logits.item() - target))
    assert rows["phone"].value == pytest.approx(np.mean(errors), rel=1e-4)
    assert rows["phone"] != rows["plain"]


@pytest.mark.parametrize(("metric", "worse", "better"), [("accuracy", 0.6, 0.9), ("mean absolute error", 9.0, 0.5)])
def test_of_two_models_of_an_attribute_the_better_scores_lower(metric, worse, better):
    assert Attribute.score([AttributeRow(metric, better)]) < Attribute.score([AttributeRow(metric, worse)])


# ---------------------------------------------------------------- domains


def test_a_clean_run_is_judged_as_it_is(recipe):
    assert tasks.development_domains(recipe()) == {"development": None}


def test_in_a_domain_the_domain_decides_and_the_audio_as_it_is_stands_beside_it(recipe):
    domains = tasks.development_domains(recipe(domain="telephony", domain_options={"codecs": ["gsm"]}))
    assert list(domains) == ["development, telephony", "development, as it is"]
    assert domains["development, telephony"] == Telephony(["gsm"]) and domains["development, as it is"] is None


def test_both_kinds_of_tasks_are_judged_in_the_domain(root, speech, recipe, labelled):
    for settings in (recipe(domain="telephony"), labelled(genders(root), domain="telephony")):
        judges = make_task(settings, speech).development
        assert list(judges) == ["development, telephony", "development, as it is", "training speakers"]
        assert [type(test.domain) for test in judges.values()] == [Telephony, type(None), type(None)]


def test_the_noise_and_the_rooms_of_the_domain_are_the_recipes(root, recipe):
    noise, rooms = str(root / "test/wav"), str(root / "train/wav")
    domain = tasks.training_domain(recipe(domain="noisy", noise=noise, rooms=rooms))
    assert type(domain) is Noisy and (domain.noise, domain.rooms, domain.snr) == (noise, rooms, (0.0, 15.0))
    options = {"snr": [5, 6], "room_probability": 0.0, "rooms": None}
    domain = tasks.training_domain(recipe(domain="noisy", noise=noise, rooms=rooms, domain_options=options))
    assert (domain.snr, domain.room_probability, domain.rooms) == ([5, 6], 0.0, None)
    assert tasks.training_domain(recipe(domain="telephony", noise=noise, rooms=rooms)) == Telephony()


def test_a_test_without_a_domain_stays_as_it_is(root):
    assert (
        tasks.test_domain(EvaluationSet(folder="a")) is None
        and tasks.test_domain(EvaluationSet(folder="a", domain="clean")) is None
    )
    test = EvaluationSet(folder="a", domain="telephony", domain_options={"loss": [0, 0]})
    assert tasks.test_domain(test) == Telephony(loss=[0, 0])
    with pytest.raises(ValueError, match="noise"):
        tasks.test_domain(EvaluationSet(folder="a", domain="noisy"))


# ---------------------------------------------------------------- where a model starts


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    save_model(tiny_model(kind=MRLReDimNetForXVector), folder)  # of 5 speakers, whose names nobody knows
    return folder


@pytest.fixture
def all_speakers(root, recipe):
    """A recipe that trains on all six: all_speakers(**settings)."""
    given = dict(dev_trials=str(root / "test/trials.txt"), dev_folder=str(root / "test/wav"))
    return lambda **settings: recipe(**{"model_options": {}, **given, **settings})


@pytest.fixture
def saved(tmp_path):
    """A saved model whose classifier has these classes: saved(names, **configuration) -> the model, its folder."""

    def make(names, dtype: torch.dtype = torch.float32, **config) -> tuple[MRLReDimNetForXVector, str]:
        model = tiny_model(tiny_config(num_speakers=len(names), **config), kind=MRLReDimNetForXVector).to(dtype)
        save_model(model, tmp_path / "saved", SpeakerTable(list(names)))
        return model, str(tmp_path / "saved")

    return make


def rows_of(model: MRLReDimNetForXVector, table: SpeakerTable) -> dict[str, torch.Tensor]:
    """The classifier's rows of every class, [sub_centers, D], by name."""
    weight = model.classifier.weight.detach()
    return dict(zip(table.names, weight.view(len(table), -1, weight.shape[1]), strict=True))


def kept(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> set[str]:
    """The classes whose rows are those of before."""
    return {name for name, rows in new.items() if name in old and torch.equal(rows, old[name])}


def test_a_size_starts_from_random_weights(speech, recipe):
    settings = recipe(speed_perturb=[1.0, 0.9, 1.1])
    model, fresh = make_task(settings, speech).build_model(settings)
    assert type(model) is MRLReDimNetForXVector and fresh
    assert model.config.num_speakers == 12 and model.config.embedding_size == 32
    assert model.classifier.weight.shape == (12, 32)


@pytest.mark.parametrize("sub_centers", [1, 2])
@pytest.mark.parametrize("loss", ["aam", "sphereface2"])
def test_speakers_keep_their_rows_by_name_wherever_they_stand(speech, all_speakers, saved, sub_centers, loss):
    """Those who are gone leave, new ones get fresh rows, and so does every speed that is new."""
    names = sorted(set(speech["speaker"]))
    old = SpeakerTable(["somebody", names[4], names[0], "somebody at speed 0.9", f"{names[0]} at speed 0.9"])
    before, folder = saved(old.names, sub_centers=sub_centers, loss=loss)
    settings = all_speakers(model=folder, speed_perturb=[1.0, 0.9], model_options={"map_dropout": 0.1})
    task = make_task(settings, speech)
    model, fresh = task.build_model(settings)
    assert not fresh and task.speakers.names == tuple(names) and len(task.classes) == 12
    assert model.config.num_speakers == 12 and model.classifier.num_speakers == 12 and model.config.map_dropout == 0.1
    assert model.classifier.weight.shape == (12 * sub_centers, 32)
    carried = {names[0], names[4], f"{names[0]} at speed 0.9"}
    assert kept(rows_of(before, old), rows_of(model, task.classes)) == carried
    assert loss == "aam" or torch.equal(model.classifier.bias, before.classifier.bias)
    saved_trunk = dict(before.redimnet.state_dict())
    assert all(torch.equal(tensor, saved_trunk[name]) for name, tensor in model.redimnet.state_dict().items())


@pytest.mark.parametrize("sub_centers", [1, 2])
def test_the_large_margin_stage_goes_on_with_the_rows_of_the_speakers(speech, all_speakers, saved, sub_centers):
    """Its model knows other speeds, too: their rows are left behind. It answers as before, at its own margin."""
    speakers = SpeakerTable(sorted(set(speech["speaker"])))
    old = classes_of(speakers, [1.0, 0.9, 1.1])
    before, folder = saved(old.names, sub_centers=sub_centers)
    settings = all_speakers(model=folder, speed_perturb=[1.0], margin=0.5)
    task = make_task(settings, speech)
    model, fresh = task.build_model(settings)
    assert not fresh and model.config.num_speakers == 6
    assert model.config.margin == model.classifier.margin == 0.5
    assert kept(rows_of(before, old), rows_of(model, task.classes)) == set(speakers.names)
    batch = torch.stack(waves(6000, 6000))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(batch).logits, before(batch).logits[:, :6], rtol=1e-5, atol=1e-5)


def test_a_renamed_speaker_is_a_new_one(speech, all_speakers, saved):
    names = sorted(set(speech["speaker"]))
    old = SpeakerTable([*names[:5], f"{names[5]}-renamed"])
    before, folder = saved(old.names)
    settings = all_speakers(model=folder)
    task = make_task(settings, speech)
    torch.manual_seed(3)
    model, fresh = task.build_model(settings)
    assert not fresh and kept(rows_of(before, old), rows_of(model, task.classes)) == set(names[:5])
    row = rows_of(model, task.classes)[names[5]]
    assert not any(torch.equal(row, other) for other in rows_of(before, old).values())
    assert 0.5 < row.norm() < 2  # as a fresh classifier's
    torch.manual_seed(3)
    assert torch.equal(task.build_model(settings)[0].classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    "case", ["strangers", "no names", "names of another number", "other sub-centers", "other loss"]
)
def test_a_classifier_of_which_nothing_is_known_begins_anew(speech, all_speakers, saved, case):
    """As many rows as there are speakers are not the rows of these speakers."""
    names = sorted(set(speech["speaker"]))
    before, folder = saved(["u", "v", "w", "x", "y", "z"] if case == "strangers" else names)
    table = Path(folder) / "speakers.json"
    if case == "no names":
        table.unlink()
    if case == "names of another number":
        SpeakerTable(names[:5]).save(table)
    options = {"other sub-centers": {"sub_centers": 2}, "other loss": {"loss": "sphereface2"}}.get(case, {})
    settings = all_speakers(model=folder, **options)
    model, fresh = make_task(settings, speech).build_model(settings)
    assert fresh and model.config.num_speakers == model.classifier.num_speakers == 6
    assert not any(torch.equal(row, old) for row in model.classifier.weight for old in before.classifier.weight)
    assert torch.isfinite(model.classifier.weight).all() and 0.5 < model.classifier.weight.norm(dim=1).mean() < 2
    assert torch.equal(model.redimnet.trunk.mix.logits, before.redimnet.trunk.mix.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_saved_in_half_precision_are_carried_over(speech, all_speakers, saved, dtype):
    names = sorted(set(speech["speaker"]))
    before, folder = saved(names[:5], dtype)
    settings = all_speakers(model=folder)
    task = make_task(settings, speech)
    model, fresh = task.build_model(settings)
    assert not fresh
    expected = rows_of(before.float(), SpeakerTable(names[:5]))
    assert kept(expected, rows_of(model.float(), task.classes)) == set(names[:5])


def test_names_come_from_the_hub_as_the_weights_do(speech, all_speakers, saved, hub):
    names = sorted(set(speech["speaker"]))
    old = SpeakerTable([names[3], "somebody"])
    before, folder = saved(old.names)
    api = HfApi(hub.url)
    api.create_repo("anna/base")
    api.upload_folder(repo_id="anna/base", folder_path=folder)
    settings = all_speakers(model="anna/base")
    task = make_task(settings, speech)
    model, fresh = task.build_model(settings)
    assert not fresh and kept(rows_of(before, old), rows_of(model, task.classes)) == {names[3]}


def test_a_misspelt_name_is_not_looked_for_on_the_hub(speech, recipe):
    settings = recipe(model="b2-vox2-ft_ml")
    with pytest.raises(FileNotFoundError, match="b2-vox2-ft_ml is not a folder: .*nearest names: .*b2-vox2-ft_lm"):
        make_task(settings, speech).build_model(settings)


def test_a_start_of_another_shape_is_refused(speech, recipe, start):
    settings = recipe(model=str(start), model_options={"pooling_bottleneck": 8})
    with pytest.raises(
        ValueError, match=r"model does not hold the weights of \w+: .*of another shape \(redimnet.pooling.attention_in"
    ):
        make_task(settings, speech).build_model(settings)


def test_a_head_of_classes_names_them(root, speech, labelled, start):
    settings = labelled(genders(root), model=str(start), model_options={})
    model, guarded = make_task(settings, speech).build_model(settings)
    assert type(model) is MRLReDimNetForSequenceClassification and guarded is False
    assert model.config.id2label == {0: "f", 1: "m"} and model.config.label2id == {"f": 0, "m": 1}
    assert model.classifier.weight.shape == (2, 32)


@pytest.mark.parametrize("from_size", [True, False])
def test_a_head_of_numbers_starts_at_their_mean_in_the_training_speech(root, speech, labelled, start, from_size):
    ages = {path: 20.5 + row**2 for row, path in enumerate(speech["path"])}
    options = {} if from_size else dict(model=str(start), model_options={})
    settings = labelled(ages, key="path", **options)
    task = make_task(settings, speech)
    model, _ = task.build_model(settings)
    assert model.classifier.weight.shape == (1, 32)
    expected = np.mean([ages[path] for path in task.corpus["path"]])  # without the speakers held out
    assert model.classifier.bias.item() == pytest.approx(expected, rel=1e-6)
    assert abs(expected - np.mean(list(ages.values()))) > 1


def test_a_head_of_numbers_that_was_trained_stays(speech, labelled, tmp_path):
    trained = tiny_model(tiny_config(num_labels=1), kind=MRLReDimNetForSequenceClassification)
    save_model(trained, tmp_path / "trained")
    ages = {path: 20 + row for row, path in enumerate(speech["path"])}
    settings = labelled(ages, key="path", model=str(tmp_path / "trained"), model_options={})
    model, _ = make_task(settings, speech).build_model(settings)
    assert torch.equal(model.classifier.bias, trained.classifier.bias)
    assert torch.equal(model.classifier.weight, trained.classifier.weight)


def test_an_encoder_alone_gets_a_fresh_head(root, speech, recipe, labelled, tmp_path):
    save_model(tiny_model(), tmp_path / "encoder")
    encoder = MRLReDimNetModel.from_pretrained(tmp_path / "encoder")
    for settings in (recipe, lambda **more: labelled(genders(root), **more)):
        made = settings(model=str(tmp_path / "encoder"), model_options={})
        model, _ = make_task(made, speech).build_model(made)
        assert torch.equal(model.redimnet.trunk.mix.logits, encoder.trunk.mix.logits)


def test_a_corpus_may_lie_anywhere(root, speech, recipe, tmp_path):
    """Where the paths of its rows begin."""
    assert tasks.development_folder(speech, recipe()) == root / "train/wav"
    moved = shutil.copytree(root / "test", tmp_path / "wav" / "wav")  # a folder's name may occur twice
    corpus = load_corpus(moved)
    assert tasks.development_folder(corpus, recipe()) == moved / "wav"
    assert all((moved / "wav" / path).is_file() for path in corpus["path"])
    assert not (tmp_path / "run").exists()  # nothing is copied


# ---------------------------------------------------------------- heads and labels that look right and are not


@pytest.mark.parametrize("kind", [MRLReDimNetForXVector, MRLReDimNetForSequenceClassification])
def test_a_head_of_the_same_shape_for_something_else_is_not_kept(root, speech, labelled, tmp_path, kind):
    """Neither two speakers' margin rows nor a head for labels of other names is one for two genders."""
    saved = tiny_model(tiny_config(num_speakers=2, num_labels=2), kind=kind)
    save_model(saved, tmp_path / "two")
    settings = labelled(genders(root), model=str(tmp_path / "two"), model_options={})
    model, _ = make_task(settings, speech).build_model(settings)
    assert not torch.equal(model.classifier.weight, saved.classifier.weight)
    assert torch.equal(model.redimnet.trunk.mix.logits, saved.redimnet.trunk.mix.logits)


def test_a_label_of_a_speaker_who_is_not_there_changes_nothing(root, speech, labelled):
    ages = {path: 20 + row for row, path in enumerate(speech["path"])}
    assert make_task(labelled({**ages, "someone/else/1.wav": ""}, key="path"), speech).name == "regression"


def test_a_name_among_the_numbers_of_a_test_is_refused(root, speech, labelled):
    names = everyone(root)
    table = dict(zip(names, range(20, 20 + len(names)), strict=True)) | {names[-1]: "old"}
    tests = {"held out": {"folder": str(root / "test")}}
    with pytest.raises(ValueError, match=r"\['old'\] occur in a test, the training speech has numbers"):
        make_task(labelled(table, tests=tests), speech)


def test_a_test_without_usable_speech_is_refused_before_training(root, speech, labelled):
    tests = {"held out": {"folder": str(root / "test")}}
    with pytest.raises(ValueError, match="tests.held out: no usable file below"):
        make_task(labelled(genders(root), tests=tests, min_seconds=60.0), speech)


def test_a_label_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "labels.csv").write_text("speaker,gender\na,f\n", encoding="utf-8-sig")
    assert tasks.read_labels(tmp_path / "labels.csv", "gender", "speaker") == {"a": "f"}


# ---------------------------------------------------------------- bad files, and paths that lead elsewhere


def damaged(path: Path):
    """A good header, and a body that does not decode."""
    wave, rate = soundfile.read(path)
    soundfile.write(path, np.tile(wave, 20), rate, format="FLAC")
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.fixture
def spoilt(root, tmp_path, monkeypatch):
    """The training folder with one file of each speaker whose body is damaged."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = Path(shutil.copytree(root / "train", tmp_path / "train"))
    for speaker in sorted((folder / "wav").iterdir()):
        damaged(sorted(speaker.rglob("*.wav"))[0])
    return folder


def test_a_damaged_development_file_is_told_once_and_its_trials_left_out(spoilt, recipe, capsys):
    task = make_task(recipe(train=str(spoilt), max_unusable_ratio=0.5), load_corpus(spoilt))
    test, model = task.development["development"], tiny_model(kind=MRLReDimNetForXVector)
    rows = task.evaluate(model, test)
    printed = capsys.readouterr().out
    assert "2 of " in printed and "files cannot be used" in printed and printed.count("\n") == 1
    lost = {path for path in test.trials.utterances if f"{path} cannot" in printed.replace(str(test.folder) + "/", "")}
    assert len(lost) == 2
    problems = {}
    assert evaluate_trials(model, test.trials, test.folder, problems=problems) == rows and set(problems) == lost
    assert task.evaluate(model, test) == rows and capsys.readouterr().out == ""
    with pytest.raises(AudioError, match="cannot be read as audio"):
        evaluate_trials(model, test.trials, test.folder)


def test_too_many_damaged_development_files_end_the_run_with_the_reason(spoilt, recipe):
    task = make_task(recipe(train=str(spoilt), max_unusable_ratio=0.01), load_corpus(spoilt))
    with pytest.raises(ValueError, match="files cannot be used .* At most 1 % may be unusable"):
        task.evaluate(tiny_model(kind=MRLReDimNetForXVector), task.development["development"])


def test_a_damaged_labelled_file_is_left_out(spoilt, labelled, capsys):
    corpus = load_corpus(spoilt)
    names = sorted(set(corpus["speaker"]))
    settings = labelled({name: "fm"[i % 2] for i, name in enumerate(names)}, train=str(spoilt), max_unusable_ratio=0.5)
    task = make_task(settings, corpus)
    model = tiny_model(tiny_config(num_labels=2), kind=MRLReDimNetForSequenceClassification)
    (row,) = task.evaluate(model, task.development["development"])
    assert 0 <= row.value <= 1 and "files cannot be used" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["/tmp/x.wav", "../x.wav", "a/../../x.wav", "", ".", "a/\0.wav", "C:\\x.wav"])
def test_paths_of_data_are_no_places_to_write_elsewhere(recipe, tmp_path, path):
    rows = {"audio": [{"bytes": b"ssh-rsa", "path": "x.wav"}], "path": [path]}
    corpus = datasets.Dataset.from_dict(rows)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="does not name a file below .*development, and nothing is written elsewhere"):
        tasks.development_folder(corpus, recipe())
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- speakers that are judged and known


def test_development_speakers_are_those_that_the_base_was_not_trained_on(speech, recipe, saved):
    """Whatever the seed; the speeds of its classes are no other speakers."""
    names = sorted(set(speech["speaker"]))
    _, folder = saved(classes_of(SpeakerTable(names[:4]), [1.0, 0.9]).names)
    for seed in range(4):
        task = make_task(recipe(model=folder, model_options={}, seed=seed), speech)
        assert task.development_speakers == set(names[4:]) and set(task.speakers.names) == set(names[:4])
        assert not task.notes


def test_development_speakers_whom_the_base_knows_are_told_with_their_number(speech, recipe, saved):
    names = sorted(set(speech["speaker"]))
    _, folder = saved(names[:5])
    task = make_task(recipe(model=folder, model_options={}, dev_speakers=3), speech)
    assert names[5] in task.development_speakers and len(task.development_speakers) == 3
    (note,) = task.notes.values()
    assert f"development: 2 of its 3 speakers have the names of speakers that {folder} was trained on (" in note
    assert "dev_trials can name other speakers" in note


def test_a_base_that_does_not_say_whom_it_knows_is_told(speech, recipe, saved):
    _, folder = saved(["a", "b"])
    (Path(folder) / "speakers.json").unlink()
    task = make_task(recipe(model=folder, model_options={}), speech)
    assert "does not say whom it was trained on (it has no speakers.json). If the 2 development" in task.notes["base"]
    assert task.development_speakers == make_task(recipe(), speech).development_speakers  # as without a base


def test_random_weights_know_nobody(speech, recipe):
    assert make_task(recipe(), speech).notes == {}


def test_labels_are_judged_on_speakers_whom_the_base_does_not_know(root, speech, labelled, saved):
    names = sorted(set(speech["speaker"]))
    _, folder = saved(names[2:])
    task = make_task(labelled(genders(root), model=folder, model_options={}), speech)
    assert task.development_speakers == set(names[:2]) and not task.notes


@pytest.mark.parametrize("known_to", ["the run", "the base"])
def test_tests_of_speakers_that_are_trained_on_are_told(root, speech, recipe, saved, known_to):
    tested = sorted(path.name for path in (root / "test/wav").iterdir())
    _, folder = saved(tested[:1] if known_to == "the base" else ["somebody"])
    lists = trial_test(root) if known_to == "the base" else trial_test(root, trials=str(root / "own.txt"))
    training = sorted(set(speech["speaker"]))
    paths = [next(path for path in speech["path"] if path.startswith(name)) for name in training[:2]]
    (root / "own.txt").write_text(f"1 {paths[0]} {paths[0]}\n0 {paths[0]} {paths[1]}\n")
    lists |= {"folder": str(root / "train/wav")} if known_to == "the run" else {}
    given = dict(dev_trials=str(root / "test/trials.txt"), dev_folder=str(root / "test/wav"))
    settings = recipe(model=folder, model_options={}, tests={"own": lists}, **given)
    notes = [note for note in make_task(settings, speech).notes.values() if note.startswith("tests.own: ")]
    number, whom = ("2 of its 2", "this run trains on") if known_to == "the run" else ("1 of its 2", f"{folder} was")
    assert len(notes) == 1 and f"tests.own: {number} speakers have the names of speakers that {whom}" in notes[0]


def test_rows_that_are_taken_over_are_told_and_can_be_left(speech, all_speakers, saved):
    """Two corpora may call their speakers by the same numbers."""
    names = sorted(set(speech["speaker"]))
    before, folder = saved(["somebody", *names[:3]])
    task = make_task(all_speakers(model=folder), speech)
    task.build_model(all_speakers(model=folder))
    note = task.notes["classifier"]
    assert f"3 of its 6 rows are taken over from {folder}, whose speakers.json has 4 names" in note
    assert "reuse_classifier: false" in note
    settings = all_speakers(model=folder, reuse_classifier=False)
    task = make_task(settings, speech)
    model, fresh = task.build_model(settings)
    assert fresh and "classifier" not in task.notes
    assert not any(torch.equal(row, old) for row in model.classifier.weight for old in before.classifier.weight)


# ---------------------------------------------------------------- lists with enrolments, files that are not there


def test_a_test_may_have_enrolments_and_another_suffix(root, speech, recipe, tmp_path):
    """As CN-Celeb has them: models of several recordings, and lists that say .wav of files with another suffix."""
    names = sorted(path.name for path in (root / "test/wav").iterdir())
    files = {name: sorted((root / "test/wav" / name).rglob("*.*")) for name in names}
    suffix = files[names[0]][0].suffix
    relative = {n: [f.relative_to(root / "test/wav").with_suffix(".xyz") for f in files[n]] for n in names}
    lines = [f"{name}-enroll {relative[other][2]} {int(name == other)}" for name in names for other in names]
    (tmp_path / "trials").write_text("\n".join(lines) + "\n")
    (tmp_path / "models").write_text("".join(f"{n}-enroll {relative[n][0]} {relative[n][1]}\n" for n in names))
    test = trial_test(root, trials=str(tmp_path / "trials"), enrolments=str(tmp_path / "models"), suffix=suffix)
    with pytest.raises(ValueError, match="fits several formats|give their list"):
        make_task(recipe(tests={"own": {k: v for k, v in test.items() if k != "enrolments"}}), speech)
    # The format's folders for enrolments are CN-Celeb's: ../data beside eval.
    (tmp_path / "models").write_text("".join(f"{n} {relative[n][0]} {relative[n][1]}\n" for n in names))
    lines = [f"{name} {relative[other][2]} {'non' * (name != other)}target" for name in names for other in names]
    (tmp_path / "trials").write_text("\n".join(lines) + "\n")
    task = make_task(recipe(tests={"own": {**test, "format": "kaldi"}}), speech)
    trials = task.tests["own"].trials
    assert {len(paths) for paths in trials.enrolments.values()} == {2} and len(trials) == len(names) ** 2
    with pytest.raises(FileNotFoundError, match=f"give --suffix {suffix}"):
        make_task(recipe(tests={"own": {k: v for k, v in test.items() if k != "suffix"} | {"format": "kaldi"}}), speech)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(noise="nowhere"), "noise: nowhere is not a folder"),
        (dict(rooms="nowhere"), "rooms: nowhere is not a folder"),
        (dict(dev_trials="nowhere", dev_folder="."), "dev_trials: nowhere is not a file"),
        (dict(dev_trials=__file__, dev_folder="nowhere"), "dev_folder: nowhere is not a folder"),
        (dict(label_file="nowhere", label_column="age"), "label_file: nowhere is not a file"),
        (dict(tests={"a": {"trials": "nowhere", "folder": "."}}), "tests.a.trials: nowhere is not a file"),
        (dict(tests={"a": {"trials": __file__, "folder": "nowhere"}}), "tests.a.folder: nowhere is not a folder"),
        (
            dict(tests={"a": {"trials": __file__, "folder": ".", "enrolments": "nowhere"}}),
            "tests.a.enrolments: nowhere is not a file",
        ),
        (dict(augmentations=[{"kind": "noise"}]), "entry 1 .noise.: noise: a folder of noise is needed"),
        (dict(augmentations=[{"kind": "music", "folder": "nowhere"}]), "nowhere is not a folder"),
    ],
)
def test_files_that_are_not_there_are_told_before_speech_is_read(recipe, settings, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        tasks.check_files(recipe(**settings))


def test_a_column_of_labels_that_is_not_there_is_told_before_speech_is_read(root, labelled):
    settings = labelled(genders(root), label_column="wannted")
    with pytest.raises(ValueError, match="no column wannted; there are .*Did you mean wanted?"):
        tasks.check_files(settings)


def test_a_new_head_is_no_warning_of_transformers(tmp_path, caplog):
    save_model(tiny_model(kind=MRLReDimNetModel), tmp_path / "model")
    start = Recipe(model={"start": str(tmp_path / "model")})
    before = get_verbosity()  # a command that ran in this process has changed it
    set_verbosity_warning()
    add_handler(caplog.handler)
    try:
        _, fresh = tasks.start_model(MRLReDimNetForXVector, start, num_speakers=4)
        assert fresh and "classifier.weight" not in caplog.text
        MRLReDimNetForXVector.from_pretrained(tmp_path / "model", num_speakers=4)
        assert "classifier.weight" in caplog.text
    finally:
        remove_handler(caplog.handler)
        set_verbosity(before)
