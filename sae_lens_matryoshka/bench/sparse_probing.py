"""Sparse probing: how well a class can be told from the few latents that differ most (SAEBench, arXiv:2503.09532).

As in SAEBench, for every data set: probes on the model's activations, then on all latents, then on the top k of them.
The model's part is done once and shared, with the state of the random generators that it leaves behind: every SAE and
level comes out as if SAEBench had evaluated it alone. Beside SAEBench's rule for the top k there is a second one, which
does not look at the largest latents only; see ``k_sparse_probes.py``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from sae_lens_matryoshka.bench.activation_source import ActivationSource, Split, TextActivations, TextSpec
from sae_lens_matryoshka.bench.beyond_saebench import Beyond
from sae_lens_matryoshka.bench.cache import Entry
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, SAEView
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.k_sparse_probes import dense_answers, top_k_answers
from sae_lens_matryoshka.bench.labelled_text import LabelledText, named_text
from sae_lens_matryoshka.bench.standard_errors import Answers, of_mean_accuracy, of_mean_of_independent
from sae_lens_matryoshka.bench.upstream import (
    RandomState,
    SparseProbingEvalConfig,
    SparseProbingEvalOutput,
    general_utils,
    seed_everything,
)


class SparseProbing(Evaluation[SparseProbingEvalConfig]):
    """SAEBench's ``sparse_probing``.

    Args:
        config: SAEBench's config; None takes its defaults. Its ``dataset_names`` name SAEBench's data sets or ``data``.
        data: The user's own text. Without a config it is all that is evaluated.
    """

    name = "sparse_probing"
    output_type = SparseProbingEvalOutput
    takes_baselines = True

    def __init__(self, config: SparseProbingEvalConfig | None = None, data: Sequence[LabelledText] = ()) -> None:
        of_user: dict[str, Any] = {"dataset_names": [text.name for text in data]} if data else {}
        super().__init__(config or SparseProbingEvalConfig(**of_user), data)
        for text in data:
            text.check_enough()

    def evaluate(
        self, group: Sequence[EvaluatedSAE], hook: Hook, source: ActivationSource
    ) -> Iterator[tuple[EvaluatedSAE, SparseProbingEvalOutput]]:
        specs = {name: self._spec(name, hook) for name in self.config.dataset_names}
        whole = SAEView(group[0].sae, hook, source.name)
        for sae in group:
            found = {
                name: self._probe_language_model(spec, source).beside(
                    self._probes("sae", source.pooled_latents(spec, whole, sae.level).of_texts)
                )
                for name, spec in specs.items()
            }
            per_class = {f"{name}_results": of_data_set.saebench for name, of_data_set in found.items()}
            standardized = {f"{name}_results": of_data_set.standardized for name, of_data_set in found.items()}
            results, further = _over_classes(per_class), _over_classes(standardized)
            # SAEBench's two categories take their own metrics of all
            metrics = general_utils.average_results_dictionaries(results, self.config.dataset_names)
            details = [{"dataset_name": name, **result} for name, result in results.items()]
            of_first = next(iter(found.values())).errors
            beyond = Beyond(
                metrics=general_utils.average_results_dictionaries(further, self.config.dataset_names),
                standard_errors={
                    metric: of_mean_of_independent([of_data_set.errors[metric] for of_data_set in found.values()])
                    for metric in of_first
                },
                details={"per_class": standardized},
            )
            view = self.view(sae, hook, source)
            yield sae, self.output(sae, view, {"llm": metrics, "sae": metrics}, details, per_class, beyond)

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

    def _probe_language_model(self, spec: TextSpec, source: ActivationSource) -> "_Probed":
        """Probes on the model's activations; leaves the generators after them."""

        def compute() -> Entry:
            seed_everything(self.config.random_seed)
            probed = self._probes("llm", source.of_text(spec).map(TextActivations.means))
            state = RandomState.capture()
            return Entry({"torch": state.torch}, {**asdict(probed), "python": state.python})

        key = source.key("probes by two rules", **spec.key, k_values=self.config.k_values, seed=self.config.random_seed)
        entry = source.cache.get_or_compute(key, compute)
        values = dict(entry.values)
        RandomState(values.pop("python"), entry.tensors["torch"]).restore()
        return _Probed(**values)

    def _probes(self, kind: str, values: Split[Tensor]) -> "_Probed":
        """On everything and on the top k, of activations ("llm") or latents ("sae")."""
        probed = _Probed()
        if kind == "sae" and self.config.lower_vram_usage:
            probed.saebench["sae_test_accuracy"] = {"-1": -1.0}  # SAEBench's way to leave out the probe on all latents
        else:
            probed.add(probed.saebench, f"{kind}_test_accuracy", dense_answers(values.train, values.test))
        for k, (by_saebench, standardized) in top_k_answers(values.train, values.test, self.config.k_values).items():
            probed.add(probed.saebench, f"{kind}_top_{k}_test_accuracy", by_saebench)
            probed.add(probed.standardized, f"{kind}_top_{k}_standardized_test_accuracy", standardized)
        return probed


@dataclass(frozen=True)
class _Probed:
    """What probes found on one data set."""

    saebench: dict[str, dict[str, float]] = field(default_factory=dict)
    """SAEBench's metric -> class -> accuracy."""

    standardized: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same of the other rule's metrics."""

    errors: dict[str, float] = field(default_factory=dict)
    """Metric -> standard error of the mean over classes."""

    def add(self, to: dict[str, dict[str, float]], metric: str, answers: dict[str, Answers]) -> None:
        to[metric] = {label: of_class.accuracy for label, of_class in answers.items()}
        self.errors[metric] = of_mean_accuracy(list(answers.values()))

    def beside(self, other: "_Probed") -> "_Probed":
        return _Probed(
            other.saebench | self.saebench, other.standardized | self.standardized, other.errors | self.errors
        )


def _over_classes(per_class: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {metric: sum(by_class.values()) / len(by_class) for metric, by_class in metrics.items()}
        for name, metrics in per_class.items()
    }
