"""Publish a model: write it as a folder that others can load, and upload it to the Hub; optionally with a Space.

The Hub's client sends all requests. upload_to_hf.py and auto_upload.py call this module; offer_upload is for the end of
a training run. The client finds the token (HF_TOKEN, or what `hf auth login` saved); this code never reads it.
"""

from __future__ import annotations

import ast
import contextlib
import glob
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from captioning.models import weights_sha256
from config import UserError
from data.scenes import draw, make_scene
from model import ImageCaptionModel
from publishing.card import Facts, layout_of, local, read_facts, scrubbed, write_card
from publishing.config import UploadConfig
from publishing.space import SPACE_FILES, write_space
from training.run import Run
from utils import ROOT, atomic, check_tokens, first_line, json_of, module_file, new_folder, printable, write_json
from weights.file import MODEL_FILE
from weights.huggingface import MARKER, WRITTEN, write_transformers
from weights.remote import MODULE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
Kind = Literal["model", "space"]
CODE = ("config", "model")  # and all that they import: to load the model and to train it further
SPACE_CODE = ("app",)
PICTURE, SAMPLES = "example.png", "samples.png"
BESIDE = ["README.md", "run.json", "metrics.json", PICTURE, SAMPLES, "onnx", ".eval_results"]
MANIFEST = "published_files.json"  # names of all files of an upload, which the next one may delete
OURS = [*WRITTEN, MODEL_FILE, f"{MODULE}.py", *BESIDE]  # files of models of any kind
# Uploads of versions without a manifest held some of these modules.
OLDER_MODULES = (
    "adapters app attention auto_upload benchmark benchmark_training cache captioning card check checkpoint config "
    "convert dataset distributed download estimates evaluate example_usage fetch files generation graphs job "
    "language_model layouts main metrics model model_file ngrams onnx_export optimizers outputs packed page pictures "
    "pixels pretrained ptb publish remote report results scenes scorers scst sources space table tracking train "
    "upload_to_hf utils"
)
OLDER_FILES = [f"{name}.py" for name in OLDER_MODULES.split()]
PASSING = {408, 429, 500, 502, 503, 504}  # HTTP statuses of errors that may be temporary
PATIENCE = 10.0  # seconds during which a request is retried; the client itself retries some requests for longer


class HubAwayError(UserError):
    """The Hub cannot be reached now: the same command may succeed later."""


def publish(config: UploadConfig, message: str = "Upload the model") -> str:
    """Write the folder and upload it; print and return its address. Raises UserError (HubAwayError if temporary)."""
    kinds: list[Kind] = ["model", "space"] if config.space else ["model"]
    if config.dry_run:
        model, run = find_model(config)
        folders = [Path("upload", *(["spaces"] if kind == "space" else []), config.repository) for kind in kinds]
        for kind, folder in zip(kinds, folders, strict=True):
            WRITERS[kind](folder, config, model, run)
        print(f"written to {' and '.join(map(str, folders))}; nothing was sent")
        return str(folders[0])
    api = logged_in()
    model, run = find_model(config)
    before = {kind: patiently(config.repository, partial(make_ready, api, config, kind)) for kind in kinds}
    # A request for a pull request whose answer is lost must not open a second one.
    again = once if config.pr else patiently
    addresses = []
    with tempfile.TemporaryDirectory(prefix="upload-") as temporary:
        for kind in kinds:
            WRITERS[kind](Path(temporary) / kind, config, model, run)
            # Before gigabytes are sent.
            patiently(config.repository, partial(check_card, api, Path(temporary) / kind, kind))
        for kind in kinds:
            folder = Path(temporary) / kind
            after, where = again(config.repository, partial(send, api, config, folder, message, kind))
            print(f"{where}: nothing had changed" if after == before[kind] else f"uploaded to {where}")
            addresses.append(where)
    return addresses[0]


# The model and its folder


