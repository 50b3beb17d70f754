"""Speed, and what it costs, side by side with transformers and pycocoevalcap, on the machine at hand.

    python benchmark.py data          the loader against the plain transformers path, and how the table grows
    python benchmark.py machine       this computer in ten minutes: what it has, captions and training steps, as a table
    python benchmark.py generate      captions by our decoding and by transformers', from the same weights
    python benchmark.py folder        captions of a folder, against the model alone and decoding alone
    python benchmark.py precision     what fewer bits cost: CIDEr-D of a model in each precision
    python benchmark.py train         training steps by our loop and by transformers' model in an ordinary one
    python benchmark.py race          Flickr8k in equal time: five captions a step, one, and transformers
    python benchmark.py golden        the same small run by two commits: is all that it leaves the same?
    python benchmark.py gpu           all that only a GPU can show, in eight minutes, beside what was predicted
    python benchmark.py metrics       BLEU, ROUGE-L, CIDEr-D and rewards by our arrays and by pycocoevalcap

Prints its figures and writes them as JSON. Peers run in turn in one process, so that ratios mean something where
absolute figures do not.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from config import UserError
from utils import parse_flags, run_script, write_json

COMMANDS = {  # in which file of benchmarks/ each is; the others, and torch, need not be imported for it
    "data": ("loader", "DataBenchmark"),
    "machine": ("machine", "MachineBenchmark"),
    "generate": ("captions", "GenerateBenchmark"),
    "folder": ("captions", "FolderBenchmark"),
    "precision": ("captions", "PrecisionBenchmark"),
    "metrics": ("metrics", "MetricsBenchmark"),
    "train": ("training", "TrainBenchmark"),
    "race": ("training", "RaceBenchmark"),
    "golden": ("golden", "GoldenBenchmark"),
    "gpu": ("gpu", "GpuBenchmark"),
}


def main() -> None:
    """The command line."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name not in COMMANDS:
        raise UserError(f"usage: python benchmark.py {'|'.join(COMMANDS)} (--help after it shows the flags)")
    file, command = COMMANDS[name]
    kind = getattr(importlib.import_module(f"benchmarks.{file}"), command)
    config: Any = kind.parsed(arguments) if name == "gpu" else parse_flags(kind, __doc__, arguments)
    from benchmarks.timing import about_machine

    write_json(config.output, about_machine() | config.run())
    print(f"written to {config.output}")


if __name__ == "__main__":
    run_script(main)
