"""Settings: defaults, files over them, the command line over both, and errors that name what is wrong."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile

from configuration_mrl_redimnet import SIZES, MRLReDimNetConfig
from mrl_redimnet.audio import SAMPLING_RATE
from mrl_redimnet.augmentation import FileTalkers, Sources, make_augmentations
from mrl_redimnet.recipe import PARTS, Recipe, parse_command_line, read_recipe
from mrl_redimnet.tasks import training_domain

FOLDER = Path(__file__).parent.parent
RECIPES = [path for part in ("recipes", "adapters") for path in sorted((FOLDER / part).glob("*.yaml"))]


def shipped(path: Path, **settings) -> Recipe:
    """A recipe of this repository; one of an attribute with the labels that it cannot bring along."""
    labels = {"label_file": "labels.csv"} if "label_column:" in path.read_text() else {}
    return read_recipe(path, {**labels, **settings})


def parse(*argv: str) -> Recipe:
    return parse_command_line(list(argv), "what it does")[0]


def refusal(capsys, *argv: str) -> str:
    """The one message with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.split("error: ")[1]


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(text)
        return str(tmp_path / "recipe.yaml")

    return write


# ---------------------------------------------------------------- what counts


def test_nothing_given_means_the_defaults():
    assert parse() == read_recipe() == Recipe()


def test_defaults_are_not_shared():
    Recipe().speeds.append(0.9)
    assert Recipe().speeds == [1.0]


def test_a_file_replaces_defaults(recipe_file):
    recipe = parse(recipe_file("steps: 7\nspeeds: [1.0, 0.9]\nnoise: some/folder\n"))
    assert recipe == Recipe(steps=7, speeds=[1.0, 0.9], noise="some/folder")


def test_the_command_line_replaces_the_file(recipe_file):
    file = recipe_file("steps: 7\nbatch_size: 3\n")
    assert parse(file, "--steps", "9") == parse("--steps=9", file) == Recipe(steps=9, batch_size=3)


def test_values_are_read_as_yaml():
    recipe = parse(
        "--model_options", "{num_mel_bins: 24}", "--rotate_at", "[0.5]", "--noise", "null", "--report_dims=[4, 8]"
    )
    assert recipe == Recipe(model_options={"num_mel_bins": 24}, rotate_at=[0.5], report_dims=[4, 8])


def test_a_crop_has_one_length_or_two_limits():
    assert parse("--crop_seconds", "3").crop_range == (3.0, 3.0)
    assert parse("--crop_seconds=[2, 3.5]").crop_range == (2.0, 3.5)
    assert Recipe().crop_range == (2.0, 2.0)


def test_augmentations_keep_their_order_and_options():
    recipe = parse("--augmentations=[{kind: noise, snr: [0, 5]}, {kind: codec, probability: 0.2}]")
    assert recipe.augmentations == [{"kind": "noise", "snr": [0, 5]}, {"kind": "codec", "probability": 0.2}]


@pytest.mark.parametrize("argv", [["--resume"], ["--resume", "--steps", "5"], ["--steps", "5", "--resume"]])
def test_resume_is_no_setting(argv):
    assert parse_command_line(argv, "")[1] is True
    assert parse_command_line([x for x in argv if x != "--resume"], "")[1] is False


# ---------------------------------------------------------------- the recipes of this repository

EACH_RECIPE = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")


@EACH_RECIPE
def test_recipes_parse(path):
    recipe, labels = shipped(path), {"label_file": "labels.csv", "label_column": "x"}
    assert recipe != Recipe(**(labels if recipe.label_column else {}))
    assert (recipe.trains == "adapter") is (path.parent.name == "adapters")


@EACH_RECIPE
def test_recipes_set_fields_that_models_have(path):
    recipe = shipped(path)
    size = recipe.model if recipe.model in SIZES else "nano"
    config = MRLReDimNetConfig.from_size(size, **recipe.model_options)
    assert all(getattr(config, name) == value for name, value in recipe.model_options.items())


