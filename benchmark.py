"""Measure speed and its cost on this machine, next to transformers and pycocoevalcap.

    python benchmark.py data          the data loader against plain transformers, and the cost of large caption tables
    python benchmark.py machine       this computer in ten minutes: hardware, captions and training steps, as a table
    python benchmark.py generate      captions by our decoding and by transformers', from the same weights
    python benchmark.py folder        captions of a folder, against the model alone and picture decoding alone
    python benchmark.py precision     the cost of lower precision: CIDEr-D of a model in each precision
    python benchmark.py train         training steps by our loop, and by a plain loop with transformers' model
    python benchmark.py race          Flickr8k in equal time: five captions a step, one, and transformers
    python benchmark.py ruler         what a change of the recipe gains: small runs on Flickr8k, several seeds
    python benchmark.py golden        the same small run by two commits: are all its files equal?
    python benchmark.py gpu           everything that needs a GPU, in eight minutes, next to predicted figures
    python benchmark.py plan          hours, money and traffic of hundreds of millions of pictures, from measured rates
    python benchmark.py metrics       BLEU, ROUGE-L, CIDEr-D and rewards by our code and by pycocoevalcap

Prints the figures and writes them as JSON. Compared programs run in turn in one process, so that ratios are meaningful
even where absolute figures are not.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from config import UserError
from flags import parse_flags
from utils import run_script, write_json

COMMANDS = {  # file in benchmarks/ and class; only that file is imported, so that --help does not wait for torch
    "data": ("loader", "DataBenchmark"),
    "machine": ("machine", "MachineBenchmark"),
    "generate": ("captions", "GenerateBenchmark"),
    "folder": ("captions", "FolderBenchmark"),
    "precision": ("captions", "PrecisionBenchmark"),
    "metrics": ("metrics", "MetricsBenchmark"),
    "train": ("training", "TrainBenchmark"),
    "race": ("training", "RaceBenchmark"),
    "ruler": ("ruler", "RulerBenchmark"),
    "golden": ("golden", "GoldenBenchmark"),
    "gpu": ("gpu", "GpuBenchmark"),
    "plan": ("plan", "PlanBenchmark"),
}


def main() -> None:
    """Run the benchmark that the command line names."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name not in COMMANDS:
        raise UserError(f"usage: python benchmark.py {'|'.join(COMMANDS)} (add --help for its flags)")
    file, command = COMMANDS[name]
    kind = getattr(importlib.import_module(f"benchmarks.{file}"), command)
    config: Any = kind.parsed(arguments) if name == "gpu" else parse_flags(kind, __doc__, arguments)
    from benchmarks.timing import about_machine

    write_json(config.output, about_machine() | config.run())
    print(f"written to {config.output}")


if __name__ == "__main__":
    run_script(main)
