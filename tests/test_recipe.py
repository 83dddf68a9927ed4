"""Settings: defaults, files over them, the command line over both, and errors that name what is wrong."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from configuration_mrl_redimnet import SIZES, MRLReDimNetConfig
from mrl_redimnet.audio.augmentation import FileTalkers, Sources, make_augmentations
from mrl_redimnet.audio.io import SAMPLING_RATE
from mrl_redimnet.training.reading import (
    FULL_NAMES,
    GROUPS,
    RENAMED,
    SETTINGS,
    make_recipe,
    parse_command_line,
    read_recipe,
)
from mrl_redimnet.training.recipe import LOSS_FIELDS, PARTS, EvaluationSet, Recipe
from mrl_redimnet.training.recipe_page import page
from mrl_redimnet.training.tasks import start_config, training_domain

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


def grouped(text: str) -> str:
    """Lines `setting: value`, each in its group; other text as it is."""
    groups: dict[str, list[str]] = {}
    for line in text.splitlines():
        name = line.partition(":")[0]
        group = FULL_NAMES.get(name, "").partition(".")[0]
        if not group or name == group:
            return text
        groups.setdefault(group, []).append(f"  {line}\n")
    return "".join(f"{group}:\n{''.join(lines)}" for group, lines in groups.items()) or text


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(grouped(text))
        return str(tmp_path / "recipe.yaml")

    return write


# ---------------------------------------------------------------- what counts


def test_nothing_given_means_the_defaults():
    assert parse() == read_recipe() == make_recipe()


def test_defaults_are_not_shared():
    make_recipe().augmentation.speed_perturb.append(0.9)
    assert make_recipe().augmentation.speed_perturb == [1.0]


def test_a_file_replaces_defaults(recipe_file):
    recipe = parse(recipe_file("steps: 7\nspeed_perturb: [1.0, 0.9]\nnoise: some/folder\n"))
    assert recipe == make_recipe(steps=7, speed_perturb=[1.0, 0.9], noise="some/folder")


def test_the_command_line_replaces_the_file(recipe_file):
    file = recipe_file("steps: 7\nbatch_size: 3\n")
    assert parse(file, "--steps", "9") == parse("--steps=9", file) == make_recipe(steps=9, batch_size=3)


def test_values_are_read_as_yaml():
    recipe = parse(
        "--model_options", "{num_mel_bins: 24}", "--rotate_at", "[0.5]", "--noise", "null", "--report_dims=[4, 8]"
    )
    assert recipe == make_recipe(model_options={"num_mel_bins": 24}, rotate_at=[0.5], report_dims=[4, 8])


def test_a_crop_has_one_length_or_two_limits():
    assert parse("--crop_seconds", "3").data.crop_range == (3.0, 3.0)
    assert parse("--crop_seconds=[2, 3.5]").data.crop_range == (2.0, 3.5)
    assert make_recipe().data.crop_range == (2.0, 2.0)


def test_augmentations_keep_their_order_and_options():
    recipe = parse("--augmentations=[{kind: noise, snr: [0, 5]}, {kind: codec, probability: 0.2}]")
    assert recipe.augmentation.augmentations == [
        {"kind": "noise", "snr": [0, 5]},
        {"kind": "codec", "probability": 0.2},
    ]


@pytest.mark.parametrize("argv", [["--resume"], ["--resume", "--steps", "5"], ["--steps", "5", "--resume"]])
def test_resume_is_no_setting(argv):
    assert parse_command_line(argv, "")[1] is True
    assert parse_command_line([x for x in argv if x != "--resume"], "")[1] is False


# ---------------------------------------------------------------- the recipes of this repository

EACH_RECIPE = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")


@EACH_RECIPE
def test_recipes_parse(path):
    recipe, labels = shipped(path), {"label_file": "labels.csv", "label_column": "x"}
    assert recipe != make_recipe(**(labels if recipe.data.label_column else {}))
    assert (recipe.model.finetune == "adapter") is (path.parent.name == "adapters")


@EACH_RECIPE
def test_recipes_set_fields_that_models_have(path):
    recipe = shipped(path)
    size = recipe.model.size or "nano"
    config = MRLReDimNetConfig.from_size(size, **recipe.model.model_options)
    assert all(getattr(config, name) == value for name, value in recipe.model.model_options.items())


@EACH_RECIPE
def test_rates_and_decays_of_parts_are_numbers_in_recipes(path):
    """As the setting of the whole is, which may be written 1e-5: a string in YAML."""
    recipe = shipped(path)
    values = [*recipe.optimizer.part_learning_rates.values(), *recipe.optimizer.part_weight_decays.values()]
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
    chain = make_augmentations(
        recipe.augmentation.augmentations, Sources(recipe.augmentation.noise, recipe.augmentation.rooms, talkers)
    )
    domain = training_domain(recipe)
    crop = 0.1 * np.random.default_rng(1).standard_normal(16_000, dtype=np.float32)
    made = [chain(crop, np.random.default_rng(seed)) for seed in range(30)]
    made += [domain(crop, np.random.default_rng(seed)) for seed in range(3)]
    assert {(one.shape, one.dtype, np.isfinite(one).all()) for one in made} == {((16_000,), np.dtype(np.float32), True)}
    changed = [not np.array_equal(one, crop) for one in made]
    assert any(changed[:30]) is bool(recipe.augmentation.augmentations)
    assert any(changed[30:]) is (recipe.augmentation.domain != "clean")


def test_the_last_stage_follows_the_first(sounds):
    """It starts from its model, with the classes of its speakers: the same ones are held out."""
    first, last = (shipped(FOLDER / f"recipes/voxceleb2{stage}.yaml") for stage in ("", "_large_margin"))
    assert last.model.start == f"{first.run.output}/best" and first.model.size in SIZES
    assert (last.data.layout, last.evaluation.dev_speakers, last.run.seed) == (
        first.data.layout,
        first.evaluation.dev_speakers,
        first.run.seed,
    )
    assert (
        set(last.augmentation.speed_perturb) < set(first.augmentation.speed_perturb)
        and last.data.crop_range > first.data.crop_range
    )
    assert last.loss.margin > first.loss.margin and last.schedule.margin_schedule == [0, 0]


@pytest.mark.parametrize("name", ["gender", "age"])
def test_recipes_of_attributes_ask_for_labels(capsys, name):
    assert "label_file and label_column: give both or neither" in refusal(capsys, f"{FOLDER}/adapters/{name}.yaml")


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert names >= {"nano_small_corpus", "telephony", "noisy", "gender", "age", "voxceleb", "cnceleb"}
    assert names >= {"voxceleb2", "voxceleb2_large_margin", "matryoshka_finetune"}


def test_no_two_recipes_write_to_one_folder():
    outputs = [shipped(path).run.output for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


# ---------------------------------------------------------------- types


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E5", 2e5), ("3", 3.0), (".5", 0.5)])
def test_numbers_yaml_takes_for_strings(text, value, recipe_file):
    from_file = parse(recipe_file(f"learning_rate: {text}\n")).optimizer.learning_rate
    assert from_file == parse("--learning_rate", text).optimizer.learning_rate == value
    assert type(from_file) is float


@pytest.mark.parametrize("name", ["part_learning_rates", "part_weight_decays"])
@pytest.mark.parametrize("part", PARTS)
def test_numbers_of_parts_yaml_takes_for_strings(name, part, recipe_file):
    from_file = getattr(parse(recipe_file(f"{name}: {{{part}: 1e-5}}\n")).optimizer, name)
    assert from_file == getattr(parse(f"--{name}={{{part}: 1e-5}}").optimizer, name) == {part: 1e-5}


@pytest.mark.parametrize("name", ["part_learning_rates", "part_weight_decays"])
def test_what_is_no_number_is_refused_for_a_part(capsys, name):
    assert name in refusal(capsys, f"--{name}={{trunk: slow}}")


def test_no_is_a_word(recipe_file):
    """YAML reads a bare `no` as false."""
    assert parse("--mixed_precision", "no") == parse(recipe_file("mixed_precision: no\n")) == make_recipe()


@pytest.mark.parametrize(
    ("key", "text", "found", "expected"),
    [
        ("steps", "true", "True", "a whole number of at least 1"),
        ("steps", "2.5", "2.5", "a whole number of at least 1"),
        ("steps", "many", "'many'", "a whole number of at least 1"),
        ("crop_seconds", "true", "True", "a length in seconds, or [shortest, longest]"),
        ("crop_seconds", "long", "'long'", "a length in seconds, or [shortest, longest]"),
        ("learning_rate", "true", "True", "a number of at least 0"),
        ("epochs", "many", "'many'", "a number above 0 or null"),
        ("reference_batch", "64.0", "64.0", "a whole number of at least 1 or null"),
        ("streaming", "1", "1", "true or false"),
        ("augmentations", "{kind: noise}", "{'kind': 'noise'}", "a list of mappings with a kind each"),
        ("part_learning_rates", "1e-5", "'1e-5'", "a mapping with some of the keys trunk, head, classifier"),
        ("speed_perturb", "0.9", "0.9", "a list of different speeds from 0.1 to 10 that begins with 1.0"),
        ("tests", "[1]", r"[1]", "a mapping"),
        ("output", "null", "None", "non-empty text"),
        ("train", "[a]", "['a']", "non-empty text or null"),
    ],
)
def test_wrong_types_are_refused(capsys, recipe_file, key, text, found, expected):
    message = f"{FULL_NAMES[key]}: got {found}, expected {expected}."
    assert f"command line: {message}" in refusal(capsys, f"--{key}", text)
    assert f"recipe.yaml: {message}" in refusal(capsys, recipe_file(f"{key}: {text}\n"))


def test_every_problem_has_a_line_of_its_own(capsys, recipe_file):
    lines = refusal(capsys, recipe_file("steps: 0\nplacement: convs\nwarmup: 7\n"), "--sampler=foo").splitlines()
    assert [line.partition("recipe.yaml: ")[2] or line for line in lines] == [
        "command line: data.sampler: got 'foo', expected one of speaker, utterance.",
        "schedule.steps: got 0, expected a whole number of at least 1.",
        "schedule.warmup: got 7, expected a ratio from 0 to below 1.",
        "adapter.placement: got 'convs', expected one of attention, attention+ffn, pointwise, projection, linear, "
        "conv, all. Did you mean conv?",
    ]


def test_a_recipe_cannot_be_changed():
    recipe = make_recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.schedule.steps = 5
    with pytest.raises(ValueError, match="frozen"):
        recipe.schedule = make_recipe(steps=5).schedule


# ---------------------------------------------------------------- groups


def test_the_last_parts_of_names_are_unique_and_no_names_of_groups():
    names = [name.rpartition(".")[2] for name in SETTINGS]
    assert len(names) == len(set(names)) == len(SETTINGS) and not set(names) & set(GROUPS)


def test_every_setting_says_what_it_is_for():
    assert [name for name, field in SETTINGS.items() if len(field.description or "") < 10] == []
    assert [name for name, kind in GROUPS.items() if not kind.__doc__] == []


def test_a_setting_has_a_full_name_and_its_last_part(recipe_file):
    file = recipe_file("rank: 4\n")
    assert parse("--adapter.rank", "4") == parse("--rank=4") == parse(file) == make_recipe(rank=4)


def test_a_group_given_as_one_value_is_its_main_setting(recipe_file):
    expected = make_recipe(start="my-b2", name="sphereface2", algorithm="sgd", lr_schedule="exponential")
    words = dict(model="my-b2", loss="sphereface2", optimizer="sgd", schedule="exponential")
    assert parse(*(f"--{group}={word}" for group, word in words.items())) == expected
    assert parse(recipe_file("\n".join(f"{group}: {word}" for group, word in words.items()))) == expected


def test_other_groups_have_no_main_setting(capsys, recipe_file):
    expected = "adapter: is a group, expected its settings, such as adapter.placement."
    assert f"recipe.yaml: {expected}" in refusal(capsys, recipe_file("adapter: 4\n"))
    assert f"command line: {expected}" in refusal(capsys, "--adapter=4")


def test_a_group_without_settings_has_the_defaults(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model:\nadapter:\n  # rank: 4\n")
    assert parse(str(tmp_path / "recipe.yaml")) == make_recipe()


def test_the_loss_fills_the_configuration_of_the_model():
    recipe = parse("--loss.name", "sphereface2", "--scale=20", "--prefix_weights=[1, 1, 2, 2]", "--sub_centers=2")
    changes = {"loss": "sphereface2", "scale": 20.0, "prefix_weights": [1.0, 1.0, 2.0, 2.0], "sub_centers": 2}
    assert recipe.config_changes == changes and start_config(recipe).loss == "sphereface2"
    assert parse().config_changes == {}


def test_every_field_of_the_configuration_for_training_is_one_of_the_loss():
    names = list(MRLReDimNetConfig.__annotations__)
    assert list(LOSS_FIELDS) == names[names.index("loss") :]


@pytest.mark.parametrize("name", RENAMED)
def test_a_name_of_an_earlier_version_is_answered_with_todays(capsys, tmp_path, name):
    (tmp_path / "recipe.yaml").write_text(f"{name}: 1\n")
    for argv in ([str(tmp_path / "recipe.yaml")], [f"--{name}=1"], [f"--{name}", "1"]):
        assert f": {name}: now {RENAMED[name]}.\n" in refusal(capsys, *argv)
    assert RENAMED[name] in SETTINGS


def test_a_file_without_groups_is_answered_with_the_groups(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("rank: 8\nspeeds: [1.0]\ndata: {seed: 3}\n")
    lines = refusal(capsys, str(tmp_path / "recipe.yaml")).splitlines()
    assert [line.partition("recipe.yaml: ")[2] for line in lines] == [
        "rank: now adapter.rank.",
        "speeds: now augmentation.speed_perturb.",
        "data.seed: now run.seed.",
    ]


def test_the_page_of_settings_is_current():
    assert (FOLDER / "docs/recipe.md").read_text() == page(), (
        "python -m mrl_redimnet.training.recipe_page docs/recipe.md writes it anew"
    )


# ---------------------------------------------------------------- names


def test_a_misspelt_name_is_answered_with_the_nearest(capsys, recipe_file):
    expected = "no setting named 'lerning_rate'. Did you mean optimizer.learning_rate?"
    assert f"command line: {expected}" in refusal(capsys, "--lerning_rate", "1")
    assert f"recipe.yaml: {expected}" in refusal(capsys, recipe_file("lerning_rate: 1\n"))


def test_a_name_like_no_other_is_answered_with_all(capsys):
    message = refusal(capsys, "--xyzzy", "1")
    assert all(name in message for name in SETTINGS)


@pytest.mark.parametrize("where", ["alone", "behind the file", "before the file"])
@pytest.mark.parametrize("value", ["1", "[0, 15]", "{trunk: 1e-5}"])
def test_an_unknown_name_is_told_whatever_its_value_and_place(capsys, recipe_file, where, value):
    """argparse takes an unknown `--name=value` with a space in it for a file."""
    word, file = f"--lerning_rate={value}", recipe_file("seed: 1\n")
    argv = {"alone": [word], "behind the file": [file, word], "before the file": [word, file]}[where]
    expected = "command line: no setting named 'lerning_rate'. Did you mean optimizer.learning_rate?"
    assert expected in refusal(capsys, *argv, "--steps=5")


def test_a_known_name_may_have_any_value_in_any_place(recipe_file):
    word, file = "--tests={a: {trials: b, folder: c}}", recipe_file("seed: 1\n")
    expected = make_recipe(seed=1, tests={"a": {"trials": "b", "folder": "c"}})
    assert parse(word, file) == parse(file, word) == expected


@pytest.mark.parametrize("name", ["noise_snr", "noise_probability", "trunk_learning_rate", "num_labels"])
def test_what_was_a_setting_once_is_not_taken_silently(capsys, recipe_file, name):
    assert f"no setting named '{name}'" in refusal(capsys, f"--{name}", "0.5")
    assert f"no setting named '{name}'" in refusal(capsys, recipe_file(f"{name}: [0, 15]\n"))


def test_abbreviations_are_refused(capsys):
    assert "no setting named 'step'. Did you mean schedule.steps?" in refusal(capsys, "--step", "5")


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
    names = text.replace(" VALUE", "")  # Python 3.13 gives it once, behind the last name
    assert all(re.search(rf"--{name}, --{name.rpartition('.')[2]}[,\n ]", names) for name in SETTINGS)
    assert "what it does" in text and "--resume" in text and "[0.002; a number of at least 0]" in text


# ---------------------------------------------------------------- files and values that cannot be


@pytest.mark.parametrize(("text", "message"), [("- 1\n- 2\n", "got list"), ("", "got NoneType"), ("a: [", "parsing")])
def test_files_that_are_no_recipes(capsys, recipe_file, text, message):
    assert message in refusal(capsys, recipe_file(text))


def test_a_missing_file(capsys):
    assert "nowhere.yaml" in refusal(capsys, "nowhere.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "schedule.steps: got 0, expected a whole number of at least 1"),
        (["--batch_size", "-1"], "data.batch_size: got -1, expected a whole number of at least 1"),
        (["--log_every", "0"], "log_every: got 0"),
        (["--checkpoint_every", "0"], "checkpoint_every: got 0"),
        (["--speed_perturb", "[0.9, 1.0]"], "begins with 1.0"),
        (["--speed_perturb", "[]"], "begins with 1.0"),
        (["--margin_schedule", "[0.5, 0.1]"], "two rising ratios between 0 and 1"),
        (["--margin_schedule", "[0.5]"], "two rising ratios between 0 and 1"),
        (["--margin_schedule", "[low, high]"], "margin_schedule: got ['low', 'high']"),
        (
            ["--augmentation_schedule", "[0.5, 0.1]"],
            "augmentation_schedule: got [0.5, 0.1], expected two rising ratios",
        ),
        (["--augmentation_schedule", "[0, 1.5]"], "augmentation_schedule: got [0, 1.5], expected two rising ratios"),
        (["--tracker", "mlflow"], "tracker: got 'mlflow', expected one of tensorboard, wandb, trackio, none"),
        (["--optimizer", "adam"], "algorithm: got 'adam', expected one of adamw, sgd"),
        (["--schedule", "step"], "schedule: got 'step', expected one of cosine, exponential"),
        (["--schedule=exponential", "--final_learning_rate=0"], "final_learning_rate: an exponential needs one above"),
        (["--schedule=exponential", "--final_learning_rate=1"], "final_learning_rate: an exponential needs one above"),
        (
            ["--part_learning_rates", "{stem: 1}"],
            "part_learning_rates: got 'stem', expected one of trunk, head",
        ),
        (
            ["--part_weight_decays", "{stem: 1}"],
            "part_weight_decays: got 'stem', expected one of trunk, head",
        ),
        (["--reference_batch", "0"], "reference_batch: got 0, expected a whole number of at least 1 or null"),
        (["--epochs", "0"], "epochs: got 0, expected a number above 0"),
        (["--epochs=-1"], "epochs: got -1, expected a number above 0"),
        (["--momentum", "1"], "momentum: got 1, expected a ratio"),
        (["--ema", "1"], "ema: got 1, expected a ratio"),
        (["--patience=-1"], "patience: got -1, expected a whole number of at least 0"),
        (["--weight_averaging=-1"], "weight_averaging: got -1, expected a whole number of steps, a ratio"),
        (["--prefixes_per_step=-1"], "prefixes_per_step: got -1, expected a whole"),
        (
            ["--prefix_starts", "[0.5, 0.1]"],
            "prefix_starts: got [0.5, 0.1], expected a list of ratios",
        ),
        (
            ["--prefix_starts", "[-0.1, 0]"],
            "prefix_starts: got [-0.1, 0], expected a list of ratios",
        ),
        (
            ["--prefix_starts", "[2, 0]"],
            "prefix_starts: got [2, 0], expected a list of ratios",
        ),
        (["--crop_seconds", "0"], "crop_seconds: got 0, expected a length in seconds, or [shortest, longest]"),
        (
            ["--crop_seconds", "[3, 2]"],
            "crop_seconds: got [3, 2], expected a length in seconds, or [shortest, longest]",
        ),
        (
            ["--crop_seconds", "[1, 2, 3]"],
            "crop_seconds: got [1, 2, 3], expected a length in seconds, or [shortest, longest]",
        ),
        (
            ["--crop_seconds", "[0, 2]"],
            "crop_seconds: got [0, 2], expected a length in seconds, or [shortest, longest]",
        ),
        (
            ["--crop_seconds", "[1, long]"],
            "crop_seconds: got [1, 'long'], expected a length in seconds, or [shortest, longest]",
        ),
        (["--utterances_per_speaker", "0"], "utterances_per_speaker: got 0, expected a whole number of at least 1"),
        (["--utterances_per_speaker=5", "--batch_size=12"], "batch_size that it divides, got speaker and 12"),
        (
            ["--utterances_per_speaker=2", "--sampler=utterance"],
            "utterances_per_speaker: 2 needs sampler: speaker and a batch_size that it divides, got utterance and 48",
        ),
        (
            ["--classifier_sample=9", "--gradient_accumulation=2"],
            "classifier_sample: works with gradient_accum",
        ),
        (
            ["--classifier_sample=9", "--ema=0.9"],
            "classifier_sample: works without rotate_at, ema",
        ),
        (["--dev_trials", "trials.txt"], "dev_trials and dev_folder: give both or neither"),
        (["--dev_speakers", "1"], "dev_speakers: at least 2"),
        (["--tests", "{vox: {trials: a}}"], "evaluation.tests.vox.folder: is missing"),
        (["--tests", "{vox: trials.txt}"], "tests.vox: got "),
        (["--tests", "{vox: null}"], "tests.vox: got "),
        (["--finetune", "trunk"], "finetune: got 'trunk', expected one of all, head, projection, exits, adapter"),
        (["--strategy", "adalora"], "strategy: got 'adalora', expected one of vanilla, dynamic, warm_up, mixed, matry"),
        (["--model=b2"], "start: b2 is a size, and no model of that name comes with the package"),
        (["--model=b2", "--size=b2"], "size: b2 is a network with random weights, start: b2 has weights"),
        (["--size=b7"], "size: got 'b7', expected one of nano, b0"),
        (["--label_key", "file"], "label_key: got 'file', expected one of speaker, path"),
        (["--clean_ratio", "1"], "clean_ratio: got 1, expected a ratio from 0 to below 1"),
        (["--clean_ratio=-0.1"], "clean_ratio: got -0.1, expected a ratio"),
        (["--trunk_frozen_until", "1"], "trunk_frozen_until: got 1, expected a ratio"),
        (["--cut_at", "1.5"], "cut_at: got 1.5, expected a ratio"),
        (["--label_file", "labels.csv"], "label_file and label_column: give both or neither"),
        (["--label_column", "age"], "label_file and label_column: give both or neither"),
        (["--segment_ranks", "4"], "segment_ranks: got 4, expected a list of whole numbers of at least 1"),
        (["--rank", "0"], "rank: got 0, expected a whole number of at least 1"),
        (["--rank=8", "--start_rank=8", "--strategy=dynamic"], "rank: got 8 and start_rank 8"),
        (["--rank=8", "--start_rank=4", "--strategy=warm_up"], "rank: got 8 and start_rank 4"),
    ],
)
def test_impossible_values_are_refused(capsys, argv, message):
    assert message in refusal(capsys, *argv)


@pytest.mark.parametrize("strategy", ["vanilla", "mixed"])
def test_a_start_rank_counts_only_where_ranks_are_cut(strategy):
    assert parse("--rank=32", f"--strategy={strategy}").adapter.start_rank == 16


@pytest.mark.parametrize("trains", ["head", "projection", "adapter"])
def test_what_only_a_whole_model_can_do_is_refused_for_a_part(capsys, trains):
    message = refusal(capsys, f"--finetune={trains}", "--trunk_frozen_until=0.5")
    assert f"trunk_frozen_until: with finetune: {trains} the trunk is never trained; leave it out" in message
    assert parse(f"--finetune={trains}").rotations == []
    for word in ("--rotate_at=[0.5]", "--ema=0.99", "--weight_averaging=0.5", "--classifier_sample=100"):
        message = refusal(capsys, f"--finetune={trains}", word)
        assert f"{word[2:].partition('=')[0]}: works with finetune: all; with {trains} leave it out" in message
        assert parse("--finetune=all", word)
    assert parse("--finetune=all", "--trunk_frozen_until=0.5", "--rotate_at=[0.5]").schedule.rotate_at == [0.5]


def test_by_default_the_basis_is_rotated_wherever_all_is_trained_for_verification():
    assert parse().rotations == [0.1, 0.3, 0.5]
    assert parse("--rotate_at=[]").rotations == []
    assert parse("--rotate_at=[0.5]").rotations == [0.5]
    assert parse("--classifier_sample=9").rotations == []
    assert parse("--label_file=labels.csv", "--label_column=age").rotations == []


VERIFICATION, ATTRIBUTE = [], ["--label_file=labels.csv", "--label_column=age"]


@pytest.mark.parametrize(
    "word", ["--teacher=b6", "--classifier_sample=100", "--prefix_starts=[0.5, 0]", "--prefixes_per_step=2"]
)
def test_what_belongs_to_the_learning_of_speakers_is_refused_for_labels(capsys, word):
    message = refusal(capsys, *ATTRIBUTE, word)
    assert (
        f"{word[2:].partition('=')[0]}: belongs to the learning of speakers; with label_column leave it out" in message
    )
    assert parse(*VERIFICATION, word)


STREAMING = ["--streaming=true", "--sampler=utterance", "--dev_trials=trials.txt", "--dev_folder=wav"]


def test_a_stream_has_its_trials_given_and_crops_of_one_length():
    assert parse(*STREAMING).data.streaming and parse(*STREAMING, "--crop_seconds=[3, 3]").data.crop_range == (3.0, 3.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--streaming=true"], "streaming: sampler must be utterance, got speaker"),
        ([*STREAMING, "--sampler=speaker"], "streaming: sampler must be utterance, got speaker"),
        ([*STREAMING, *ATTRIBUTE], "streaming: label_file must be None, got labels.csv"),
        (
            [*STREAMING, "--augmentation_schedule=[0, 0.5]"],
            "streaming: augmentation_schedule must be [0.0, 0.0], got [0.0, 0.5]",
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
    assert list(parse(*task, f"--tests={{vox: {test}}}").evaluation.tests) == ["vox"]


@pytest.mark.parametrize(
    ("task", "test", "message"),
    [
        (VERIFICATION, "{folder: b}", "tests.vox.trials: is missing, expected a trial list"),
        (VERIFICATION, "{trials: a, folder: b, noise: c}", "evaluation.tests.vox.noise: no such entry."),
        (ATTRIBUTE, "{trials: a, folder: b}", "tests.vox.trials: belongs to trials; with label_column leave it out"),
        (ATTRIBUTE, "{domain: noisy}", "evaluation.tests.vox.folder: is missing"),
    ],
)
def test_a_test_has_the_entries_of_its_task(capsys, task, test, message):
    assert message in refusal(capsys, *task, f"--tests={{vox: {test}}}")


# ---------------------------------------------------------------- every setting has its values


def settings_of(kind: type) -> list[str]:
    """The settings whose default is of a type, by the last parts of their names."""
    return [name.rpartition(".")[2] for name, field in SETTINGS.items() if type(field.default) is kind]


NUMBERS = [*settings_of(int), *settings_of(float), "epochs", "reference_batch"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", [".nan", "-.inf", "inf", "true", "'1e999'", "-1"])
def test_what_is_no_number_in_range_is_refused(recipe_file, capsys, name, text):
    assert f"{name}: got " in refusal(capsys, recipe_file(f"{name}: {text}\n"))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), True, "many"])
def test_what_is_no_number_is_refused_in_python_as_well(name, value):
    with pytest.raises(ValueError, match=f"{name}: got "):
        make_recipe(**{name: value})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("warmup: 6", "warmup: got 6, expected a ratio from 0 to below 1"),
        ("rotate_at: [12]", "rotate_at: got [12], expected a list of ratios above 0 and below 1"),
        ("rotate_at: [0]", "rotate_at: got [0], expected a list of ratios above 0 and below 1"),
        ("rotate_at: [.nan]", "rotate_at: got [nan], expected a list of ratios above 0 and below 1"),
        ("max_gradient_norm: 0", "max_gradient_norm: got 0, expected a number above 0"),
        ("learning_rate: -1e-3", "learning_rate: got '-1e-3', expected a number of at least 0"),
        ("weight_decay: -0.1", "weight_decay: got -0.1, expected a number of at least 0"),
        ("part_weight_decays: {trunk: -1}", "part_weight_decays.trunk: got -1, expected a number of at least 0"),
        ("part_learning_rates: {trnk: 1}", "expected one of trunk, head, classifier. Did you mean trunk?"),
        ("part_learning_rates: {trunk: .nan}", "part_learning_rates.trunk: got nan, expected a number of at least 0"),
        ("learning_rate: 1e-6", "final_learning_rate: got 2e-05, expected at most learning_rate, 1e-06"),
        ("seed: 4294967296", "seed: got 4294967296, expected a whole number of at least 0 and below 4294967296"),
        ("speed_perturb: [1.0, .nan]", "speed_perturb: got [1.0, nan], expected a list of different speeds"),
        ("speed_perturb: [1.0, true]", "speed_perturb: got [1.0, True], expected a list of different speeds"),
        ("speed_perturb: [1.0, 1.0]", "speed_perturb: got [1.0, 1.0], expected a list of different speeds"),
        ("crop_seconds: .inf", "crop_seconds: got inf, expected a length in seconds, or [shortest, longest]"),
        (
            "crop_seconds: [1, true]",
            "crop_seconds: got [1, True], expected a length in seconds",
        ),
        ("margin_schedule: [true, 1]", "margin_schedule: got [True, 1], expected two rising ratios"),
        ("report_dims: [8.5]", "report_dims: got [8.5], expected a list of whole numbers of at least 1"),
        ("report_dims: ['8']", "report_dims: got ['8'], expected a list of whole numbers of at least 1"),
        ("segment_ranks: [0]", "segment_ranks: got [0], expected a list of whole numbers of at least 1"),
        ("max_unusable_ratio: 1.5", "max_unusable_ratio: got 1.5, expected a ratio from 0 to 1"),
        ("max_learning_rate_growth: 0.5", "max_learning_rate_growth: got 0.5, expected a number of at least 1"),
        ("output: ''", "output: got '', expected non-empty text"),
        ("placement: convs", "expected one of attention, attention+ffn, pointwise, projection, linear, conv, all. Did"),
        ("sampler: speekers", "sampler: got 'speekers', expected one of speaker, utterance. Did you mean speaker?"),
        (
            "domain: telefony",
            "domain: got 'telefony', expected one of clean, noisy, telephony. Did you mean telephony?",
        ),
        ("mixed_precision: bf17", "mixed_precision: got 'bf17', expected one of no, bf16, fp16. Did you mean bf16?"),
        (
            "strategy: warmup",
            "strategy: got 'warmup', expected one of vanilla, dynamic, warm_up, mixed, matryoshka. Did",
        ),
        ("algorithm: adam", "optimizer.algorithm: got 'adam', expected one of adamw, sgd. Did you mean adamw?"),
        ("tracker: tensorbord", "Did you mean tensorboard?"),
        ("layout: voxceleb3", "Did you mean voxceleb2?"),
        ("layout: speaker", "layout 'speaker' must be one of"),
        (
            "columns: {speakr: who}",
            "columns: got 'speakr', expected one of audio, speaker, session",
        ),
        ("columns: {speaker: 3}", "columns.speaker: got 3, expected non-empty text"),
        ("label_key: speakers", "label_key: got 'speakers', expected one of speaker, path. Did you mean speaker?"),
        (
            "weight_averaging: 10",
            "weight_averaging: got 10, expected a ratio of the run such as 0.1",
        ),
        ("evaluate_every: 1.5", "evaluate_every: got 1.5, expected a whole number of steps, a ratio of the run"),
        ("evaluate_every: 1 epohc", "evaluate_every: got '1 epohc', expected a whole number of steps, a ratio"),
        ("checkpoint_every: 0 epochs", "checkpoint_every: got '0 epochs', expected a whole number of steps"),
        ("chance_until: nan epochs", "chance_until: got 'nan epochs', expected a whole number of steps"),
        ("seed: 1\nseed: 2", "seed: given twice"),
    ],
)
def test_values_out_of_range_are_refused_with_what_is_allowed(capsys, recipe_file, setting, message):
    assert message in refusal(capsys, recipe_file(f"{setting}\n"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{loss: foo}", "model_options.loss: now loss.name."),
        ("{poling: TAP}", "model_options: the model has no field named 'poling'. Did you mean pooling?"),
        ("{num_speakers: 5}", "model_options.num_speakers: leave it out"),
        ("{map_dropout: .nan}", "model_options.map_dropout: got nan, expected a finite number"),
        ("{map_dropout: true}", "model_options.map_dropout: got True, expected a finite number"),
        ("{map_dropout: 2}", "model_options.map_dropout: got 2, expected 0 <= map_dropout < 1"),
        ("{margin: 0.5}", "model_options.margin: now loss.margin."),
        ("{window_seconds: large}", "model_options.window_seconds: got 'large', expected a finite number"),
        ("{spec_augment: 1}", "model_options.spec_augment: got 1, expected true or false"),
        ("{num_mel_bins: 24.0}", "model_options.num_mel_bins: got 24.0, expected a whole number"),
        ("{matryoshka_dims: [64, true]}", "model_options.matryoshka_dims: got [64, True], expected a list"),
        ("{matryoshka_dims: 64}", "model_options.matryoshka_dims: got 64, expected a list"),
        ("{matryoshka_dims: [64]}", "model_options.matryoshka_dims: must end at embedding_size=256"),
    ],
)
def test_options_of_the_model_are_checked(capsys, options, message):
    assert message in refusal(capsys, "--model_options", options)


def test_options_of_the_model_are_checked_with_the_model_they_change(capsys, tmp_path):
    MRLReDimNetConfig.from_size("nano").save_pretrained(tmp_path / "base")
    base = f"--model={tmp_path / 'base'}"
    assert parse(base, "--loss.margin=5e-1").config_changes == {"margin": 0.5}
    assert "matryoshka_dims: must end at embedding_size=256" in refusal(
        capsys, base, "--model_options={matryoshka_dims: [8]}"
    )
    for model in (base, "--model=owner/name"):
        assert "model_options.pooling: got 'foo', expected one of ASTP" in refusal(
            capsys, model, "--model_options={pooling: foo}"
        )
        assert "loss.label_smoothing: loss 'sphereface2' has none" in refusal(
            capsys, model, "--loss=sphereface2", "--label_smoothing=0.1"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{lora_alfa: 8}", "peft_options: LoraConfig has no field named 'lora_alfa'. Did you mean lora_alpha?"),
        ("{r: 8}", "peft_options.r: leave it out, it is set by rank"),
        ("{target_modules: x}", "peft_options.target_modules: leave it out, it is set by placement"),
        ("{lora_alpha: true}", "peft_options.lora_alpha: got True, expected a number above 0"),
        ("{lora_alpha: 0}", "peft_options.lora_alpha: got 0, expected a number above 0"),
        ("{lora_dropout: 1.5}", "peft_options.lora_dropout: got 1.5, expected a ratio from 0 to below 1"),
        ("{lora_dropout: .nan}", "peft_options.lora_dropout: got nan"),
        ("{use_dora: 1}", "peft_options.use_dora: got 1, expected true or false"),
        ("{init_lora_weights: pisa}", "peft_options.init_lora_weights: got 'pisa', expected true, false, or one of"),
        ("{bias: some}", "peft_options.bias: got 'some', expected one of none, all, lora_only"),
        ("{rank_pattern: 8}", "peft_options.rank_pattern: got 8, expected a mapping"),
    ],
)
def test_options_of_peft_are_checked(capsys, options, message):
    assert message in refusal(capsys, "--finetune=adapter", "--peft_options", options)


@pytest.mark.parametrize("word", ["pissa", "pissa_niter_16", "gaussian", "eva", "true"])
def test_initialisations_of_peft_are_known(word):
    assert parse(f"--peft_options={{init_lora_weights: {word}}}").adapter.peft_options


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
        ("{trials: a, folder: b, suffix: flac}", "tests.vox.suffix: got 'flac', expected a dot and letters"),
        ("{trials: a, folder: b, format: kaldy}", "tests.vox.format: got 'kaldy', expected one of auto, voxceleb"),
        ("{trials: a, folder: b, enrolments: 5}", "tests.vox.enrolments: got 5, expected non-empty text"),
        ("{trials: a, folder: b, enrollments: c}", "Did you mean enrolments?"),
        ("{trials: a, folder: b, group_column: age}", "tests.vox.group_column: needs groups"),
        ("{trials: a, folder: b, benchmark: me/x}", "tests.vox.benchmark: got 'me/x', expected OWNER/DATASET:TASK"),
        (
            "{trials: a, folder: b, benchmark: 'me/x:y', domain: telephony}",
            "tests.vox.benchmark: belongs to audio as it is; with domain leave it out",
        ),
        ("{trials: 5, folder: b}", "tests.vox.trials: got 5, expected non-empty text"),
    ],
)
def test_entries_of_tests_are_checked_when_they_are_read(capsys, test, message):
    assert message in refusal(capsys, f"--tests={{vox: {test}}}")


def test_a_test_takes_what_evaluate_takes():
    test = {"trials": "a", "folder": "b", "enrolments": "c", "suffix": ".flac", "format": "cnceleb"}
    test["benchmark"] = "me/x:y"
    assert parse(f"--tests={{cnc-e: {test}}}").evaluation.tests == {"cnc-e": EvaluationSet(**test)}


def test_numbers_that_yaml_takes_for_strings_are_numbers_wherever_they_are():
    recipe = parse(
        "--margin_schedule=[1e-1, 4e-1]",
        "--rotate_at=[1e-1]",
        "--model_options={map_dropout: 2e-1, freq_mask_width: [0, 9]}",
        "--peft_options={lora_dropout: 1e-1}",
        "--augmentations=[{kind: gain, probability: 5e-1, gain: [-1e1, 1e1]}]",
        "--domain=telephony",
        "--domain_options={loss: [0, 1e-1]}",
        "--evaluate_every=5e-2",
    )
    assert recipe.schedule.margin_schedule == [0.1, 0.4] and recipe.schedule.rotate_at == [0.1]
    assert recipe.evaluation.evaluate_every == 0.05
    assert recipe.model.model_options["map_dropout"] == 0.2 and recipe.adapter.peft_options == {"lora_dropout": 0.1}
    assert recipe.augmentation.augmentations == [{"kind": "gain", "probability": 0.5, "gain": [-10.0, 10.0]}]
    assert recipe.augmentation.domain_options == {"loss": [0, 0.1]}


@pytest.mark.parametrize("value", ["60", "0.05", "1 epoch", "0.5 epochs", "1e-1 epochs"])
def test_stretches_of_a_run_are_steps_shares_or_passes(value, recipe_file):
    for name in ("evaluate_every", "checkpoint_every", "chance_until"):
        assert parse(recipe_file(f"{name}: {value}\n")) == parse(f"--{name}={value}") != make_recipe()


def test_the_settings_of_a_caller_are_not_changed():
    tests = {"a": {"trials": "b", "folder": "c", "domain": "telephony", "domain_options": {"loss": [0, "1e-1"]}}}
    make_recipe(tests=tests)
    assert tests["a"]["domain_options"] == {"loss": [0, "1e-1"]}
