"""Web page that captions pictures: python app.py [--model X] [--port N]. Drop or paste pictures, or give their URL.

Every caption is shown with the model's confidence and, for each word, the model's attention to the picture; a folder of
pictures becomes a CSV. Programs use the same model at /v1/chat/completions in OpenAI's form, or at the endpoint
/caption with gradio's client. Requests of many clients are captioned in batches. The page loads nothing from other
servers and sends nothing to them. See also: captioning/service.py (answers), captioning/page.py (HTML),
captioning/chat.py (OpenAI's form), captioning/door.py (limits and access).
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from captioning.chat import Chat
from captioning.door import LEAST, Door, Uploads, check_free, host_names, is_local, upload_folder
from captioning.models import newest_model
from captioning.page import COLOURS, FOLDER, HEADER, NO_MODEL, PAGE, STYLE, TABLE, WORDS, results, working
from captioning.service import Captioner, Length, Settings, Source, Style, Training, caption_folder, full_url, show
from config import NUM_BEAMS, UserError
from flags import parse_flags
from utils import StopSignal, choose_precision, in_one_line, named, run_script
from weights.file import MODEL_FILE

if TYPE_CHECKING:
    import gradio as gr


@dataclass(kw_only=True)
class AppConfig:
    """A web page that captions pictures, by default at http://127.0.0.1:7860."""

    model: str | None = None
    """A .safetensors file, a folder, user/name, or vit-gpt2 or distilvit (default: the newest model here; if none, the
    page offers a demo)."""
    allow_pickle: bool = False
    """Also read weights of transformers that are a pickle, from a source you trust; only the tensors are read."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 for this machine only, 0.0.0.0 for all who can reach it."""
    port: int = 7860
    """Port to listen at."""
    allowed_hosts: tuple[str, ...] = ()
    """More host names of the page, for example behind a proxy: page.example.org, with or without a port."""
    api_key: str | None = None
    """Key that programs must send to /v1/chat/completions (default: VIT_GPT2_API_KEY of the environment, or else none)."""
    max_megabytes: int = 20
    """Largest allowed picture file, in MiB."""
    max_upload_gigabytes: float = 4
    """Largest size of all stored pictures together, in GiB; each is deleted after an hour."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where the model runs."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of matrix products; auto: fp32 on a GPU, where in half precision the pictures of a batch would change each
    other's captions; elsewhere bf16 where it is measured to be faster."""
    debug: bool = False
    """Show tracebacks of errors."""


