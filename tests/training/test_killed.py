"""Whole command lines killed at any moment, and runs of whose files any bit is flipped.

What of a run has a hash or checksum: the files of a checkpoint (its manifest, any change of which shows too), and the
finished model's two copies (the best checkpoint's manifest, and run.json's model_sha256 where one is trained on). What has
none: run.json, metrics.jsonl, what an evaluation writes (each start that comes to the end writes it anew), the adapters'
files of each epoch, drawn scenes, and the cached table; of the cached pictures see data/pixels.py.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from processes import ending, flags, fork, forked, small_config, start
from test_checkpoint import several

from training.checkpoint import checkpoints
from utils import file_hash
from weights.file import MODEL_FILE


def stage(folder: Path) -> str:
    """What a process was doing when it was killed, by what it has left."""
    out = folder / "out"
    if (out / MODEL_FILE).exists():
        return "the end"
    if checkpoints(out):
        return "training"
    if [*(folder / "cache").glob("pixels*")]:
        return "caching, or before the first checkpoint"
    return "drawing" if (out / "scenes").exists() else "starting"


@pytest.mark.slow
@pytest.mark.parametrize("number", [30])
def test_a_command_line_killed_anywhere_ends_in_the_same_model(tmp_path, number):
    """Drawing, caching, training, saving, evaluation, the end: the same command, given again, must end as if nothing had
    been."""
    config = small_config(
        Path(), data_dir=None, dataset="scenes", num_scenes=96, max_steps=90, cache=True, val_pictures=50
    )
    seed, seconds, killed = random.randrange(1 << 32), 0.0, Counter()
    print("seed", seed)

    def begin(folder: Path):
        folder.mkdir(exist_ok=True)
        return start(
            flags(config), folder, environment={"VIT_GPT2_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        )

    def finish(process) -> str:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return said

    began = time.monotonic()
    finish(begin(tmp_path / "quiet"))
    seconds = time.monotonic() - began
    wanted, moments = ending(tmp_path / "quiet/out"), random.Random(seed)
    for index in range(number):
        folder = tmp_path / str(index)
        process = begin(folder)
        time.sleep(moments.uniform(0, seconds))
        process.kill()
        process.communicate()
        killed[stage(folder)] += 1
        said = finish(begin(folder))
        assert ending(folder / "out") == wanted, f"seed {seed}, run {index}: {said}"
        assert file_hash(folder / MODEL_FILE) == wanted[0]
        assert not [*folder.rglob("*.unfinished")]
        shutil.rmtree(folder)
    print(f"{number} of {number} kills ended in the same model: {dict(killed)}")


@several(3, 50)
def test_a_flipped_bit_is_named_and_changes_no_model(tmp_path, scenes_dir, number):
    """A flipped bit is a model that captions a little worse, and nobody knows why."""
    config = small_config(scenes_dir, max_steps=18, keep_checkpoints=3, val_pictures=0)
    forked(config, tmp_path / "whole")
    wanted, seed = ending(tmp_path / "whole/out"), random.randrange(1 << 32)
    print("seed", seed)
    draw, ends = random.Random(seed), Counter()
    for index in range(number):
        folder = tmp_path / str(index)
        shutil.copytree(tmp_path / "whole", folder, symlinks=True)
        (folder / "output.txt").unlink()
        read = [checkpoints(folder / "out")[-1], (folder / "out/checkpoints/best").resolve()]
        hashed = sorted(
            {path for own in read for path in own.iterdir()} | {folder / MODEL_FILE, folder / "out" / MODEL_FILE}
        )
        path = draw.choice(hashed)
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        process = fork(config, folder)
        process.join(120)
        said = (folder / "output.txt").read_text()
        where = path.parent.name if path.parent in read else "a different model in .* folder was renamed to"
        assert re.search(rf"{where}( is damaged)?", said), f"seed {seed}, {index}, {path}: {said}"
        assert "damaged" in said or "was renamed to" in said, f"seed {seed}, {index}, {path}: {said}"
        if process.exitcode == 0:
            assert ending(folder / "out") == wanted and file_hash(folder / MODEL_FILE) == wanted[0], f"{seed}, {index}"
        ends[f"{path.name}, exit code {process.exitcode}"] += 1
        shutil.rmtree(folder)
    print(f"{number} of {number} flips named: {dict(ends)}")
