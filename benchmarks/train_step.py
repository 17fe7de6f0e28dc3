"""Time and memory of one training step, ours beside what a user could train instead.

All contenders take turns within one run, on the same batches; medians are compared. Memory is the peak of a process of
its own above what it held before its first step.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda --shapes 2304/65536/4096/40 --autocast
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from contenders import Options, Shape, Step, batches, contender, forward_backward

from sae_lens_matryoshka.saes import thresholded_family

SHAPES = ["64/2048/2048/16", "512/8192/4096/32", "768/16384/2048/40", "2304/16384/2048/40"]
CONTENDERS = [
    "ours",
    "ours, SAELens's Adam",
    "SAELens matryoshka",
    "SAELens matryoshka, compiled",
    "SAELens batchtopk",
    "dictionary_learning",
    "encoder product",
]
VARIANTS = [
    ("batchtopk", "k"),
    ("topk", "k"),
    ("jumprelu", "half, as at the start"),
    ("jumprelu", "k"),
    ("standard", "half, as at the start"),
    ("standard", "k"),
]


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="D_IN/D_SAE/BATCH/K")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument(
        "--only", choices=["contenders", "variants", "listing", "options"], help="print tables of one kind only"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast, as SAELens's autocast option")
    parser.add_argument("--tf32", action="store_true", help="matrix products in TF32, on a GPU")
    parser.add_argument("--memory-of", metavar="CONTENDER", help="print one contender's peak extra memory in MB")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    if options.memory_of:
        print(peak_extra_memory(options.memory_of, Shape.parse(options.shapes[0]), options.device, options.autocast))
        return
    print(f"{machine(options.device)}\n")
    shapes = [Shape.parse(text) for text in options.shapes]
    middle = shapes[-2] if len(shapes) > 1 else shapes[0]
    if options.only in (None, "contenders"):
        for shape in shapes:
            compare_contenders(shape, options)
    if options.only in (None, "variants"):
        compare_variants(middle, options)
    if options.only in (None, "listing"):
        compare_listing(middle, options)
    if options.only in (None, "options"):
        compare_options(middle, options)


def compare_contenders(shape: Shape, options: argparse.Namespace) -> None:
    """One table: every contender at one shape."""
    base = Options(device=options.device, autocast=options.autocast)
    steps: dict[str, Step] = {}
    for name in options.contenders:
        try:
            steps[name] = contender(name, shape, base)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    steps["ours, forward + backward"] = forward_backward(shape, base)
    seconds = interleaved_medians(steps, shape, options)
    print(f"### d_in/d_sae/batch/k = {shape}\n")
    print("| contender | seconds a step | against ours | peak extra memory, MB |\n|---|---|---|---|")
    for name, median in seconds.items():
        memory = (
            "" if name in ("ours, forward + backward", "encoder product") else memory_in_process(name, shape, options)
        )
        print(f"| {name} | {median:.4f} | {median / seconds['ours']:.2f}x | {memory} |", flush=True)
    print()


def compare_variants(shape: Shape, options: argparse.Namespace) -> None:
    """One table: every variant with 5 levels beside its SAELens twin with one."""
    print(f"### Every variant with 5 levels beside its one-level twin, {shape}\n")
    print("| variant | latents that fire | ours | SAELens's twin | twin / ours |\n|---|---|---|---|---|")
    for variant, firing in VARIANTS:
        base = Options(device=options.device, autocast=options.autocast, sparse=firing == "k")
        ours = "ours" if variant == "batchtopk" else f"ours {variant}"
        steps = {name: contender(name, shape, base) for name in (ours, f"SAELens {variant}")}
        seconds, twin_seconds = interleaved_medians(steps, shape, options).values()
        ratio = twin_seconds / seconds
        print(f"| {variant} | {firing} | {seconds:.3f} | {twin_seconds:.3f} | {ratio:.2f}x |", flush=True)
    print()


def compare_listing(shape: Shape, options: argparse.Namespace) -> None:
    """One table: our ReLU step from listed entries and from whole matrices, by the share of latents that fire."""
    print(f"### Entries listed or whole matrices, standard, {shape}\n")
    print("| share that fires | listed | whole matrices |\n|---|---|---|")
    for share in (0.0025, 0.01, 0.03, 0.06):
        firing = replace(shape, k=round(share * shape.d_sae))
        base = Options(device=options.device, autocast=options.autocast, sparse=True)
        step = contender("ours standard", firing, base)
        medians: list[float] = []
        for limit in (1.0, -1.0):  # everything may be listed, or nothing
            thresholded_family.LISTED_SHARE = limit
            medians += interleaved_medians({"step": step}, shape, options).values()
        print(f"| {share:.2%} | {medians[0]:.3f} | {medians[1]:.3f} |", flush=True)
    print()


def compare_options(shape: Shape, options: argparse.Namespace) -> None:
    """One table: our step with few and many levels, and with dead latents."""
    variants = {
        "2 levels": Options(n_levels=2),
        "5 levels": Options(),
        "20 levels": Options(n_levels=20),
        "5 levels, 10 % dead": Options(dead_share=0.1),
        "2 prefixes drawn a step": Options(prefix_sampling={"n_prefixes": 2}),
        "10 prefixes drawn a step": Options(prefix_sampling={"n_prefixes": 10}),
    }
    steps = {
        name: contender("ours", shape, replace(variant, device=options.device, autocast=options.autocast))
        for name, variant in variants.items()
    }
    seconds = interleaved_medians(steps, shape, options)
    print(f"### Ours with other levels, {shape}\n")
    print("| | seconds a step | against 2 levels |\n|---|---|---|")
    for name, median in seconds.items():
        print(f"| {name} | {median:.4f} | {median / seconds['2 levels']:.2f}x |")
    print()


def interleaved_medians(steps: Mapping[str, Step], shape: Shape, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each step, all taking turns."""
    data = batches(shape, 4, options.device)
    for step in steps.values():
        for x in data[:2]:
            step(x)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats):
        for name, step in steps.items():
            synchronize(options.device)
            start = time.perf_counter()
            step(data[repeat % len(data)])
            synchronize(options.device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def memory_in_process(name: str, shape: Shape, options: argparse.Namespace) -> str:
    """The peak extra memory of a contender, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--shapes", str(shape), "--device", options.device]
    if options.autocast:
        command.append("--autocast")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def peak_extra_memory(name: str, shape: Shape, device: str, autocast: bool) -> int:
    """Peak memory in MB during three steps, above what the process held before the first."""
    step = contender(name, shape, Options(device=device, autocast=autocast))
    data = batches(shape, 3, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the contender and its data
        before = _status_bytes("VmRSS")
    for x in data:
        step(x)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")
    return round((peak - before) / 2**20)


def _status_bytes(field: str) -> int:
    """A field of this process's status. (ru_maxrss would be the largest of this process and its parent.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def synchronize(device: str) -> None:
    """Wait for the GPU, where there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> str:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "sae-lens"))
    return f"{name}{threads}; Python {platform.python_version()}, {packages}"


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
