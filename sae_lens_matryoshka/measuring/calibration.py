"""Setting the inference threshold of an SAE so that it fires the number of latents it was trained to fire.

BatchTopK chooses latents by comparing a whole batch; for inference SAELens saves one threshold in its place. Here that
threshold is measured: on n samples, the right one lies just below the (target_l0 * n)-th largest pre-activation.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from sae_lens import BatchTopKTrainingSAE, JumpReLUSAE
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_matryoshka.ops.selection import column_products
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE


@dataclass(frozen=True)
class ThresholdCalibration:
    """What :func:`calibrate_threshold` did."""

    shift: float
    """What was added to every threshold, in units of the pre-activations."""

    l0_before: float
    """Mean number of latents a sample that fired before, on the calibration samples."""

    l0_after: float
    """The same after the shift."""

    n_samples: int
    """How many samples were used."""


@torch.no_grad()
def calibrate_threshold(
    sae: BatchTopKTrainingSAE | JumpReLUSAE | MatryoshkaSAE,
    activations: Iterable[Float[Tensor, "batch d_in"]],
    n_samples: int = 100_000,
    target_l0: float | None = None,
) -> ThresholdCalibration:
    """Shift the threshold of an SAE, in place, so that ``target_l0`` latents fire on average a sample.

    The shift is exact on the samples given: not an estimate from batches, but the order statistic of all
    pre-activations. A training SAE has one running threshold, which is set; an inference SAE has one threshold a
    latent, and all of them move by the same amount, so learned differences between latents stay.

    Args:
        sae: A BatchTopK training SAE (ours or SAELens's) or a JumpReLU SAE (Matryoshka SAEs trained
            with BatchTopK are).
        activations: Batches of shape (batch, d_in) as the SAE takes them, that is scaled where training scales them.
            Only as many are drawn as are needed.
        n_samples: How many samples to use. Fewer are used if ``activations`` ends early.
        target_l0: Mean number of latents to fire a sample; None takes the ``k`` the SAE was trained with.

    Raises:
        ValueError: If ``target_l0`` is not given and not recorded, is not in (0, d_sae], if ``n_samples`` is not
            positive, or if there are no activations or any that are not finite.
        TypeError: If the SAE has no threshold: TopK and standard SAEs.
    """
    if not isinstance(sae, BatchTopKTrainingSAE | JumpReLUSAE):
        raise TypeError(
            f"A {type(sae).__name__} has no threshold to calibrate; pass a JumpReLU SAE or a BatchTopK training SAE."
        )
    target_l0 = _target_l0(sae, target_l0)
    threshold = sae.topk_threshold if isinstance(sae, BatchTopKTrainingSAE) else sae.threshold.data
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples} must be positive.")
    # one more than may fire: the threshold lies above the largest value that must not
    largest = _LargestValues(max(1, round(target_l0 * n_samples)) + 1)
    n_seen = n_fired = 0
    with tqdm(total=n_samples, desc="Calibrating threshold", leave=False) as progress:
        for batch in activations:
            x = sae.process_sae_in(batch.to(sae.device)).reshape(-1, sae.cfg.d_in)[: n_samples - n_seen]
            for hidden_pre, compared in _compared(sae, x, threshold.float().expand(sae.cfg.d_sae)):
                if not torch.stack(hidden_pre.aminmax()).isfinite().all():
                    raise ValueError(f"The activations after sample {n_seen} give pre-activations that are not finite.")
                n_fired += int((hidden_pre > compared.clamp(min=0)).sum())
                largest.add(_margins_above(largest.smallest_kept, hidden_pre, compared))
            n_seen += x.shape[0]
            progress.update(x.shape[0])
            if n_seen >= n_samples:
                break
    if n_seen == 0:
        raise ValueError("There are no activations to calibrate the threshold on.")

    n_to_fire = max(1, round(target_l0 * n_seen))
    values = largest.descending()
    if len(values) > n_to_fire:
        # halfway between the last that fires and the first that does not: rounding then moves neither
        shift = values[n_to_fire - 1 : n_to_fire + 1].double().mean().item()
        n_firing = int((values > shift).sum())
    else:  # even with every positive pre-activation firing there are too few
        shift = -threshold[threshold.isfinite()].max().item()  # infinite ones belong to latents that never fire
        n_firing = len(values)
    threshold += shift
    return ThresholdCalibration(shift, n_fired / n_seen, n_firing / n_seen, n_seen)


class _LargestValues:
    """The n largest values of a stream, exactly, in the memory of 2n values and one batch."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.values: Tensor | None = None
        self.smallest_kept = -torch.inf

    def add(self, values: Float[Tensor, " any"]) -> None:
        values = values[values > self.smallest_kept]
        self.values = values if self.values is None else torch.cat([self.values, values])
        if self.values.numel() > 2 * self.n:
            self.values = self.values.topk(self.n).values
            self.smallest_kept = self.values[-1].item()

    def descending(self) -> Float[Tensor, " at_most_n"]:
        values = torch.empty(0) if self.values is None else self.values
        return values.sort(descending=True).values[: self.n]


def _compared(
    sae: BatchTopKTrainingSAE | JumpReLUSAE, x: Float[Tensor, "batch d_in"], threshold: Float[Tensor, " d_sae"]
) -> Iterator[tuple[Float[Tensor, "batch chunk"], Float[Tensor, " chunk"]]]:
    """What is compared with what for a latent to fire, a chunk of columns at a time.

    All columns at once would take some 25 bytes a latent a sample: more than training does.
    """
    rescale = isinstance(sae, BatchTopKTrainingSAE) and sae.cfg.rescale_acts_by_decoder_norm
    scale = sae.W_dec.norm(dim=-1) if rescale else None
    for columns, product in column_products(x, sae.W_enc):
        hidden_pre = product.add_(sae.b_enc[columns])
        if scale is not None:
            hidden_pre *= scale[columns]
        yield hidden_pre, threshold[columns]


def _margins_above(
    least: float, hidden_pre: Float[Tensor, "batch chunk"], threshold: Float[Tensor, " chunk"]
) -> Float[Tensor, " any"]:
    """How far positive pre-activations lie above their threshold, where that is more than ``least``, or hardly less."""
    floor = (threshold + least - 1e-6 * (threshold + least).abs()).nan_to_num(nan=-torch.inf).clamp(min=0)
    found = (hidden_pre > floor).flatten().nonzero().squeeze(1)
    return hidden_pre.flatten()[found].float() - threshold[found % hidden_pre.shape[1]]


def _target_l0(sae: BatchTopKTrainingSAE | JumpReLUSAE, target_l0: float | None) -> float:
    if target_l0 is None:
        if isinstance(sae, BatchTopKTrainingSAE):
            target_l0 = sae.cfg.k
        else:
            target_l0 = (sae.cfg.metadata.training_architecture_details or {}).get("k")
    if target_l0 is None:
        raise ValueError("This SAE does not record the k it was trained with; pass target_l0.")
    if not 0 < target_l0 <= sae.cfg.d_sae:
        raise ValueError(f"target_l0={target_l0} must be above 0 and at most d_sae={sae.cfg.d_sae}.")
    return target_l0
