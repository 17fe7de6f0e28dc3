"""Our loss beside SAELens's over a training run: the same start, the same batches, the same optimizer.

python benchmarks/loss_curves.py --device cuda --shape 2304/65536/4096/40 --tf32
"""

import argparse
import warnings
from typing import Any

import torch
from contenders import Shape, batches, level_widths
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from train_step import machine

from sae_lens_matryoshka.training.fused_adam import fuse_adam

ARCHITECTURES = {"ours": "matryoshka", "SAELens": "matryoshka_batchtopk"}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="256/4096/1024/32", metavar="D_IN/D_SAE/BATCH/K")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast, as SAELens's autocast option")
    parser.add_argument("--tf32", action="store_true", help="matrix products in TF32, on a GPU")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    shape = Shape.parse(options.shape)
    data = batches(shape, 8, options.device)
    losses = {name: train(architecture, shape, data, options) for name, architecture in ARCHITECTURES.items()}
    difference = (losses["ours"] / losses["SAELens"] - 1).abs()
    print(f"{machine(options.device)}; d_in/d_sae/batch/k = {shape}\n")
    print("| step | ours | SAELens |\n|---|---|---|")
    for step in (0, 9, 49, 99, 199, 499):
        if step < options.steps:
            print(f"| {step + 1} | {losses['ours'][step]:.4f} | {losses['SAELens'][step]:.4f} |")
    print(f"\nLargest relative difference {difference.max():.1e}, mean {difference.mean():.1e}.")


def train(architecture: str, shape: Shape, data: list[torch.Tensor], options: argparse.Namespace) -> torch.Tensor:
    """The loss of every step."""
    torch.manual_seed(0)
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    fields: dict[str, Any] = {"k": shape.k, "matryoshka_widths": level_widths(shape.d_sae, 5)}
    sae = sae_class(config_class(d_in=shape.d_in, d_sae=shape.d_sae, **fields))
    sae.to(options.device)
    settings = {"lr": options.lr, "lr_end": options.lr, "device": options.device, "autocast": options.autocast}
    trainer = SAETrainer(SAETrainerConfig(10**9, shape.batch, **settings), sae, iter(()))
    if architecture == "matryoshka":
        fuse_adam(trainer)
    losses: list[torch.Tensor] = []
    for step in range(options.steps):
        losses.append(trainer.step(data[step % len(data)]).loss.detach())
        trainer.n_training_steps += 1
    return torch.stack(losses).double().cpu()


if __name__ == "__main__":
    main()
