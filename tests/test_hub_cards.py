"""Cards state what was measured and nothing else; their metadata is the Hub's; what they tell users to type works."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from conftest import run_alone, tiny_config, tiny_model, waves
from huggingface_hub import ModelCard, parse_eval_result_entries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import pipeline

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters import AdapterFacts, Base, fingerprint, lora_config
from mrl_redimnet.evaluation.robustness import NumberRow
from mrl_redimnet.hub_cards import (
    NO_RESULTS,
    UNKNOWN_TRAINING,
    AttributeRow,
    Evaluation,
    adapter_card,
    base_card,
    eer_plot,
    save_card,
)
from mrl_redimnet.rows import GroupRow, Rate, VerificationRow
from mrl_redimnet.saving import save_model

BASE = Base("some-org/some-base", None, "sha256:" + "0f" * 32)
ROWS = [VerificationRow(8, 0.1234, 0.5, 0.1, 0.15), VerificationRow(32, 0.05, 0.4, 0.025, 0.075)]
WORSE = [VerificationRow(8, 0.2, 0.6), VerificationRow(32, 0.15, 0.55)]
VERIFICATION = Evaluation(
    "adapter", {"phone": {"base": WORSE, "adapter": ROWS}, "clean": {"adapter": ROWS}}, "One run."
)
GENDER = Evaluation("adapter", {"gender, AN4": {"adapter": [AttributeRow("accuracy", 0.931, 0.9, 0.95)]}})
GROUPS = [
    GroupRow("f", 8, 0.5, 6, 1234, 40, Rate(0.1, 0.05, 0.2), Rate(0.125), Rate(0.02, 0.01, 0.03)),
    GroupRow("m", 8, 0.5, 6, 90, 60, Rate(0.15), Rate(0.1), Rate(0.1),
             "f", Rate(0.05, -0.02, 0.1), Rate(-0.025), Rate(0.08)),
    GroupRow("x | y", 8, 0.5, 2, 10, 20),
    GroupRow("between groups", 8, 0.5, 14, 0, 80, false_alarm=Rate(0.01, 0.0, 0.02)),
]  # fmt: skip
NUMBERS = [
    NumberRow("noise", "test", 8, 0.9, 0.2, 0.8, 1.0),
    NumberRow("all", "test", 8, 0.456, 0.21, 0.3, 0.6, 0.1, 0.3),
    NumberRow("all", "test", 32, -0.1, 0.19),
    NumberRow("all", "both", 8, 1.5, 0.3, 1.25, 1.75),
]
SIZES = dict(parameters=12_345, file_bytes=67_890)


def verification_card(**options) -> ModelCard:
    facts = AdapterFacts("telephony", BASE, training="Trained on calls.", layers={"a": 4, "b": 4})
    return adapter_card(facts, **{"name": "tel", "repository": "some-org/tel", **SIZES, **options})


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, as lines of cells, headings first."""
    found = re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE)
    lines = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in found]
    return [[[cell.strip() for cell in line] for line in [table[0], *table[2:]]] for table in lines]


def python(card: ModelCard) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", card.text, flags=re.DOTALL | re.MULTILINE)
    return code


# ----------------------------------------------------------------------------------------------------------------------
# Cards


def test_cards_say_what_is_not_known():
    facts = AdapterFacts("telephony", BASE)
    for card in (base_card(tiny_model()), adapter_card(facts, **SIZES)):
        assert NO_RESULTS in card.text and UNKNOWN_TRAINING in card.text
        assert "No licence is stated" in card.text
        assert "model-index" not in card.data.to_dict() and "license" not in card.data.to_dict()
        assert tables(card.text) == [] and "eer.png" not in card.text


