"""benchmark.py machine: this computer's hardware, and its times for captions and training, as a Markdown table."""

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
    """Measure this computer's CPU: its rates, and captions and a training step of a base-size model next to
    transformers, in every precision that it has kernels for. Takes about seven minutes on two cores, and ends with a
    table in Markdown."""

    rounds: int = 5
    """Rounds of captioning, in each of which both take a turn; a ratio is the median over rounds."""
    train: bool = True
    """Also measure the training step, which takes half of the time."""
    tiny: bool = False
    """Use a tiny model, to check that every line runs."""
    output: Path = Path("benchmark-machine.json")
    """JSON file to write the figures to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> dict[str, Any]:
        """Measure everything, print the table, and return all figures."""
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
    """The CPU's product name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def instruction_sets() -> str:
    """The instruction set that torch's kernels use, and those of SETS that the CPU has."""
    used = torch.backends.cpu.get_cpu_capability()
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.12 and later
    return ", ".join([f"torch uses {used}", *(name for name in SETS if has.get(name))])


def table(found: dict[str, Any]) -> list[str]:
    """The figures as lines of Markdown."""
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
            f"{ours['seconds']:.2f} s, {ours['ratio']:.2f}x, {ours['floor'] / ours['seconds']:.0%} of the floor's speed"
            for ours in (row[precision] for precision in rates)
        ]
        lines.append(f"| {name} | {row['fp32']['transformers']:.2f} s | {' | '.join(cells)} |")
    return lines + training_rows(found.get("train", {"loops": [], "ratios": {}}), list(rates))


def training_rows(train: dict[str, Any], precisions: list[str]) -> list[str]:
    """A table row for each number of pairs per step that transformers was measured with."""
    loops = {(loop["whose"], loop["precision"], loop["pairs"]): loop for loop in train["loops"]}
    lines = []
    for whose, precision, pairs in loops:
        if (whose, precision) == ("transformers", "fp32"):
            theirs, cells = loops[whose, precision, pairs], []
            for name in precisions:
                ours = next((loop for key, loop in loops.items() if key[:2] == ("ours", name)), None)
                ratio = ours and theirs["seconds_per_pair"] / ours["seconds_per_pair"]
                cells.append(
                    f"{ours['seconds_per_pair']:.3f} s, {ratio:.2f}x, {ours['utilisation']:.0%} of the product's rate"
                    if ours
                    else ""
                )
            peer = f"{theirs['seconds_per_pair']:.3f} s, {theirs['utilisation']:.0%}"
            lines.append(f"| a pair in training, transformers' steps of {pairs} pairs | {peer} | {' | '.join(cells)} |")
    return lines
