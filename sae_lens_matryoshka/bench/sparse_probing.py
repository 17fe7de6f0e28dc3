"""Sparse probing: how well a class can be told from the few latents that differ most (SAEBench, arXiv:2503.09532).

As in SAEBench, for every data set: probes on the model's activations, then on all latents, then on the top k of them.
The model's part is done once and shared, with the state of the random generators that it leaves behind: every SAE and
level comes out as if SAEBench had evaluated it alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_lens_matryoshka.bench.activation_source import ActivationSource, Split, TextActivations, TextSpec
from sae_lens_matryoshka.bench.cache import Entry
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, SAEView
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.labelled_text import LabelledText, named_text
from sae_lens_matryoshka.bench.upstream import (
    RandomState,
    SparseProbingEvalConfig,
    SparseProbingEvalOutput,
    general_utils,
    probe_training,
    seed_everything,
)

DENSE_PROBE: dict[str, Any] = {"select_top_k": None, "use_sklearn": False, "batch_size": 250, "epochs": 100, "lr": 1e-2}
"""How SAEBench trains the probe on all channels or latents (``sparse_probing.main.run_eval_single_dataset``)."""


class SparseProbing(Evaluation[SparseProbingEvalConfig]):
    """SAEBench's ``sparse_probing``.

    Args:
        config: SAEBench's config; None takes its defaults. Its ``dataset_names`` name SAEBench's data sets or ``data``.
        data: The user's own text. Without a config it is all that is evaluated.
    """

    name = "sparse_probing"
    output_type = SparseProbingEvalOutput

    def __init__(self, config: SparseProbingEvalConfig | None = None, data: Sequence[LabelledText] = ()) -> None:
        of_user: dict[str, Any] = {"dataset_names": [text.name for text in data]} if data else {}
        super().__init__(config or SparseProbingEvalConfig(**of_user), data)

    def evaluate(
        self, group: Sequence[EvaluatedSAE], hook: Hook, source: ActivationSource
    ) -> Iterator[tuple[EvaluatedSAE, SparseProbingEvalOutput]]:
        specs = {name: self._spec(name, hook) for name in self.config.dataset_names}
        whole = SAEView(group[0].sae, hook, source.name)
        for sae in group:
            results: dict[str, dict[str, float]] = {}
            per_class: dict[str, dict[str, dict[str, float]]] = {}
            for name, spec in specs.items():
                llm_accuracies = self._probe_language_model(spec, source)
                latents = source.pooled_latents(spec, whole, sae.level).of_texts
                accuracies = self._accuracies("sae", latents) | llm_accuracies
                per_class[f"{name}_results"] = accuracies
                results[f"{name}_results"] = {
                    metric: sum(by_class.values()) / len(by_class) for metric, by_class in accuracies.items()
                }
            # SAEBench's two categories take their own metrics of all
            mean = general_utils.average_results_dictionaries(results, self.config.dataset_names)
            details = [{"dataset_name": name, **result} for name, result in results.items()]
            view = self.view(sae, hook, source)
            yield sae, self.output(sae, view, {"llm": mean, "sae": mean}, details, per_class)

    def _spec(self, name: str, hook: Hook) -> TextSpec:
        config = self.config
        n_train, n_test = config.probe_train_set_size, config.probe_test_set_size
        if name in self.data:
            # a probe tells one class from the others, so half of its texts are of the class
            texts = self.data[name].by_class(n_train // 2, n_test // 2)
        else:
            texts = named_text(name, n_train, n_test, config.random_seed)
        assert config.llm_batch_size is not None  # filled in
        return TextSpec(*texts, hook, config.context_length, config.llm_batch_size)

    def _probe_language_model(self, spec: TextSpec, source: ActivationSource) -> dict[str, dict[str, float]]:
        """Accuracies of probes on the model's activations, by metric and class; leaves the generators after them."""

        def compute() -> Entry:
            seed_everything(self.config.random_seed)
            mean = source.of_text(spec).map(TextActivations.means)
            accuracies = self._accuracies("llm", mean)
            state = RandomState.capture()
            return Entry({"torch": state.torch}, {"accuracies": accuracies, "python": state.python})

        key = source.key("probes", **spec.key, k_values=self.config.k_values, seed=self.config.random_seed)
        entry = source.cache.get_or_compute(key, compute)
        RandomState(entry.values["python"], entry.tensors["torch"]).restore()
        return entry.values["accuracies"]

    def _accuracies(self, kind: str, values: Split[Tensor]) -> dict[str, dict[str, float]]:
        """By metric and class: of probes on everything and on the top k, of activations ("llm") or latents ("sae")."""
        probes = {f"{kind}_test_accuracy": DENSE_PROBE}
        probes |= {f"{kind}_top_{k}_test_accuracy": {"select_top_k": k} for k in self.config.k_values}
        found: dict[str, dict[str, float]] = {}
        for metric, settings in probes.items():
            if metric == "sae_test_accuracy" and self.config.lower_vram_usage:
                found[metric] = {"-1": -1.0}  # SAEBench's way to leave out the probe on all latents
                continue
            with torch.enable_grad():
                _, accuracies = probe_training.train_probe_on_activations(values.train, values.test, **settings)
            found[metric] = {label: float(accuracy) for label, accuracy in accuracies.items()}
        return found