def test_systems_stand_side_by_side():
    card = verification_card(evaluation=VERIFICATION)
    rates, costs = tables(card.text)
    assert rates == [
        ["trials", "weights", "8", "32"],
        ["phone", "base", "20.00", "15.00"],
        ["phone", "**adapter**", "12.34 [10.0, 15.0]", "5.00 [2.5, 7.5]"],
        ["clean", "**adapter**", "12.34 [10.0, 15.0]", "5.00 [2.5, 7.5]"],
    ]
    assert costs[1:3] == [["phone", "base", "0.600", "0.550"], ["phone", "**adapter**", "0.500", "0.400"]]
    assert "One run." in card.text and "Brackets" in card.text and NO_RESULTS not in card.text
    assert "Rows of the base: the same model with the adapter switched off." in card.text
    assert "Brackets" not in base_card(tiny_model(), evaluation=Evaluation("base", {"x": {"base": WORSE}})).text


def test_missing_dimensions_stay_blank():
    evaluation = Evaluation("adapter", {"x": {"adapter": ROWS[:1], "base": WORSE}})
    assert tables(verification_card(evaluation=evaluation).text)[0][1] == ["x", "**adapter**", "12.34 [10.0, 15.0]", ""]


def test_base_card():
    card = base_card(
        tiny_model(), "some-name", "some-org/some-name", "Trained on x.", licence="cc-by-4.0", datasets=["org/speech"]
    )
    for stated in ("# some-name", "some-org/some-name", "first 8 / 16 / 32 numbers", "Trained on x.", "org/speech"):
        assert stated in card.text
    assert "Licence of the weights: cc-by-4.0." in card.text
    assert card.data.library_name == "transformers"
    assert card.data.license == "cc-by-4.0" and card.data.datasets == ["org/speech"]
    assert {"speaker-verification", "matryoshka", "mrl_redimnet"} <= set(card.data.tags)


def test_a_card_promises_a_pipeline_where_one_runs(tmp_path):
    """A classifier runs in transformers' own; no other model or adapter does."""
    classifier = tiny_model(tiny_config(num_labels=3), kind=MRLReDimNetForSequenceClassification)
    save_model(classifier, tmp_path / "classifier")
    promised = ModelCard.load(tmp_path / "classifier" / "README.md").data.pipeline_tag
    rows = pipeline(promised, model=str(tmp_path / "classifier"))(waves(8000)[0].numpy())
    assert promised == "audio-classification" and len(rows) == 3
    regressor = tiny_model(tiny_config(num_labels=1), kind=MRLReDimNetForSequenceClassification)
    adapters = [AdapterFacts("tel", BASE), AdapterFacts("gender", BASE, "classification", ["a", "b"])]
    cards = [base_card(tiny_model()), base_card(tiny_model(kind=MRLReDimNetForXVector)), base_card(regressor)]
    cards += [adapter_card(facts, parameters=1, file_bytes=1) for facts in adapters]
    assert [card.data.pipeline_tag for card in cards] == [None] * 5
    assert not [card for card in cards if "pipeline_tag" in card.content]


def test_base_card_says_which_network():
    of_2 = base_card(tiny_model(tiny_config("redimnet2")))
    assert "A [ReDimNet2](https://arxiv.org/abs/2603.11841) speaker encoder" in of_2.text
    assert "redimnet2" in of_2.data.tags and "redimnet" not in of_2.data.tags
    assert "A [ReDimNet](https://arxiv.org/abs/2407.18223) speaker encoder" in base_card(tiny_model()).text


def test_adapter_card():
    card = verification_card(evaluation=VERIFICATION)
    for stated in ("# tel", "[some-org/some-base](https://huggingface.co/some-org/some-base)", BASE.fingerprint):
        assert stated in card.text
    assert "12,345 parameters, rank 4 in 2 layers, 67.9 kB" in card.text and "Trained on calls." in card.text
    assert card.data.library_name == "peft"
    assert (card.data.base_model, card.data.base_model_relation) == ("some-org/some-base", "adapter")
    assert {"lora", "telephony", "speaker-verification", "redimnet"} <= set(card.data.tags)


