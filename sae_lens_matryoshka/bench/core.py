"""SAEBench's core evaluation: L0, variance explained, loss recovered, densities; on the same tokens for every SAE.

Beside SAEBench's means over all tokens, their standard errors over sequences, whose tokens belong together.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_lens_matryoshka.bench.activation_source import ActivationSource, check_finite_activations
from sae_lens_matryoshka.bench.beyond_saebench import Beyond
from sae_lens_matryoshka.bench.cache import Entry
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, SAEView
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.fingerprints import path_hash
from sae_lens_matryoshka.bench.labelled_text import fetching
from sae_lens_matryoshka.bench.models import Model
from sae_lens_matryoshka.bench.standard_errors import of_ratio
from sae_lens_matryoshka.bench.upstream import CoreEvalConfig, CoreEvalOutput, core_main
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.text.data_files import READERS
from sae_lens_matryoshka.text.data_set import open_text_file

Tokens = Int[Tensor, "batches prompts context"]

EXPLAINED_VARIANCE = "explained_variance_saelens"
"""Where ``eval_result_unstructured`` holds the share of variance explained as SAELens computes it.

SAEBench's ``explained_variance`` subtracts the square of the mean square where it means the square of the mean.
"""

SHUFFLE_SEED = 42
"""The seed with which SAEBench shuffles the text (``core.main.multiple_evals``)."""


class Core(Evaluation[CoreEvalConfig]):
    """SAEBench's ``core``.

    Args:
        config: SAEBench's config; None takes its defaults. Its output needs every metric, so all ``compute_*`` are on.
            Its ``dataset`` is a name on the Hugging Face Hub, or the path of a local data set or of a file.
        follow_training: Whether an SAE that was trained without special tokens (``exclude_special_tokens``) does not
            reconstruct them here either, whatever the config's ``exclude_special_tokens_from_reconstruction`` says.
            SAEBench does what its config says, which by default lets such an SAE replace activations it never saw.
    """

    name = "core"
    output_type = CoreEvalOutput
    takes_baselines = True

    def __init__(self, config: CoreEvalConfig | None = None, follow_training: bool = True) -> None:
        config = config or CoreEvalConfig()
        everything = {field.name: True for field in dataclasses.fields(config) if field.name.startswith("compute_")}
        for field in ("batch_size_prompts", "context_size", "n_eval_reconstruction_batches",
                      "n_eval_sparsity_variance_batches"):  # fmt: skip
            if getattr(config, field) < 1:
                raise UserError(f"core.{field}={getattr(config, field)} must be at least 1.")
        dataset = os.path.expanduser(config.dataset)
        super().__init__(dataclasses.replace(config, dataset=dataset, **everything))
        self.follow_training = follow_training
        self._text_hash: str | None = None

    def config_for(self, sae: EvaluatedSAE) -> CoreEvalConfig:
        if not self.follow_training or not sae.sae.cfg.metadata.exclude_special_tokens:
            return self.config
        return dataclasses.replace(self.config, exclude_special_tokens_from_reconstruction=True)

    def begin(self, source: ActivationSource) -> None:
        super().begin(source)
        path = Path(self.config.dataset)
        # of local text by its contents; a data set on the Hub is what its name stands for
        self._text_hash = path_hash(path) if path.exists() else None

    def inputs(self, source: ActivationSource) -> dict[str, Any]:
        return {**super().inputs(source), "text": self._text_hash}

    def inputs_of_sae(self, sae: EvaluatedSAE, source: ActivationSource) -> dict[str, Any]:
        tokens = {"prepend_bos": sae.sae.cfg.metadata.prepend_bos, "special": sorted(_special_tokens(sae.sae, source))}
        return {**super().inputs_of_sae(sae, source), "tokens": tokens}

    def evaluate(
        self, group: Sequence[EvaluatedSAE], hook: Hook, source: ActivationSource
    ) -> Iterator[tuple[EvaluatedSAE, CoreEvalOutput]]:
        special = _special_tokens(group[0].sae, source)
        for sae in group:
            view = self.view(sae, hook, source)
            reconstruction, variance = self._tokens(view, source)
            with _nothing_is_padding(source.model), _losses_by_sequence(special) as losses:
                scalar_metrics, feature_metrics = core_main.run_evals(
                    view,  # type: ignore[arg-type]
                    _RecordedTokens(reconstruction, variance),  # type: ignore[arg-type]
                    source.model,  # type: ignore[arg-type]
                    self.config_for(sae),
                    ignore_tokens=special,  # type: ignore[arg-type]
                )
                explained, errors = _explained_variance(view, hook, source, variance, special)
            _check_finite_losses(scalar_metrics, sae)
            scalar_metrics["misc_metrics"] = core_main.calculate_misc_metrics(feature_metrics)
            metrics, of_latents = map(core_main.replace_nans_with_negative_one, (scalar_metrics, feature_metrics))
            details = core_main.convert_feature_metrics(of_latents)
            beyond = Beyond(standard_errors=errors | _loss_errors(losses))
            yield sae, self.output(sae, view, metrics, details, {EXPLAINED_VARIANCE: explained}, beyond)

    def _tokens(self, view: SAEView, source: ActivationSource) -> tuple[Tokens, Tokens]:
        """Batches for the metrics of reconstruction and those of variance and density, as SAEBench draws them."""
        config, dataset = self.config, self.config.dataset
        n_batches = [config.n_eval_reconstruction_batches, config.n_eval_sparsity_variance_batches]

        def compute() -> Entry:
            drawn: dict[str, Tensor] = {}
            with fetching(dataset):
                try:
                    store = ActivationsStore.from_sae(
                        source.model,  # type: ignore[arg-type]
                        view,  # type: ignore[arg-type]
                        context_size=config.context_size,
                        dataset=open_text_file(dataset) if Path(dataset).suffix in READERS else dataset,  # type: ignore[arg-type]
                    )
                    store.shuffle_input_dataset(seed=SHUFFLE_SEED)
                    for part, n in zip(("reconstruction", "variance"), n_batches, strict=True):
                        drawn[part] = torch.stack([store.get_batch_tokens(config.batch_size_prompts) for _ in range(n)])
                        store.reset_input_dataset()
                except StopIteration:  # the text ends before a batch is full, even read again and again
                    raise UserError(
                        f"The text {dataset!r} has no row as long as the context of the core evaluation, or none at "
                        f"all: it takes {config.batch_size_prompts * config.context_size} tokens a batch; give more "
                        "text, or lower core.context_size and core.batch_size_prompts."
                    ) from None
            return Entry(drawn)

        key = source.key(
            "core tokens",
            dataset=None if self._text_hash else dataset,
            text=self._text_hash,
            context_size=config.context_size,
            prompts=config.batch_size_prompts,
            batches=n_batches,
            prepend_bos=view.cfg.metadata.prepend_bos,
        )
        tensors = source.cache.get_or_compute(key, compute).tensors
        return tensors["reconstruction"].to(source.device), tensors["variance"].to(source.device)


def _check_finite_losses(scalar_metrics: dict[str, Any], sae: EvaluatedSAE) -> None:
    """Refuse losses that SAEBench would write as -1."""
    for part in ("model_performance_preservation", "model_behavior_preservation"):
        for metric, value in scalar_metrics.get(part, {}).items():
            if metric.endswith(("_with_sae", "_without_sae")) and not math.isfinite(value):
                raise UserError(
                    f"{metric} of {sae} is {value}: with the SAE in it, or without, the model's logits are not finite; "
                    f"use a data type of more range, as --dtype float32."
                )


class _RecordedTokens:
    """Stands in for SAELens's activation store, of which SAEBench takes tokens only."""

    def __init__(self, reconstruction: Tokens, variance: Tokens) -> None:
        self._batches = iter([*reconstruction, *variance])
        self.context_size = reconstruction.shape[2]

    def get_batch_tokens(self, batch_size: int) -> Int[Tensor, "prompts context"]:
        batch = next(self._batches)
        assert len(batch) == batch_size
        return batch

    def reset_input_dataset(self) -> None:
        """SAEBench goes back to the start of the text between its two parts; so did the recording."""


