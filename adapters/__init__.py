"""LoRA adapters on a ReDimNet-MRL base. Import as `mrl_redimnet.adapters`.

Adapters are ordinary PEFT: `get_peft_model(model, lora_config("linear"))`, `PeftModel.load_adapter`, `set_adapter`.
"""

from mrl_redimnet.adapters.facts import AdapterFacts, Base, WrongBaseError, fingerprint
from mrl_redimnet.adapters.placement import PLACEMENTS, lora_config

__all__ = ["PLACEMENTS", "AdapterFacts", "Base", "WrongBaseError", "fingerprint", "lora_config"]