def test_attribute_cards(tmp_path):
    facts = AdapterFacts("gender", BASE, "classification", ['"a"', "b"])
    card = adapter_card(facts, evaluation=GENDER, rank_text="rank 3", parameters=1, file_bytes=2_345_678)
    assert tables(card.text) == [
        [["trials", "weights", "accuracy %"], ["gender, AN4", "**adapter**", "93.10 [90.0, 95.0]"]]
    ]
    assert "1 parameters, rank 3, 2.35 MB" in card.text and "eer.png" not in card.text
    assert "speaker-verification" not in card.data.tags
    (entry,) = card.data.eval_results
    assert (entry.task_type, entry.metric_type, entry.metric_value) == ("audio-classification", "accuracy", 93.1)
    save_card(card, tmp_path, GENDER)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "evaluation.json"}

    age = Evaluation("adapter", {"age": {"adapter": [AttributeRow("mean absolute error", 7.125, 6, 8.5)]}})
    card = adapter_card(AdapterFacts("age", BASE, "regression"), evaluation=age, **SIZES)
    assert tables(card.text)[0][1] == ["age", "**adapter**", "7.12 [6.0, 8.5]"]
    assert [(e.metric_type, e.metric_value) for e in card.data.eval_results] == [("mae", 7.12)]
    with pytest.raises(ValueError, match="'gender' does not name its classes"):
        adapter_card(AdapterFacts("gender", BASE, "classification"), **SIZES)


def test_groups_stand_on_the_card():
    card = verification_card(evaluation=replace(VERIFICATION, groups={"clean": GROUPS}))
    heading, f, m, few, between = tables(card.text)[2]
    assert heading == [
        "trials", "group", "dims", "speakers", "targets", "impostors", "EER %", "miss %", "false alarm %"
    ]  # fmt: skip
    assert f == ["clean", "f", "8", "6", "1,234", "40", "10.00 [5.0, 20.0]", "12.50", "2.00 [1.0, 3.0]"]
    assert m == ["clean", "m", "8", "6", "90", "60", "15.00", "10.00", "10.00"]
    assert few == ["clean", "x \\| y", "8", "2", "10", "20", "too few", "too few", "too few"]
    assert between == ["clean", "between groups", "8", "14", "0", "80", "", "", "1.00 [0.0, 2.0]"]
    differs = "m less f at 8 dimensions, in points: EER +5.00 [-2.0, +10.0], miss -2.50, false alarm +8.00."
    assert f"{differs} 40 % of the impostor trials are between groups." in card.text
    assert "one threshold" not in verification_card(evaluation=VERIFICATION).text


def test_robustness_stands_on_the_card():
    """The one number, not those of the kinds."""
    evaluation = replace(VERIFICATION, robustness={"phone": NUMBERS, "clean": NUMBERS[1:2]})
    assert tables(verification_card(evaluation=evaluation).text)[2] == [
        ["trials", "perturbed", "8", "32"],
        ["phone", "test", "+46 [+30, +60]", "-10"],
        ["phone", "enrolment and test", "+150 [+125, +175]", ""],
        ["clean", "test", "+46 [+30, +60]", ""],
    ]
    assert "perturbed by noise, each counting" in verification_card(evaluation=evaluation).text
    for without in (VERIFICATION, replace(VERIFICATION, robustness={"phone": NUMBERS[:1]})):
        assert "Robustness" not in verification_card(evaluation=without).text


# ----------------------------------------------------------------------------------------------------------------------
# Metadata


@pytest.mark.parametrize("name", ["my-base", "runs/x/best", "/a/path", "a--b/c", ""])
def test_only_a_hub_id_becomes_the_base_model(name):
    card = adapter_card(AdapterFacts("telephony", Base(name, "v1", "sha256:0")), **SIZES)
    assert "base_model" not in card.data.to_dict() and "base_model_relation" not in card.data.to_dict()
    assert f'"{name}"' in card.text and 'revision="v1"' in card.text


def test_only_hub_ids_become_datasets():
    card = verification_card(datasets=["librispeech_asr", "960 h of calls"])
    assert card.data.datasets == ["librispeech_asr"] and "960 h of calls" in card.text
    assert "datasets" not in verification_card(datasets=["960 h of calls"]).data.to_dict()


