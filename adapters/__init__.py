"""LoRA adapters on a ReDimNet-MRL base, one per domain. Import as `mrl_redimnet.adapters`.

Adapters are ordinary PEFT: `get_peft_model(model, lora_config("linear"))`, `PeftModel.load_adapter`, `set_adapter`.
The recipes beside this file train one each; `AdapterBank` serves several on one base.
"""

from mrl_redimnet.adapters.bank import AdapterBank
from mrl_redimnet.adapters.detector import DomainDetector
from mrl_redimnet.adapters.facts import AdapterFacts, Base, WrongBaseError, fingerprint
from mrl_redimnet.adapters.placement import PLACEMENTS, adapter_report, lora_config

__all__ = [
    "PLACEMENTS",
    "AdapterBank",
    "AdapterFacts",
    "Base",
    "DomainDetector",
    "WrongBaseError",
    "adapter_report",
    "fingerprint",
    "lora_config",
]
