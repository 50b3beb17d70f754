"""flags.py: what --help and --help-all print."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import pytest
from processes import finished

from config import TrainConfig
from flags import all_fields
from main import INTERNAL

SCRIPTS = ["main.py", "example_usage.py", "evaluate.py"]


def printed(*command: str) -> str:
    return finished(*command, environment={"COLUMNS": "100"}).stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_common_flags_fit_on_a_screen(script):
    """There were 93 flags of main.py, three screens and more."""
    help = printed(script, "--help")
    number = int(re.search(r"--help-all shows all (\d+)", " ".join(help.split()))[1])
    assert len(help.splitlines()) <= 64 and number > 30 and max(map(len, help.splitlines())) <= 100
    everything = printed(script, "--help-all")
    flags = set(re.findall(r"--[a-z][a-z-]+", help))
    assert flags - {"--help-all"} <= set(re.findall(r"--[a-z][a-z-]+", everything)) and len(flags) > 10


def test_every_flag_of_a_training_is_in_the_full_help():
    """Those for programs are not; a default is said once; --no-no-upload was one of them."""
    help = printed("main.py", "--help-all")
    flags = {flag.removeprefix("--").replace("-", "_") for flag in re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", help)}
    fields = set(all_fields(TrainConfig))
    negative = {f"no_{name}" for name in fields}
    assert fields - set(INTERNAL) - {name.removeprefix("no_") for name in flags & negative} <= flags
    assert not flags & set(INTERNAL) and "no_no_upload" not in flags and "None" not in help
    text = " ".join(help.replace("│", " ").split())
    assert not re.search(r"\(default: [^)]*\)\.? \(default", text)


def test_lines_of_a_docstring_are_joined():
    """A line of the source that began with no letter began a line of the help, wherever the words before it had ended."""
    help = printed("main.py", "--help-all")
    lines = [line.strip("│ ").strip() for line in help.splitlines() if line.startswith("│  ")]
    width = max(map(len, lines))
    joined = 0
    for line, following in itertools.pairwise(lines):
        first = following.split(" ")[0]
        if line and following and not following.startswith("-") and not re.search(r"\.\)?$|\)$|^--", line):
            assert len(line) + 1 + len(first) > width - 12, (line, following)
            joined += 1
    assert joined > 30


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_the_shell_completes_flags(tmp_path):
    (tmp_path / "main.py").write_text(printed("main.py", "--tyro-print-completion", "bash"))
    words = "COMP_WORDS=(main.py --batch-s); COMP_CWORD=1; COMP_LINE='main.py --batch-s'; COMP_POINT=17"
    name = re.search(r"complete .*-F (\w+)", (tmp_path / "main.py").read_text())[1]
    line = f". {tmp_path}/main.py; {words}; {name}; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--batch-size"]
