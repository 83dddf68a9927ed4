"""transformers' own shared tests on this project's models, configuration and feature extractor.

`run.py` fetches them and puts their folder, in which they are the package `tests`, in front of sys.path.
"""

import random
import unittest

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from tests.test_sequence_feature_extraction_common import SequenceFeatureExtractionTestMixin
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from configuration_mrl_redimnet import MRLReDimNetConfig
from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel

# The tests know what a class is for, and so what labels it takes, by its name in these lists.
modeling_auto.MODEL_MAPPING_NAMES["mrl_redimnet"] = "MRLReDimNetModel"
modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES["mrl_redimnet"] = "MRLReDimNetForSequenceClassification"
modeling_auto.MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES["mrl_redimnet"] = "MRLReDimNetForXVector"


class ModelTester:
    """A network and a batch for it, with the attributes that the tests ask for."""

    is_training = True
    batch_size = 3
    seq_length = 4000

    def __init__(self, size: str) -> None:
        self.config = MRLReDimNetConfig.from_size(size, num_speakers=5)
        self.hidden_size = self.config.embedding_size
        self.num_hidden_layers = len(self.config.stages)

    def get_config(self) -> MRLReDimNetConfig:
        return MRLReDimNetConfig.from_dict(self.config.to_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[MRLReDimNetConfig, dict]:
        generator = torch.Generator().manual_seed(0)
        waveforms = 0.1 * torch.randn(self.batch_size, self.seq_length, generator=generator)
        return self.get_config(), {"input_values": waveforms.to(torch_device)}


class ModelTests(ModelTesterMixin):
    """The tests of a network's three classes."""

    size: str
    all_model_classes = (MRLReDimNetModel, MRLReDimNetForXVector, MRLReDimNetForSequenceClassification)
    has_attentions = False  # of the outputs
    test_resize_embeddings = False  # there are no tokens

    def setUp(self):
        self.model_tester = ModelTester(self.size)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is MRLReDimNetForXVector:
            inputs["labels"] = torch.zeros(len(inputs["input_values"]), dtype=torch.long, device=torch_device)
        return inputs


class TestNano(ModelTests, unittest.TestCase):
    size = "nano"


class TestReDimNet2Nano(ModelTests, unittest.TestCase):
    size = "redimnet2-nano"


class ExtractorTester:
    """Utterances of several lengths, and the arguments of an extractor."""

    batch_size = 7
    min_seq_length = 400
    max_seq_length = 2000
    seq_length_diff = (max_seq_length - min_seq_length) // (batch_size - 1)
    feature_size = 1

    def prepare_feat_extract_dict(self) -> dict:
        return {"sampling_rate": 16_000, "min_samples": 257, "padding_value": 0.0}

    def prepare_inputs_for_common(self, equal_length: bool = False, numpify: bool = False) -> list:
        rng = random.Random(0)
        if equal_length:
            lengths = [self.max_seq_length] * self.batch_size
        else:
            lengths = range(self.min_seq_length, self.max_seq_length, self.seq_length_diff)
        utterances = [[rng.uniform(-1, 1) for _ in range(length)] for length in lengths]
        return [torch.tensor(each).numpy() for each in utterances] if numpify else utterances


class TestFeatureExtractor(SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = MRLReDimNetFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = ExtractorTester()


class TestConfig(unittest.TestCase):
    """Each part of ConfigTester as a test, so that each is counted."""

    def setUp(self):
        self.tester = ConfigTester(
            self,
            config_class=MRLReDimNetConfig,
            has_text_modality=False,
            common_properties=["hidden_size"],
            **MRLReDimNetConfig.from_size("nano").to_diff_dict(),
        )


def part_of_config_tester(name: str):
    def test(self: TestConfig):
        getattr(self.tester, name)()

    return test


for name in dir(ConfigTester):
    if name.startswith(("create_and_test_", "check_")):
        setattr(TestConfig, f"test_{name}", part_of_config_tester(name))
