"""`mrl-redimnet convert`: a published ReDimNet or ReDimNet2 checkpoint as a Hub folder."""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import Commands, add_command, checkpoint, folder, must_be_there


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(commands, "convert", run, help="convert a published ReDimNet checkpoint into a Hub folder")
    parser.add_argument(
        "checkpoint",
        help="the published .pt file, or its name, such as b2-vox2-ft_lm or IDRnD/b2-vox2-ft_lm, to have it fetched "
        "from its authors' release",
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument(
        "--embedding-size", type=int, help="size of the embedding, where it is to be larger than the checkpoint's"
    )
    parser.add_argument(
        "--rotate-on",
        type=Path,
        metavar="AUDIO_DIR",
        help="speech of many speakers, on which the embedding is rotated as `mrl-redimnet rotate` does",
    )
    must_be_there(parser, checkpoint=checkpoint, rotate_on=folder)


def run(arguments: argparse.Namespace) -> None:
    """Fetches a checkpoint that is given by name, converts, rotates if asked to, and saves."""
    from mrl_redimnet import convert_checkpoint
    from mrl_redimnet.files import refuse_existing
    from mrl_redimnet.published import find_checkpoint
    from mrl_redimnet.saving import card_facts, convert_published, save_model
    from mrl_redimnet_cli.rotate import print_saved, rotate_and_print

    refuse_existing(arguments.out)
    published = None if Path(arguments.checkpoint).is_file() else find_checkpoint(arguments.checkpoint)
    if published is None:
        model, facts = convert_checkpoint(arguments.checkpoint, arguments.embedding_size), {}
    else:
        model, facts = convert_published(published, arguments.embedding_size), card_facts(published)
        print(f"{published.id}, trained on {', '.join(published.corpora)}. {published.terms}")
    if arguments.rotate_on is not None:
        rotate_and_print(model, arguments.rotate_on)
    save_model(model, arguments.out, **facts)
    print_saved(model, arguments.out)
