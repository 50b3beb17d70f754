"""benchmark.py golden: check that a change keeps training, captions and published files equal to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import UserError
from utils import ROOT, file_hash, read_log, write_json
from weights.file import MODEL_FILE

GOLDEN = [
    *("--preset", "demo", "--num-scenes", "640", "--batch-size", "32", "--max-steps", "100", "--precision", "fp32"),
    *("--vision-num-layers", "2", "--decoder-num-layers", "1", "--dropout", "0.1", "--word-dropout", "0.1"),
    *("--device", "cpu", "--seed", "1"),
]
"""Flags of a small run, which mean the same in all versions."""


OPTIMIZERS = ("adamw", "muon")
EXACT = ("--device", "cpu", "--precision", "fp32")


def golden_code(commit: str | None, directory: Path) -> Path:
    """Write a commit's files to the directory and return it; for None, return the working tree. Raises UserError."""
    if commit is None:
        return ROOT
    directory.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise UserError(f"{commit}: {archive.stderr.decode().strip().splitlines()[-1]}")
    subprocess.run(["tar", "-x"], cwd=directory, input=archive.stdout, check=True)
    return directory


def golden_script(code: Path, directory: Path, *arguments: str) -> None:
    """Run a checkout's script in a directory. Raises UserError where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # or sums depend on the number of cores
    command = [sys.executable, str(code / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1]
        raise UserError(f"the golden run of {code} failed in {arguments[0]}: {reason}")


def golden_run(code: Path, directory: Path, optimizer: str) -> tuple[list[float], str]:
    """Run a checkout's golden run; return the losses it logs every ten steps, and the SHA-256 of its model."""
    flags = [*GOLDEN, "--optimizer", optimizer, "--output-dir", "golden", "--resume", "never"]
    golden_script(code, directory, "main.py", *flags)
    losses = [line["loss"] for line in read_log(directory / "golden" / "metrics.jsonl") if "loss" in line]
    return losses, file_hash(directory / MODEL_FILE)


def golden_files(code: Path, directory: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files that the golden run and its model write: captions (three beams, greedy, sampled),
    metrics, and the published files other than code."""
    from publishing.hub import MANIFEST  # imported late: it needs tyro, and benchmark.py gpu must run without it

    greedy = ("--num-beams", "1", "--scores", "--output", "greedy.jsonl")
    golden_script(code, directory, "example_usage.py", "golden/scenes/val2017", MODEL_FILE, *greedy, *EXACT)
    drawn = ("--do-sample", "--output-dir", "sampled")
    golden_script(code, directory, "evaluate.py", MODEL_FILE, "--data-dir", "golden/scenes", *drawn, *EXACT)
    about = directory / "golden" / "run.json"
    write_json(about, json.loads(about.read_text(encoding="utf-8")) | {"seconds": 60})  # the real time always differs
    upload = ("user/name", "--dry-run", "--model-path", MODEL_FILE, "--run", "golden")
    golden_script(code, directory, "upload_to_hf.py", *upload)
    files = [directory / "greedy.jsonl"]
    files += [directory / run / f"{name}.json" for run in ("golden", "sampled") for name in ("captions", "metrics")]
    published = sorted(path for path in (directory / "upload").rglob("*") if path.is_file())
    files += [path for path in published if path.suffix != ".py" and path.name != MANIFEST]
    return {path.relative_to(directory).as_posix(): file_hash(path) for path in files}


@dataclass(kw_only=True)
class GoldenBenchmark:
    """Do the same small run with two versions of the code on this machine: a refactoring must give equal bits in
    training, captions, metrics and published files."""

    before: str = "HEAD"
    """Commit to compare with."""
    after: str | None = None
    """Commit to check (default: the working tree)."""
    output: Path = Path("benchmark-golden.json")
    """JSON file to write the losses and hashes to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> dict[str, Any]:
        """Return losses by optimizer and hashes of files. Raises UserError where the two versions differ."""
        different: list[str] = []
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            versions = []
            for name, commit in (("before", self.before), ("after", self.after)):
                (run := Path(folder) / name).mkdir()
                versions.append((golden_code(commit, run / "code"), run))
            for optimizer in OPTIMIZERS:
                (before, before_hash), (after, after_hash) = (golden_run(*each, optimizer) for each in versions)
                print(f"{optimizer:>5} {self.before:>24} {self.after or 'these files':>24}")
                for number, (a, b) in enumerate(zip(before, after, strict=True), start=1):
                    print(f"{10 * number:5} {a.hex():>24} {b.hex():>24}{'' if a == b else '   differs'}")
                if same := (before, before_hash) == (after, after_hash):
                    print(f"the same to the bit, weights {after_hash[:16]}...", flush=True)
                different += [] if same else [f"training by {optimizer}"]
                found[optimizer] = {"losses": [loss.hex() for loss in after], "sha256": after_hash}
            old, new = (golden_files(*each) for each in versions)
            for name in old | new:
                same = old.get(name) == new.get(name)
                print(f"{'the same' if same else 'differs':8}  {name}")
                different += [] if same else [name]
            found["files"] = new
        if different:
            raise UserError(f"not the same to the bit: {', '.join(different)}")
        return found
