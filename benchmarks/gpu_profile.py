"""Where a training step's time goes, phase by phase, beside what the device's bandwidth and arithmetic allow.

    python benchmarks/gpu_profile.py --shape 2304/65536/4096/40
    python benchmarks/gpu_profile.py --device cpu --shape 256/4096/1024/32

The phases are the calls of ``sae_lens_matryoshka.ops`` that a step of ``matryoshka`` makes, each timed by itself on the
state of a step in the middle of training. A phase's floor is the larger of its arithmetic over the rate of a large
matrix product and of the bytes it cannot avoid over the bandwidth of a large copy, both measured first. Whole steps of
SAELens and of dictionary_learning stand beside.
"""

import argparse
import contextlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from contenders import Options, Shape, batches, contender, level_widths
from sae_lens.saes.sae import TrainStepInput
from torch import nn
from train_step import machine, memory_in_process, synchronize

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.ops.auxiliary_loss import auxiliary_loss
from sae_lens_matryoshka.ops.encoder import selected_hidden_pre
from sae_lens_matryoshka.ops.latents import ActiveLatents, lay_out
from sae_lens_matryoshka.ops.nested_loss import nested_errors
from sae_lens_matryoshka.ops.selection import select_batch_topk

CONTENDERS = ("ours", "SAELens matryoshka", "SAELens matryoshka, compiled", "dictionary_learning")
WARM_UP_STEPS = 20


class Phase(NamedTuple):
    """A part of a training step."""

    name: str
    call: Callable[[], object]
    operations: float
    """Floating-point operations of its matrix products."""

    numbers: float
    """Numbers that it must read or write in memory, each once."""

    part: bool = False
    """Whether it is part of the phase that follows."""


class Ceilings(NamedTuple):
    """What the device does at best."""

    operations: float
    """Floating-point operations a second of a large matrix product."""

    bytes: float
    """Bytes a second, read and written, of a large copy."""


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2304/65536/4096/40", metavar="D_IN/D_SAE/BATCH/K")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast, as SAELens's autocast option")
    parser.add_argument("--tf32", action="store_true", help="matrix products in TF32")
    parser.add_argument("--dead-share", type=float, default=0.01, help="for the phase of the auxiliary loss")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-contenders", action="store_true", help="profile our step alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    shape = Shape.parse(options.shape)
    products = "bfloat16 autocast" if options.autocast else "TF32" if options.tf32 else "float32"
    print(f"{machine(options.device)}; d_in/d_sae/batch/k = {shape}; products in {products}\n")
    ceilings = measure_ceilings(options)
    print(f"Ceilings: {ceilings.operations / 1e12:.1f} TFLOP/s, {ceilings.bytes / 1e9:.0f} GB/s.\n")
    print_phases(shape, ceilings, options)
    if not options.no_contenders:
        print_contenders(shape, options)


def measure_ceilings(options: argparse.Namespace) -> Ceilings:
    """The rates of a large matrix product and of a large copy."""
    size = 8192 if options.device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=options.device) for _ in range(2))
    source = torch.randn(2**28 if options.device == "cuda" else 2**24, device=options.device)
    copy = torch.empty_like(source)
    if options.autocast:
        a, b = a.bfloat16(), b.bfloat16()
    product = median_seconds(lambda: a @ b, options)
    copying = median_seconds(lambda: copy.copy_(source), options)
    return Ceilings(2 * size**3 / product, 2 * 4 * source.numel() / copying)


def print_phases(shape: Shape, ceilings: Ceilings, options: argparse.Namespace) -> None:
    """One table: every phase, its floor and its share of their sum; then the whole step."""
    rows = [(phase, median_seconds(phase.call, options) * 1e3) for phase in phases(shape, options)]
    whole = sum(ms for phase, ms in rows if not phase.part)
    print("| phase | ms | floor, ms | share |\n|---|---|---|---|")
    for phase, ms in rows:
        floor = max(phase.operations / ceilings.operations, 4 * phase.numbers / ceilings.bytes) * 1e3
        share = f"({ms / whole:.0%})" if phase.part else f"{ms / whole:.0%}"
        print(f"| {phase.name} | {ms:.2f} | {floor:.2f} | {share} |", flush=True)
    print(f"| sum (without shares in brackets) | {whole:.2f} | | |\n")
    step = contender("ours", shape, Options(device=options.device, autocast=options.autocast))
    data = batches(shape, 2, options.device)
    for index in range(WARM_UP_STEPS):
        step(data[index % 2])
    if options.device == "cuda":
        print(f"{count_synchronizations(lambda: step(data[0]))} synchronizations a step.\n")


def print_contenders(shape: Shape, options: argparse.Namespace) -> None:
    """One table: whole steps of ours and of what a user could train instead."""
    print("| whole step | ms | against ours | peak extra memory, MB |\n|---|---|---|---|")
    data, ours = batches(shape, 2, options.device), None
    for name in CONTENDERS:
        try:
            step = contender(name, shape, Options(device=options.device, autocast=options.autocast))
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        before = torch.cuda.memory_allocated()
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for index in range(WARM_UP_STEPS):
            step(data[index % 2])
        ms = median_seconds(lambda step=step: step(data[0]), options) * 1e3
        extra = torch.cuda.max_memory_allocated() - before
        del step
        ours = ours or ms
        memory = round(extra / 2**20) if options.device == "cuda" else memory_in_process(name, shape, options)
        print(f"| {name} | {ms:.2f} | {ms / ours:.2f}x | {memory} |", flush=True)


