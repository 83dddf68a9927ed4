"""Settings: defaults, files over them, the command line over both, and errors that name what is wrong."""

from dataclasses import fields
from pathlib import Path

import pytest

from mrl_redimnet.recipe import Recipe, parse_command_line, read_recipe

FOLDER = Path(__file__).parent.parent
RECIPES = [path for part in ("recipes", "adapters") for path in sorted((FOLDER / part).glob("*.yaml"))]


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
        "--model_options", "{num_mel_bins: 24}", "--rotate_at", "[0.5]", "--noise", "null", "--noise_snr=[-5, 5]"
    )
    assert recipe == Recipe(model_options={"num_mel_bins": 24}, rotate_at=[0.5], noise_snr=[-5, 5])


@pytest.mark.parametrize("argv", [["--resume"], ["--resume", "--steps", "5"], ["--steps", "5", "--resume"]])
def test_resume_is_no_setting(argv):
    assert parse_command_line(argv, "")[1] is True
    assert parse_command_line([x for x in argv if x != "--resume"], "")[1] is False


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(path):
    """Those of attributes with the labels that they cannot bring along."""
    labels = {"label_file": "labels.csv"} if "label_column:" in path.read_text() else {}
    recipe = read_recipe(path, labels)
    assert recipe != Recipe(**({**labels, "label_column": "x"} if labels else {}))
    assert (recipe.trains == "adapter") is (path.parent.name == "adapters")


@pytest.mark.parametrize("name", ["gender", "age"])
def test_recipes_of_attributes_ask_for_labels(capsys, name):
    assert "label_file and label_column: give both or neither" in refusal(capsys, f"{FOLDER}/adapters/{name}.yaml")


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert names >= {"nano_small_corpus", "telephony", "noisy", "gender", "age", "voxceleb", "cnceleb"}


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name == "adapters"], ids=lambda p: p.stem)
def test_no_two_recipes_write_to_one_folder(path):
    outputs = [line for other in RECIPES for line in other.read_text().splitlines() if line.startswith("output:")]
    assert outputs.count(f"output: runs/{path.stem}") == 1


# ---------------------------------------------------------------- types


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E5", 2e5), ("3", 3.0), (".5", 0.5)])
def test_numbers_yaml_takes_for_strings(text, value, recipe_file):
    from_file = parse(recipe_file(f"learning_rate: {text}\n")).learning_rate
    assert from_file == parse("--learning_rate", text).learning_rate == value
    assert type(from_file) is float


def test_no_is_a_word(recipe_file):
    """YAML reads a bare `no` as false."""
    assert parse("--mixed_precision", "no") == parse(recipe_file("mixed_precision: no\n")) == Recipe()


@pytest.mark.parametrize(
    ("key", "text", "found", "expected"),
    [
        ("steps", "true", "True", "int"),
        ("steps", "2.5", "2.5", "int"),
        ("steps", "many", "'many'", "int"),
        ("crop_seconds", "true", "True", "float"),
        ("crop_seconds", "long", "'long'", "float"),
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
        (["--tracker", "mlflow"], "tracker: got 'mlflow', expected tensorboard, wandb or none"),
        (["--dev_trials", "trials.txt"], "dev_trials and dev_folder: give both or neither"),
        (["--dev_speakers", "1"], "dev_speakers: at least 2"),
        (["--tests", "{vox: {trials: a}}"], "tests.vox: got ['trials'], expected the entries folder and trials"),
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
    message = refusal(capsys, f"--trains={trains}", "--rotate_at=[0.5]")
    assert f"rotate_at: with trains: {trains} the basis is not ours to turn; leave it out" in message
    assert parse("--trains=all", "--trunk_frozen_until=0.5", "--rotate_at=[0.5]").rotate_at == [0.5]


VERIFICATION, ATTRIBUTE = [], ["--label_file=labels.csv", "--label_column=age"]


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