@EACH_RECIPE
def test_rates_and_decays_of_parts_are_numbers_in_recipes(path):
    """As the setting of the whole is, which may be written 1e-5: a string in YAML."""
    recipe = shipped(path)
    values = [*recipe.learning_rates.values(), *recipe.weight_decays.values()]
    assert [type(value) for value in values] == [float] * len(values)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """MUSAN and RIRS_NOISES in small, and other noise below `noise`."""
    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    noise = [f"musan/{kind}/set/{kind}-set-000{i}.wav" for kind in ("noise", "music", "speech") for i in range(2)]
    for name in (*noise, "RIRS_NOISES/simulated_rirs/smallroom/Room001/Room001-00001.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        fade = np.exp(-np.arange(8000) / 500) if "RIRS" in name else 0.1
        soundfile.write(folder / name, fade * rng.standard_normal(8000), SAMPLING_RATE)
    return folder


@EACH_RECIPE
def test_what_recipes_do_to_crops_can_be_done(path, sounds):
    """Their augmentations and their domain can be built from the folders that they name, and leave crops whole."""
    recipe = shipped(path, noise=str(sounds / "musan"), rooms=str(sounds / "RIRS_NOISES"))
    talkers = FileTalkers(sorted(str(file) for file in (sounds / "musan/speech").rglob("*.wav")))
    chain = make_augmentations(recipe.augmentations, Sources(recipe.noise, recipe.rooms, talkers))
    domain = training_domain(recipe)
    crop = 0.1 * np.random.default_rng(1).standard_normal(16_000, dtype=np.float32)
    made = [chain(crop, np.random.default_rng(seed)) for seed in range(30)]
    made += [domain(crop, np.random.default_rng(seed)) for seed in range(3)]
    assert {(one.shape, one.dtype, np.isfinite(one).all()) for one in made} == {((16_000,), np.dtype(np.float32), True)}
    changed = [not np.array_equal(one, crop) for one in made]
    assert any(changed[:30]) is bool(recipe.augmentations)
    assert any(changed[30:]) is (recipe.domain != "clean")


def test_the_last_stage_follows_the_first(sounds):
    """It starts from its model, with the classes of its speakers: the same ones are held out."""
    first, last = (shipped(FOLDER / f"recipes/voxceleb2{stage}.yaml") for stage in ("", "_large_margin"))
    assert last.model == f"{first.output}/best" and first.model in SIZES
    assert (last.layout, last.dev_speakers, last.seed) == (first.layout, first.dev_speakers, first.seed)
    assert set(last.speeds) < set(first.speeds) and last.crop_range > first.crop_range
    assert last.model_options["margin"] > first.model_options["margin"] and last.margin_rise == [0, 0]


@pytest.mark.parametrize("name", ["gender", "age"])
def test_recipes_of_attributes_ask_for_labels(capsys, name):
    assert "label_file and label_column: give both or neither" in refusal(capsys, f"{FOLDER}/adapters/{name}.yaml")


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert names >= {"nano_small_corpus", "telephony", "noisy", "gender", "age", "voxceleb", "cnceleb"}
    assert names >= {"voxceleb2", "voxceleb2_large_margin", "matryoshka_finetune"}


def test_no_two_recipes_write_to_one_folder():
    outputs = [shipped(path).output for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


# ---------------------------------------------------------------- types


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E5", 2e5), ("3", 3.0), (".5", 0.5)])
def test_numbers_yaml_takes_for_strings(text, value, recipe_file):
    from_file = parse(recipe_file(f"learning_rate: {text}\n")).learning_rate
    assert from_file == parse("--learning_rate", text).learning_rate == value
    assert type(from_file) is float


@pytest.mark.parametrize("name", ["learning_rates", "weight_decays"])
@pytest.mark.parametrize("part", PARTS)
def test_numbers_of_parts_yaml_takes_for_strings(name, part, recipe_file):
    from_file = getattr(parse(recipe_file(f"{name}: {{{part}: 1e-5}}\n")), name)
    assert from_file == getattr(parse(f"--{name}={{{part}: 1e-5}}"), name) == {part: 1e-5}


@pytest.mark.parametrize("name", ["learning_rates", "weight_decays"])
def test_what_is_no_number_is_refused_for_a_part(capsys, name):
    assert name in refusal(capsys, f"--{name}={{trunk: slow}}")


def test_no_is_a_word(recipe_file):
    """YAML reads a bare `no` as false."""
    assert parse("--mixed_precision", "no") == parse(recipe_file("mixed_precision: no\n")) == Recipe()


@pytest.mark.parametrize(
    ("key", "text", "found", "expected"),
    [
        ("steps", "true", "True", "int"),
        ("steps", "2.5", "2.5", "int"),
        ("steps", "many", "'many'", "int"),
        ("crop_seconds", "true", "True", "float or list"),
        ("crop_seconds", "long", "'long'", "float or list"),
        ("learning_rate", "true", "True", "float"),
        ("epochs", "many", "'many'", "float or nothing"),
        ("learning_rate_batch", "64.0", "64.0", "int or nothing"),
        ("streaming", "1", "1", "bool"),
        ("augmentations", "{kind: noise}", "{'kind': 'noise'}", "list"),
        ("learning_rates", "1e-5", "'1e-5'", "dict"),
        ("speeds", "0.9", "0.9", "list"),
        ("tests", "[1]", r"[1]", "dict"),
        ("model", "null", "None", "str"),
        ("train", "[a]", "['a']", "str or nothing"),
    ],
)
def test_wrong_types_are_refused(capsys, recipe_file, key, text, found, expected):
    message = f"{key}: got {found}, expected {expected}."
    assert f"command line: {message}" in refusal(capsys, f"--{key}", text)
    assert f"recipe.yaml: {message}" in refusal(capsys, recipe_file(f"{key}: {text}\n"))


# ---------------------------------------------------------------- names


def test_a_misspelt_name_is_answered_with_the_nearest(capsys, recipe_file):
    expected = "no setting named 'lerning_rate'. Did you mean learning_rate?"
    assert f"command line: {expected}" in refusal(capsys, "--lerning_rate", "1")
    assert f"recipe.yaml: {expected}" in refusal(capsys, recipe_file("lerning_rate: 1\n"))


def test_a_name_like_no_other_is_answered_with_all(capsys):
    message = refusal(capsys, "--xyzzy", "1")
    assert all(field.name in message for field in fields(Recipe))


@pytest.mark.parametrize("where", ["alone", "behind the file", "before the file"])
@pytest.mark.parametrize("value", ["1", "[0, 15]", "{trunk: 1e-5}"])
def test_an_unknown_name_is_told_whatever_its_value_and_place(capsys, recipe_file, where, value):
    """argparse takes an unknown `--name=value` with a space in it for a file."""
    word, file = f"--lerning_rate={value}", recipe_file("seed: 1\n")
    argv = {"alone": [word], "behind the file": [file, word], "before the file": [word, file]}[where]
    expected = "command line: no setting named 'lerning_rate'. Did you mean learning_rate?"
    assert expected in refusal(capsys, *argv, "--steps=5")


def test_a_known_name_may_have_any_value_in_any_place(recipe_file):
    word, file = "--tests={a: {trials: b, folder: c}}", recipe_file("seed: 1\n")
    expected = Recipe(seed=1, tests={"a": {"trials": "b", "folder": "c"}})
    assert parse(word, file) == parse(file, word) == expected


@pytest.mark.parametrize("name", ["noise_snr", "noise_probability", "trunk_learning_rate", "num_labels"])
def test_what_was_a_setting_once_is_not_taken_silently(capsys, recipe_file, name):
    assert f"no setting named '{name}'" in refusal(capsys, f"--{name}", "0.5")
    assert f"no setting named '{name}'" in refusal(capsys, recipe_file(f"{name}: [0, 15]\n"))


def test_abbreviations_are_refused(capsys):
    assert "no setting named 'step'. Did you mean steps?" in refusal(capsys, "--step", "5")


@pytest.mark.parametrize("stray", ["-steps=5", "steps", "steps=5"])
def test_a_stray_word_is_refused(capsys, stray, recipe_file):
    assert refusal(capsys, recipe_file("seed: 1\n"), stray)


def test_a_missing_value_is_refused(capsys):
    assert "--steps: expected one argument" in refusal(capsys, "--steps")


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{field.name} " in text for field in fields(Recipe))
    assert "what it does" in text and "--resume" in text and "[0.002]" in text


# ---------------------------------------------------------------- files and values that cannot be


@pytest.mark.parametrize(("text", "message"), [("- 1\n- 2\n", "got list"), ("", "got NoneType"), ("a: [", "parsing")])
def test_files_that_are_no_recipes(capsys, recipe_file, text, message):
    assert message in refusal(capsys, recipe_file(text))


def test_a_missing_file(capsys):
    assert "nowhere.yaml" in refusal(capsys, "nowhere.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "steps: got 0, expected at least 1"),
        (["--batch_size", "-1"], "batch_size: got -1, expected at least 1"),
        (["--log_every", "0"], "log_every: got 0"),
        (["--checkpoint_every", "0"], "checkpoint_every: got 0"),
        (["--speeds", "[0.9, 1.0]"], "begins with 1.0"),
        (["--speeds", "[]"], "begins with 1.0"),
        (["--margin_rise", "[0.5, 0.1]"], "two rising shares between 0 and 1"),
        (["--margin_rise", "[0.5]"], "two rising shares between 0 and 1"),
        (["--margin_rise", "[low, high]"], "margin_rise: got ['low', 'high']"),
        (["--augmentation_rise", "[0.5, 0.1]"], "augmentation_rise: got [0.5, 0.1], expected two rising shares"),
        (["--augmentation_rise", "[0, 1.5]"], "augmentation_rise: got [0, 1.5], expected two rising shares"),
        (["--tracker", "mlflow"], "tracker: got 'mlflow', expected one of tensorboard, wandb, trackio, none"),
        (["--optimizer", "adam"], "optimizer: got 'adam', expected one of adamw, sgd"),
        (["--schedule", "step"], "schedule: got 'step', expected one of cosine, exponential"),
        (["--schedule=exponential", "--final_learning_rate=0"], "final_learning_rate: an exponential needs one above"),
        (["--schedule=exponential", "--final_learning_rate=1"], "final_learning_rate: an exponential needs one above"),
        (["--learning_rates", "{stem: 1}"], "learning_rates: got stem, expected some of trunk, head, classifier"),
        (["--weight_decays", "{stem: 1}"], "weight_decays: got stem, expected some of trunk, head, classifier"),
        (["--learning_rate_batch", "0"], "learning_rate_batch: got 0, expected a number above 0"),
        (["--epochs", "0"], "epochs: got 0.0, expected a number above 0"),
        (["--epochs=-1"], "epochs: got -1.0, expected a number above 0"),
        (["--momentum", "1"], "momentum: got 1.0, expected a share"),
        (["--ema", "1"], "ema: got 1.0, expected a share"),
        (["--patience=-1"], "patience: got -1, expected at least 0"),
        (["--average_last=-1"], "average_last: got -1, expected at least 0"),
        (["--prefixes_per_step=-1"], "prefixes_per_step: got -1, expected at least 0"),
        (["--prefixes_from", "[0.5, 0.1]"], "prefixes_from: got [0.5, 0.1]; expected shares, the last"),
        (["--prefixes_from", "[-0.1, 0]"], "prefixes_from: got [-0.1, 0]; expected shares, the last"),
        (["--prefixes_from", "[2, 0]"], "prefixes_from: got [2, 0]; expected shares, the last"),
        (["--crop_seconds", "0"], "crop_seconds: got 0.0, expected a length, or [shortest, longest]"),
        (["--crop_seconds", "[3, 2]"], "crop_seconds: got [3, 2], expected a length, or [shortest, longest]"),
        (["--crop_seconds", "[1, 2, 3]"], "crop_seconds: got [1, 2, 3], expected a length, or [shortest, longest]"),
        (["--crop_seconds", "[0, 2]"], "crop_seconds: got [0, 2], expected a length, or [shortest, longest]"),
        (["--crop_seconds", "[1, long]"], "crop_seconds: got [1, 'long'], expected numbers"),
        (["--utterances_per_speaker", "0"], "utterances_per_speaker: got 0, expected at least 1"),
        (["--utterances_per_speaker=5", "--batch_size=12"], "batch_size that it divides, got speaker and 12"),
        (
            ["--utterances_per_speaker=2", "--sampler=utterance"],
            "utterances_per_speaker: 2 needs sampler: speaker and a batch_size that it divides, got utterance and 48",
        ),
        (["--classifier_sample=9", "--accumulation=2"], "classifier_sample: works with accumulation: 1"),
        (["--classifier_sample=9", "--ema=0.9"], "classifier_sample: works without rotate_at, ema and average_last"),
        (["--dev_trials", "trials.txt"], "dev_trials and dev_folder: give both or neither"),
        (["--dev_speakers", "1"], "dev_speakers: at least 2"),
        (["--tests", "{vox: {trials: a}}"], "tests.vox: got ['trials'], expected the entries folder and trials"),
        (["--tests", "{vox: trials.txt}"], "tests.vox: got "),
        (["--tests", "{vox: null}"], "tests.vox: got "),
        (["--trains", "trunk"], "trains: got 'trunk', expected one of all, head, projection, adapter"),
        (["--strategy", "adalora"], "strategy: got 'adalora', expected one of vanilla, dynamic, warm_up, mixed"),
        (["--label_key", "file"], "label_key: got 'file', expected one of speaker, path"),
        (["--base_share", "1"], "base_share: got 1.0, expected a share from 0 to below 1"),
        (["--base_share=-0.1"], "base_share: got -0.1, expected a share"),
        (["--trunk_frozen_until", "1"], "trunk_frozen_until: got 1.0, expected a share"),
        (["--cut_at", "1.5"], "cut_at: got 1.5, expected a share"),
        (["--label_file", "labels.csv"], "label_file and label_column: give both or neither"),
        (["--label_column", "age"], "label_file and label_column: give both or neither"),
        (["--segment_ranks", "4"], "segment_ranks: got 4, expected list"),
        (["--rank", "0"], "rank: got 0 and start_rank 16; expected at least 1, and a start above it"),
        (["--rank=8", "--start_rank=8", "--strategy=dynamic"], "rank: got 8 and start_rank 8"),
        (["--rank=8", "--start_rank=4", "--strategy=warm_up"], "rank: got 8 and start_rank 4"),
    ],
)
def test_impossible_values_are_refused(capsys, argv, message):
    assert message in refusal(capsys, *argv)


@pytest.mark.parametrize("strategy", ["vanilla", "mixed"])
def test_a_start_rank_counts_only_where_ranks_are_cut(strategy):
    assert parse("--rank=32", f"--strategy={strategy}").start_rank == 16


@pytest.mark.parametrize("trains", ["head", "projection", "adapter"])
def test_what_only_a_whole_model_can_do_is_refused_for_a_part(capsys, trains):
    message = refusal(capsys, f"--trains={trains}", "--trunk_frozen_until=0.5")
    assert f"trunk_frozen_until: with trains: {trains} the trunk never trains; leave it out" in message
    assert parse(f"--trains={trains}").rotations == []
    for word in ("--rotate_at=[0.5]", "--ema=0.99", "--average_last=3", "--classifier_sample=100"):
        message = refusal(capsys, f"--trains={trains}", word)
        assert f"{word[2:].partition('=')[0]}: works with trains: all; with {trains} leave it out" in message
        assert parse("--trains=all", word)
    assert parse("--trains=all", "--trunk_frozen_until=0.5", "--rotate_at=[0.5]").rotate_at == [0.5]


def test_by_default_the_basis_is_rotated_wherever_all_is_trained_for_verification():
    assert parse().rotations == [0.1, 0.3, 0.5]
    assert parse("--rotate_at=[]").rotations == []
    assert parse("--rotate_at=[0.5]").rotations == [0.5]
    assert parse("--classifier_sample=9").rotations == []
    assert parse("--label_file=labels.csv", "--label_column=age").rotations == []


VERIFICATION, ATTRIBUTE = [], ["--label_file=labels.csv", "--label_column=age"]


@pytest.mark.parametrize(
    "word", ["--teacher=b6", "--classifier_sample=100", "--prefixes_from=[0.5, 0]", "--prefixes_per_step=2"]
)
def test_what_belongs_to_the_learning_of_speakers_is_refused_for_labels(capsys, word):
    message = refusal(capsys, *ATTRIBUTE, word)
    assert (
        f"{word[2:].partition('=')[0]}: belongs to the learning of speakers; with label_column leave it out" in message
    )
    assert parse(*VERIFICATION, word)


STREAMING = ["--streaming=true", "--sampler=utterance", "--dev_trials=trials.txt", "--dev_folder=wav"]


def test_a_stream_has_its_trials_given_and_crops_of_one_length():
    assert parse(*STREAMING).streaming and parse(*STREAMING, "--crop_seconds=[3, 3]").crop_range == (3.0, 3.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--streaming=true"], "streaming: sampler must be utterance, got speaker"),
        ([*STREAMING, "--sampler=speaker"], "streaming: sampler must be utterance, got speaker"),
        ([*STREAMING, *ATTRIBUTE], "streaming: label_file must be None, got labels.csv"),
        ([*STREAMING, "--augmentation_rise=[0, 0.5]"], "streaming: augmentation_rise must be [0.0, 0.0], got [0, 0.5]"),
        ([*STREAMING, "--crop_seconds=[2, 3]"], "streaming: crops have one length; crop_seconds: got [2, 3]"),
        (["--streaming=true", "--sampler=utterance"], "streaming: no speakers can be held out of a stream"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(capsys, argv, message):
    assert message in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("task", "test"),
    [
        (VERIFICATION, "{trials: a, folder: b}"),
        (VERIFICATION, "{trials: a, folder: b, domain: telephony}"),
        (VERIFICATION, "{trials: a, folder: b, domain: noisy, domain_options: {noise: c}}"),
        (ATTRIBUTE, "{folder: b}"),
        (ATTRIBUTE, "{folder: b, domain: telephony, domain_options: {codecs: [gsm]}}"),
    ],
)
def test_a_test_may_be_in_a_domain(task, test):
    assert list(parse(*task, f"--tests={{vox: {test}}}").tests) == ["vox"]


@pytest.mark.parametrize(
    ("task", "test", "message"),
    [
        (VERIFICATION, "{folder: b}", "tests.vox: got ['folder'], expected the entries folder and trials, and domain"),
        (VERIFICATION, "{trials: a, folder: b, noise: c}", "tests.vox: got ['folder', 'noise', 'trials']"),
        (ATTRIBUTE, "{trials: a, folder: b}", "got ['folder', 'trials'], expected the entries folder, and domain"),
        (ATTRIBUTE, "{domain: noisy}", "tests.vox: got ['domain'], expected the entries folder, and domain"),
    ],
)
def test_a_test_has_the_entries_of_its_task(capsys, task, test, message):
    assert message in refusal(capsys, *task, f"--tests={{vox: {test}}}")