@pytest.mark.parametrize("evaluation", [None, VERIFICATION])
def test_metadata_survives_the_file(tmp_path, evaluation):
    cards = [
        verification_card(evaluation=evaluation, licence="mit", datasets=["a/b"]),
        base_card(tiny_model(), evaluation=evaluation),
    ]
    for card in cards:
        save_card(card, tmp_path, evaluation)
        loaded = ModelCard.load(tmp_path / "README.md")
        assert loaded.data.to_dict() == card.data.to_dict()
        assert loaded.text == card.text
        assert all(value is not None for value in loaded.data.to_dict().values())


def test_a_benchmark_of_the_hub_has_its_results_in_the_form_of_the_hub(tmp_path):
    """As huggingface_hub reads them, a file for each number, beside those of the card's metadata."""
    benchmarks = {"phone": "some-org/calls:short"}
    evaluation = replace(VERIFICATION, benchmarks=benchmarks)
    save_card(verification_card(evaluation=evaluation), tmp_path, evaluation)
    assert Evaluation.load(tmp_path) == evaluation
    found = {}
    for file in sorted((tmp_path / ".eval_results").iterdir()):
        (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
        assert (entry.dataset_id, entry.task_id) == ("some-org/calls", "short")
        found[file.name] = (entry.value, entry.notes)
    assert found == {
        "phone-8.yaml": (12.34, "EER % by cosine, 8 dimensions"),
        "phone-32.yaml": (5.0, "EER % by cosine, 32 dimensions"),
    }
    in_metadata = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert [e.metric_value for e in in_metadata if e.dataset_name == "phone"] == [12.34, 5.0]
    save_card(verification_card(evaluation=VERIFICATION), tmp_path, VERIFICATION)
    assert not (tmp_path / ".eval_results").exists()


@pytest.mark.parametrize("benchmarks", [{"vox": "a/b:c"}, {"phone": "a/b"}, {"phone": "b:c"}, {"phone": "a/b:"}])
def test_what_is_no_benchmark(benchmarks):
    with pytest.raises(ValueError, match="is no benchmark of these lists, expected OWNER/DATASET:TASK"):
        replace(VERIFICATION, benchmarks=benchmarks)


def test_lists_of_like_names_stay_apart():
    names = ["far field", "far-field", "far-field-2", "éé", "üü"]
    card = verification_card(evaluation=Evaluation("adapter", {name: {"adapter": ROWS} for name in names}))
    (index,) = card.data.to_dict()["model-index"]
    assert [result["dataset"]["name"] for result in index["results"]] == names
    assert len({result["dataset"]["type"] for result in index["results"]}) == len(names)


# ----------------------------------------------------------------------------------------------------------------------
# No number that was not measured

RATES = st.floats(0, 1)
NAMES = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=8).filter(str.strip)


@st.composite
def bounds(draw) -> tuple:
    return draw(st.one_of(st.just((None, None)), st.tuples(RATES, RATES)))


@st.composite
def rows(draw, kind: type) -> list:
    if kind is AttributeRow:
        metrics = draw(st.lists(st.sampled_from(["accuracy", "mean absolute error"]), min_size=1, unique=True))
        return [AttributeRow(metric, draw(RATES), *draw(bounds())) for metric in metrics]
    dims = draw(st.lists(st.integers(1, 2048), min_size=1, max_size=3, unique=True))
    return [VerificationRow(dim, draw(RATES), draw(RATES), *draw(bounds())) for dim in dims]


@st.composite
def evaluations(draw) -> Evaluation:
    saved, *others = draw(st.lists(NAMES, min_size=1, max_size=2, unique=True))
    results = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
        kind = draw(st.sampled_from([VerificationRow, AttributeRow]))
        results[name] = {system: draw(rows(kind)) for system in (*others, saved)}
    return Evaluation(saved, results)


