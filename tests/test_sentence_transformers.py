"""sentence-transformers around a saved model: its evaluators, quantisation, adapters and training, with our numbers."""

import re
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import soundfile
import torch
from peft import PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    MSEEvaluator,
    ParaphraseMiningEvaluator,
    RerankingEvaluator,
    TripletEvaluator,
)
from sklearn.metrics import average_precision_score

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.adapters import lora_config
from mrl_redimnet.recordings import FIRST, OTHER_SPEAKER, SAME_SPEAKER
from mrl_redimnet.saving import load_model, save_model
from mrl_redimnet.scoring import metrics

ROOT = Path(__file__).resolve().parents[1]
CLOSE = dict(rtol=0, atol=1e-4)  # of cosines; the faster forms of modules round otherwise


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "nano"
    save_model(load_model("nano"), folder)
    return folder


@pytest.fixture(scope="module")
def model(saved) -> SentenceTransformer:
    return SentenceTransformer(str(saved), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def files(speech) -> list[str]:
    """Utterances of eight voices, three of each, in the order of the voices."""
    found = [sorted(folder.rglob("*.wav"))[:3] for folder in sorted((speech / "wav").iterdir())]
    return [str(file) for group in found for file in group]


@pytest.fixture(scope="module")
def embeddings(files) -> np.ndarray:
    return SpeakerEncoder.from_pretrained("nano", device="cpu").embed(files)


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """evaluate copies a module's file to where it imports it from: not into the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        yield


def cosines(embeddings: np.ndarray, dim: int | None = None) -> np.ndarray:
    units = embeddings[:, :dim] / np.linalg.norm(embeddings[:, :dim], axis=1, keepdims=True)
    return units @ units.T


def trials(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of both sides of all pairs of `count` utterances, and whether they are of one voice."""
    one, other = np.triu_indices(count, 1)
    return one, other, (one // 3 == other // 3).astype(int)


# ---------------------------------------------------------------- evaluators


@pytest.mark.parametrize("dim", [None, 64])
def test_pairs(model, files, embeddings, dim):
    one, other, labels = trials(len(files))
    sides = ([files[row] for row in rows] for rows in (one, other))
    found = BinaryClassificationEvaluator(*sides, labels.tolist(), truncate_dim=dim)(model)
    scores = cosines(embeddings, dim)[one, other]
    assert found["cosine_ap"] == pytest.approx(average_precision_score(labels, scores), abs=2e-3)
    best = max(np.mean((scores >= threshold) == labels) for threshold in scores)
    assert found["cosine_accuracy"] == pytest.approx(best, abs=1.5 / len(labels)) and 0.9 < best < 1


def test_graded_pairs(model, files, embeddings):
    one, other, labels = trials(9)
    sides = ([files[row] for row in rows] for rows in (one, other))
    found = EmbeddingSimilarityEvaluator(*sides, scores=labels.tolist())(model)
    scores = cosines(embeddings)[one, other]
    assert found["pearson_cosine"] == pytest.approx(np.corrcoef(scores, labels)[0, 1], abs=1e-3)


def test_triplets(model, files, embeddings):
    """Each first utterance, nearer to the second of its voice than to the third of the next voice."""
    anchors = np.arange(0, len(files), 3)
    rows = (anchors, anchors + 1, (anchors + 5) % len(files))
    found = TripletEvaluator(*([files[row] for row in side] for side in rows))(model)
    near, far = (cosines(embeddings)[anchors, other] for other in rows[1:])
    assert found["cosine_accuracy"] == np.mean(near > far)


@pytest.fixture(scope="module")
def ranked(files, embeddings):
    """For each voice's first utterance, whether the others, the nearest first, are of its voice."""
    queries = np.arange(0, len(files), 3)
    rest = np.setdiff1d(np.arange(len(files)), queries)
    order = rest[np.argsort(-cosines(embeddings)[np.ix_(queries, rest)], axis=1)]
    return queries, rest, order // 3 == queries[:, None] // 3


def test_search(model, files, ranked):
    queries, rest, hits = ranked
    relevant = {str(query): {str(query + 1), str(query + 2)} for query in queries}
    texts = ({str(row): files[row] for row in rows} for rows in (queries, rest))
    found = InformationRetrievalEvaluator(*texts, relevant, corpus_chunk_size=len(rest))(model)
    assert found["cosine_accuracy@1"] == pytest.approx(hits[:, 0].mean())
    first = hits.argmax(axis=1)
    assert found["cosine_mrr@10"] == pytest.approx(np.where(first < 10, 1 / (first + 1), 0).mean())


def test_reranking(model, files, ranked):
    queries, rest, hits = ranked
    samples = [
        {
            "query": files[query],
            "positive": [files[query + 1], files[query + 2]],
            "negative": [files[row] for row in rest if row // 3 != query // 3],
        }
        for query in queries
    ]
    found = RerankingEvaluator(samples)(model)
    falling = np.arange(hits.shape[1], 0, -1)
    assert found["map"] == pytest.approx(np.mean([average_precision_score(each, falling) for each in hits]))


def test_mining(model, files, embeddings):
    one, other, labels = trials(12)
    names = {str(row): files[row] for row in range(12)}
    same = [(str(a), str(b)) for a, b, label in zip(one, other, labels, strict=True) if label]
    found = ParaphraseMiningEvaluator(names, duplicates_list=same, add_transitive_closure=True)(model)
    scores = cosines(embeddings)[one, other]
    assert found["average_precision"] == pytest.approx(average_precision_score(labels, scores), abs=1e-3)


def test_mean_squared_error(saved, model, files):
    other = SentenceTransformer(str(saved), trust_remote_code=True, device="cpu")
    found = MSEEvaluator(files[:3], files[3:6], teacher_model=other)(model)
    expected = ((other.encode(files[:3]) - model.encode(files[3:6])) ** 2).mean()
    assert found["negative_mse"] == pytest.approx(-100 * expected, rel=1e-4)


class ErrorRates(BaseEvaluator):
    """The error rates of trials by modules of `evaluate`, as an evaluator."""

    def __init__(self, enrol: list[str], test: list[str], labels: list[int], modules: evaluate.CombinedEvaluations):
        super().__init__()
        self.sides, self.labels, self.modules = (enrol, test), labels, modules
        self.primary_metric, self.greater_is_better = "eer", False

    def __call__(self, model, output_path=None, epoch=-1, steps=-1) -> dict[str, float]:
        scores = model.similarity_pairwise(*(model.encode(side) for side in self.sides))
        found = self.modules.compute(predictions=scores, references=self.labels)
        self.store_metrics_in_model_card_data(model, found, epoch, steps)
        return found


@pytest.fixture(scope="module")
def error_rates(files, tmp_path_factory) -> ErrorRates:
    one, other, labels = trials(len(files))
    load = [evaluate.load(str(ROOT / "metrics" / name), cache_dir=str(tmp_path_factory.mktemp("c")))
            for name in ("eer", "auc")]  # fmt: skip
    sides = ([files[row] for row in rows] for rows in (one, other))
    return ErrorRates(*sides, labels.tolist(), evaluate.combine(load))


def test_modules_of_evaluate_in_an_evaluator(model, files, embeddings, error_rates):
    one, other, labels = trials(len(files))
    scores = cosines(embeddings)[one, other]
    found = error_rates(model)
    assert found["eer"] == pytest.approx(metrics.eer(scores, labels), abs=5e-3)
    assert found["auc"] == pytest.approx(metrics.auc(scores, labels), abs=1e-3)


# ---------------------------------------------------------------- the lines of the page


def test_the_pages_lines(saved, tmp_path, monkeypatch):
    section = (ROOT / "docs" / "hub.md").read_text().split("## sentence-transformers\n")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    for name, file in (("a.wav", FIRST), ("b.wav", SAME_SPEAKER), ("c.wav", OTHER_SPEAKER)):
        soundfile.write(name, *soundfile.read(file))
    names = {"REPO": str(saved)}
    for block in re.findall(r"^```py\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE):
        exec(block.replace('"metrics/eer"', repr(str(ROOT / "metrics" / "eer"))), names)
    assert names["bits"].shape == (2, 8) and names["cosines"].shape == (2, 2)
    assert names["rates"]["eer"] == 0.0 and names["found"]["cosine_accuracy"] == 1.0


# ---------------------------------------------------------------- adapters, training


def test_an_adapter_is_loaded(saved, files, tmp_path):
    """By the mixin that sentence-transformers hands on to transformers' method."""
    torch.manual_seed(0)
    adapted = get_peft_model(load_model("nano").base_model, lora_config("linear", 2, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    model = SentenceTransformer(str(saved), trust_remote_code=True, device="cpu")
    plain = model.encode(files[:2])
    model.load_adapter(str(tmp_path / "adapter"))
    expected = PeftModel.from_pretrained(load_model("nano").base_model, tmp_path / "adapter").eval()
    waves = [torch.from_numpy(soundfile.read(file, dtype="float32")[0])[None] for file in files[:2]]
    with torch.inference_mode():
        expected = torch.cat([expected(input_values=wave).embeddings for wave in waves]).numpy()
    np.testing.assert_allclose(model.encode(files[:2]), expected, rtol=0, atol=1e-4)
    assert np.abs(plain - expected).max() > 0.01


def test_what_was_saved_again_is_loaded_again(model, files, tmp_path):
    model.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(again.encode(files[:3]), model.encode(files[:3]))


@pytest.mark.slow
def test_their_trainer_trains_with_their_matryoshka_loss(saved, files, error_rates, tmp_path):
    """Pairs of files of one voice, among those of the others; every prefix learns."""
    model = SentenceTransformer(str(saved), trust_remote_code=True, device="cpu")
    data = datasets.Dataset.from_dict({"anchor": files[::3], "positive": files[1::3]})
    loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [256, 64, 16])
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True, report_to="none",
        eval_strategy="steps", eval_steps=4, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, arguments, data, loss=loss, evaluator=error_rates)
    trainer.train()
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 4 and steps[-1] < steps[0]
    assert any("eval_eer" in entry for entry in trainer.state.log_history)