@contextmanager
def _nothing_is_padding(model: Model) -> Iterator[None]:
    """Rows are as long as the context, but a HookedTransformer whose tokenizer pads on the left takes a BOS at their
    beginning for padding if it is the padding token too.
    """
    tokenizer: Any = model.tokenizer
    side, tokenizer.padding_side = tokenizer.padding_side, "right"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def _special_tokens(sae: SAE[Any], source: ActivationSource) -> set[int]:
    """Padding, EOS and BOS, as in SAEBench, and what else the SAE was trained without."""
    ids = {getattr(source.model.tokenizer, f"{kind}_token_id") for kind in ("pad", "eos", "bos")}
    excluded = sae.cfg.metadata.exclude_special_tokens
    if excluded is True:
        excluded = get_special_token_ids(source.model.tokenizer)  # type: ignore[arg-type]
    return {token for token in (*ids, *(excluded or ())) if token is not None}


@contextmanager
def _losses_by_sequence(special: set[int]) -> Iterator[dict[str, list[Tensor]]]:
    """SAEBench's losses summed over the tokens of each sequence, and "tokens", how many there are; filled meanwhile.

    SAEBench itself averages over the tokens of all sequences, in a function that asks another one for each batch.
    """
    recorded: dict[str, list[Tensor]] = {}
    losses_of_batch = core_main.get_recons_loss

    def recording(sae: Any, model: Any, batch_tokens: Int[Tensor, "prompts context"], *others: Any, **more: Any) -> Any:
        losses = losses_of_batch(sae, model, batch_tokens, *others, **more)
        counts = ~torch.isin(batch_tokens, torch.tensor(list(special), device=batch_tokens.device))
        for metric, values in losses.items():
            of_metric = counts[:, : values.shape[1]]  # the last token predicts nothing
            recorded.setdefault(metric, []).append((values.cpu().double() * of_metric.cpu()).sum(dim=1))
            recorded.setdefault(f"{metric} tokens", []).append(of_metric.cpu().sum(dim=1).double())
        return losses

    core_main.get_recons_loss = recording
    try:
        yield recorded
    finally:
        core_main.get_recons_loss = losses_of_batch


