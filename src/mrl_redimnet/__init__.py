"""MRL-ReDimNet: ReDimNet speaker embeddings as Hugging Face models, usable at several sizes.

Importing this package registers the models with transformers' Auto classes, so that `AutoModel.from_pretrained` finds
the installed code and needs no `trust_remote_code`.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioXVector,
)

from configuration_mrl_redimnet import MRLReDimNetConfig, MRLReDimNetError
from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import (
    MRLReDimNetForSequenceClassification,
    MRLReDimNetForXVector,
    MRLReDimNetModel,
)
from mrl_redimnet import recordings
from mrl_redimnet.convert import ConversionError, convert_checkpoint
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.rotation import rotate
from mrl_redimnet.speed import speed_up

AutoConfig.register(MRLReDimNetConfig.model_type, MRLReDimNetConfig, exist_ok=True)
AutoFeatureExtractor.register(MRLReDimNetConfig, MRLReDimNetFeatureExtractor, exist_ok=True)
AutoModel.register(MRLReDimNetConfig, MRLReDimNetModel, exist_ok=True)
AutoModelForAudioXVector.register(MRLReDimNetConfig, MRLReDimNetForXVector, exist_ok=True)
AutoModelForAudioClassification.register(MRLReDimNetConfig, MRLReDimNetForSequenceClassification, exist_ok=True)

__all__ = [
    "ConversionError",
    "MRLReDimNetConfig",
    "MRLReDimNetError",
    "MRLReDimNetFeatureExtractor",
    "MRLReDimNetForSequenceClassification",
    "MRLReDimNetForXVector",
    "MRLReDimNetModel",
    "SpeakerEncoder",
    "convert_checkpoint",
    "recordings",
    "rotate",
    "speed_up",
]
