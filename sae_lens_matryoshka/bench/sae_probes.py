"""SAEBench's ``sparse_probing_sae_probes``: 113 binary tasks of arXiv:2502.16681, probed at the last token of a text.

Among SAEBench's metrics the most reliable one (arXiv:2605.18229). The texts are in the package sae_probes itself, so
nothing is downloaded. Its functions draw texts, choose latents and fit probes; the model sees each text once for all
SAEs and levels, alone and without padding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from sae_lens_matryoshka.bench.activation_source import ActivationSource, check_finite_activations
from sae_lens_matryoshka.bench.beyond_saebench import Beyond
from sae_lens_matryoshka.bench.cache import Entry
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, SAEView
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.progress import progress_bar
from sae_lens_matryoshka.bench.standard_errors import of_mean, of_mean_of_independent
from sae_lens_matryoshka.bench.texts_alone import activations_alone, text_tokens
from sae_lens_matryoshka.bench.upstream_sae_probes import (
    DATASETS,
    METHODS,
    SparseProbingSaeProbesEvalConfig,
    SparseProbingSaeProbesEvalOutput,
    find_best_reg,
    get_sorted_indices,
    mean_act_normalization,
    utils_data,
)
from sae_lens_matryoshka.errors import UserError

MOST_TOKENS, LLM_BATCH_SIZE = 1024, 32
"""Of longer texts sae_probes takes the last tokens; the texts it runs together (``generate_model_activations``)."""

MOST_TEXTS, MOST_TRAIN, FEWEST_TEST = 5000, 1024, 100
"""The texts of a data set, to train on at most, to test on at least (``generate_sae_activations_normal``)."""

ENCODE_BATCH_SIZE = 128

Scores = Mapping[str, float]
"""``test_accuracy``, ``test_auc`` and ``test_f1``, and of the first two the standard errors, as ``test_auc_error``."""


class SaeProbes(Evaluation[SparseProbingSaeProbesEvalConfig]):
    """SAEBench's ``sparse_probing_sae_probes``.

    Args:
        config: SAEBench's config; None takes its defaults. Its ``results_path`` and ``model_cache_path`` are where
            sae_probes would keep files, and are not used.
        limit_texts: How many texts of each data set to train on at most, and how many to test on; None for all.
    """

    name = "sparse_probing_sae_probes"
    output_type = SparseProbingSaeProbesEvalOutput
    takes_baselines = True

    def __init__(self, config: SparseProbingSaeProbesEvalConfig | None = None, limit_texts: int | None = None) -> None:
        config = config or SparseProbingSaeProbesEvalConfig()
        super().__init__(config)
        self.limit_texts = limit_texts
        for field, known in (
            ("setting", ["normal"]), ("reg_type", ["l1", "l2"]), ("baseline_method", list(METHODS)),
        ):  # fmt: skip
            if getattr(config, field) not in known:
                raise UserError(f"{self.name}.{field}={getattr(config, field)!r} must be {' or '.join(known)}.")
        default = SparseProbingSaeProbesEvalConfig()
        for field in ("results_path", "model_cache_path"):
            if getattr(config, field) != getattr(default, field):
                raise UserError(f"{self.name}.{field} is not used here: results go to the output; leave it out.")
        unknown = [name for name in config.dataset_names if name not in DATASETS]
        if unknown or not config.dataset_names:
            raise UserError(
                f"{self.name}.dataset_names={unknown or config.dataset_names!r} must be among those of sae_probes, as "
                f"{', '.join(DATASETS[:3])}."
            )
        if not config.ks or min(config.ks) < 1:
            raise UserError(f"{self.name}.ks={config.ks} must be numbers of latents, 1 or more.")

    def inputs(self, source: ActivationSource) -> dict[str, Any]:
        return {**super().inputs(source), "limit_texts": self.limit_texts}

    def evaluate(
        self, group: Sequence[EvaluatedSAE], hook: Hook, source: ActivationSource
    ) -> Iterator[tuple[EvaluatedSAE, SparseProbingSaeProbesEvalOutput]]:
        names = sorted(self.config.dataset_names)
        for sae in group:
            view = self.view(sae, hook, source)
            by_data_set: dict[str, dict[str, Scores]] = {}
            with progress_bar(len(names), f"{self.name} {sae}", "data sets") as bar:
                for name in names:
                    draw = self._draw(name)
                    train, test = self._activations(name, draw, hook, source)
                    by_data_set[name] = self._of_model(
                        name, draw, train.float(), test.float(), hook, source
                    ) | self._top_k(
                        "sae", _encoded(view.encode, train, source), _encoded(view.encode, test, source), draw
                    )
                    bar.update()
            yield sae, self._output(sae, view, by_data_set)

    def _draw(self, name: str) -> "_Draw":
        """Which texts of a data set, by sae_probes' own function."""
        labels = utils_data.get_yvals(name)[:MOST_TEXTS]
        n_train = min(len(labels) - FEWEST_TEST, MOST_TRAIN)
        n_test = len(labels) - n_train - 1
        if self.limit_texts is not None:
            n_train, n_test = min(n_train, self.limit_texts), min(n_test, self.limit_texts)
        train, test = utils_data.get_train_test_indices(labels, n_train, n_test, 0.5, self.config.random_seed)
        return _Draw(train, test, torch.tensor(labels[train]), torch.tensor(labels[test]))

    def _activations(
        self, name: str, draw: "_Draw", hook: Hook, source: ActivationSource
    ) -> tuple[Float[Tensor, "train d_in"], Float[Tensor, "test d_in"]]:
        """The model's activations at the last token of each text."""
        prompts = utils_data.read_numbered_dataset_df(name)["prompt"]
        texts = [str(prompts.iloc[row]) for row in (*draw.train, *draw.test)]

        def compute() -> Entry:
            most = min(MOST_TOKENS, source.model.cfg.n_ctx)
            tokens = [_last_tokens(of_text, most) for of_text in text_tokens(source.model, texts)]
            last: list[Tensor] = [torch.empty(0)] * len(tokens)
            for index, activations in activations_alone(source.model, tokens, hook, LLM_BATCH_SIZE, f"reading {name}"):
                check_finite_activations(activations, hook, source)
                last[index] = activations[-1].cpu()
            return Entry({"last": torch.stack(last)})

        key = source.key("last tokens of sae_probes", hook=hook.name, texts=texts)
        last = source.cache.get_or_compute(key, compute).tensors["last"].cpu()
        return last[: len(draw.train)], last[len(draw.train) :]

    def _of_model(
        self, name: str, draw: "_Draw", train: Tensor, test: Tensor, hook: Hook, source: ActivationSource
    ) -> dict[str, Scores]:
        """The probe on all of the model's channels, and probes on its best few; nothing if the config says so."""
        config = self.config
        if not config.include_llm_baseline:
            return {}

        def compute() -> Entry:
            method = METHODS[config.baseline_method]  # type: ignore[index]
            labels = (draw.train_labels.numpy(), draw.test_labels.numpy())
            found = method(train, labels[0], test, labels[1], seed=config.random_seed)
            scores = {"llm": _scores(found.metrics)}
            if config.baseline_method == "logreg":  # others see the activations changed
                scores["llm"] |= _errors(found.classifier, test, draw.test_labels)
            return Entry({}, scores | self._top_k("llm", train, test, draw))

        key = source.key(
            "probes of sae_probes", hook=hook.name, data_set=name, limit_texts=self.limit_texts, ks=config.ks,
            seed=config.random_seed, method=config.baseline_method, reg_type=config.reg_type, binarize=config.binarize,
        )  # fmt: skip
        return source.cache.get_or_compute(key, compute).values

    def _top_k(self, kind: str, train: Tensor, test: Tensor, draw: "_Draw") -> dict[str, Scores]:
        """Probes on the k columns that sae_probes chooses (``run_sae_eval``)."""
        config = self.config
        columns = get_sorted_indices(train, draw.train_labels, mean_act_normalization)
        scores: dict[str, Scores] = {}
        for k in config.ks:
            chosen, chosen_test = train[:, columns[:k]], test[:, columns[:k]]
            if config.binarize:
                chosen, chosen_test = chosen != 0, chosen_test != 0
            found = find_best_reg(
                chosen, draw.train_labels, chosen_test, draw.test_labels, penalty=config.reg_type,
                seed=config.random_seed,
            )  # fmt: skip
            scores[f"{kind}_top_{k}"] = _scores(found.metrics) | _errors(
                found.classifier, chosen_test, draw.test_labels
            )
        return scores

    def _output(
        self, sae: EvaluatedSAE, view: SAEView, by_data_set: Mapping[str, Mapping[str, Scores]]
    ) -> SparseProbingSaeProbesEvalOutput:
        per_data_set = [
            {f"{kind}_{metric}": value for kind, scores in kinds.items() for metric, value in scores.items()}
            for kinds in by_data_set.values()
        ]
        values = {metric: [of_data_set[metric] for of_data_set in per_data_set] for metric in per_data_set[0]}
        errors = {
            metric.removesuffix("_error"): of_mean_of_independent(of_metric)
            for metric, of_metric in values.items()
            if metric.endswith("_error")
        }
        metrics = {
            metric: sum(of_metric) / len(of_metric)
            for metric, of_metric in values.items()
            if not metric.endswith("_error")
        }
        channels = {metric: value for metric, value in metrics.items() if metric.startswith("llm_top_")}
        details = [
            {"dataset_name": name, "sae_metrics_by_k": self._by_k(of_data_set), **of_data_set}
            for name, of_data_set in zip(by_data_set, per_data_set, strict=True)
        ]
        beyond = Beyond(channels, errors, {"limit_texts": self.limit_texts})
        # SAEBench's classes take their own metrics of all
        eval_output = self.output(sae, view, {"llm": metrics, "sae": metrics}, details, beyond=beyond)
        return replace(eval_output, sae_metrics_by_k=self._by_k(metrics))

    def _by_k(self, metrics: Mapping[str, float]) -> dict[int, dict[str, float]]:
        return {k: {name: metrics[f"sae_top_{k}_{name}"] for name in _METRICS.values()} for k in self.config.ks}


