"""Settings: defaults, files over them, the command line over both, and errors that name what is wrong."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile

from configuration_mrl_redimnet import SIZES, MRLReDimNetConfig
from mrl_redimnet.audio.augmentation import FileTalkers, Sources, make_augmentations
from mrl_redimnet.audio.io import SAMPLING_RATE
from mrl_redimnet.training.recipe import PARTS, Recipe, parse_command_line, read_recipe
from mrl_redimnet.training.tasks import training_domain

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
        (["--average_last=-1"], "average_last: got -1, expected a whole number of steps, a share"),
        (["--prefixes_per_step=-1"], "prefixes_per_step: got -1, expected at least 0"),
        (["--prefixes_from", "[0.5, 0.1]"], "prefixes_from: got [0.5, 0.1]; expected shares, the last"),
        (["--prefixes_from", "[-0.1, 0]"], "prefixes_from: got [-0.1, 0], expected shares from 0 to below 1, the last"),
        (["--prefixes_from", "[2, 0]"], "prefixes_from: got [2, 0], expected shares from 0 to below 1, the last"),
        (["--crop_seconds", "0"], "crop_seconds: got 0.0, expected a length, or [shortest, longest]"),
        (["--crop_seconds", "[3, 2]"], "crop_seconds: got [3, 2], expected a length, or [shortest, longest]"),
        (["--crop_seconds", "[1, 2, 3]"], "crop_seconds: got [1, 2, 3], expected a length, or [shortest, longest]"),
        (["--crop_seconds", "[0, 2]"], "crop_seconds: got [0, 2], expected a length, or [shortest, longest]"),
        (["--crop_seconds", "[1, long]"], "crop_seconds: got [1, 'long'], expected a length, or [shortest, longest]"),
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
        (["--rank", "0"], "rank: got 0, expected at least 1"),
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
    for word in ("--rotate_at=[0.5]", "--ema=0.99", "--average_last=0.5", "--classifier_sample=100"):
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
        (
            [*STREAMING, "--augmentation_rise=[0, 0.5]"],
            "streaming: augmentation_rise must be [0.0, 0.0], got [0.0, 0.5]",
        ),
        ([*STREAMING, "--crop_seconds=[2, 3]"], "streaming: crops have one length; crop_seconds: got [2.0, 3.0]"),
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


# ---------------------------------------------------------------- every setting has its values


def settings_of(kind: type) -> list[str]:
    """The settings whose default is of a type."""
    return [f.name for f in fields(Recipe) if type(f.default) is kind]


NUMBERS = [*settings_of(int), *settings_of(float), "epochs", "learning_rate_batch"]


def test_every_setting_has_a_check():
    assert [field.name for field in fields(Recipe) if not callable(field.metadata.get("check"))] == []
    assert len(NUMBERS) > 30


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", [".nan", "-.inf", "inf", "true", "'1e999'", "-1"])
def test_what_is_no_number_in_range_is_refused(recipe_file, capsys, name, text):
    assert f"{name}: got " in refusal(capsys, recipe_file(f"{name}: {text}\n"))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), True, "many"])
def test_what_is_no_number_is_refused_in_python_as_well(name, value):
    with pytest.raises(ValueError, match=f"{name}: got "):
        Recipe(**{name: value})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("warmup: 6", "warmup: got 6.0, expected a share from 0 to below 1"),
        ("rotate_at: [12]", "rotate_at: got [12], expected shares above 0 and below 1"),
        ("rotate_at: [0]", "rotate_at: got [0], expected shares above 0 and below 1"),
        ("rotate_at: [.nan]", "rotate_at: got [nan], expected shares above 0 and below 1"),
        ("max_gradient_norm: 0", "max_gradient_norm: got 0.0, expected a number above 0"),
        ("learning_rate: -1e-3", "learning_rate: got -0.001, expected at least 0"),
        ("weight_decay: -0.1", "weight_decay: got -0.1, expected at least 0"),
        ("weight_decays: {trunk: -1}", "weight_decays.trunk: got -1, expected at least 0"),
        ("learning_rates: {trnk: 1}", "expected some of trunk, head, classifier. Did you mean trunk?"),
        ("learning_rates: {trunk: .nan}", "learning_rates.trunk: got nan, expected a finite number"),
        ("learning_rate: 1e-6", "final_learning_rate: got 2e-05, expected at most learning_rate, 1e-06"),
        ("seed: 4294967296", "seed: got 4294967296, expected at least 0 and below 4294967296"),
        ("speeds: [1.0, .nan]", "speeds: got [1.0, nan], expected a list of speeds"),
        ("speeds: [1.0, true]", "speeds: got [1.0, True], expected a list of speeds"),
        ("speeds: [1.0, 1.0]", "speeds: got [1.0, 1.0], expected a list of different speeds"),
        ("crop_seconds: .inf", "crop_seconds: got inf, expected a length, or [shortest, longest]"),
        ("crop_seconds: [1, true]", "crop_seconds: got [1, True], expected a length, or [shortest, longest]"),
        ("margin_rise: [true, 1]", "margin_rise: got [True, 1], expected two rising shares"),
        ("report_dims: [8.5]", "report_dims: got [8.5], expected whole numbers of at least 1"),
        ("report_dims: ['8']", "report_dims: got ['8'], expected whole numbers of at least 1"),
        ("segment_ranks: [0]", "segment_ranks: got [0], expected whole numbers of at least 1"),
        ("max_problem_share: 1.5", "max_problem_share: got 1.5, expected at least 0 and at most 1"),
        ("max_learning_rate_growth: 0.5", "max_learning_rate_growth: got 0.5, expected at least 1"),
        ("output: ''", "output: got '', expected a text that is not empty"),
        ("placement: convs", "expected one of attention, attention+ffn, pointwise, projection, linear, conv, all. Did"),
        ("sampler: speekers", "sampler: got 'speekers', expected one of speaker, utterance. Did you mean speaker?"),
        (
            "domain: telefony",
            "domain: got 'telefony', expected one of clean, noisy, telephony. Did you mean telephony?",
        ),
        ("mixed_precision: bf17", "mixed_precision: got 'bf17', expected one of no, bf16, fp16. Did you mean bf16?"),
        ("strategy: warmup", "strategy: got 'warmup', expected one of vanilla, dynamic, warm_up, mixed. Did you mean"),
        ("optimizer: adam", "optimizer: got 'adam', expected one of adamw, sgd. Did you mean adamw?"),
        ("tracker: tensorbord", "Did you mean tensorboard?"),
        ("layout: voxceleb3", "Did you mean voxceleb2?"),
        ("layout: speaker", "layout 'speaker' must be one of"),
        ("columns: {speakr: who}", "columns: got speakr, expected some of audio, speaker, session, path, seconds. Did"),
        ("columns: {speaker: 3}", "columns.speaker: got 3, expected a text that is not empty"),
        ("label_key: speakers", "label_key: got 'speakers', expected one of speaker, path. Did you mean speaker?"),
        ("average_last: 10", "average_last: got 10, expected a share of the run such as 0.1, or passes such as"),
        ("evaluate_every: 1.5", "evaluate_every: got 1.5, expected a whole number of steps, a share of the run"),
        ("evaluate_every: 1 epohc", "evaluate_every: got '1 epohc', expected a whole number of steps, a share"),
        ("checkpoint_every: 0 epochs", "checkpoint_every: got '0 epochs', expected a whole number of steps"),
        ("chance_until: nan epochs", "chance_until: got 'nan epochs', expected a whole number of steps"),
        ("chance_steps: 300", "no setting named 'chance_steps': it is chance_until, a number of steps or passes"),
        ("seed: 1\nseed: 2", "seed: given twice"),
    ],
)
def test_values_out_of_range_are_refused_with_what_is_allowed(capsys, recipe_file, setting, message):
    assert message in refusal(capsys, recipe_file(f"{setting}\n"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{loss: foo}", "model_options: loss: got 'foo', expected one of aam, sphereface2"),
        ("{losss: aam}", "model_options: the model has no field named 'losss'. Did you mean loss?"),
        ("{num_speakers: 5}", "model_options.num_speakers: leave it out"),
        ("{margin: .nan}", "model_options.margin: got nan, expected a finite number"),
        ("{margin: true}", "model_options.margin: got True, expected a finite number"),
        ("{margin: 2}", "model_options: margin: got 2.0, expected 0 <= margin < 1.5"),
        ("{scale: .inf}", "model_options.scale: got inf, expected a finite number"),
        ("{scale: large}", "model_options.scale: got 'large', expected a finite number"),
        ("{spec_augment: 1}", "model_options.spec_augment: got 1, expected true or false"),
        ("{num_mel_bins: 24.0}", "model_options.num_mel_bins: got 24.0, expected a whole number"),
        ("{matryoshka_dims: [64, true]}", "model_options.matryoshka_dims: got True, expected a whole number"),
        ("{matryoshka_dims: 64}", "model_options.matryoshka_dims: got 64, expected a list"),
        ("{matryoshka_dims: [64]}", "model_options: matryoshka_dims: must end at embedding_size=256"),
    ],
)
def test_options_of_the_model_are_checked(capsys, options, message):
    assert message in refusal(capsys, "--model_options", options)


def test_options_of_the_model_are_checked_with_the_model_they_change(capsys, tmp_path):
    MRLReDimNetConfig.from_size("nano").save_pretrained(tmp_path / "base")
    base = f"--model={tmp_path / 'base'}"
    assert parse(base, "--model_options={margin: 5e-1}").model_options == {"margin": 0.5}
    assert "matryoshka_dims: must end at embedding_size=256" in refusal(
        capsys, base, "--model_options={matryoshka_dims: [8]}"
    )
    assert "loss: got 'foo'" in refusal(capsys, base, "--model_options={loss: foo}")
    assert "loss: got 'foo'" in refusal(capsys, "--model=owner/name", "--model_options={loss: foo}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{lora_alfa: 8}", "peft_options: LoraConfig has no field named 'lora_alfa'. Did you mean lora_alpha?"),
        ("{r: 8}", "peft_options.r: leave it out, it is set by rank"),
        ("{target_modules: x}", "peft_options.target_modules: leave it out, it is set by placement"),
        ("{lora_alpha: true}", "peft_options.lora_alpha: got True, expected a finite number"),
        ("{lora_alpha: 0}", "peft_options.lora_alpha: got 0, expected a number above 0"),
        ("{lora_dropout: 1.5}", "peft_options.lora_dropout: got 1.5, expected a share from 0 to below 1"),
        ("{lora_dropout: .nan}", "peft_options.lora_dropout: got nan"),
        ("{use_dora: 1}", "peft_options.use_dora: got 1, expected true or false"),
        ("{init_lora_weights: pisa}", "peft_options.init_lora_weights: got 'pisa', expected one of"),
        ("{bias: some}", "peft_options.bias: got 'some', expected one of none, all, lora_only"),
        ("{rank_pattern: 8}", "peft_options.rank_pattern: got 8, expected a mapping"),
    ],
)
def test_options_of_peft_are_checked(capsys, options, message):
    assert message in refusal(capsys, "--trains=adapter", "--peft_options", options)


@pytest.mark.parametrize("word", ["pissa", "pissa_niter_16", "gaussian", "eva", "true"])
def test_initialisations_of_peft_are_known(word):
    assert parse(f"--peft_options={{init_lora_weights: {word}}}").peft_options


def test_ranks_of_segments_need_a_placement_that_reaches_them(capsys):
    message = refusal(capsys, "--placement=attention", "--segment_ranks=[4, 2]")
    assert message.startswith("segment_ranks: the placement 'attention' does not reach the projection's segments")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{kind: noice}", "augmentations, entry 1: no kind named 'noice'. Did you mean noise?"),
        ("{kind: noise, snrr: [0, 5]}", "entry 1 (noise): no option named 'snrr'. Did you mean snr?"),
        ("{kind: noise, snr: [0, .nan]}", "entry 1 (noise): snr: got"),
        ("{kind: noise, snr: 5}", "entry 1 (noise): snr: got 5, expected two numbers"),
        ("{kind: noise, probability: 2}", "entry 1 (noise): probability: got 2, expected 0 to 1"),
        ("{kind: noise, probability: true}", "entry 1 (noise): probability: got True, expected 0 to 1"),
        ("{kind: noise, folder: 5}", "entry 1 (noise): folder: got 5, expected the path of a folder"),
        ("{kind: reverberation, room_count: true}", "room_count: got True, expected a whole number"),
        ("{kind: babble, count: [3, 2.5]}", "entry 1 (babble): count: got"),
        ("{kind: codec, codecs: [gms]}", "codecs: no codec named 'gms'. Did you mean gsm?"),
        ("{kind: gain, gain: [3, 1]}", "entry 1 (gain): gain: got 3 to 1"),
        ("{kind: one_of, choices: [{kind: nose}]}", "choices, entry 1: no kind named 'nose'. Did you mean noise?"),
    ],
)
def test_augmentations_are_checked_when_they_are_read(capsys, entry, message):
    """No folder of sounds has to be there for that."""
    assert message in refusal(capsys, f"--augmentations=[{entry}]")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--domain=noisy", "--train=a"], "noise: the noisy domain needs a folder of noise files"),
        (["--domain=noisy", "--domain_options={snrr: [0, 5]}"], "unknown option snrr; its options: room_count, "),
        (["--domain=noisy", "--domain_options={snr: [5, 0]}"], "snr: got 5 to 0"),
        (
            ["--domain=noisy", "--domain_options={room_probability: true}"],
            "room_probability: got True, expected 0 to 1",
        ),
        (["--domain=noisy", "--domain_options={room_count: 0}"], "room_count: got 0, expected at least 1"),
        (["--domain=telephony", "--domain_options={codecs: gsm}"], "codecs: got 'gsm', expected a list of some of"),
        (["--domain=telephony", "--domain_options={codecs: [gms]}"], "codecs: got ['gms'], expected some of"),
        (["--domain=telephony", "--domain_options={loss: [0, 2]}"], "loss: got 0 to 2"),
        (["--domain_options={loss: [0, 0]}"], "clean domain: unknown option loss"),
    ],
)
def test_domains_are_checked_when_they_are_read(capsys, argv, message):
    assert message in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (
            "{trials: a, folder: b, domain: telefony}",
            "tests.vox.domain: got 'telefony', expected one of clean, noisy, ",
        ),
        ("{trials: a, folder: b, domain: noisy}", "tests.vox: noise: the noisy domain needs a folder"),
        ("{trials: a, folder: b, domain: telephony, domain_options: {los: [0, 0]}}", "tests.vox: telephony domain: "),
        ("{trials: a, folder: b, domain_options: 5}", "tests.vox.domain_options: got 5, expected a mapping"),
        ("{trials: a, folder: b, suffix: flac}", "tests.vox.suffix: got 'flac', expected a point and letters"),
        ("{trials: a, folder: b, format: kaldy}", "tests.vox.format: got 'kaldy', expected one of auto, voxceleb"),
        ("{trials: a, folder: b, enrolments: 5}", "tests.vox.enrolments: got 5, expected a text that is not empty"),
        ("{trials: a, folder: b, enrollments: c}", "Did you mean enrolments?"),
        ("{trials: a, folder: b, group_column: age}", "tests.vox.group_column: needs groups"),
        ("{trials: 5, folder: b}", "tests.vox.trials: got 5, expected a text that is not empty"),
    ],
)
def test_entries_of_tests_are_checked_when_they_are_read(capsys, test, message):
    assert message in refusal(capsys, f"--tests={{vox: {test}}}")


def test_a_test_takes_what_evaluate_takes():
    test = {"trials": "a", "folder": "b", "enrolments": "c", "suffix": ".flac", "format": "cnceleb"}
    assert parse(f"--tests={{cnc-e: {test}}}").tests == {"cnc-e": test}


def test_numbers_that_yaml_takes_for_strings_are_numbers_wherever_they_are():
    recipe = parse(
        "--margin_rise=[1e-1, 4e-1]",
        "--rotate_at=[1e-1]",
        "--model_options={margin: 2e-1, freq_mask_width: [0, 9]}",
        "--peft_options={lora_dropout: 1e-1}",
        "--augmentations=[{kind: gain, probability: 5e-1, gain: [-1e1, 1e1]}]",
        "--domain=telephony",
        "--domain_options={loss: [0, 1e-1]}",
        "--evaluate_every=5e-2",
    )
    assert recipe.margin_rise == [0.1, 0.4] and recipe.rotate_at == [0.1] and recipe.evaluate_every == 0.05
    assert recipe.model_options["margin"] == 0.2 and recipe.peft_options == {"lora_dropout": 0.1}
    assert recipe.augmentations == [{"kind": "gain", "probability": 0.5, "gain": [-10.0, 10.0]}]
    assert recipe.domain_options == {"loss": [0, 0.1]}


@pytest.mark.parametrize("value", ["60", "0.05", "1 epoch", "0.5 epochs", "1e-1 epochs"])
def test_stretches_of_a_run_are_steps_shares_or_passes(value, recipe_file):
    for name in ("evaluate_every", "checkpoint_every", "chance_until"):
        assert parse(recipe_file(f"{name}: {value}\n")) == parse(f"--{name}={value}") != Recipe()


def test_the_settings_of_a_caller_are_not_changed():
    tests = {"a": {"trials": "b", "folder": "c", "domain": "telephony", "domain_options": {"loss": [0, "1e-1"]}}}
    Recipe(tests=tests)
    assert tests["a"]["domain_options"] == {"loss": [0, "1e-1"]}
