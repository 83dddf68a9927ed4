"""Tables as text."""

from mrl_redimnet.tables import markdown_table, text_table

LINES = [["trials", "8", ""], ["a", "12.50", "EER %"], ["with | bar", "0.1", "minDCF"]]


def test_columns_are_aligned():
    assert text_table(LINES, left=(0, 2)).splitlines() == [
        "trials          8",
        "a           12.50  EER %",
        "with | bar    0.1  minDCF",
    ]


def test_markdown_is_aligned_or_short():
    assert markdown_table(LINES, left=(0,)).splitlines() == [
        r"| trials      |     8 |        |",
        r"|-------------|------:|-------:|",
        r"| a           | 12.50 |  EER % |",
        r"| with \| bar |   0.1 | minDCF |",
    ]
    assert markdown_table(LINES, aligned=False).splitlines() == [
        "| trials | 8 |  |",
        "|---|---:|---:|",
        "| a | 12.50 | EER % |",
        r"| with \| bar | 0.1 | minDCF |",
    ]
