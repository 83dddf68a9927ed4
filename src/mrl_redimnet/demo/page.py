"""The layout of the page to try a model on, and how it is opened: Gradio on top of `Listener`.

    run_until_stopped(Listener.load("nano"))

Nothing goes to other machines: no analytics, no fonts or scripts of other servers, and it listens on this machine
alone unless told otherwise. Recordings lie in a private temporary folder while they are used.
"""

import os
import signal
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mrl_redimnet.audio.io import AudioError
from mrl_redimnet.demo import markup
from mrl_redimnet.demo.listener import LONGEST, MOST_FILES, OFF, Listener, Take
from mrl_redimnet.extras import extra

with extra("demo"):
    import gradio as gr

Takes = dict[str, Take]  # by the path that the page's server gave the recording

AUDIO_MINUTES = 10  # after which a recording is deleted from the temporary folder, though the page is open
MEMORY_MINUTES = 60  # after which what was heard is forgotten, though the page is open
MEGABYTES = 32  # of a file
MOST_SPEAKERS, MOST_TAKES = 20, 10

CONSENT = """
**What is kept: nothing.** A voice identifies a person. Compare only voices whose speakers have agreed to it.
"""
DETAILS = f"""
- A recording goes from this browser to the program that made this page, and nowhere else.
- There it lies in a temporary folder that only this program's user can read. It is deleted after {AUDIO_MINUTES}
  minutes, and when the program ends.
- Embeddings of the recordings, and the names you enrol, are held in memory for this page alone. They are gone when
  you clear a recording or press *Forget everybody*, and at the latest {MEMORY_MINUTES} minutes after the last use.
- Nothing is logged, measured or used for training.
- An embedding is biometric data, as a fingerprint is. In many countries it may be made only with the speaker's consent.
- A score is evidence, not proof: thresholds were set on other recordings, and copied or synthetic voices are accepted.
"""

CSS = """
.gradio-container { max-width: 60rem !important; margin: 0 auto; }
.mrl-card { border: 1px solid var(--border-color-primary); border-left: 6px solid #64748b; border-radius: 6px;
  padding: .6rem .9rem; margin: .3rem 0; overflow-wrap: anywhere; }
.mrl-card ul { margin: .2rem 0 0 1.2rem; list-style: disc; }
.mrl-good { border-left-color: #15803d; } .mrl-bad { border-left-color: #b91c1c; }
.mrl-warn { border-left-color: #b45309; }
.mrl-verdict { font-size: 1.25rem; margin: 0 0 .3rem; }
.mrl-card dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .8rem; margin: .3rem 0; }
.mrl-card dt { opacity: .8; } .mrl-card dd { margin: 0; font-weight: 600; }
.mrl-scroll { overflow-x: auto; contain: inline-size; }
.mrl-scroll table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.mrl-scroll th, .mrl-scroll td { border: 1px solid var(--border-color-primary); padding: .2rem .5rem;
  text-align: right; }
.mrl-scroll th:first-child { text-align: left !important; }
 .mrl-chosen > * { font-weight: 700; background: rgba(29,78,216,.18); }
.mrl-pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); gap: .6rem; }
.mrl-pictures img { width: 100%; height: auto; margin: 0; background: white; border-radius: 6px; }
.mrl-map { width: 100%; max-width: 420px; border: 1px solid var(--border-color-primary); border-radius: 6px; }
.mrl-map circle { fill: #1d4ed8; } .mrl-map line { stroke: #15803d; stroke-width: 2; }
.mrl-map text { fill: white; font-size: 12px; text-anchor: middle; }
.mrl-size label { display: block; font-weight: 600; }
.mrl-size input { width: 100%; min-height: 2rem; accent-color: #1d4ed8; }
.mrl-size .mrl-marks { display: flex; justify-content: space-between; }
@media (max-width: 600px) { .mrl-row { flex-direction: column; } .mrl-card dl { display: block; } }
:focus-visible { outline: 3px solid #1d4ed8 !important; outline-offset: 2px; }
"""