def gradio() -> Any:
    """Import gradio, with its analytics turned off. Raises UserError where it is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # otherwise every request computes percentiles of 10,000 events
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(sys.maxsize)
    try:
        import gradio
    except ImportError:
        raise UserError("the web page needs gradio: pip install -r requirements/app.txt") from None
    return gradio


# Options of events that only the page uses: not in the API's description, and any number may run at a time.
PAGE_ONLY: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}
MOST_EVENTS = 400  # events that may wait; more are refused, as the queue is full
MOST_SESSIONS = 1000  # browsers whose pictures and settings are stored


def build(captioner: Captioner, most_bytes: int, training: Training) -> gr.Blocks:
    """Build the page and its endpoint /caption."""
    gr = gradio()
    with gr.Blocks(title="Captions for pictures", analytics_enabled=False) as page:
        gr.HTML(HEADER)
        about = gr.HTML(captioner.about(), visible=captioner.model is not None)
        main = gr.Column(visible=captioner.model is not None)
        if captioner.model is None:  # otherwise the page has no such event
            with gr.Column(elem_id="untrained") as untrained:
                demo(captioner, training, page, [untrained, main, about])
        with main:
            settings, answers, download = setting_fields(), picture_answers(), folder_answers()
            with gr.Tabs():
                with gr.Tab("Pictures"):
                    pictures_tab(captioner, most_bytes, settings, answers)
                with gr.Tab("Folder", elem_id="folder-tab"):
                    folder_tab(captioner, settings, download)
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                for row in (settings[:3], settings[3:5], settings[5:]):
                    with gr.Row(elem_classes="settings"):
                        for field in row:
                            field.render()
                answers[0].render()
            for field in (*answers[1:], *download):
                field.render()
        endpoint(captioner, most_bytes, *settings[:2])
    guard(page)
    return page.queue(max_size=MOST_EVENTS)


def guard(page: gr.Blocks) -> None:
    """Check the data of every event, whatever its route, before gradio reads it, which fetches URLs. Errors become one
    line, where gradio would write a traceback."""
    gr = gradio()
    process = page.process_api

    async def guarded(block_fn: Any, inputs: list[Any], *others: Any, **options: Any) -> dict[str, Any]:
        try:
            if options.get("iterator") is None:
                for field, sent in zip(block_fn.inputs, inputs, strict=False):
                    check_sent(field, sent)
            return await process(block_fn, inputs, *others, **options)
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:  # even SystemExit: a client must not end the server
            known = isinstance(error, UserError | gr.Error)
            why = getattr(error, "message", str(error)) if known else f"cannot be done ({named(error)})"
            raise gr.Error(in_one_line(why)[:500], print_exception=False) from None

    page.process_api = guarded  # type: ignore[method-assign]


def check_sent(field: Any, sent: Any) -> None:
    """Raise UserError for data that this field of the page does not accept: files that were not uploaded, and anything
    but files, texts and numbers."""
    if not isinstance(field, gradio().File):
        if not (field.stateful or sent is None or isinstance(sent, str | int | float)):
            raise UserError(f"{field.label}: must be a text or a number")
        return
    for file in sent if isinstance(sent, list) else [] if sent is None else [sent]:
        path = file.get("path") if isinstance(file, dict) else None
        if not isinstance(path, str):
            raise UserError(f"{field.label}: must be a file")
        if "://" in path:
            raise UserError("picture must be a file: give a URL as url")
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(field.GRADIO_CACHE)):
            raise UserError(f"{field.label}: upload the file first")


def demo(captioner: Captioner, training: Training, page: gr.Blocks, columns: list[Any]) -> None:
    """A button that trains the demo while there is no model; then the other fields replace the first column."""
    gr = gradio()

    def train(request: Any) -> Iterator[list[Any]]:
        if captioner.model is not None:
            raise UserError("there is a model here already")
        if not is_local(request.client.host, request.headers):
            raise UserError("the demo can only be trained from this machine itself")
        training.start()
        while training.running:
            yield [working(training.line), *[gr.skip()] * 3]
            time.sleep(0.5)
        if training.process is not None and training.process.returncode == 0:
            with training.lock:  # several clients may have waited
                if captioner.model is None:
                    captioner.load(newest_model())
            yield ["", *trained()]
        else:
            yield [results([], [training.line]), *[gr.skip()] * 3]

    def trained() -> list[Any]:
        """Updates of the columns, and of the line that says which model answers."""
        there = captioner.model is not None
        return [gr.update(visible=not there), gr.update(visible=there), gr.update(captioner.about(), visible=there)]

    train.__annotations__["request"] = gr.Request  # gradio passes the request to this annotation
    gr.HTML(NO_MODEL)
    start = gr.Button("Train the demo", variant="primary")
    status = gr.HTML()
    start.click(train, None, [status, *columns], show_progress="hidden", **PAGE_ONLY)
    page.load(trained, None, columns, show_progress="hidden", **PAGE_ONLY)  # clients that come later find it done


def pictures_tab(captioner: Captioner, most_bytes: int, settings: list[Any], answers: list[Any]) -> None:
    """Single pictures, dropped or by URL, and the button that captions them again."""
    gr = gradio()

    def show_sources(sources: list[Source], *values: Any) -> tuple[Any, ...]:
        """Updates of the answers: the button "again", the results, and the pictures."""
        html = show(captioner, sources, Settings(*values), most_bytes)
        return gr.update(visible=bool(sources)), html, sources

    def show_files(files: list[Source], *values: Any) -> tuple[Any, ...]:
        """Caption dropped pictures; their field is empty again afterwards."""
        return None, *show_sources(files, *values)

    def show_url(url: str, *values: Any) -> tuple[Any, ...]:
        """Caption the picture at a URL."""
        url = full_url(url)
        return show_sources([Source(url, url=url)] if url else [], *values)

    files = upload(label="Pictures", file_count="multiple", elem_id="pictures", show_label=False, height=150)
    url = gr.Textbox(
        label="Or the address of a picture",
        placeholder="www.example.com/cat.jpg",
        submit_btn="Caption it",
        elem_id="address",
    )
    again, *_, sources = answers
    files.upload(show_files, [files, *settings], [files, *answers], **PAGE_ONLY)
    url.submit(show_url, [url, *settings], answers, **PAGE_ONLY)
    again.click(show_sources, [sources, *settings], answers, **PAGE_ONLY)


def folder_tab(captioner: Captioner, settings: list[Any], answers: list[Any]) -> None:
    """A folder of pictures, which becomes a CSV."""
    gr = gradio()
    gr.HTML(FOLDER)
    folder = upload(label="Folder", file_count="directory", elem_id="folder", show_label=False, height=150)

    def show_folder(files: list[Source], *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yield progress, and at the end the CSV."""
        path = Path(tempfile.mkdtemp(dir=folder.GRADIO_CACHE)) / "captions.csv"  # deleted with the other uploads
        html = ""
        for html in caption_folder(captioner, files, Settings(*values), path):
            yield None, gr.update(visible=False), html
        yield None, gr.update(value=str(path), visible=True), html

    folder.upload(show_folder, [folder, *settings], [folder, *answers], show_progress="hidden", **PAGE_ONLY)


