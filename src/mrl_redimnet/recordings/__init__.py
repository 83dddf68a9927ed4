"""Three short recordings of real people, for the first steps without speech of one's own.

`FIRST` and `SAME_SPEAKER` are one woman, `OTHER_SPEAKER` is another. Each is a few seconds of LibriSpeech's part
test-other (Panayotov et al. 2015, CC BY 4.0, https://www.openslr.org/12): speaker 3080, chapter 5032, twice, and
speaker 3331, chapter 159605; as they are, in FLAC at 16 kHz. No model of this package was trained on these speakers;
they are among those that its error rates on LibriSpeech are measured with.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent

FIRST = _FOLDER / "speaker_3080_a.flac"
SAME_SPEAKER = _FOLDER / "speaker_3080_b.flac"
OTHER_SPEAKER = _FOLDER / "speaker_3331.flac"