def _loss_errors(losses: dict[str, list[Tensor]]) -> dict[str, float]:
    """Standard errors over sequences of SAEBench's mean losses and of the shares of loss and divergence recovered."""
    of = {metric: torch.cat(values) for metric, values in losses.items()}
    errors = {metric: of_ratio(of[metric], of[f"{metric} tokens"]) for metric in of if not metric.endswith(" tokens")}
    ablated = of["ce_loss_with_ablation"]
    recovered = of_ratio(ablated - of["ce_loss_with_sae"], ablated - of["ce_loss_without_sae"])
    divergence = of_ratio(of["kl_div_with_sae"], of["kl_div_with_ablation"])
    return errors | {"ce_loss_score": recovered, "kl_div_score": divergence}


@torch.no_grad()
def _explained_variance(
    view: SAEView, hook: Hook, source: ActivationSource, tokens: Tokens, special: set[int]
) -> tuple[float, dict[str, float]]:
    """As SAELens computes it, and standard errors over sequences of it and of L0."""
    calculator = ExplainedVarianceCalculator()
    counts: list[int] = []
    active, sums, squares, residuals = (list[Tensor]() for _ in range(4))
    for batch in tokens:
        _, cache = source.model.run_with_cache(
            batch, names_filter=[hook.name], stop_at_layer=hook.layer + 1, prepend_bos=False
        )
        is_text = ~torch.isin(batch, torch.tensor(list(special), device=batch.device))
        check_finite_activations(cache[hook.name], hook, source)
        activations = cache[hook.name][is_text]
        feature_acts = view.encode(activations)
        reconstruction = view.decode(feature_acts)
        calculator.add_batch(reconstruction, activations)
        lengths = is_text.sum(dim=1).tolist()
        counts += lengths
        x = activations.cpu().double()
        for parts, values in (
            (active, (feature_acts != 0).sum(dim=-1).cpu()),
            (sums, x),
            (squares, x.square().sum(dim=-1)),
            (residuals, (x - reconstruction.cpu()).square().sum(dim=-1)),
        ):
            parts += [of_sequence.double().sum(dim=0) for of_sequence in values.split(lengths)]
    n, total = torch.tensor(counts, dtype=torch.float64), torch.stack(sums)
    mean = total.sum(dim=0) / n.sum()
    variances = torch.stack(squares) - 2 * total @ mean + n * mean.square().sum()
    errors = {
        EXPLAINED_VARIANCE: of_ratio(torch.stack(residuals), variances),
        "l0": of_ratio(torch.stack(active), n),
    }
    return calculator.compute(), errors
