"""`mrl-redimnet export`: models and adapters as files for other runtimes."""

from pathlib import Path

from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from mrl_redimnet.export import (
    ADAPTER_PLACEMENTS,
    PRECISIONS,
    deviation,
    export_facts,
    export_onnx,
    export_onnx_adapter,
    export_torch,
)
from mrl_redimnet.saving import load_model
from mrl_redimnet.systems import System, check_output, model_arguments, thresholds_argument


def add_export_command(commands):
    """Adds the subcommand to `commands` of an argument parser."""
    parser = commands.add_parser("export", help="a model as an ONNX or torch.export file, an adapter for such a file")
    model_arguments(parser)
    parser.add_argument("--to", choices=list(TARGETS), default="onnx", help="[onnx]")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="float32", help="of an ONNX file [float32]")
    parser.add_argument(
        "--no-mask", dest="mask", action="store_false", help="no attention_mask: faster, for audio without padding"
    )
    parser.add_argument(
        "--adapter-inputs",
        choices=ADAPTER_PLACEMENTS,
        help="let onnxruntime put adapters (--to onnx-adapter) of these layers on the ONNX file, call by call",
    )
    thresholds_argument(parser)
    parser.set_defaults(run=_export)


def _export(arguments):
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
