"""`mrl-redimnet export`: models and adapters as files for other runtimes."""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import Commands, add_command, add_model, add_thresholds, load_encoder
from mrl_redimnet_cli.names import CHOICES


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(
        commands,
        "export",
        run,
        help="export a model as ONNX or torch.export file or folder for the browser, or an adapter for an ONNX file",
    )
    add_model(parser)
    parser.add_argument(
        "--to", choices=CHOICES["export.TARGETS"], default="onnx", help="the kind of file to write [onnx]"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the file to write; the folder for --to browser",
    )
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
    parser.add_argument(
        "--seconds",
        type=float,
        nargs="+",
        help="ONNX or torch files of fixed lengths, batch 1 and without mask, one for each: FILE gets the length in "
        "its name",
    )
    add_thresholds(parser)


def run(arguments: argparse.Namespace) -> None:
    """Writes the files, and prints their sizes."""
    from mrl_redimnet.export import TARGETS
    from mrl_redimnet.files import check_output

    if arguments.seconds is not None and arguments.to not in ("onnx", "torch"):
        raise ValueError(f"--seconds is for --to onnx and --to torch, not for --to {arguments.to}.")
    if arguments.to == "browser":
        _browser(arguments)
        return
    outputs = _outputs(arguments)
    for out in outputs.values():
        check_output(out, (TARGETS[arguments.to],))
        if out.exists() and not arguments.overwrite:
            raise FileExistsError(f"{out} exists already: give a new file, or --overwrite.")
    if arguments.to in ("onnx", "torch"):
        {"onnx": _onnx, "torch": _torch}[arguments.to](arguments, outputs)
    else:
        {"onnx-weights": _onnx_weights, "onnx-adapter": _onnx_adapter}[arguments.to](arguments)
    for out in outputs.values():
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB.")


def _outputs(arguments: argparse.Namespace) -> dict[float | None, Path]:
    """The files to write, by their length in seconds; None is any length."""
    if arguments.seconds is None:
        return {None: arguments.out}
    return {each: arguments.out.with_stem(f"{arguments.out.stem}_{each:g}s") for each in arguments.seconds}


def _onnx(arguments: argparse.Namespace, outputs: dict[float | None, Path]):
    from mrl_redimnet.export import deviation, export_onnx, fixed_samples

    if arguments.adapter is not None and arguments.adapter_inputs is not None:
        raise ValueError("--adapter merges one adapter, --adapter-inputs leaves them to be chosen later: give one.")
    model, facts, _ = _loaded(arguments)
    for seconds in arguments.seconds or ():
        fixed_samples(model, seconds)  # a wrong one is refused before any file is written
    for seconds, out in outputs.items():
        export_onnx(
            model,
            out,
            precision=arguments.precision,
            mask=arguments.mask,
            adapter_inputs=arguments.adapter_inputs,
            seconds=seconds,
            facts=facts,
        )
        print(_agreement("Embeddings", deviation(model, out)))


def _browser(arguments: argparse.Namespace):
    from mrl_redimnet.export import export_browser

    _refuse_onnx_options(arguments)
    out = arguments.out
    if not out.parent.is_dir() or (out.exists() and not out.is_dir()):
        raise FileNotFoundError(f"{out} is a file, or there is no folder {out.parent}: give a folder to write.")
    if out.exists() and not arguments.overwrite:
        raise FileExistsError(f"{out} exists already: give a new folder, or --overwrite.")
    if out.exists() and any(out.iterdir()) and not (out / "onnx" / "model.onnx").is_file():
        raise FileExistsError(f"{out} holds something else than an export for the browser: give a new folder.")
    model, facts, thresholds = _loaded(arguments)
    for name, differ in export_browser(model, out, mask=arguments.mask, facts=facts, thresholds=thresholds).items():
        print(_agreement(f"{name}: embeddings", differ))
        print(f"{out / name}: {(out / name).stat().st_size / 1e6:.1f} MB.")


def _agreement(what: str, differ: float) -> str:
    return f"{what} of noise are within {differ:.1e} of their length of PyTorch's."


def _torch(arguments: argparse.Namespace, outputs: dict[float | None, Path]):
    from mrl_redimnet.export import export_torch, fixed_samples

    _refuse_onnx_options(arguments)
    model, facts, _ = _loaded(arguments)
    for seconds in arguments.seconds or ():
        fixed_samples(model, seconds)  # a wrong one is refused before any file is written
    for seconds, out in outputs.items():
        export_torch(model, out, mask=arguments.mask, seconds=seconds, facts=facts)


def _onnx_weights(arguments: argparse.Namespace):
    from mrl_redimnet.export import export_onnx_weights

    _refuse_onnx_options(arguments)
    if not arguments.mask:
        raise ValueError("--no-mask: a file with weights has no mask, weights of 0 are one; leave it out.")
    model, facts, _ = _loaded(arguments)
    export_onnx_weights(model, arguments.out, facts=facts)


def _onnx_adapter(arguments: argparse.Namespace):
    from mrl_redimnet.export import export_onnx_adapter
    from mrl_redimnet.saving import load_model

    _refuse_onnx_options(arguments)
    if not arguments.mask:
        raise ValueError("--no-mask is for models, not for --to onnx-adapter.")
    if arguments.adapter is None:
        raise ValueError("--to onnx-adapter needs --adapter, the path or Hub id of the adapter.")
    if arguments.depth is not None:
        raise ValueError("--depth is for models, not for --to onnx-adapter: an adapter is of the whole model.")
    export_onnx_adapter(load_model(arguments.model), arguments.out, adapter=arguments.adapter)


def _refuse_onnx_options(arguments: argparse.Namespace):
    if arguments.precision != "float32" or arguments.adapter_inputs is not None:
        raise ValueError(f"--precision and --adapter-inputs are for --to onnx, not for --to {arguments.to}.")


def _loaded(arguments: argparse.Namespace):
    """The model, its adapter merged; what the file will say of it; and the thresholds."""
    from mrl_redimnet.export import export_facts

    encoder = load_encoder(arguments)
    thresholds = encoder.thresholds(arguments.thresholds)
    facts = export_facts(
        encoder.model,
        base=encoder.name,
        revision=encoder.commit,
        adapter=encoder.adapter,
        weights=encoder.fingerprint,
        thresholds=thresholds,
    )
    return encoder.model, facts, thresholds
