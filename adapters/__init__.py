"""LoRA adapters on a ReDimNet-MRL base, one per domain. Import as `mrl_redimnet.adapters`.

Adapters are ordinary PEFT: `get_peft_model(model, lora_config("linear"))`, `PeftModel.load_adapter`, `set_adapter`.
The recipes beside this file train one each; `AdapterBank` serves several on one base.
"""

import importlib
from typing import TYPE_CHECKING

from mrl_redimnet.fingerprints import fingerprint

if TYPE_CHECKING:
    from mrl_redimnet.adapters.bank import AdapterBank
    from mrl_redimnet.adapters.detector import DomainDetector
    from mrl_redimnet.adapters.facts import AdapterFacts, Base, WrongBaseError
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

# Where each name is. It is imported when it is first asked for: PEFT takes a second to import, and what knows a base by
# its fingerprint, as `verify` does, needs none of it.
_MODULES = {
    "bank": ("AdapterBank",),
    "detector": ("DomainDetector",),
    "facts": ("AdapterFacts", "Base", "WrongBaseError"),
    "placement": ("PLACEMENTS", "adapter_report", "lora_config"),
}


def __getattr__(name: str):
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