def find_model(config: UploadConfig) -> tuple[ImageCaptionModel, Facts | None]:
    """The model, and the run that trained it if known. Raises UserError, also for a model that others could not use."""
    from captioning.models import newest_model

    source = config.model_path or newest_model()
    if config.run and not (config.run / "run.json").is_file():
        raise UserError(f"{config.run}: no run.json there: name the folder of a run")
    model = ImageCaptionModel.from_pretrained(source, config.base_dir)
    bases = filter(None, model.merged["bases"].values()) if model.merged else ()
    for base in bases:
        if local(base):
            where = f" --base-dir {config.base_dir}" if config.base_dir else ""
            merge = f"make a merged model (python convert.py merge {source} merged.safetensors{where}) and publish that"
            raise UserError(f"{source}: adapters for {base}, which nobody else has: {merge}")
    if config.onnx and layout_of(model) != "transformers":
        raise UserError(f"{source}: only full models with cross-attention have ONNX files: leave out --onnx")
    found = Run(config.run) if config.run else Run.of_model(Path(source))
    step = re.search(r"step-(\d+)", source)  # the name of a checkpoint
    return model, read_facts(found.folder, weights_sha256(model), int(step[1]) if step else None) if found else None


def code_files(names: Sequence[str]) -> list[str]:
    """The files of these modules and of all that they import, with the text files beside them and each __init__.py."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        file = module_file(name)
        file = file if file.is_file() else file.with_suffix("") / "__init__.py"
        path = file.relative_to(ROOT).as_posix()
        if path in found or not file.is_file():
            continue
        found.add(path)
        if "." in name:  # in a folder: at the top level, files of such names are models and logs
            todo.append(name.rpartition(".")[0])
            texts = [text for end in ("css", "html", "js", "txt") for text in file.parent.glob(f"{file.stem}.*{end}")]
            found |= {text.relative_to(ROOT).as_posix() for text in texts}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sorted(found)


@contextlib.contextmanager
def repository_folder(directory: Path, names: Sequence[str], modules: Sequence[str]) -> Iterator[Path]:
    """A folder to fill with these names; adds the modules, all that they import, and the manifest."""
    code = code_files(modules)
    earlier = files_of(directory) or OLDER_FILES
    written = [*names, MANIFEST, *(Path(name).parts[0] for name in (*code, *earlier))]
    with new_folder(directory, written, MARKER) as folder:
        yield folder
        for name in code:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        write_json(folder / MANIFEST, sorted(files))


def files_of(folder: Path) -> list[str]:
    """Files that an earlier upload wrote into a folder, from its manifest; none if no manifest can be read."""
    try:
        names = json_of((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def write_space_folder(directory: Path, config: UploadConfig, model: ImageCaptionModel, run: Facts | None) -> None:
    """Write everything that is uploaded to a Space."""
    with repository_folder(directory, [MARKER, "README.md", *SPACE_FILES], SPACE_CODE) as folder:
        write_space(folder, config.repository, model.merged)
        write_json(folder / MARKER, {})


def write_model_folder(directory: Path, config: UploadConfig, model: ImageCaptionModel, run: Facts | None) -> None:
    """Write all that is uploaded of a model. Equal models give equal folders: no dates, no paths of this machine."""
    layout = layout_of(model)
    model.tokenizer = model.tokenizer  # GPT-2's tokenizer, if the weights came without one
    with repository_folder(directory, OURS, CODE) as folder:
        if layout == "transformers":
            write_transformers(model.saved(), folder)
        elif model.merged:
            shutil.copyfile(model.merged["file"], folder / MODEL_FILE)
            write_json(folder / "config.json", model.config.to_dict())
        else:
            model.save_pretrained(folder)
        if layout != "transformers":
            write_json(folder / MARKER, {})
        scene, _, rng = make_scene(0, "example", 0)
        draw(scene, rng).save(folder / PICTURE)  # drawn by this project, so that anybody may redistribute it
        if config.onnx:
            from captioning.onnx import save_onnx

            save_onnx(model, folder / "with_onnx", int8=True)
            (folder / "with_onnx" / "onnx").rename(folder / "onnx")
            shutil.rmtree(folder / "with_onnx")
        if run:
            write_json(folder / "run.json", scrubbed(run.about))
            if run.metrics:
                write_json(folder / "metrics.json", scrubbed(run.metrics))
            if run.samples and (run.drawn or config.sample_pictures):
                shutil.copyfile(run.samples, folder / SAMPLES)
        options = (config.license, config.language, config.benchmark, config.space)
        write_card(folder, model, run, config.repository, *options)


WRITERS = {"model": write_model_folder, "space": write_space_folder}


# The Hub


def logged_in() -> HfApi:
    """The Hub's client. Raises UserError where there is no token, before any request is sent."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    check_tokens("hub")
    if not get_token():
        raise UserError("not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="vit-gpt2-captioning")


def make_ready(api: HfApi, config: UploadConfig, kind: Kind) -> str | None:
    """Create the repository (of a model or a Space) and the branch if they are missing; return the parent commit of the
    upload.

    Raises UserError for a repository that the upload would damage.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    name = config.repository
    what = f"the Space {name}" if kind == "space" else name
    info_of = partial(api.space_info if kind == "space" else api.model_info, name)
    try:
        info = info_of()
    except RepositoryNotFoundError:
        sdk = "gradio" if kind == "space" else None
        api.create_repo(name, repo_type=kind, space_sdk=sdk, private=config.private or None, exist_ok=True)
        info = info_of()
    if config.private and not info.private:
        raise UserError(f"{what} exists and everybody can see it: make it private in its settings, or name another")
    made_by_the_hub = {".gitattributes", *(["README.md"] if kind == "space" else [])}
    inside = {file.rfilename for file in info.siblings or []} - made_by_the_hub
    if inside and MARKER not in inside and not (config.pr or config.force):
        some = ", ".join(sorted(inside)[:3])
        advice = f"name another, or add --force{'' if config.space else ' (or --pr)'}"
        raise UserError(f"{what} holds files that were not written here ({some}): {advice}")
    if config.revision and not config.revision.startswith("refs/"):
        api.create_branch(name, branch=config.revision, exist_ok=True)
    return info_of(revision=config.revision).sha if config.revision else info.sha


def check_card(api: HfApi, folder: Path, kind: Kind) -> None:
    """Let the Hub validate the card. Raises ValueError for a card that it refuses. (Before version 2 the client's own
    check asks huggingface.co, even if HF_ENDPOINT is set.)"""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    card = {"repoType": kind, "content": (folder / "README.md").read_text(encoding="utf-8")}
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=card, headers={"Accept": "text/plain"})
    if answer.status_code == 400:
        raise ValueError(answer.text)
    hf_raise_for_status(answer)


def send(api: HfApi, config: UploadConfig, folder: Path, message: str, kind: Kind) -> tuple[str, str]:
    """Upload the folder in one commit, which also deletes files of an earlier upload that this one lacks.

    Returns the commit and its address. The client sends only what the Hub does not have.
    """
    commit = api.upload_folder(
        repo_id=config.repository,
        repo_type=kind,
        folder_path=folder,
        revision=config.revision,
        create_pr=config.pr,
        commit_message=message,
        delete_patterns=written_before(api, config, kind),
    )
    branch = f"/tree/{config.revision}" if config.revision else ""
    where = f"{api.endpoint}/{'spaces/' if kind == 'space' else ''}{config.repository}{branch}"
    return commit.oid, commit.pr_url or where


def written_before(api: HfApi, config: UploadConfig, kind: Kind) -> list[str]:
    """Patterns of the files that earlier uploads wrote into the repository: all that its manifest names, and a model's
    files beside its code. Empty for a repository that this project did not write."""
    name, revision = config.repository, config.revision
    files = set(api.list_repo_files(name, repo_type=kind, revision=revision))
    if MARKER not in files:
        return []
    earlier = OLDER_FILES
    if MANIFEST in files:
        earlier = files_of(Path(api.hf_hub_download(name, MANIFEST, repo_type=kind, revision=revision)).parent)
    beside = [f"{name}/*" if name in ("onnx", ".eval_results") else name for name in OURS]
    return [*map(glob.escape, earlier), *beside]


def patiently(name: str, action: Callable[[], T]) -> T:
    """Return the action's result; retry for PATIENCE seconds while the Hub cannot be reached. Raises UserError."""
    started, wait = time.monotonic(), 1.0
    while True:
        try:
            return once(name, action)
        except HubAwayError:
            if time.monotonic() - started + wait > PATIENCE:
                raise
        time.sleep(wait)
        wait *= 2


def once(name: str, action: Callable[[], T]) -> T:
    """Return the action's result. The client's errors become a UserError of one line, temporary ones a HubAwayError."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return action()
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise UserError(f"{name}: HF_HUB_OFFLINE is set: unset it to upload") from error
    except Exception as error:  # a dozen classes of the client, its HTTP library and its storage library
        cause: Any = error
        while type(cause) is RuntimeError and cause.__cause__:  # it names the file, not the reason
            cause = cause.__cause__
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        ours = type(cause).__name__ in ("LocalProtocolError", "UnsupportedProtocol", "InvalidURL")  # not temporary
        lost = type(cause).__module__.startswith(("httpx", "hf_xet")) and not ours
        lost |= isinstance(cause, json.JSONDecodeError)
        if status in PASSING or (status is None and lost):
            again = "run again, only what is missing will be sent"
            raise HubAwayError(f"{name}: the Hub cannot be reached now ({first_line(cause)}): {again}") from error
        if status in (401, 403):
            why = "does not know this token" if status == 401 else "does not allow this token to write there"
            advice = "run `hf auth login` or set another HF_TOKEN"
            raise UserError(f"{name}: the Hub {why} ({status}): {advice}") from error
        reason = "; ".join(filter(None, str(cause).strip().splitlines())) or type(cause).__name__
        raise UserError(f"{name}: not uploaded: {reason}") from error


# Beside a training run


def offer_upload(model_path: Path | str = MODEL_FILE) -> None:
    """Ask once, at the end of training, whether to publish the model; never where nobody can answer.

    A failed upload prints one line and raises nothing: the run has succeeded.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    from huggingface_hub import get_token

    command = f"python upload_to_hf.py user/name --model-path {model_path}"
    if not get_token():
        print(f"publish it  hf auth login, then {command}")
        return
    try:
        name = input(
            "Publish this model on the Hugging Face Hub? Its name there (user/name), or Enter for no: "
        ).strip()
    except EOFError:
        return
    if not name:
        return
    try:
        publish(UploadConfig(repository=name, model_path=str(model_path)))
    except UserError as error:
        print(f"error: {printable(str(error))}\nlater       {command}", file=sys.stderr)


class Stage:
    """Save a run's new checkpoints until they are uploaded, as the run deletes its older ones.

    Only reads the run: a checkpoint's folder is renamed into place, so an existing one is complete. Its model is
    hard-linked (or copied, where links are not possible) into a folder beside the run, and stays there until it is
    uploaded, possibly by a later process.
    """

    def __init__(self, run: Path) -> None:
        self.run = run.absolute()
        self.folder = self.run.with_name(f".{self.run.name}.upload")
        self._saved: set[tuple[str, int, int]] = set()

    def gather(self) -> None:
        """Save the checkpoints that are new."""
        for path in sorted(self.run.glob("checkpoints/step-*/model.safetensors")):
            try:
                about = path.stat()
                key = (path.parent.name, about.st_ino, about.st_mtime_ns)
                if key not in self._saved:
                    self.folder.mkdir(exist_ok=True)
                    if self.folder.is_symlink():
                        raise UserError(f"{self.folder}: is a link, which could point anywhere: delete it")
                    link_or_copy(path, self.folder / f"{path.parent.name}.safetensors")
                    self._saved.add(key)
            except FileNotFoundError:  # deleted by the run meanwhile: it was saved before
                continue

    def waiting(self) -> list[Path]:
        """Files that are still to be uploaded, oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def done(self, path: Path, number: int) -> None:
        """Delete an uploaded file, unless its inode is another one: a restarted run may have replaced it."""
        if path.stat().st_ino == number:
            path.unlink()
        if not self.waiting():
            shutil.rmtree(self.folder, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it; the target is written atomically."""
    with atomic(target) as unfinished:
        unfinished.unlink()
        try:
            os.link(source, unfinished)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(source, unfinished)