def phases(shape: Shape, options: argparse.Namespace) -> Iterator[Phase]:
    """The phases of a step in the middle of training, in order."""
    sae = trained_a_little(shape, options)
    d_in, d_sae, batch, n = shape.d_in, shape.d_sae, shape.batch, shape.batch * shape.k
    x = batches(shape, 1, options.device)[0]
    W_enc, b_enc, W_dec, b_dec = (p.detach() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    sae_in = (x - b_dec).detach()
    widths, norms, guess = level_widths(d_sae, 5), W_dec.norm(dim=-1), sae.selection_guess
    cast = W_enc.bfloat16() if options.autocast else W_enc
    cast_in = sae_in.to(cast.dtype)
    product = 2.0 * batch * d_in * d_sae

    yield Phase("decoder norms", lambda: W_dec.norm(dim=-1), 0, d_in * d_sae)
    yield Phase("encoder product alone", lambda: cast_in @ cast, product, d_in * d_sae + batch * d_sae, part=True)

    def select() -> Any:
        with autocast(options):
            return select_batch_topk(sae_in, W_enc, b_enc, norms, n, guess)

    yield Phase("encoder product and selection", select, product, d_in * d_sae + 2 * batch * d_sae)
    selection = select()
    yield Phase("layout", lambda: lay_out(selection, batch, widths), 0, 8 * n)
    latents: ActiveLatents = lay_out(selection, batch, widths)
    values = latents.scores
    gathered = n * d_in
    yield Phase("level sums", lambda: latents.level_sums(values, W_dec), 0, gathered + 5 * batch * d_in, part=True)
    levels = latents.level_sums(values, W_dec)
    levels[0] += b_dec - x
    parameters = [nn.Parameter(value.clone()) for value in (values, W_dec, b_dec)]
    yield Phase(
        "nested loss, forward",
        lambda: nested_errors(*parameters, x, latents),  # type: ignore[arg-type]
        0,
        gathered + 2 * 5 * batch * d_in,
    )
    yield Phase(
        "gradient of the activations", lambda: latents.coefficients_grad(levels, W_dec), 0, gathered + 5 * batch * d_in
    )
    yield Phase("gradient of the decoder", lambda: latents.W_dec_grad(levels, values), 0, gathered + d_in * d_sae)
    hidden_pre = selected_hidden_pre(sae_in, sae.W_enc, sae.b_enc, sae.b_dec, latents)
    yield Phase(
        "gradient of the encoder",
        lambda: torch.autograd.grad(hidden_pre, [sae.W_enc, sae.b_enc, sae.b_dec], values, retain_graph=True),
        0,
        gathered + d_in * d_sae,
    )
    yield Phase("activations for the trainer", lambda: latents.to_sparse(values), 0, 6 * n)
    dead = torch.randperm(d_sae, device=options.device)[: int(options.dead_share * d_sae)]

    def auxiliary() -> None:
        with autocast(options):
            loss = auxiliary_loss(sae_in, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, levels[-1], dead, norms, None)
        torch.autograd.grad(loss, [sae.W_enc, sae.W_dec])

    share = options.dead_share
    yield Phase(
        f"auxiliary loss, {share:.0%} dead, forward and backward", auxiliary, 5 * share * product, 2 * d_in * d_sae
    )
    of_sae = list(sae.parameters())
    for parameter in of_sae:
        parameter.grad = torch.empty_like(parameter).normal_()
    yield Phase("clipping", lambda: nn.utils.clip_grad_norm_(of_sae, 1.0), 0, 2 * 3 * d_in * d_sae)
    adam = torch.optim.Adam(of_sae, lr=1e-4, fused=True)
    yield Phase("Adam, fused", adam.step, 0, 2 * 7 * d_in * d_sae)


def trained_a_little(shape: Shape, options: argparse.Namespace) -> MatryoshkaTrainingSAE:
    """An SAE whose guess of the threshold has settled."""
    torch.manual_seed(0)
    cfg = MatryoshkaTrainingSAEConfig(
        shape.d_in, shape.d_sae, k=shape.k, matryoshka_widths=level_widths(shape.d_sae, 5)
    )
    sae = MatryoshkaTrainingSAE(cfg).to(options.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    data = batches(shape, 2, options.device)
    for index in range(WARM_UP_STEPS):
        optimizer.zero_grad()
        with autocast(options):
            output = sae.training_forward_pass(TrainStepInput(data[index % 2], {}, None, index, False))
        output.loss.backward()
        optimizer.step()
    sae.zero_grad()
    return sae


def autocast(options: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """SAELens's autocast, where it is asked for."""
    return torch.autocast(options.device, torch.bfloat16, enabled=options.autocast)


def median_seconds(call: Callable[[], object], options: argparse.Namespace) -> float:
    """Median seconds of a call, the device's work included."""
    times: list[float] = []
    for repeat in range(options.repeats + 2):
        synchronize(options.device)
        start = time.perf_counter()
        call()
        synchronize(options.device)
        if repeat >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def count_synchronizations(call: Callable[[], object]) -> int:
    """How often a call makes the CPU wait for the GPU, as torch counts it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


if __name__ == "__main__":
    main()