_METRICS = {"test_acc": "test_accuracy", "test_auc": "test_auc", "test_f1": "test_f1"}
"""Names of sae_probes -> of SAEBench."""


class _Draw(NamedTuple):
    train: Int[np.ndarray, " train"]
    """Rows of the data set."""

    test: Int[np.ndarray, " test"]
    train_labels: Int[Tensor, " train"]
    test_labels: Int[Tensor, " test"]


def _last_tokens(tokens: Int[Tensor, " tokens"], most: int) -> Int[Tensor, " tokens"]:
    """The first token, which is the BOS where there is one, and the last ones, as tokenizers truncate on the left."""
    return tokens if len(tokens) <= most else torch.cat([tokens[:1], tokens[1 - most :]])


@torch.no_grad()
def _encoded(encode: Any, activations: Float[Tensor, "texts d_in"], source: ActivationSource) -> Tensor:
    return torch.cat([encode(batch.to(source.device)).cpu().float() for batch in activations.split(ENCODE_BATCH_SIZE)])


def _scores(metrics: Any) -> dict[str, float]:
    return {name: asdict(metrics)[theirs] for theirs, name in _METRICS.items()}


def _errors(classifier: Any, inputs: Any, labels: Int[Tensor, " texts"]) -> dict[str, float]:
    """Standard errors over test texts: of the accuracy, and of the area under the curve by DeLong's method."""
    truth = labels.numpy()
    right = (classifier.predict(inputs) == truth).astype(float)
    scores = classifier.predict_proba(inputs)[:, 1]
    positive, negative = scores[truth == 1], scores[truth == 0]
    ranks = rankdata(np.concatenate([positive, negative]))
    # the share of the other class's texts that each text stands above, or below
    above = (ranks[: len(positive)] - rankdata(positive)) / len(negative)
    below = 1 - (ranks[len(positive) :] - rankdata(negative)) / len(positive)
    auc = float(np.hypot(of_mean(above.tolist()), of_mean(below.tolist())))
    return {"test_accuracy_error": of_mean(right.tolist()), "test_auc_error": auc}
