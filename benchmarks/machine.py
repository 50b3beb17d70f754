"""benchmark.py machine: what this computer has, and what captions and training cost on it, as a table to paste."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.captions import GenerateBenchmark, memory_rate, packed_precisions, product_rate
from benchmarks.timing import about_machine, sizes
from benchmarks.training import TrainBenchmark
from decoding.packed import how_int8
from utils import available_memory, choose_precision

SETS = ("avx2", "avx_vnni", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "neon", "dotprod", "i8mm", "sve")  # fmt: skip


@dataclass(kw_only=True)
class MachineBenchmark:
    """This computer's CPU: its rates, captions of base size and a training step beside transformers', in every precision that
    it has kernels for. About seven minutes on two cores; ends with a table in Markdown."""

    rounds: int = 5
    """Pairs of turns that a caption's ratio is the median of."""
    train: bool = True
    """Also the training step, half of the time."""
    tiny: bool = False
    """A tiny model: does every line run?"""
    output: Path = Path("benchmark-machine.json")
    """Where the figures are written to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> dict[str, Any]:
        """All figures."""
        about = {"processor": processor(), "sets": instruction_sets(), "memory": available_memory()}
        rates = {name: product_rate(name) for name in packed_precisions()}
        found: dict[str, Any] = {"about": about, "rates": rates | {"memory": memory_rate()}}
        found |= GenerateBenchmark(device="cpu", rounds=self.rounds, model=sizes(self.tiny)).run()
        if self.train:
            half = choose_precision("auto", torch.device("cpu"))[0] == torch.bfloat16
            precisions: Any = ("fp32", "bf16") if half else ("fp32",)
            found |= {
                "train": TrainBenchmark(device="cpu", precisions=precisions, steps=1, model=sizes(self.tiny)).run()
            }
        print("\n".join(["", *table(found)]))
        return found


def processor() -> str:
    """The CPU's name, as its maker gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def instruction_sets() -> str:
    """What torch takes for its own kernels, and what the CPU has that matters here."""
    own = torch.backends.cpu.get_cpu_capability()
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.12 and later
    return ", ".join([f"torch uses {own}", *(name for name in SETS if has.get(name))])


def table(found: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    about, rates, machine = found["about"], dict(found["rates"]), about_machine()
    memory = rates.pop("memory")
    cores = f"{machine['cores']} cores ({torch.get_num_threads()} threads)"
    lines = [
        f"{about['processor']}, {cores}, {about['sets']}, {about['memory'] / 2**30:.0f} GiB; torch {machine['torch']}."
    ]
    products = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())
    lines += [f"Memory is read at {memory / 1e9:.1f} GB/s; products in Gop/s: {products}. int8: {how_int8()}.", ""]
    lines += [f"| | transformers, fp32 | {' | '.join(rates)} |", "|---" * (2 + len(rates)) + "|"]
    for row in found["generate"]:
        some = f"{row['pictures']} picture{'s' * (row['pictures'] > 1)}, "
        name = some + ("greedy" if row["beams"] == 1 else f"{row['beams']} beams")
        cells = [
            f"{own['seconds']:.2f} s, {own['ratio']:.2f}x, {own['floor'] / own['seconds']:.0%} of the floor"
            for own in (row[precision] for precision in rates)
        ]
        lines.append(f"| {name} | {row['fp32']['transformers']:.2f} s | {' | '.join(cells)} |")
    return lines + training_rows(found.get("train", {"loops": [], "ratios": {}}), list(rates))


def training_rows(train: dict[str, Any], precisions: list[str]) -> list[str]:
    """A line for each of transformers' numbers of pairs a step."""
    loops = {(loop["whose"], loop["precision"], loop["pairs"]): loop for loop in train["loops"]}
    lines = []
    for whose, precision, pairs in loops:
        if (whose, precision) == ("transformers", "fp32"):
            theirs, cells = loops[whose, precision, pairs], []
            for name in precisions:
                own = next((loop for key, loop in loops.items() if key[:2] == ("ours", name)), None)
                ratio = own and theirs["seconds_per_pair"] / own["seconds_per_pair"]
                cells.append(
                    f"{own['seconds_per_pair']:.3f} s, {ratio:.2f}x, {own['utilisation']:.0%} of the product's rate"
                    if own
                    else ""
                )
            said = f"{theirs['seconds_per_pair']:.3f} s, {theirs['utilisation']:.0%}"
            lines.append(f"| a pair in training, beside steps of {pairs} pairs | {said} | {' | '.join(cells)} |")
    return lines
