"""`mrl-redimnet export`: models and adapters as files for other runtimes."""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import Commands, add_command, add_model, add_thresholds
from mrl_redimnet_cli.names import CHOICES


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(
        commands, "export", run, help="export a model as an ONNX or torch.export file, or an adapter for an ONNX file"
    )
    add_model(parser)
    parser.add_argument(
        "--to", choices=CHOICES["export.TARGETS"], default="onnx", help="the kind of file to write [onnx]"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    parser.add_argument(
        "--precision",
        choices=CHOICES["export.PRECISIONS"],
        default="float32",
        help="number format of an ONNX file's weights [float32]",
    )
    parser.add_argument(
        "--no-mask",
        dest="mask",
        action="store_false",
        help="leave out the input attention_mask: faster, for audio without padding",
    )
    parser.add_argument(
        "--adapter-inputs",
        choices=CHOICES["export.ADAPTER_PLACEMENTS"],
        help="let onnxruntime put adapters (--to onnx-adapter) on these layers of the ONNX file, call by call",
    )
    add_thresholds(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes the file, and prints its size."""
    from mrl_redimnet.export import TARGETS
    from mrl_redimnet.files import check_output

    check_output(arguments.out, (TARGETS[arguments.to],))
    if arguments.out.exists() and not arguments.overwrite:
        raise FileExistsError(f"{arguments.out} exists already: give a new file, or --overwrite.")
    {"onnx": _onnx, "torch": _torch, "onnx-adapter": _onnx_adapter}[arguments.to](arguments)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB.")


def _onnx(arguments: argparse.Namespace):
    from mrl_redimnet.export import deviation, export_onnx

    if arguments.adapter is not None and arguments.adapter_inputs is not None:
        raise ValueError("--adapter merges one adapter, --adapter-inputs leaves them to be chosen later: give one.")
    model, facts = _loaded(arguments)
    export_onnx(
        model,
        arguments.out,
        precision=arguments.precision,
        mask=arguments.mask,
        adapter_inputs=arguments.adapter_inputs,
        facts=facts,
    )
    differ = deviation(model, arguments.out)
    print(f"Embeddings of noise are within {differ:.1e} of their length of PyTorch's.")


def _torch(arguments: argparse.Namespace):
    from mrl_redimnet.export import export_torch

    _refuse_onnx_options(arguments)
    model, facts = _loaded(arguments)
    export_torch(model, arguments.out, mask=arguments.mask, facts=facts)


def _onnx_adapter(arguments: argparse.Namespace):
    from mrl_redimnet.export import export_onnx_adapter
    from mrl_redimnet.saving import load_model

    _refuse_onnx_options(arguments)
    if not arguments.mask:
        raise ValueError("--no-mask is for models, not for --to onnx-adapter.")
    if arguments.adapter is None:
        raise ValueError("--to onnx-adapter needs --adapter, the path or Hub id of the adapter.")
    export_onnx_adapter(load_model(arguments.model), arguments.out, adapter=arguments.adapter)


def _refuse_onnx_options(arguments: argparse.Namespace):
    if arguments.precision != "float32" or arguments.adapter_inputs is not None:
        raise ValueError(f"--precision and --adapter-inputs are for --to onnx, not for --to {arguments.to}.")


def _loaded(arguments: argparse.Namespace):
    """The model, its adapter merged, and what the file will say of it."""
    from mrl_redimnet import SpeakerEncoder
    from mrl_redimnet.export import export_facts

    encoder = SpeakerEncoder.from_pretrained(arguments.model, arguments.adapter)
    facts = export_facts(
        encoder.model,
        base=encoder.name,
        revision=encoder.commit,
        adapter=encoder.adapter,
        weights=encoder.fingerprint,
        thresholds=encoder.thresholds(arguments.thresholds),
    )
    return encoder.model, facts
