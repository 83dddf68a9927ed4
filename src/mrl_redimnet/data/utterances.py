"""The forms in which speech is given to `SpeakerEncoder`: lists of files, of arrays, data sets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mrl_redimnet.audio.io import Encoded, name_of
from mrl_redimnet.audio.waveforms import is_source


@dataclass(frozen=True)
class Input:
    """An utterance that can be loaded.

    Attributes:
        name: what messages call it.
        key: the same for the same file; None for what is no file.
        load: gives what `read_waveform` takes.
    """

    name: str
    key: str | None
    load: Callable[[], object]


def as_inputs(inputs: Sequence, what: str = "row") -> list[Input]:
    """Inputs as `SpeakerEncoder` describes them. what: an utterance that has no file is called so, with its number."""
    if is_source(inputs) or isinstance(inputs, Mapping) or getattr(inputs, "ndim", 2) < 2:
        raise ValueError(f"inputs: got one {type(inputs).__name__}, expected a list of utterances, such as [{what}].")
    if type(inputs).__module__.split(".")[0] == "datasets":
        return _rows_of(inputs, what)
    return [_as_input(value, f"{what} {row}") for row, value in enumerate(inputs)]


def _as_input(value: Any, name: str) -> Input:
    if isinstance(value, Mapping):  # a row of a data set's audio column
        from mrl_redimnet.data.corpus import source_of  # datasets take a second to import

        value = source_of(dict(value)) if value.get("array") is None else (value["array"], value.get("sampling_rate"))
    elif isinstance(value, bytes):
        value = Encoded(name, value)
    elif hasattr(value, "get_all_samples"):  # a row that torchcodec decodes
        return Input(name, None, partial(_decoded, value))
    elif hasattr(value, "read"):  # an open file
        return Input(name, None, lambda: Encoded(str(getattr(value, "name", name)), value.read()))
    if is_source(value):
        return Input(name_of(value), None if isinstance(value, Encoded) else str(value), lambda: value)
    return Input(name, None, lambda: value)


def _decoded(decoder: Any) -> tuple[Any, int]:
    """The mono waveform and the sampling rate of an AudioDecoder of torchcodec."""
    samples = decoder.get_all_samples()
    return samples.data.mean(0), samples.sample_rate


def distinct(items: list[Input]) -> list[Input]:
    """Without files that came before."""
    return list({item.key or row: item for row, item in enumerate(items)}.values())


def _rows_of(data: Any, what: str) -> list[Input]:
    """The rows of a data set of `datasets`, or of a column of one, as encoded audio, which is decoded here alone."""
    import datasets  # who gives a data set has imported it already

    from mrl_redimnet.data.corpus import source_of

    column = None
    if isinstance(getattr(data, "source", None), datasets.Dataset):  # data["audio"]
        data, column = data.source, data.column_name
    if not isinstance(data, datasets.Dataset):
        raise ValueError(
            f"inputs: a {type(data).__name__} cannot be embedded at once. Give a Dataset with an audio column or this "
            "column; corpora of any size are for `mrl-redimnet embed`"
        )
    audio = [name for name, kind in data.features.items() if isinstance(kind, datasets.Audio)]
    if column is None and len(audio) != 1:
        raise ValueError(
            f"inputs: the data set has {len(audio)} audio columns ({', '.join(audio) or 'none'}), expected one: give "
            "the column, as in data['audio']"
        )
    column = column or audio[0]
    if column not in audio:
        raise ValueError(f"inputs: the column {column} holds no audio, but {data.features[column]}")
    data = data.select_columns([column]).cast_column(column, datasets.Audio(decode=False)).with_format(None)

    def load(row: int) -> object:
        source = source_of(data[row][column])
        if isinstance(source, Encoded):
            return Encoded(f"{what} {row}, {source.name}", source.data, source.problem)
        return source

    return [Input(f"{what} {row}", None, partial(load, row)) for row in range(len(data))]