def setting_fields() -> list[Any]:
    """Fields for what Settings has, in its order; .render() puts them on the page."""
    gr = gradio()
    lengths = [("Short", "short"), ("Normal", "normal"), ("Long", "long")]
    styles = [("Safe", "safe"), ("Varied", "varied"), ("Creative", "creative")]
    spaces = "as it stands, with its spaces"
    return [
        gr.Radio(lengths, value="normal", label="Length", info="how long the captions are", render=False),
        gr.Radio(styles, value="safe", label="Style", info="creative: more surprises, more errors", render=False),
        gr.Radio(
            [1, 3, 5], value=3, label="Captions", info="for each picture", elem_classes="of-pictures", render=False
        ),
        gr.Textbox("", label="Start with", info="the model goes on from here", placeholder="a photo of", render=False),
        gr.Textbox(
            "", label="Without the words", info="separated by commas", placeholder="picture, image", render=False
        ),
        gr.Textbox("", label="Put before", info=spaces, placeholder="my trigger word, ", render=False),
        gr.Textbox("", label="Put after", info=spaces, placeholder=", high quality", render=False),
        gr.Number(0, label="Leave out below", info="% sure; 0 keeps all", minimum=0, maximum=100, render=False),
    ]


def picture_answers() -> list[Any]:
    """Fields for pictures: the button "again", their captions, and their sources; .render() puts them on the page."""
    gr = gradio()
    return [
        gr.Button("Caption again with these settings", visible=False, elem_classes="of-pictures", render=False),
        gr.HTML(js_on_load=WORDS, elem_id="results", elem_classes="of-pictures", render=False),
        gr.State([], render=False),
    ]


def folder_answers() -> list[Any]:
    """Fields for a folder: the CSV and its table; .render() puts them on the page."""
    gr = gradio()
    return [
        gr.DownloadButton(
            "Download captions.csv", variant="primary", visible=False, elem_classes="of-folder", render=False
        ),
        gr.HTML(js_on_load=TABLE, elem_id="table", elem_classes="of-folder", render=False),
    ]


def upload(**options: Any) -> Any:
    """A field for files. gradio's preprocess would leave an empty file for each upload. (For a subclass gradio would
    write an app.pyi beside this file.)"""
    gr = gradio()
    field = gr.File(**options)

    def as_sources(sent: Any) -> list[Source]:
        files = [] if sent is None else [sent] if field.file_count == "single" else sent.root
        return [Source(file.orig_name or Path(file.path).name, path=file.path) for file in files]

    field.preprocess = as_sources
    return field


def endpoint(captioner: Captioner, most_bytes: int, length: Any, style: Any) -> None:
    """Endpoint /caption, for programs; invisible fields give its parameters their names."""
    gr = gradio()

    def caption(
        picture: list[Source],
        url: str,
        length: Length,
        style: Style,
        captions: float,
        beams: float,
        prefix: str,
        without: str,
        prepend: str,
        append: str,
        min_confidence: float,
    ) -> list[dict[str, Any]]:
        """Captions of one picture, a file or a URL, the best first: [{"caption": ..., "confidence": 0 to 1}, ...]. Those
        with less than min_confidence are empty."""
        if bool(picture) == bool(url):
            raise UserError("give either a picture or a url")
        source = Source(url, url=full_url(url)) if url else picture[0]
        settings = Settings(length, style, int(captions), prefix, without, prepend, append, 100 * min_confidence)
        options, finish = settings.options(int(beams)), settings.finish()
        found = captioner.submit(source.read(most_bytes), source.name, options).result()
        return [{"caption": finish.caption(each).text, "confidence": round(each.score or 0, 4)} for each in found]

    texts = [gr.Textbox("", label=label, visible=False) for label in ("prefix", "without", "prepend", "append")]
    parameters = [
        upload(label="picture", file_count="single", visible=False),
        gr.Textbox("", label="url", visible=False),
        length,
        style,
        gr.Number(1, label="captions", minimum=1, maximum=5, precision=0, visible=False),
        gr.Number(NUM_BEAMS, label="beams", minimum=1, maximum=10, precision=0, visible=False),
        *texts,
        gr.Number(0, label="min_confidence", minimum=0, maximum=1, visible=False),
    ]
    answer = gr.JSON(label="captions", visible=False)
    ask = gr.Button(visible=False)
    ask.click(caption, parameters, answer, api_name="caption", concurrency_limit=None)


