"""Concept erasure: ablate the latents that matter most to a probe and see what it still tells (SAEBench, TPP and SCR).

SAEBench encodes every token anew for each class, each number of ablated latents and each class it measures. But all
that it keeps are means over the tokens of a text, and with a linear decoder those means are all it needs: the ablated
activations are mean(x) - mean(f)[ablated] @ W_dec[ablated]. So SAEBench's functions are given the means instead of the
tokens, wrapped so that their own encoding step finds the latents at hand, and everything is encoded once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_matryoshka.bench.activation_source import ActivationSource, PooledLatents, TextActivations, TextSpec
from sae_lens_matryoshka.bench.beyond_saebench import Beyond
from sae_lens_matryoshka.bench.cache import Entry
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, SAEView
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.labelled_text import LabelledText, Texts, named_text
from sae_lens_matryoshka.bench.spurious_text import class_pairs, named_spurious_text, spurious_text
from sae_lens_matryoshka.bench.standard_errors import of_mean, of_mean_of_independent
from sae_lens_matryoshka.bench.upstream import (
    RandomState,
    ScrAndTppEvalConfig,
    ScrEvalOutput,
    TppEvalOutput,
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
        for text in () if config.perform_scr else data:  # SCR says itself what it lacks
            text.check_enough()
        self.name = "scr" if config.perform_scr else "tpp"  # type: ignore[misc]
        self.output_type = ScrEvalOutput if config.perform_scr else TppEvalOutput

    def config_for(self, sae: EvaluatedSAE) -> ScrAndTppEvalConfig:
        """No more latents can be ablated than there are: SAEBench stops with an AssertionError."""
        return replace(self.config, n_values=[n for n in self.config.n_values if n <= sae.width])

    def evaluate(
        self, group: Sequence[EvaluatedSAE], hook: Hook, source: ActivationSource
    ) -> Iterator[tuple[EvaluatedSAE, ScrEvalOutput | TppEvalOutput]]:
        specs = self._specs(hook)
        whole = SAEView(group[0].sae, hook, source.name)
        for sae in group:
            if not self.config_for(sae).n_values:
                self.skip(sae, f"it has {sae.width} latents, fewer than the least number to ablate.")
                continue
            view = self.view(sae, hook, source)
            results: dict[str, Accuracies] = {}
            per_class: dict[str, dict[str, Accuracies]] = {}
            for name, spec in specs.items():
                probes, clean = self._probe_language_model(spec, source)
                pooled = source.pooled_latents(spec, whole, sae.level)
                ablated = self._ablate(spec, view, sae, pooled, probes, source)
                if self._scr:
                    results[f"{name}_results"] = scr_and_tpp_main.get_scr_plotting_dict(ablated, clean)
                else:
                    metrics, by_class = scr_and_tpp_main.create_tpp_plotting_dict(ablated, clean)
                    results[f"{name}_tpp_results"], per_class[name] = metrics, by_class  # type: ignore[assignment]
            names = [name.removesuffix("_results") for name in results]
            mean = general_utils.average_results_dictionaries(results, names)
            details = [{"dataset_name": name, **result} for name, result in results.items()]
            beyond = Beyond(standard_errors=_errors(results, per_class))
            more = None if self._scr else per_class
            yield sae, self.output(sae, view, {f"{self.name}_metrics": mean}, details, more, beyond)

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

    def _specs(self, hook: Hook) -> dict[str, TextSpec]:
        """The texts of every set of probes: one a data set, for SCR one a pair of its classes."""
        config = self.config
        sizes = (config.train_set_size, config.test_set_size)
        texts: dict[str, tuple[Texts, Texts]] = {}
        for name in config.dataset_names:
            data = self.data.get(name)
            if self._scr:
                for pair in self._pairs(name):
                    given = (pair, *sizes, config.random_seed)
                    of_pair = named_spurious_text(name, *given) if data is None else spurious_text(data, *given)
                    texts[f"{name}_scr_{pair[0]}_{pair[1]}"] = of_pair
            elif data is None:
                texts[name] = named_text(name, *sizes, config.random_seed)
            else:
                texts[name] = data.by_class(sizes[0] // 2, sizes[1] // 2)
        return {
            name: TextSpec(*train_and_test, hook, config.context_length, config.llm_batch_size)
            for name, train_and_test in texts.items()
        }

    def _classes(self, spec: TextSpec) -> list[str]:
        """The classes whose probes are disturbed."""
        return list(dataset_info.PAIRED_CLASS_KEYS if self._scr else spec.train)

    def _probe_language_model(self, spec: TextSpec, source: ActivationSource) -> tuple[Probes, Accuracies]:
        """Probes on the model's activations and how well they do; leaves the random generators after them."""
        config = self.config
        test_batch_size = config.probe_test_batch_size
        settings: dict[str, Any] = {
            "batch_size": config.probe_train_batch_size,
            "epochs": config.probe_epochs,
            "lr": config.probe_lr,
            "perform_scr": config.perform_scr,
            "early_stopping_patience": config.early_stopping_patience,
            "l1_penalty": config.probe_l1_penalty,
        }

        def compute() -> Entry:
            seed_everything(config.random_seed)
            mean = source.of_text(spec).map(TextActivations.means)
            with torch.enable_grad():
                probes, _ = probe_training.train_probe_on_activations(
                    mean.train, mean.test, select_top_k=None, use_sklearn=False, **settings
                )
            clean = scr_and_tpp_main.get_probe_test_accuracy(
                probes,  # type: ignore[arg-type]
                self._classes(spec),
                mean.test,
                test_batch_size,
                config.perform_scr,
            )
            state = RandomState.capture()
            tensors = {
                f"probe/{label}/{name}": value
                for label, probe in probes.items()
                for name, value in probe.state_dict().items()  # type: ignore[union-attr]
            }
            return Entry({**tensors, "torch": state.torch}, {"clean": clean, "python": state.python})

        key = source.key(
            "erasure probes", **spec.key, seed=config.random_seed, test_batch_size=test_batch_size, **settings
        )
        entry = source.cache.get_or_compute(key, compute)
        probes: Probes = {}
        for label in spec.train:
            weights = {name: entry.tensors[f"probe/{label}/{name}"] for name in ("net.weight", "net.bias")}
            probe = probe_training.Probe(weights["net.weight"].shape[1], source.dtype).to(source.device)
            probe.load_state_dict(weights)
            probes[label] = probe
        RandomState(entry.values["python"], entry.tensors["torch"]).restore()
        return probes, entry.values["clean"]

    def _ablate(
        self,
        spec: TextSpec,
        view: SAEView,
        sae: EvaluatedSAE,
        pooled: PooledLatents,
        probes: Probes,
        source: ActivationSource,
    ) -> dict[str, dict[int, Accuracies]]:
        """Accuracies after ablation: ablated class -> number of latents -> measured class."""
        config, n_values, classes = self.config, self.config_for(sae).n_values, self._classes(spec)
        with torch.no_grad():
            effects = scr_and_tpp_main.get_all_node_effects_for_one_sae(
                _LatentsAsActivations(view),  # type: ignore[arg-type]
                probes,
                classes,
                config.perform_scr,
                {label: _LatentsAsActivations.wrap(latents) for label, latents in pooled.of_texts.train.items()},
                config.sae_batch_size,
            )
            if not view.decodes_linearly:
                return scr_and_tpp_main.perform_feature_ablations(
                    probes,
                    view,  # type: ignore[arg-type]
                    config.sae_batch_size,
                    {label: of_class.padded() for label, of_class in source.of_text(spec).test.items()},
                    effects,
                    n_values,
                    classes,
                    config.probe_test_batch_size,
                    config.perform_scr,
                )
            means = _test_means(source.of_text(spec).test, pooled)
            return {
                label: {
                    n: scr_and_tpp_main.get_probe_test_accuracy(
                        probes,
                        classes,
                        _without(scr_and_tpp_main.select_top_n_features(effects[label], n, label), means, view),
                        config.probe_test_batch_size,
                        config.perform_scr,
                    )
                    for n in n_values
                }
                for label in classes
            }


