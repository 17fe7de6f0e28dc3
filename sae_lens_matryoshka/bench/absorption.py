"""Feature absorption on first letters (SAEBench, after arXiv:2409.14507), for all levels of an SAE together.

The model's part, prompts and probes, is done once. SAEBench then encodes all training words once for each of 50 epochs
and each of 260 small probes; here they are encoded once for all levels. It also fits and scores probes on up to ten
latents a letter, of which it uses those up to where F1 stops rising: here as many are fitted as that takes.

Most of the time goes into the model's part: each word of the vocabulary, 100,000 and more with Gemma's, is read twice,
at the end of a prompt of some 70 tokens. ``max_words`` takes a sample of them.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.metrics import f1_score
from torch import Tensor

from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.beyond_saebench import Beyond
from sae_lens_matryoshka.bench.cache import Entry
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, SAEView, SharedEncoder
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.standard_errors import of_mean
from sae_lens_matryoshka.bench.upstream import (
    AbsorptionEvalConfig,
    AbsorptionEvalOutput,
    FeatureAbsorptionCalculator,
    RandomState,
    absorption_common,
    absorption_main,
    absorption_probing,
    absorption_prompting,
    feature_absorption,
    k_sparse_probing,
    seed_everything,
    vocab,
)
from sae_lens_matryoshka.bench.word_prompts import FEWEST_OF_A_LETTER, WordPrompts
from sae_lens_matryoshka.errors import UserError

SHARED_LATENTS_BYTES = 4 * 10**9
"""Up to this size the latents of all training words are kept; beyond, SAEBench encodes them batch by batch."""

FEWEST_LATENTS = FeatureAbsorptionCalculator.topk_feats
"""How many latents SAEBench compares for each word."""

FEWEST_WORDS = 26 * FEWEST_OF_A_LETTER
"""How many words a sample has at least."""

N_ICL_EXAMPLES = 10
"""Words spelled out before the one asked for (``feature_absorption.run_feature_absortion_experiment``)."""


class Absorption(Evaluation[AbsorptionEvalConfig]):
    """SAEBench's ``absorption_first_letter``.

    Args:
        config: SAEBench's config; None takes its defaults. Its ``prompt_token_pos`` counts from the end of the prompt
            and must be where the word's token is: -6 in SAEBench's own template with Gemma's tokenizer; -1 in
            ``"{word}"``.
        max_words: How many words of the vocabulary to draw by the config's ``random_seed``; None takes all of them.
    """

    name = "absorption"
    output_type = AbsorptionEvalOutput

    def __init__(self, config: AbsorptionEvalConfig | None = None, max_words: int | None = None) -> None:
        super().__init__(config or AbsorptionEvalConfig())
        self.max_words = max_words
        if max_words is not None and max_words < FEWEST_WORDS:
            raise UserError(
                f"max_words={max_words} must be {FEWEST_WORDS} or more, {FEWEST_OF_A_LETTER} a letter, since each "
                "letter has a probe (--absorption-max-words); leave it out for all words."
            )
        if self.config.prompt_token_pos >= 0:
            raise UserError(
                f"prompt_token_pos={self.config.prompt_token_pos} must count from the end, since examples come first: "
                "-1 is the last token."
            )
        self._prompts: dict[Hook, WordPrompts] = {}

    def begin(self, source: ActivationSource) -> None:
        super().begin(source)
        self._prompts = {}  # of another model, or of this one before it was changed

    def inputs(self, source: ActivationSource) -> dict[str, Any]:
        return {**super().inputs(source), "max_words": self.max_words}

    def evaluate(
        self, group: Sequence[EvaluatedSAE], hook: Hook, source: ActivationSource
    ) -> Iterator[tuple[EvaluatedSAE, AbsorptionEvalOutput]]:
        if hook not in self._prompts:
            config = self.config
            self._prompts[hook] = WordPrompts(
                source.model, hook, config.prompt_token_pos, self.max_words, config.random_seed
            )
        prompts = self._prompts[hook]
        letters = self._first_letters(prompts, source)
        self._check(letters)
        whole = SAEView(group[0].sae, hook, source.name)
        encoder = SharedEncoder(whole)
        n_bytes = len(letters.train_labels) * sum(sae.width for sae in group) * 4
        latents = _encoded(encoder, letters.train_activations) if n_bytes <= SHARED_LATENTS_BYTES else None
        for sae in group:
            if sae.width < FEWEST_LATENTS:
                self.skip(sae, f"it has {sae.width} latents, fewer than the {FEWEST_LATENTS} that are compared.")
                continue
            view = self.view(sae, hook, source)
            of_level = None if latents is None else encoder.of_level(latents, sae.level)
            yield sae, self._evaluate_one(sae, view, letters, of_level, prompts)

    def _evaluate_one(
        self,
        sae: EvaluatedSAE,
        view: SAEView,
        letters: "_FirstLetters",
        latents: Float[Tensor, "words width"] | None,
        prompts: WordPrompts,
    ) -> AbsorptionEvalOutput:
        layer = prompts.hook.layer
        with tempfile.TemporaryDirectory() as folder:
            raw, metrics = self._sparse_probes(view, letters, latents, layer)
            raw_path = Path(folder) / k_sparse_probing.get_sparse_probing_raw_results_filename("sae", layer)
            raw.to_parquet(raw_path, index=False)
            stats = feature_absorption.get_stats_and_likely_false_negative_tokens(metrics, "sae", layer, Path(folder))
        calculator = FeatureAbsorptionCalculator(
            model=prompts,  # type: ignore[arg-type]
            icl_word_list=prompts.words,
            max_icl_examples=N_ICL_EXAMPLES,
            base_template=self.config.prompt_template,
            answer_formatter=absorption_prompting.first_letter_formatter(),
            word_token_pos=self.config.prompt_token_pos,
            full_absorption_probe_cos_sim_threshold=feature_absorption.FULL_ABSORPTION_PROBE_COS_THRESHOLD,
            absorption_fraction_probe_cos_sim_threshold=feature_absorption.ABSORPTION_FRACTION_PROBE_COS_THRESHOLD,
            probe_projection_proportion_threshold=feature_absorption.ABSORPTION_PROBE_PROJECTION_PROPORTION_THRESHOLD,
            absorption_fraction_max_absorbing_latents=feature_absorption.ABSORPTION_FRACTION_MAX_ABSORBING_LATENTS,
            batch_size=self.config.llm_batch_size,
        )
        n_words = sum(len(of_letter.potential_false_negatives) for of_letter in stats.values())
        with prompts.shown(n_words, f"absorption of {sae}"):
            words = feature_absorption.calculate_projection_and_cos_sims(calculator, view, letters.probe, layer, stats)  # type: ignore[arg-type]
        return self._output(sae, view, letters, words)

    def _first_letters(self, prompts: WordPrompts, source: ActivationSource) -> "_FirstLetters":
        """Words, activations and probes, which depend on the model alone; see :class:`_FirstLetters`."""
        config, layer = self.config, prompts.hook.layer

        def compute() -> Entry:
            seed_everything(config.random_seed)
            showing = prompts.shown(len(prompts.words), "absorption: reading words")
            with tempfile.TemporaryDirectory() as folder, torch.enable_grad(), showing:
                where = {
                    "model": prompts,
                    "layer": layer,
                    "probes_dir": folder,
                    "base_template": config.prompt_template,
                    "pos_idx": config.prompt_token_pos,
                }
                probe = absorption_common.load_or_train_probe(**where, device=str(source.device))
                state = RandomState.capture()
                tensors: dict[str, Tensor] = dict(probe.state_dict())
                labels: dict[str, list[tuple[str, int]]] = {}
                for split in ("train", "test"):
                    tensors[split], labels[split] = absorption_common.load_probe_data_split_or_train(
                        **where, split=split, device="cpu"
                    )
            return Entry({**tensors, "torch": state.torch}, {**labels, "python": state.python})

        key = source.key(
            "first letters",
            hook=prompts.hook.name,
            prompt_template=config.prompt_template,
            prompt_token_pos=config.prompt_token_pos,
            seed=config.random_seed,
            max_words=self.max_words,
        )
        return _FirstLetters.from_entry(source.cache.get_or_compute(key, compute))

    def _sparse_probes(
        self, view: SAEView, letters: "_FirstLetters", latents: Float[Tensor, "words width"] | None, layer: int
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """SAEBench's raw scores and metrics of k-sparse probes, for k up to where every letter's F1 stops rising."""
        config = self.config
        # an SAE whose input is latents already
        of_latents = SimpleNamespace(cfg=view.cfg, device=view.device, dtype=view.dtype, encode=lambda x: x)
        most = min(config.max_k_value, view.cfg.d_sae)
        fitted = min(3, most)
        while True:
            letters.random_state.restore()
            with torch.enable_grad():
                probes = k_sparse_probing.train_k_sparse_probes(
                    view if latents is None else of_latents,  # type: ignore[arg-type]
                    letters.train_labels,
                    letters.train_activations if latents is None else latents,
                    ks=range(1, fitted + 1),
                    l1_decay=config.k_sparse_probe_l1_decay,
                    batch_size=config.k_sparse_probe_batch_size,
                    num_epochs=config.k_sparse_probe_num_epochs,
                    precalc_sae_acts=latents is not None,
                )
            raw = k_sparse_probing.eval_probe_and_sae_k_sparse_raw_scores(
                view,  # type: ignore[arg-type]
                letters.probe,
                k_sparse_probes=probes,
                eval_labels=letters.test_labels,
                eval_activations=letters.test_activations,
                eval_batch_size=config.eval_k_sparse_probe_batch_size,
            )
            metadata = k_sparse_probing.sae_k_sparse_metadata(view, letters.probe, probes, "sae", layer)  # type: ignore[arg-type]
            metrics = k_sparse_probing.build_metrics_df(raw, metadata, max_k_value=fitted)
            k_sparse_probing.add_feature_splits_to_metrics_df(metrics, fitted, config.f1_jump_threshold)
            # a letter whose F1 rose up to the last k might go on rising
            if fitted == most or all(len(latent_ids) < fitted for latent_ids in metrics["split_feats"]):
                return raw, metrics
            fitted = min(2 * fitted, most)

    def _check(self, letters: "_FirstLetters") -> None:
        """Before an SAE is looked at: whether there are enough letters to speak of."""
        config, found = self.config, self._told(letters)
        if len(found) < config.min_feats_for_eval:
            raise UserError(
                f"First letters that can be told from the model's activations with F1 above min_GT_probe_f1="
                f"{config.min_GT_probe_f1}: {len(found)}, fewer than min_feats_for_eval={config.min_feats_for_eval} "
                f"({len(letters.train_labels)} words to train on, mean F1 {statistics.mean(letters.f1.values()):.2f}); "
                "use more words, a larger model, or lower them in the config."
            )

    def _told(self, letters: "_FirstLetters") -> list[str]:
        return [letter for letter, f1 in letters.f1.items() if f1 > self.config.min_GT_probe_f1]

    def _output(
        self, sae: EvaluatedSAE, view: SAEView, letters: "_FirstLetters", words: pd.DataFrame
    ) -> AbsorptionEvalOutput:
        found = self._told(letters)
        of_letters: Any = absorption_main._aggregate_results_df(words)
        of_letters = of_letters.rename(columns={"letter": "first_letter", "num_split_feats": "num_split_features"})
        details = of_letters[of_letters["first_letter"].isin(found)].to_dict(orient="records")
        mean: dict[str, float] = {}
        errors: dict[str, float] = {}
        for field, metric in (
            ("mean_absorption_fraction", "absorption_fraction_score"),
            ("full_absorption_rate", "full_absorption_score"),
            ("num_split_features", "num_split_features"),
        ):
            values = [float(detail[field]) for detail in details]
            mean |= {f"mean_{metric}": statistics.mean(values), f"std_dev_{metric}": _deviation(values)}
            errors[f"mean_{metric}"] = of_mean(values)
        beyond = Beyond(
            metrics={"n_letters_told": float(len(found)), "mean_letter_f1": statistics.mean(letters.f1.values())},
            standard_errors=errors,
            details={
                "letter_f1": letters.f1,
                "words": {"train": len(letters.train_labels), "test": len(letters.test_labels)},
                "max_words": self.max_words,
            },
        )
        return self.output(sae, view, {"mean": mean}, details, beyond=beyond)


def _deviation(values: list[float]) -> float:
    """The standard deviation over letters; SAEBench's schema wants a number for a single one too."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class _FirstLetters:
    """What the absorption evaluation knows of the model."""

    probe: absorption_probing.LinearProbe
    train_activations: Float[Tensor, "words d_model"]
    train_labels: list[tuple[str, int]]
    test_activations: Float[Tensor, "test_words d_model"]
    test_labels: list[tuple[str, int]]
    random_state: RandomState
    """Where the generators stood when the probe was trained."""

    @cached_property
    def f1(self) -> dict[str, float]:
        """Letter -> how well the probe tells it on the test words, as ``k_sparse_probing.build_metrics_df`` has it."""
        with torch.no_grad():
            told = (self.probe(self.test_activations.to(self.probe.weights.device)) > 0).cpu().numpy()
        truth = np.array([label for _, label in self.test_labels])
        return {
            letter: float(f1_score(truth == number, told[:, number])) for number, letter in enumerate(vocab.LETTERS)
        }

    @classmethod
    def from_entry(cls, entry: Entry) -> "_FirstLetters":
        weight, bias = entry.tensors["fc.weight"], entry.tensors["fc.bias"]
        probe = absorption_probing.LinearProbe(weight.shape[1], weight.shape[0]).to(weight.device, weight.dtype)
        probe.load_state_dict({"fc.weight": weight, "fc.bias": bias})
        train, test = ([(token, label) for token, label in entry.values[split]] for split in ("train", "test"))
        state = RandomState(entry.values["python"], entry.tensors["torch"])
        return cls(probe, entry.tensors["train"], train, entry.tensors["test"], test, state)


@torch.no_grad()
def _encoded(encoder: SharedEncoder, activations: Float[Tensor, "words d_model"]) -> Float[Tensor, "words columns"]:
    device, dtype = encoder.view.device, encoder.view.dtype
    return torch.cat([encoder.encode(batch.to(device, dtype)).cpu() for batch in activations.split(4096)])