def stored_numbers(record: dict) -> set[str]:
    """The numbers of a row in evaluation.json, in every way in which a card may write them."""
    numbers = [value for value in record.values() if isinstance(value, int | float)]
    written = {f"{unit * number:.{digits}f}" for number in numbers for unit in (1, 100) for digits in (1, 2, 3)}
    return written | {str(number) for number in numbers if isinstance(number, int)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(evaluation=evaluations())
def test_every_number_is_in_the_file(tmp_path, evaluation):
    card = verification_card(evaluation=evaluation)
    evaluation.save(tmp_path)
    assert Evaluation.load(tmp_path) == evaluation
    content = json.loads((tmp_path / "evaluation.json").read_text())
    records = [r for systems in content["results"].values() for rows in systems.values() for r in rows]
    stored = set().union(*map(stored_numbers, records))

    written = 0
    for heading, *lines in tables(card.text):
        cells = [*heading[2:], *(cell for line in lines for cell in line[2:])]
        assert all(len(line) == len(heading) for line in lines)
        numbers = [number for cell in cells for number in re.findall(r"[-+.\w]*\d[-+.\w]*", cell)]
        assert set(numbers) <= stored
        written += len(numbers)
    assert written >= len(records)

    (index,) = card.data.to_dict()["model-index"]
    indexed = {result["dataset"]["name"]: result["metrics"] for result in index["results"]}
    assert list(indexed) == list(content["results"])
    for name, systems in content["results"].items():
        saved = systems[content["saved"]]
        assert [metric["value"] for metric in indexed[name]] == [
            round(100 * r["eer"], 2) if "eer" in r else round(r["value"] * (100 if r["metric"] == "accuracy" else 1), 2)
            for r in saved
        ]
        assert [re.findall(r"\d+", metric["name"]) for metric in indexed[name]] == [
            [str(r["dim"])] if "dim" in r else [] for r in saved
        ]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_saved_folder_is_of_one_evaluation(tmp_path):
    save_card(verification_card(evaluation=VERIFICATION), tmp_path, VERIFICATION)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "evaluation.json", "eer.png"}
    assert "![EER per dimension](eer.png)" in (tmp_path / "README.md").read_text()
    assert Evaluation.load(tmp_path) == VERIFICATION
    with pytest.raises(ValueError, match="not made from this evaluation"):
        save_card(verification_card(evaluation=VERIFICATION), tmp_path, None)
    with pytest.raises(ValueError, match="not made from this evaluation"):
        save_card(verification_card(), tmp_path, VERIFICATION)
    assert Evaluation.load(tmp_path) == VERIFICATION
    save_card(verification_card(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md"}
    assert Evaluation.load(tmp_path) is None


def test_plot(tmp_path):
    """A picture whatever the lists: a name with a dollar sign, one dimension, no intervals, two rows of panels."""
    results = {"$a_b": {"adapter": ROWS[:1]}, "b": {"adapter": ROWS, "base": WORSE}, "c" * 90: {"adapter": WORSE}}
    assert eer_plot(Evaluation("adapter", results), tmp_path / "eer.png")
    data = (tmp_path / "eer.png").read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20]) >= 640
    assert not eer_plot(GENDER, tmp_path / "none.png") and not (tmp_path / "none.png").exists()


ROW = '{"dim": 8, "eer": 0.1, "min_dcf": 0.1}'
SHARE = '{"metric": "accuracy", "value": 1}'


@pytest.mark.parametrize(
    "rows",
    [
        "",
        "8",
        '{"dim": 8, "eer": 0.1}',
        '{"dim": 8, "eer": 12.3, "min_dcf": 0.1}',
        '{"dim": 8, "eer": NaN, "min_dcf": 0.1}',
        '{"dim": "8", "eer": 0.1, "min_dcf": 0.1}',
        '{"dim": 8, "eer": 0.1, "min_dcf": 0.1, "eer_low": 0.1}',
        '{"metric": "F1", "value": 0.1}',
        '{"metric": "accuracy", "value": 93}',
        f"{ROW}, {ROW}",
        f"{SHARE}, {ROW}",
    ],
)
def test_malformed_rows_are_refused(tmp_path, rows):
    (tmp_path / "evaluation.json").write_text(f'{{"saved": "a", "results": {{"x": {{"a": [{rows}]}}}}}}')
    with pytest.raises(ValueError, match="evaluation.json is not an evaluation"):
        Evaluation.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"saved": "a", "results": {}}',
        f'{{"saved": "a", "results": {{"x": {{"b": [{ROW}]}}}}}}',
        f'{{"saved": "a", "results": {{" ": {{"a": [{ROW}]}}}}}}',
        f'{{"saved": "a", "results": {{"x": {{"a": [{ROW}]}}}}, "conditions": 1}}',
    ],
)
def test_malformed_files_are_refused(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match="evaluation.json is not an evaluation"):
        Evaluation.load(tmp_path)