def _errors(results: Mapping[str, Accuracies], per_class: Mapping[str, Mapping[str, Accuracies]]) -> dict[str, float]:
    """Standard errors: of TPP over the classes of each data set, of SCR, which has one score a pair, over its pairs.

    How scores move with the texts is not known, since SAEBench says of a probe only how often it was right.
    """
    if not per_class:
        metrics = set[str].intersection(*map(set, results.values()))
        return {metric: of_mean([of_pair[metric] for of_pair in results.values()]) for metric in metrics}
    errors = [
        {
            metric: of_mean([of_class[metric] for of_class in classes.values()])
            for metric in next(iter(classes.values()))
        }
        for classes in per_class.values()
    ]
    return {metric: of_mean_of_independent([of_set[metric] for of_set in errors]) for metric in errors[0]}


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


def _without(
    ablated: Tensor, means: Mapping[str, tuple[Tensor, Tensor]], view: SAEView
) -> dict[str, Float[Tensor, "texts d_in"]]:
    """Mean activations a text, by class, with some latents ablated."""
    return {
        label: scr_and_tpp_main.ablated_precomputed_activations(
            activations,
            _MeanLatents(latents, view),  # type: ignore[arg-type]
            ablated,
            len(activations),
        )
        for label, (activations, latents) in means.items()
    }


def _test_means(
    activations: Mapping[str, TextActivations], pooled: PooledLatents
) -> dict[str, tuple[Float[Tensor, "texts 1 d_in"], Float[Tensor, "texts 1 width"]]]:
    """Mean activations and latents of each text, by class, as SAEBench divides them: by the number of its real tokens.

    SAEBench ablates at padding too, where the activations are zero but latents may fire; so these are added.
    """
    means: dict[str, tuple[Tensor, Tensor]] = {}
    for label, of_class in activations.items():
        n_counted = of_class.n_counted
        padding_a_token = (of_class.context_length - n_counted) / n_counted
        latents = pooled.of_texts.test[label] + padding_a_token[:, None] * pooled.of_nothing
        means[label] = of_class.means()[:, None], latents[:, None]
    return means
