"""Concept erasure: ablate the latents that matter most to a probe and see what it still tells (SAEBench, TPP and SCR).

SAEBench encodes every token anew for each class, each number of ablated latents and each class it measures. But all
that it keeps are means over the tokens of a text, and with a linear decoder those means are all it needs: the ablated
activations are mean(x) - mean(f)[ablated] @ W_dec[ablated]. So SAEBench's functions are given the means instead of the
tokens, wrapped so that their own encoding step finds the latents at hand, and everything is encoded once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_matryoshka.bench.activation_source import ActivationSource, PooledLatents, TextActivations, TextSpec
from sae_lens_matryoshka.bench.cache import Entry
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, SAEView, SharedEncoder
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.labelled_text import LabelledText, Texts, named_text
from sae_lens_matryoshka.bench.spurious_text import class_pairs, named_spurious_text, spurious_text
from sae_lens_matryoshka.bench.upstream import (
    RandomState,
    ScrAndTppEvalConfig,
    ScrEvalOutput,
    ScrMetricCategories,
    ScrMetrics,
    ScrResultDetail,
    TppEvalOutput,
    TppMetricCategories,
    TppMetrics,
    TppResultDetail,
    dataset_info,
    general_utils,
    probe_training,
    scr_and_tpp_main,
    seed_everything,
)
from sae_lens_matryoshka.errors import UserError

Probes = dict[str, probe_training.Probe]
Accuracies = dict[str, float]


class ConceptErasure(Evaluation[ScrAndTppEvalConfig]):
    """SAEBench's ``scr_and_tpp``: spurious correlation removal (SCR) or targeted probe perturbation (TPP).

    Args:
        config: SAEBench's config; its ``perform_scr`` chooses. None takes its defaults with TPP. Its ``dataset_names``
            name SAEBench's data sets or ``data``.
        data: The user's own text. Without a config it is all that is evaluated. SCR needs a second label, and takes
            the classes in pairs, in their order, unless the config's ``column1_vals_lookup`` names the pairs.
    """

    def __init__(self, config: ScrAndTppEvalConfig | None = None, data: Sequence[LabelledText] = ()) -> None:
        if config is None:
            of_user: dict[str, Any] = {"dataset_names": [text.name for text in data]} if data else {}
            config = ScrAndTppEvalConfig(perform_scr=False, **of_user)
        super().__init__(config, data)
        self.name = "scr" if config.perform_scr else "tpp"  # type: ignore[misc]
        self.output_type = ScrEvalOutput if config.perform_scr else TppEvalOutput

    def config_for(self, sae: EvaluatedSAE) -> ScrAndTppEvalConfig:
        """No more latents can be ablated than there are: SAEBench stops with an AssertionError."""
        return replace(self.config, n_values=[n for n in self.config.n_values if n <= sae.width])

    def evaluate(
        self, group: Sequence[EvaluatedSAE], hook: Hook, source: ActivationSource
    ) -> Iterator[tuple[EvaluatedSAE, ScrEvalOutput | TppEvalOutput]]:
        tasks = [_Task(name, *self._spec(name, hook)) for name in self.config.dataset_names if not self._scr]
        for name in self.config.dataset_names if self._scr else ():
            for first, second in self._pairs(name):
                tasks.append(_Task(f"{name}_scr_{first}_{second}", *self._spec(name, hook, (first, second))))
        whole = SAEView(group[0].sae, hook, source.name)
        encoder = SharedEncoder(whole)
        for sae in group:
            if not self.config_for(sae).n_values:
                self.skip(sae, f"it has {sae.width} latents, fewer than the least number to ablate.")
                continue
            view = self.view(sae, hook, source)
            results: dict[str, Accuracies] = {}
            per_class: dict[str, dict[str, Accuracies]] = {}
            for task in tasks:
                probes, clean = self._probe_language_model(task, source)
                pooled = _of_level(source.pooled_latents(task.spec, whole), encoder, sae.level)
                ablated = self._ablate(task, view, sae, pooled, probes, source)
                if self._scr:
                    results[f"{task.name}_results"] = scr_and_tpp_main.get_scr_plotting_dict(ablated, clean)
                else:
                    metrics, by_class = scr_and_tpp_main.create_tpp_plotting_dict(ablated, clean)
                    results[f"{task.name}_tpp_results"], per_class[task.name] = metrics, by_class  # type: ignore[assignment]
            yield sae, self._output(sae, view, results, per_class)

    @property
    def _scr(self) -> bool:
        return self.config.perform_scr

    def _pairs(self, name: str) -> list[tuple[str, str]]:
        pairs = self.config.column1_vals_lookup.get(name)
        if pairs is None and name in self.data:
            pairs = class_pairs(self.data[name])
        if not pairs:
            raise UserError(f"column1_vals_lookup has no pairs of classes for data set {name!r}; add them.")
        return [(first, second) for first, second in pairs]

    def _spec(self, name: str, hook: Hook, pair: tuple[str, str] | None = None) -> tuple[TextSpec, list[str]]:
        """The texts, and the classes that have probes."""
        config = self.config
        sizes = (config.train_set_size, config.test_set_size)
        texts: tuple[Texts, Texts]
        if pair is not None:
            if name in self.data:
                texts = spurious_text(self.data[name], pair, *sizes, config.random_seed)
            else:
                texts = named_spurious_text(name, pair, *sizes, config.random_seed)
        elif name in self.data:
            texts = self.data[name].by_class(sizes[0] // 2, sizes[1] // 2)
        else:
            texts = named_text(name, *sizes, config.random_seed)
        spec = TextSpec(*texts, hook, config.context_length, config.llm_batch_size)
        return spec, list(texts[0]) if pair is None else list(dataset_info.PAIRED_CLASS_KEYS)

    def _probe_language_model(self, task: "_Task", source: ActivationSource) -> tuple[Probes, Accuracies]:
        """Probes on the model's activations and how well they do; leaves the random generators after them."""
        config = self.config

        def compute() -> Entry:
            seed_everything(config.random_seed)
            mean = source.of_text(task.spec).map(TextActivations.means)
            with torch.enable_grad():
                probes, _ = probe_training.train_probe_on_activations(
                    mean.train,
                    mean.test,
                    select_top_k=None,
                    use_sklearn=False,
                    batch_size=config.probe_train_batch_size,
                    epochs=config.probe_epochs,
                    lr=config.probe_lr,
                    perform_scr=config.perform_scr,
                    early_stopping_patience=config.early_stopping_patience,
                    l1_penalty=config.probe_l1_penalty,
                )
            clean = scr_and_tpp_main.get_probe_test_accuracy(
                probes,  # type: ignore[arg-type]
                task.classes,
                mean.test,
                config.probe_test_batch_size,
                config.perform_scr,
            )
            state = RandomState.capture()
            tensors = {
                f"probe/{label}/{name}": value
                for label, probe in probes.items()
                for name, value in probe.state_dict().items()  # type: ignore[union-attr]
            }
            return Entry({**tensors, "torch": state.torch}, {"clean": clean, "python": state.python})

        settings = {
            field: getattr(config, field)
            for field in (
                "probe_train_batch_size", "probe_epochs", "probe_lr", "perform_scr", "early_stopping_patience",
                "probe_l1_penalty", "probe_test_batch_size",
            )
        }  # fmt: skip
        key = source.key("erasure probes", **task.spec.key, seed=config.random_seed, **settings)
        entry = source.cache.get_or_compute(key, compute)
        probes: Probes = {}
        for label in task.spec.train:
            weights = {name: entry.tensors[f"probe/{label}/{name}"] for name in ("net.weight", "net.bias")}
            probe = probe_training.Probe(weights["net.weight"].shape[1], source.dtype).to(source.device)
            probe.load_state_dict(weights)
            probes[label] = probe
        RandomState(entry.values["python"], entry.tensors["torch"]).restore()
        return probes, entry.values["clean"]

    def _ablate(
        self,
        task: "_Task",
        view: SAEView,
        sae: EvaluatedSAE,
        pooled: PooledLatents,
        probes: Probes,
        source: ActivationSource,
    ) -> dict[str, dict[int, Accuracies]]:
        """Accuracies after ablation: ablated class -> number of latents -> measured class."""
        config, n_values = self.config, self.config_for(sae).n_values
        with torch.no_grad():
            effects = scr_and_tpp_main.get_all_node_effects_for_one_sae(
                _LatentsAsActivations(view),  # type: ignore[arg-type]
                probes,
                task.classes,
                config.perform_scr,
                {label: _LatentsAsActivations.wrap(latents) for label, latents in pooled.of_texts.train.items()},
                config.sae_batch_size,
            )
            if not view.decodes_linearly:
                return scr_and_tpp_main.perform_feature_ablations(
                    probes,
                    view,  # type: ignore[arg-type]
                    config.sae_batch_size,
                    {label: of_class.padded() for label, of_class in source.of_text(task.spec).test.items()},
                    effects,
                    n_values,
                    task.classes,
                    config.probe_test_batch_size,
                    config.perform_scr,
                )
            means = _test_means(source, task.spec, pooled)
            return {
                label: {
                    n: scr_and_tpp_main.get_probe_test_accuracy(
                        probes,
                        task.classes,
                        _without(scr_and_tpp_main.select_top_n_features(effects[label], n, label), means, view),
                        config.probe_test_batch_size,
                        config.perform_scr,
                    )
                    for n in n_values
                }
                for label in task.classes
            }

    def _output(
        self,
        sae: EvaluatedSAE,
        view: SAEView,
        results: dict[str, Accuracies],
        per_class: dict[str, dict[str, Accuracies]],
    ) -> ScrEvalOutput | TppEvalOutput:
        mean = general_utils.average_results_dictionaries(results, [name.removesuffix("_results") for name in results])
        fields = self.common_fields(sae, view)
        if self._scr:
            return ScrEvalOutput(
                **fields,
                eval_result_metrics=ScrMetricCategories(scr_metrics=ScrMetrics(**mean)),
                eval_result_details=[ScrResultDetail(dataset_name=name, **result) for name, result in results.items()],  # type: ignore[arg-type]
            )
        return TppEvalOutput(
            **fields,
            eval_result_metrics=TppMetricCategories(tpp_metrics=TppMetrics(**mean)),
            eval_result_details=[TppResultDetail(dataset_name=name, **result) for name, result in results.items()],  # type: ignore[arg-type]
            eval_result_unstructured=per_class,
        )


