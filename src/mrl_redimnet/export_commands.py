"""`mrl-redimnet export`: models and adapters as files for other runtimes."""

from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from mrl_redimnet.export import (
    deviation,
    export_facts,
    export_onnx,
    export_onnx_adapter,
    export_torch,
)
from mrl_redimnet.saving import load_model
from mrl_redimnet.systems import System, check_output


def export(arguments):
    """`mrl-redimnet export`."""
    suffix, write = TARGETS[arguments.to]
    check_output(arguments.out, (suffix,))
    if arguments.out.exists() and not arguments.overwrite:
        raise FileExistsError(f"{arguments.out} exists already: give a new file, or --overwrite.")
    write(arguments)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB.")


def _onnx(arguments):
    if arguments.adapter is not None and arguments.adapter_inputs is not None:
        raise ValueError("--adapter merges one adapter, --adapter-inputs leaves them to be chosen later: give one.")
    system = System.load(arguments)
    export_onnx(
        system.model,
        arguments.out,
        precision=arguments.precision,
        mask=arguments.mask,
        adapter_inputs=arguments.adapter_inputs,
        facts=_facts(system, arguments),
    )
    differ = deviation(system.model, arguments.out)
    print(f"Embeddings of noise are within {differ:.1e} of their length of PyTorch's.")


def _torch(arguments):
    _refuse_onnx_options(arguments)
    system = System.load(arguments)
    export_torch(system.model, arguments.out, mask=arguments.mask, facts=_facts(system, arguments))


def _onnx_adapter(arguments):
    _refuse_onnx_options(arguments)
    if not arguments.mask:
        raise ValueError("--no-mask is for models, not for --to onnx-adapter.")
    if arguments.adapter is None:
        raise ValueError("--to onnx-adapter needs --adapter, the path or Hub id of the adapter.")
    export_onnx_adapter(load_model(arguments.model), arguments.out, adapter=arguments.adapter)


# What --to can be: the file's suffix and what writes it.
TARGETS = {"onnx": (".onnx", _onnx), "torch": (".pt2", _torch), "onnx-adapter": (".onnx_adapter", _onnx_adapter)}


def _refuse_onnx_options(arguments):
    if arguments.precision != "float32" or arguments.adapter_inputs is not None:
        raise ValueError(f"--precision and --adapter-inputs are for --to onnx, not for --to {arguments.to}.")


def _facts(system: System, arguments) -> dict[str, str]:
    return export_facts(
        system.model,
        base=system.name,
        revision=extract_commit_hash(cached_file(arguments.model, CONFIG_NAME), None),
        adapter=system.adapter,
        weights=system.weights,
        thresholds=system.thresholds(arguments.thresholds, arguments.model),
    )