def test_groups_and_robustness_survive_the_file(tmp_path):
    evaluation = replace(VERIFICATION, groups={"phone": GROUPS}, robustness={"phone": NUMBERS})
    save_card(verification_card(evaluation=evaluation), tmp_path, evaluation)
    assert Evaluation.load(tmp_path) == evaluation
    with pytest.raises(ValueError, match="not made from this evaluation"):
        save_card(verification_card(evaluation=VERIFICATION), tmp_path, evaluation)


def test_an_earlier_versions_file_is_read(tmp_path):
    VERIFICATION.save(tmp_path)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    earlier = {name: content[name] for name in ("saved", "results", "conditions")}
    (tmp_path / "evaluation.json").write_text(json.dumps(earlier))
    assert Evaluation.load(tmp_path) == VERIFICATION


@pytest.mark.parametrize(
    "part, rows",
    [
        ("groups", []),
        ("groups", [{"group": "f"}]),
        ("groups", [{**asdict(GROUPS[0]), "eer": {"value": 12.0}}]),
        ("groups", [{**asdict(GROUPS[0]), "eer": {"value": None}}]),
        ("groups", [{**asdict(GROUPS[0]), "miss": {"value": -0.1}}]),
        ("groups", [{**asdict(GROUPS[0]), "miss": {"value": 0.1, "low": 0.1}}]),
        ("groups", [{**asdict(GROUPS[0]), "eer_difference": {"value": -1.1}}]),
        ("groups", [{**asdict(GROUPS[0]), "speakers": -1}]),
        ("groups", [{**asdict(GROUPS[0]), "threshold": "high"}]),
        ("groups", [asdict(GROUPS[0]), asdict(GROUPS[0])]),
        ("robustness", []),
        ("robustness", [{**asdict(NUMBERS[1]), "eer": 12.0}]),
        ("robustness", [{**asdict(NUMBERS[1]), "change": -2.0}]),
        ("robustness", [{**asdict(NUMBERS[1]), "side": "left"}]),
        ("robustness", [{**asdict(NUMBERS[1]), "dim": 0}]),
        ("robustness", [{**asdict(NUMBERS[1]), "change_low": None}]),
        ("robustness", [asdict(NUMBERS[1]), asdict(NUMBERS[1])]),
    ],
)
def test_malformed_groups_and_numbers_are_refused(tmp_path, part, rows):
    VERIFICATION.save(tmp_path)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps({**content, part: {"phone": rows}}))
    with pytest.raises(ValueError, match="evaluation.json is not an evaluation"):
        Evaluation.load(tmp_path)


def test_a_later_versions_file_is_read(tmp_path):
    VERIFICATION.save(tmp_path)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    content["results"]["phone"]["base"][0]["later"] = 1
    (tmp_path / "evaluation.json").write_text(json.dumps({**content, "later": 1}))
    assert Evaluation.load(tmp_path) == VERIFICATION


# ----------------------------------------------------------------------------------------------------------------------
# What cards tell users to type

# Runs the snippets in another process, where this project looks as if it were not installed.
RUNNER = """
import json
import sys

class Hiding:
    def find_spec(self, name, path=None, target=None):
        first = name.split(".")[0]
        if first in {"mrl_redimnet", "train_hf"} or first.endswith("_mrl_redimnet"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Hiding())
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
snippets, out = sys.argv[1:]
answers = {}
for kind, code in json.load(open(snippets)).items():
    torch.manual_seed(0)
    names = {}
    exec(compile(code, kind, "exec"), names)
    waves = dict(zip(("waveforms.0", "waveforms.1"), names["waveforms"], strict=True))
    tensors = {name: value for name, value in names.items() if isinstance(value, torch.Tensor)}
    answers |= {f"{kind}.{name}": tensor.contiguous() for name, tensor in (tensors | waves).items()}
    assert type(names.get("base", names["model"])).__module__.startswith("transformers_modules.")
save_file(answers, out)
"""