@dataclass(frozen=True)
class _Task:
    """One set of probes to disturb."""

    name: str
    spec: TextSpec
    classes: list[str]


@dataclass(frozen=True)
class _Means:
    """Means over the tokens of each text of a class, as SAEBench divides them: by the number of its real tokens."""

    activations: Float[Tensor, "texts 1 d_in"]
    latents: Float[Tensor, "texts 1 width"]


class _LatentsAsActivations:
    """An SAE for which mean latents are the activations, so that SAEBench's encoding step finds them as they are.

    SAEBench takes a position whose activations sum to 0 for padding. A text on which no latent fires is none, so a 1
    goes along with the latents.
    """

    def __init__(self, view: SAEView) -> None:
        self.W_dec = view.W_dec

    @staticmethod
    def wrap(latents: Float[Tensor, "texts width"]) -> Float[Tensor, "texts 1 width_plus_1"]:
        return torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)[:, None]

    def encode(self, x: Float[Tensor, "texts 1 width_plus_1"]) -> Float[Tensor, "texts 1 width"]:
        return x[..., :-1]


class _MeanLatents:
    """An SAE that has encoded the texts of one class already."""

    def __init__(self, latents: Float[Tensor, "texts 1 width"], view: SAEView) -> None:
        self.latents = latents
        self.view = view

    def encode(self, x: Float[Tensor, "texts 1 d_in"]) -> Float[Tensor, "texts 1 width"]:
        assert len(x) == len(self.latents)
        return self.latents.clone()  # SAEBench ablates in place

    def decode(self, feature_acts: Float[Tensor, "texts 1 width"]) -> Float[Tensor, "texts 1 d_in"]:
        return self.view.decode(feature_acts)


