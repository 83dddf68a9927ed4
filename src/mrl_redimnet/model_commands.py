"""`mrl-redimnet convert | rotate | synthesise`."""

from pathlib import Path

from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel
from mrl_redimnet.audio.scan import AUDIO_SUFFIXES, drawn, files_below
from mrl_redimnet.convert import convert_checkpoint
from mrl_redimnet.data.corpus import SpeakerTable
from mrl_redimnet.embedding import embed_usable
from mrl_redimnet.files import refuse_existing
from mrl_redimnet.rotation import ROTATION_UTTERANCES, rotate
from mrl_redimnet.saving import load_model, save_model


def convert(arguments):
    """`mrl-redimnet convert`."""
    refuse_existing(arguments.out)
    model = convert_checkpoint(arguments.checkpoint, arguments.embedding_size)
    if arguments.rotate_on is not None:
        _rotate_on(model, arguments.rotate_on)
    _save(model, arguments.out)


def rotate_model(arguments):
    """`mrl-redimnet rotate`."""
    refuse_existing(arguments.out)
    model = load_model(arguments.model)
    _rotate_on(model, arguments.audio)
    names = Path(arguments.model) / "speakers.json"
    _save(model, arguments.out, SpeakerTable.load(names) if names.is_file() else None)


def synthesise(arguments):
    """`mrl-redimnet synthesise`."""
    from mrl_redimnet.data.synthetic import make_corpus  # needs an extra, which converting and rotating do without

    root = make_corpus(arguments.out, arguments.train_speakers, arguments.test_speakers, seed=arguments.seed)
    print(f"{root}: synthetic speech, see its README.txt for what results on it cannot tell.")


def _rotate_on(model: MRLReDimNetPreTrainedModel, folder: Path):
    """Rotates on up to 2000 files drawn from `folder`, and prints the energy each prefix keeps."""
    files = files_below(folder)
    if len(files) < 2:
        raise FileNotFoundError(f"1 audio file ({', '.join(AUDIO_SUFFIXES)}) below {folder}: too few.")
    chosen = drawn(files, ROTATION_UTTERANCES)
    embeddings = embed_usable(model, chosen, "speech to rotate on", progress="embedding")
    if len(embeddings) < model.config.embedding_size:
        print(
            f"Note: {len(embeddings)} utterances for {model.config.embedding_size} dimensions; speech of some hundred "
            "speakers makes better prefixes."
        )
    kept = rotate(model, embeddings)
    shares = ", ".join(f"{dim}: {100 * kept[dim - 1]:.1f} %" for dim in model.config.matryoshka_dims)
    print(f"Rotated on {len(embeddings)} utterances; energy of the embeddings in each prefix: {shares}.")


def _save(model: MRLReDimNetPreTrainedModel, out: Path, speakers: SpeakerTable | None = None):
    save_model(model, out, speakers)
    config = model.config
    print(
        f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.hop_ms:g} ms hop, "
        f"embeddings of {', '.join(map(str, config.matryoshka_dims))} dimensions."
    )
