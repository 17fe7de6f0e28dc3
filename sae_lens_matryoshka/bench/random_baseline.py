"""An SAE of the same shape whose decoder is random and never trained: what a score is worth that it reaches too.

arXiv:2602.14111 finds SAEs with random frozen decoders close to trained ones on interpretability and probing. There the
encoder is trained; here nothing is, so that it costs no more than an evaluation: latents are random directions in space
where every channel has mean 0 and variance 1 (or the largest channel would own all latents), each latent's encoder is
its direction, and what depends on data is set in closed form: the thresholds, so that each level has the L0 of the
trained SAE's, and one gain a level, so that its reconstruction is best.
"""

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from torch import Tensor

from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.cache import Entry
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, SAEView, SharedEncoder
from sae_lens_matryoshka.bench.texts_alone import activations_alone, is_special, text_tokens
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.saes.matryoshka_sae_kinds import MatryoshkaJumpReLUSAE, MatryoshkaJumpReLUSAEConfig
from sae_lens_matryoshka.saved.baseline_names import random_name

SEED = 0
"""The seed of the directions."""

CALIBRATION_TEXTS = ("161_agnews_0", "113_movie_sent", "159_code_Python", "94_ai_gen")
"""What thresholds and gains are set on: data sets that the package sae_probes, which SAEBench needs, has in its files.

The same whatever is evaluated, so that the baseline of an SAE is one SAE, whose results can be kept and compared.
"""

TEXTS_A_SET, TOKENS_A_TEXT, BATCH_SIZE = 32, 48, 32


def random_baselines(saes: Sequence[EvaluatedSAE], hook: Hook, source: ActivationSource) -> list[EvaluatedSAE]:
    """The baselines of some levels of an SAE, or of an SAE without levels, named ``NAME_random``.

    Args:
        saes: What shares an encoder.
        hook: Where its activations are taken.
        source: The model's activations.
    """
    whole = saes[0].sae
    random = random_baseline(whole, calibration_activations(hook, source), SEED)
    random.cfg.metadata = copy.deepcopy(whole.cfg.metadata)
    random.cfg.metadata.random_baseline_seed = SEED
    random = random.to(device=whole.device, dtype=whole.dtype)
    return [replace(evaluated, name=random_name(evaluated.name), sae=random) for evaluated in saes]


@torch.no_grad()
def random_baseline(sae: SAE, activations: Float[Tensor, "tokens d_in"], seed: int) -> JumpReLUSAE:
    """The baseline of an SAE: its widths, and on these activations its L0 at every level.

    Args:
        sae: The SAE.
        activations: Activations of the model.
        seed: The seed of the directions.

    Returns:
        An SAE with levels if the other has any, with JumpReLU whatever the other has.
    """
    widths = sae.widths if isinstance(sae, MatryoshkaSAE) else [sae.cfg.d_sae]
    l0 = _l0_by_level(sae, activations, len(widths))
    x = activations.float().cpu()
    mean, deviation = x.mean(dim=0), x.std(dim=0)
    x = x - mean
    per_deviation = torch.where(deviation > 0, 1 / deviation, torch.zeros_like(deviation))
    directions = torch.randn(widths[-1], x.shape[1], generator=torch.Generator().manual_seed(seed))
    directions /= directions.norm(dim=1, keepdim=True)
    if isinstance(sae, MatryoshkaSAE):
        baseline: JumpReLUSAE = MatryoshkaJumpReLUSAE(
            MatryoshkaJumpReLUSAEConfig(x.shape[1], widths[-1], matryoshka_widths=widths)
        )
    else:
        baseline = JumpReLUSAE(JumpReLUSAEConfig(x.shape[1], widths[-1]))
    baseline.W_enc.copy_((directions * per_deviation).T)
    baseline.W_dec.copy_(directions * deviation)
    baseline.b_enc.zero_()
    baseline.b_dec.copy_(mean)
    residual = x
    for start, end, few, many in zip([0, *widths], widths, [0.0, *l0], l0, strict=False):
        hidden_pre = x @ baseline.W_enc[:, start:end]
        baseline.threshold[start:end] = _threshold(hidden_pre, round((many - few) * len(x)))
        acts = hidden_pre * (hidden_pre > baseline.threshold[start:end])
        reconstruction = acts @ baseline.W_dec[start:end]
        if reconstruction.any():
            gain = (residual * reconstruction).sum() / reconstruction.square().sum()
            baseline.W_dec[start:end] *= gain
            residual = residual - gain * reconstruction
    return baseline


def calibration_activations(hook: Hook, source: ActivationSource) -> Float[Tensor, "tokens d_in"]:
    """Activations on :data:`CALIBRATION_TEXTS`, special tokens left out.

    Args:
        hook: Where to take them.
        source: The model's.
    """

    def compute() -> Entry:
        tokens = text_tokens(source.model, _calibration_texts(), TOKENS_A_TEXT)
        rows = [
            activations[~is_special(source.model, tokens[index])]
            for index, activations in activations_alone(
                source.model, tokens, hook, BATCH_SIZE, "reading texts for baselines"
            )
        ]
        return Entry({"activations": torch.cat(rows)})

    parts = {"hook": hook.name, "texts": [*CALIBRATION_TEXTS], "sizes": [TEXTS_A_SET, TOKENS_A_TEXT]}
    entry = source.cache.get_or_compute(source.key("activations for baselines", **parts), compute)
    return entry.tensors["activations"].to(source.device)


def _calibration_texts() -> list[str]:
    spec = importlib.util.find_spec("sae_probes")  # importing it would read all of its data sets
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data" / "cleaned_data"
    texts: list[str] = []
    for name in CALIBRATION_TEXTS:
        frame = pd.read_csv(folder / f"{name}.csv.zst", compression="zstd", nrows=TEXTS_A_SET)
        texts += frame["prompt"].astype(str).tolist()
    return texts


def _l0_by_level(sae: SAE, activations: Float[Tensor, "tokens d_in"], n_levels: int) -> list[float]:
    hook = Hook("", 0)
    encoder = SharedEncoder(SAEView(sae, hook, ""))
    active = torch.zeros(n_levels)
    for block in activations.to(sae.dtype).to(sae.device).split(512):
        encoded = encoder.encode(block)
        active += torch.tensor([float((encoder.of_level(encoded, level) != 0).sum()) for level in range(n_levels)])
    return (active / len(activations)).tolist()


def _threshold(hidden_pre: Float[Tensor, "tokens latents"], n_active: int) -> Tensor:
    """Above which there are ``n_active`` values, or all positive ones if they are fewer."""
    n_active = min(max(n_active, 0), hidden_pre.numel() - 1)
    return hidden_pre.flatten().topk(n_active + 1).values[-1].clamp(min=0)