# A range input over sizes that are not evenly spaced: it says the size, not its place, to who sees and who hears it.
SIZE_TEMPLATE = """<div class="mrl-size"><label for="mrl-size">Numbers of the embedding that are compared:
<span aria-hidden="true"></span></label>
<input id="mrl-size" type="range" min="0" step="1"><div class="mrl-marks" aria-hidden="true"></div></div>"""
SIZE_SCRIPT = """
const input = element.querySelector('input'), now = element.querySelector('span');
const dims = props.dims, last = dims[dims.length - 1];
element.querySelector('.mrl-marks').innerHTML = dims.map((dim) => `<span>${dim}</span>`).join('');
input.max = dims.length - 1;
const show = () => {
  now.textContent = `${dims[input.value]} of ${last}`;
  input.setAttribute('aria-valuetext', `${dims[input.value]} of ${last} numbers`);
};
input.value = dims.indexOf(Number(props.value));
show();
input.addEventListener('input', show);
input.addEventListener('change', () => { props.value = String(dims[input.value]); trigger('change'); });
"""
# Results come without the focus moving to them: screen readers say them where the box is live.
LIVE_SCRIPT = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
# The buttons of a recorder say "Record", not of what: they stand in a group with a name.
GROUP_SCRIPT = "element.setAttribute('role', 'group'); element.setAttribute('aria-label', props.name);"


# ---------------------------------------------------------------- what the page's events do


