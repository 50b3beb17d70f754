"""Publish a model without asking, once or after every checkpoint of a run.

    HF_TOKEN=... python auto_upload.py user/name
    HF_TOKEN=... python auto_upload.py user/name --watch runs/demo-20260101-120000

With --watch each new checkpoint goes to a separate branch, such as step-00000500 (or all of them to --revision), and
the finished model to main. The run itself is only read. What cannot be sent now is saved and sent later.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from config import UserError
from flags import parse_flags
from publishing.config import UploadConfig
from utils import StopSignal, counted, printable, run_script
from weights.file import MODEL_FILE

POLL_EVERY = 1.0  # seconds; a run deletes a checkpoint only when there are two newer ones
LONGEST_WAIT = 60.0  # seconds between attempts while the Hub cannot be reached


@dataclass(kw_only=True)
class AutoConfig(UploadConfig):
    """Publish a model without asking."""

    watch: Path | None = None
    """Folder of a run, which may still be training: publish each checkpoint, and the model when it is finished."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.watch and (self.pr or self.dry_run or self.model_path):
            raise UserError("watch publishes a run while it trains: leave out --pr, --dry-run and --model-path")


def watch(config: AutoConfig, run: Path) -> int:
    """Publish checkpoints until the run is finished and all is uploaded. Returns 0, or 130/143 if stopped."""
    from publishing.hub import HubAwayError, Stage, logged_in, publish  # late, so that --help does not wait for torch
    from training.run import Run

    logged_in()  # fail now and not after the first checkpoint
    if not run.is_dir():
        raise UserError(f"{run}: no such folder: name the folder of a run")
    stage, stop, over = Stage(run), StopSignal(), threading.Event()

    def gather() -> None:  # also runs during uploads, which take long
        while not over.wait(POLL_EVERY):
            stage.gather()

    stage.gather()
    threading.Thread(target=gather, daemon=True).start()
    wait, plain = POLL_EVERY, dataclasses.replace(config, watch=None)
    try:
        while stop.received is None:
            end = Run(run).finished  # read before the last checkpoint is gathered
            stage.gather()
            try:
                for path in stage.waiting():
                    revision, number = config.revision or path.stem, path.stat().st_ino
                    job = dataclasses.replace(plain, model_path=str(path), run=run, revision=revision, space=False)
                    publish(job, f"Checkpoint at {path.stem}")
                    stage.done(path, number)
                    wait = POLL_EVERY
                    if stop.received is not None:
                        break
                else:
                    if end:
                        publish(dataclasses.replace(plain, model_path=str(run / MODEL_FILE), run=run))
                        return 0
            except HubAwayError as error:
                wait = min(2 * wait, LONGEST_WAIT)
                print(
                    f"{printable(error.args[0].partition(': run again')[0])}; next attempt in {wait:.0f} s", flush=True
                )
            until = time.monotonic() + wait
            while stop.received is None and time.monotonic() < until:
                time.sleep(0.1)
    finally:
        over.set()
        stop.restore()
    print(
        f"stopped; {counted(len(stage.waiting()), 'checkpoints')} waiting in {stage.folder}: run the same command to send them"
    )
    return stop.exit_code


def main() -> int:
    """Run the command line."""
    config = parse_flags(AutoConfig, __doc__)
    from publishing.hub import publish

    if config.watch:
        return watch(config, config.watch)
    publish(config)
    return 0


if __name__ == "__main__":
    run_script(main, without_reader=True)