def adapted(kind: str):
    """A trained-looking adapter on the tiny base, as PEFT has it."""
    if kind == "verification":
        return get_peft_model(tiny_model(), lora_config("linear", r=4, init_lora_weights=False)).eval()
    outputs = 3 if kind == "classification" else 1
    head = tiny_model(tiny_config(num_labels=outputs), kind=MRLReDimNetForSequenceClassification, seed=1)
    head.redimnet.load_state_dict(tiny_model().state_dict())
    config = lora_config("linear", r=4, init_lora_weights=False, modules_to_save=["classifier"])
    return get_peft_model(head, config).eval()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The adapted models, and what the snippets of their cards computed in the other process."""
    folder = tmp_path_factory.mktemp("cards")
    xvector = tiny_model(kind=MRLReDimNetForXVector)
    xvector.redimnet.load_state_dict(tiny_model().state_dict())
    for name, model in (("encoder", tiny_model()), ("xvector", xvector)):
        model.save_pretrained(folder / name)
        MRLReDimNetFeatureExtractor(min_samples=model.config.min_samples).save_pretrained(folder / name)
        save_card(base_card(model), folder / name)
    snippets = {"base": python(base_card(tiny_model(), repository="the-base")).replace("the-base", f"{folder}/encoder")}
    models = {kind: adapted(kind) for kind in ("verification", "classification", "regression")}
    for kind, model in models.items():
        labels = ["a", "b", "c"] if kind == "classification" else []
        facts = AdapterFacts("some", Base("org/the-base", "v1", fingerprint(model)), kind, labels)
        model.save_pretrained(folder / kind)
        facts.save(folder / kind)
        card = adapter_card(facts, repository="org/the-adapter", **SIZES)
        save_card(card, folder / kind)
        # Trained bases have a classifier of their own, which is not to get in the way.
        base = "encoder" if kind == "verification" else "xvector"
        code = python(card).replace("org/the-base", f"{folder}/{base}")
        snippets[kind] = code.replace("org/the-adapter", f"{folder}/{kind}")
    (folder / "snippets.json").write_text(json.dumps(snippets))
    printed = run_alone(RUNNER, folder / "snippets.json", folder / "answers.safetensors", folder=folder)
    return models, load_file(folder / "answers.safetensors"), printed


def batch(tensors: dict, kind: str):
    waves = [tensors[f"{kind}.waveforms.{i}"].numpy() for i in range(2)]
    return MRLReDimNetFeatureExtractor()(waves, sampling_rate=16_000)


@torch.inference_mode()
def test_base_snippet(answers):
    _, tensors, _ = answers
    expected = tiny_model(kind=MRLReDimNetModel)(**batch(tensors, "base")).embeddings
    torch.testing.assert_close(tensors["base.embeddings"], expected)
    torch.testing.assert_close(tensors["base.score"], torch.cosine_similarity(*expected[:, :8], dim=0))


@torch.inference_mode()
def test_verification_adapter_snippet(answers):
    models, tensors, _ = answers
    inputs = batch(tensors, "verification")
    expected, of_base = models["verification"](**inputs).embeddings, tiny_model()(**inputs).embeddings
    assert not torch.allclose(expected, of_base, atol=1e-3)
    torch.testing.assert_close(tensors["verification.embeddings"], expected)
    torch.testing.assert_close(tensors["verification.of_base"], of_base)
    torch.testing.assert_close(tensors["verification.score"], torch.cosine_similarity(*expected[:, :8], dim=0))


@torch.inference_mode()
def test_attribute_adapter_snippets(answers):
    models, tensors, printed = answers
    probabilities = models["classification"](**batch(tensors, "classification")).logits.softmax(-1)
    torch.testing.assert_close(tensors["classification.probabilities"], probabilities)
    assert all(f"'{label}': " in printed for label in "abc")
    values = models["regression"](**batch(tensors, "regression")).logits[:, 0]
    torch.testing.assert_close(tensors["regression.values"], values)