class Session:
    """The functions behind the page. They take and give plain values and strings of HTML, and never raise for what a
    user gave: the sentence on what is wrong is in the HTML.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def verify(
        self, first: str | None, second: str | None, dim: str, adapter: str, heard: Takes | None = None
    ) -> tuple[str, str, str, Takes]:
        """Paths of two recordings -> (verdict with warnings, what is lost, pictures), and what was heard.

        heard: what this function gave before, so that moving the slider computes no embedding.
        """
        given = [path for path in (first, second) if path]
        try:
            known = self._heard(given, heard or {})
            takes = [known[path] for path in given]
            if len(takes) < 2:
                missing = "two recordings" if not takes else "the second recording" if first else "the first recording"
                return (
                    markup.hint(f"Record or choose {missing}.") + markup.warnings_of(takes),
                    "",
                    markup.pictures(takes),
                    known,
                )
            choice = self.listener.choose(adapter, takes[1:])
            found = self.listener.verify(takes[:1], takes[1], choice.adapter)
            size = self._dim(dim)
        except (AudioError, ValueError) as error:
            return markup.problem(str(error)), "", "", heard or {}
        chosen = next(each for each in found if each.dim == size)
        told = markup.verdict(
            chosen, "one speaker in both recordings.", "two different speakers.", "the score stands alone."
        )
        return (
            told + markup.warnings_of(takes) + markup.facts(takes, choice),
            markup.sizes(found, size),
            markup.pictures(takes),
            known,
        )

    def enrol(
        self, name: str, file: str | None, speakers: dict[str, list[Take]] | None = None
    ) -> tuple[str, str, dict[str, list[Take]]]:
        """Adds a recording to a speaker -> (who is enrolled, what happened, the speakers)."""
        speakers, name = dict(speakers or {}), name.strip()
        try:
            if not name or not file:
                raise ValueError("A name and a recording are needed to enrol somebody")
            if name not in speakers and len(speakers) >= MOST_SPEAKERS:
                raise ValueError(f"{MOST_SPEAKERS} speakers are enrolled, which is the most that this page takes")
            if len(speakers.get(name, [])) >= MOST_TAKES:
                raise ValueError(f"{name} has {MOST_TAKES} recordings, which is the most that this page takes")
            take = self.listener.hear(file)
        except (AudioError, ValueError) as error:
            return markup.enrolled(speakers), markup.problem(str(error)), speakers
        speakers[name] = [*speakers.get(name, []), take]
        count = len(speakers[name])
        done = markup.hint(f"{name} is enrolled with {count} recording{'' if count == 1 else 's, which are averaged'}.")
        return markup.enrolled(speakers), done + markup.warnings_of([take]), speakers

    def forget(self) -> tuple[str, str, dict[str, list[Take]]]:
        """Nobody is enrolled any more."""
        return markup.enrolled({}), markup.hint("Everybody is forgotten."), {}

    def identify(
        self, test: str | None, dim: str, adapter: str, speakers: dict[str, list[Take]] | None = None
    ) -> tuple[str, str]:
        """The path of a recording -> (who it is, the enrolled speakers by how alike they are)."""
        if not test or not speakers:
            return markup.hint("Enrol somebody, then record or choose whom to identify."), ""
        try:
            take = self.listener.hear(test)
            choice = self.listener.choose(adapter, [take])
            found = self.listener.identify(speakers, take, self._dim(dim), choice.adapter)
        except (AudioError, ValueError) as error:
            return markup.problem(str(error)), ""
        nearest = found[0].speaker
        told = markup.verdict(found[0], f"this is {nearest}.", "nobody who is enrolled.", f"{nearest} is the nearest.")
        return told + markup.warnings_of([take]) + markup.facts([take], choice), markup.matches(found)

    def compare(
        self, files: Sequence[str] | None, dim: str, adapter: str, heard: Takes | None = None
    ) -> tuple[str, str, Takes]:
        """Paths of up to `MOST_FILES` recordings -> (notes with the matrix, the map), and what was heard."""
        given = list(dict.fromkeys(files or []))
        if len(given) < 2:
            return markup.hint(f"Choose two to {MOST_FILES} recordings."), "", {}
        try:
            if len(given) > MOST_FILES:
                raise ValueError(f"{len(given)} files were given, the most are {MOST_FILES}: leave some out")
            known = self._heard(given, heard or {})
            takes = list(known.values())
            choice = self.listener.choose(adapter, takes)
            size = self._dim(dim)
            found = self.listener.similarities(takes, size, choice.adapter)
        except (AudioError, ValueError) as error:
            return markup.problem(str(error)), "", heard or {}
        names, thresholds = [take.name for take in takes], self.listener.thresholds(takes, size, choice.adapter)
        told = markup.warnings_of(takes) + markup.hint(f"With {size} numbers. {choice.reason}")
        return told + markup.matrix(names, found, thresholds), markup.plane(names, found, thresholds), known

    def points(self, adapter: str) -> str:
        """The error rates of every size."""
        name = adapter if adapter in self.listener.adapters else None
        return markup.operating_points(self.listener.operating_points(name))

    def _heard(self, paths: Sequence[str], before: Takes) -> Takes:
        return {path: before.get(path) or self.listener.hear(path) for path in paths}

    def _dim(self, given: str) -> int:
        dims = self.listener.dims
        if str(given) not in map(str, dims):
            raise ValueError(f"size: got {given}, expected one of {', '.join(map(str, dims))}")
        return int(given)


# ---------------------------------------------------------------- layout


def make_page(listener: Listener) -> gr.Blocks:
    """The page, to be launched with `LOOK` among the options."""
    session, model = Session(listener), listener.encoder
    with gr.Blocks(
        title=f"Speaker verification with {model.name}",
        analytics_enabled=False,
        delete_cache=(60, 60 * AUDIO_MINUTES),
    ) as page:
        adapters = f", with adapters: {', '.join(listener.adapters)}" if listener.adapters else ""
        gr.Markdown(f"# Is this the same speaker?\n\nModel `{model.name}`{adapters}.\n{CONSENT}")
        with gr.Accordion("Consent, and what happens to a recording", open=False, elem_id="consent"):
            gr.Markdown(DETAILS)
        dim = gr.HTML(
            str(listener.dims[-1]),
            label="size",
            html_template=SIZE_TEMPLATE,
            js_on_load=SIZE_SCRIPT,
            elem_id="size",
            dims=listener.dims,
        )
        adapter = gr.Radio(
            listener.choices,
            value=listener.choices[0],
            label="Adapter",
            info="For a kind of audio. Both sides of a comparison go through the same one.",
            visible=len(listener.choices) > 1,
            elem_id="adapter",
        )
        settings = [dim, adapter]
        with gr.Tab("Verify", id="verify"):
            _verify_tab(session, settings)
        with gr.Tab("Identify", id="identify"):
            _identify_tab(session, settings)
        with gr.Tab("Compare many", id="compare"):
            _compare_tab(session, settings)
        with gr.Accordion("Error rates of this model", open=False, elem_id="rates"):
            points = gr.HTML(session.points(OFF))
        adapter.change(session.points, [adapter], [points], api_visibility="private")
    return page


def _audio(label: str, name: str) -> gr.Audio:
    with gr.HTML(html_template="@children", js_on_load=GROUP_SCRIPT, min_width=280, name=label):
        return gr.Audio(
            label=label, sources=["upload", "microphone"], type="filepath", editable=False, buttons=[], elem_id=name
        )


def _live(text: str = "", name: str | None = None) -> gr.HTML:
    return gr.HTML(text, js_on_load=LIVE_SCRIPT, elem_id=name)


def _memory() -> gr.State:
    return gr.State({}, time_to_live=60 * MEMORY_MINUTES)


def _on(triggers: Sequence[Callable], run: Callable, inputs: Sequence, outputs: Sequence, name: str) -> None:
    """Runs at each of the events, with the latest inputs where several come while it runs."""
    gr.on(triggers, run, inputs, outputs, api_name=name, trigger_mode="always_last", show_progress="minimal")


def _verify_tab(session: Session, settings: Sequence[Any]) -> None:
    with gr.Row(elem_classes="mrl-row"):
        first, second = _audio("First recording", "first"), _audio("Second recording", "second")
    told = _live(markup.hint("Record or choose two recordings."), "verdict")
    lost = gr.HTML(elem_id="lost")
    pictures = gr.HTML(elem_id="pictures")
    heard = _memory()
    inputs = [first, second, *settings, heard]
    triggers = [first.change, second.change, *(each.change for each in settings)]
    _on(triggers, session.verify, inputs, [told, lost, pictures, heard], "verify")


def _identify_tab(session: Session, settings: Sequence[Any]) -> None:
    speakers = _memory()
    with gr.Row(elem_classes="mrl-row"):
        with gr.Column():
            name = gr.Textbox(label="Name", elem_id="name", max_length=60)
            take = _audio("Recording to enrol", "take")
            with gr.Row():
                add = gr.Button("Enrol", variant="primary")
                clear = gr.Button("Forget everybody")
        with gr.Column():
            test = _audio("Whom to identify", "test")
    done = _live(name="done")
    who = gr.HTML(markup.enrolled({}), elem_id="enrolled")
    told = _live(name="identified")
    nearest = gr.HTML(elem_id="nearest")
    gr.on([add.click, name.submit], session.enrol, [name, take, speakers], [who, done, speakers], api_name="enrol")
    clear.click(session.forget, None, [who, done, speakers], api_name="forget")
    triggers = [test.change, speakers.change, *(each.change for each in settings)]
    _on(triggers, session.identify, [test, *settings, speakers], [told, nearest], "identify")


def _compare_tab(session: Session, settings: Sequence[Any]) -> None:
    files = gr.File(
        label=f"Two to {MOST_FILES} recordings of up to {LONGEST:g} s",
        file_count="multiple",
        file_types=["audio"],
        elem_id="files",
    )
    table = _live(markup.hint(f"Choose two to {MOST_FILES} recordings."), "matrix")
    plane = gr.HTML(elem_id="map")
    heard = _memory()
    triggers = [files.change, *(each.change for each in settings)]
    _on(triggers, session.compare, [files, *settings, heard], [table, plane, heard], "compare")


# ---------------------------------------------------------------- opening it


def look() -> dict[str, Any]:
    """Options of `launch` with which the page looks as it should, keeps nothing and asks no other server."""
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return dict(
        theme=theme.set(color_accent="*primary_700", button_primary_background_fill="*primary_700"),
        css=CSS,
        max_file_size=f"{MEGABYTES}mb",
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
    )


@contextmanager
def opened(listener: Listener, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """The page while it is open, by its address. Its recordings lie in a temporary folder, which goes with it.

    port: None for the first free one from 7860 on. Raises OSError where the port is in use.
    """
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="mrl-redimnet-demo-") as folder:  # only its owner can read it
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = make_page(listener)
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, **look()
            )
            yield address
        finally:
            page.close(verbose=False)
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def run_until_stopped(
    listener: Listener, host: str = "127.0.0.1", port: int | None = None, *, browser: bool = False
) -> None:
    """Shows the page until Ctrl-C or SIGTERM. browser: also opens it in the browser of this machine.

    Raises as `opened`. To be called from the main thread, as signals are.
    """
    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    with opened(listener, host, port) as address:
        print(f"The page is at {address} until Ctrl-C.", flush=True)
        if browser:
            webbrowser.open(address)
        stop.wait()