def keep(uploads: Uploads) -> None:
    """Make gradio keep uploads within their limits, and delete the files of an upload that does not finish."""
    gradio()
    from gradio import route_utils
    from starlette.formparsers import MultiPartException

    class Bounded(route_utils.GradioMultiPartParser):
        def on_headers_finished(self) -> None:
            super().on_headers_finished()
            self.take(LEAST)
            if self._current_part.file is None or self._current_part.field_name != "files":
                raise MultiPartException("an upload must have files, in the field files, and nothing else")

        def on_part_data(self, data: bytes, start: int, end: int) -> None:
            self.take(end - start)
            super().on_part_data(data, start, end)

        def take(self, size: int) -> None:
            try:
                uploads.take(size)
            except UserError as error:
                raise MultiPartException(str(error)) from None

        async def parse(self) -> Any:
            try:
                return await super().parse()
            except BaseException:
                for file in self._files_to_close_on_error:
                    file.close()
                    Path(file.name).unlink(missing_ok=True)
                raise

    route_utils.GradioMultiPartParser = Bounded  # type: ignore[misc]


def tidy(page: gr.Blocks, uploads: Uploads) -> None:
    """Delete old files, and entries that gradio would store for ever."""
    from gradio.routes import file_upload_statuses

    uploads.clean()
    for names in page.temp_file_sets:
        names.clear()
    queue = page._queue
    for session in set(queue.pending_event_ids_session) - set(queue.pending_messages_per_session):
        queue.pending_event_ids_session.pop(session, None)
    if len(file_upload_statuses._signals) > MOST_SESSIONS:
        file_upload_statuses._signals.clear()
        file_upload_statuses._statuses.clear()


def launch(
    page: gr.Blocks,
    host: str,
    port: int,
    most_bytes: int,
    allowed_hosts: tuple[str, ...] = (),
    chat: dict[str, Any] | None = None,
) -> str:
    """Serve the page until page.close(), and return its address. chat: arguments of captioning.chat.Chat, to answer
    programs too. Raises UserError where it cannot listen there."""
    gr = gradio()
    from starlette.middleware import Middleware

    middleware = [Middleware(Door, names=host_names(host, allowed_hosts), most_bytes=most_bytes)]
    middleware += [Middleware(Chat, most_bytes=most_bytes, **chat)] if chat else []
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    )
    theme.set(**COLOURS)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            max_file_size=most_bytes,
            state_session_capacity=MOST_SESSIONS,
            app_kwargs={"middleware": middleware},
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            show_error=True,
            run_history=False,
            enable_monitoring=False,
            footer_links=["api"],
            theme=theme,
            css=STYLE,
            js=PAGE,
        )
    except OSError as error:
        raise UserError(f"cannot listen at {host}, port {port} ({error}): choose another --port or --host") from error
    return str(address)


def main() -> int:
    """Run the command line: serve until stopped."""
    config = parse_flags(AppConfig, __doc__)
    check_free(config.host, config.port)  # before a minute is spent on loading the model
    with upload_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder)  # gradio reads it when it is imported
        return serve(config, Uploads(folder, int(config.max_upload_gigabytes * 2**30)))


def serve(config: AppConfig, uploads: Uploads) -> int:
    """Serve the page, and keep uploads within their limits."""
    keep(uploads)
    captioner, training = Captioner(config.device, config.precision), Training()
    source = config.model
    if source is None:
        try:
            source = newest_model()
        except UserError:
            print("no model here: the page offers to train the demo")
    if source is not None:
        from captioning.engine import in_words  # imported late, so that --help does not wait for torch

        captioner.load(source, config.allow_pickle)
        precision = str(choose_precision(captioner.precision, captioner.device)[0])[6:]
        tokens = in_words("fp32" if (captioner.device.type, precision) == ("cpu", "float32") else "half")
        print(f"model       {source}, on {captioner.device} in {precision}; tokens by {tokens}")
    stop = StopSignal()
    most_bytes = config.max_megabytes << 20
    page = build(captioner, most_bytes, training)
    key = config.api_key or os.environ.get("VIT_GPT2_API_KEY")
    chat = {"captioner": captioner, "model": Path(source or MODEL_FILE).stem, "key": key}
    address = launch(page, config.host, config.port, most_bytes, config.allowed_hosts, chat)
    print(f"page        {address} (Ctrl-C stops it)", flush=True)
    try:
        while stop.received is None:
            if time.monotonic() - uploads.cleaned > 60:
                tidy(page, uploads)
            time.sleep(0.2)
    finally:
        training.stop()
        page.close(verbose=False)
    return stop.exit_code


if __name__ == "__main__":
    run_script(main, without_reader=True)
