"""Text files of any common encoding, and paths from data that stay below their folder."""

import pytest

from mrl_redimnet.data.prepare import read_listing
from mrl_redimnet.evaluation.groups import read_groups
from mrl_redimnet.extraction.inputs import Inputs, read_manifest
from mrl_redimnet.files import NotTextError, path_below, text_lines
from mrl_redimnet.scoring.trials import read_trials
from mrl_redimnet.training.tasks import read_labels

TEXT = "path,id\r\nZoë/1.wav,a\r\nb.wav,b\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding):
    file = tmp_path / "list.csv"
    file.write_bytes(TEXT.encode(encoding))
    assert "".join(text_lines(file)) == TEXT
    assert list(read_manifest(file, "/in")) == [("a", "/in/Zoë/1.wav"), ("b", "/in/b.wav")]


def test_another_encoding_is_refused_with_its_line(tmp_path):
    file = tmp_path / "list.csv"
    file.write_bytes("path,id\na.wav,a\r\nZoë.wav,b\n".encode("latin-1"))
    with pytest.raises(NotTextError, match=r"list.csv: not UTF-8 text \(line 3, byte 0xeb; save it as UTF-8\)"):
        list(text_lines(file))
    with pytest.raises(ValueError, match="list.csv: not UTF-8 text .line 3"):
        Inputs.find([file])
    file.write_bytes(TEXT.encode("utf-16-le"))
    with pytest.raises(NotTextError, match="list.csv: not UTF-8 text .it has zero bytes, as UTF-16 does"):
        list(text_lines(file))
    file.write_bytes(TEXT.encode("utf-16")[:-1])
    with pytest.raises(NotTextError, match="list.csv: not UTF-16 text"):
        list(text_lines(file))


READERS = {
    "trials.txt": (read_trials, "1 a/Zoë.wav a/2.wav\n0 a/Zoë.wav b/1.wav\n"),
    "listing.txt": (read_listing, "a/Zoë.wav\nb/1.wav\n"),
    "groups.csv": (lambda file: read_groups(file, "gender"), "speaker,gender\nZoë,f\nb,m\n"),
    "labels.csv": (lambda file: read_labels(file, "gender", "speaker"), "speaker,gender\nZoë,f\nb,m\n"),
    "manifest.lst": (lambda file: list(read_manifest(file)), "a/Zoë.wav\n"),
}


@pytest.mark.parametrize("name", READERS)
def test_every_list_is_read_in_these_encodings_and_refused_in_others(tmp_path, name):
    read, text = READERS[name]
    file = tmp_path / name
    read_as = {}
    for encoding in ("utf-8", "utf-16", "utf-8-sig"):
        file.write_bytes(text.encode(encoding))
        read_as[encoding] = repr(vars(found) if hasattr(found := read(file), "labels") else found)
    assert len(set(read_as.values())) == 1 and "Zoë" in read_as["utf-8"]
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name}.*not UTF-8 text .line [12], byte 0xeb; save it as UTF-8"):
        read(file)


def test_a_quotation_mark_without_its_end_is_told(tmp_path):
    (tmp_path / "list.csv").write_text('path,id\n"a.wav,a\n' + "b.wav,b\n" * 30_000)
    with pytest.raises(ValueError, match="list.csv, line .*a quotation mark without its end"):
        list(read_manifest(tmp_path / "list.csv"))


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "", ".", "a\0b", "C:/x"])
def test_a_path_from_data_stays_below_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="speaker: .* does not name a file below"):
        path_below(tmp_path, name, "speaker")
    assert path_below(tmp_path, "a/..b/c.wav", "speaker") == tmp_path / "a/..b/c.wav"
