from conftest import tiny_model
from huggingface_hub import ModelCard

from mrl_redimnet.evaluation import VerificationRow
from mrl_redimnet.hub_cards import NO_RESULTS, UNKNOWN_TRAINING, base_card


def test_card_says_what_is_not_known():
    card = base_card(tiny_model()).content
    assert NO_RESULTS in card
    assert UNKNOWN_TRAINING in card


def test_card_states_the_results_it_is_given():
    rows = [VerificationRow(dim=8, eer=0.1234, min_dcf=0.5), VerificationRow(dim=32, eer=0.05, min_dcf=0.4)]
    card = base_card(tiny_model(), training="Trained on x.", results={"trials_x": rows}).content
    assert "| trials | 8 | 32 |" in card
    assert "| trials_x | 12.34 | 5.00 |" in card
    assert "Trained on x." in card and NO_RESULTS not in card


def test_card_metadata(tmp_path):
    base_card(tiny_model(), licence="cc-by-4.0").save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "transformers"
    assert data.license == "cc-by-4.0"
    assert "matryoshka" in data.tags