def _without(ablated: Tensor, means: Mapping[str, _Means], view: SAEView) -> dict[str, Float[Tensor, "texts d_in"]]:
    """Mean activations a text, by class, with some latents ablated."""
    return {
        label: scr_and_tpp_main.ablated_precomputed_activations(
            of_class.activations,
            _MeanLatents(of_class.latents, view),  # type: ignore[arg-type]
            ablated,
            len(of_class.activations),
        )
        for label, of_class in means.items()
    }


def _of_level(pooled: PooledLatents, encoder: SharedEncoder, level: int | None) -> PooledLatents:
    def cut(latents: Tensor) -> Tensor:
        return encoder.of_level(latents, level)

    return PooledLatents(pooled.of_texts.map(cut), cut(pooled.of_nothing))


def _test_means(source: ActivationSource, spec: TextSpec, pooled: PooledLatents) -> dict[str, _Means]:
    """SAEBench ablates at padding too, where the activations are zero but latents may fire; so these are added."""
    means: dict[str, _Means] = {}
    for label, activations in source.of_text(spec).test.items():
        n_counted = activations.n_counted
        padding_a_token = (activations.context_length - n_counted) / n_counted
        latents = pooled.of_texts.test[label] + padding_a_token[:, None] * pooled.of_nothing
        means[label] = _Means(activations.means()[:, None], latents[:, None])
    return means
