"""`mrl-redimnet convert | rotate | export`."""

from pathlib import Path

from mrl_redimnet_cli.arguments import add_command, add_model, add_thresholds, file, folder, must_be_there, source
from mrl_redimnet_cli.names import CHOICES


def add_convert(commands):
    """Adds `convert` to the subparsers `commands`."""
    parser = add_command(commands, "convert", help="a published ReDimNet checkpoint to a Hub folder")
    parser.add_argument("checkpoint", type=Path, help="the published .pt file")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--embedding-size", type=int, help="more dimensions than the checkpoint's head has")
    parser.add_argument("--rotate-on", type=Path, metavar="AUDIO_DIR", help="make prefixes principal subspaces")
    must_be_there(parser, checkpoint=file, rotate_on=folder)
    parser.set_defaults(run="mrl_redimnet.model_commands:convert")


def add_rotate(commands):
    """Adds `rotate` to the subparsers `commands`."""
    parser = add_command(commands, "rotate", help="make the prefixes of a model's embedding principal subspaces")
    parser.add_argument("model", help="path or Hub id")
    parser.add_argument("audio", type=Path, metavar="AUDIO_DIR", help="speech of many speakers, at any depth")
    parser.add_argument("out", type=Path, help="a new folder")
    must_be_there(parser, model=source, audio=folder)
    parser.set_defaults(run="mrl_redimnet.model_commands:rotate_model")


def add_export(commands):
    """Adds `export` to the subparsers `commands`."""
    parser = add_command(commands, "export", help="a model as an ONNX or torch.export file, an adapter for such a file")
    add_model(parser)
    parser.add_argument("--to", choices=CHOICES["export_commands.TARGETS"], default="onnx", help="[onnx]")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    parser.add_argument(
        "--precision", choices=CHOICES["export.PRECISIONS"], default="float32", help="of an ONNX file [float32]"
    )
    parser.add_argument(
        "--no-mask", dest="mask", action="store_false", help="no attention_mask: faster, for audio without padding"
    )
    parser.add_argument(
        "--adapter-inputs",
        choices=CHOICES["export.ADAPTER_PLACEMENTS"],
        help="let onnxruntime put adapters (--to onnx-adapter) of these layers on the ONNX file, call by call",
    )
    add_thresholds(parser)
    parser.set_defaults(run="mrl_redimnet.export_commands:export")
