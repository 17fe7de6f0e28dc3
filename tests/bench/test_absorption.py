"""Absorption equals SAEBench's own run, for every level."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench import upstream
from sae_lens_matryoshka.bench.absorption import Absorption
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.beyond_saebench import Beyond
from sae_lens_matryoshka.bench.evaluated_saes import Hook, levels
from sae_lens_matryoshka.bench.models import Model
from sae_lens_matryoshka.bench.upstream import AbsorptionEvalConfig
from sae_lens_matryoshka.bench.word_prompts import WordPrompts
from sae_lens_matryoshka.errors import UserError
from tests.bench.fixtures import HOOK, assert_equal, upstream_sae


def _config(**settings: Any) -> AbsorptionEvalConfig:
    # a model this small does not know many first letters
    small = {"min_GT_probe_f1": 0.05, "min_feats_for_eval": 2, "prompt_template": "{word}", "prompt_token_pos": -1}
    return AbsorptionEvalConfig(
        **{"model_name": "tinystories", "k_sparse_probe_num_epochs": 5, "max_k_value": 5, **small, **settings}
    )


def _saebench_own_run(config: AbsorptionEvalConfig, sae: Any, prompts: WordPrompts, folder: Path) -> dict[str, Any]:
    """SAEBench writes into the folder it is installed in and reads what it finds there, so it gets another one."""
    main, patch = upstream.absorption_main, pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(main.HookedTransformer, "from_pretrained_no_processing", lambda *_, **__: prompts)
        for name in ("run_k_sparse_probing_experiment", "run_feature_absortion_experiment"):
            folders: dict[str, Path] = {"probes_dir": folder / "probes"}
            if "absortion" in name:
                folders |= {"experiment_dir": folder / "absorption", "sparse_probing_experiment_dir": folder / "sparse"}
            else:
                folders |= {"experiment_dir": folder / "sparse"}
            context.setattr(main, name, functools.partial(getattr(main, name), **folders))
        upstream.seed_everything(config.random_seed)  # SAEBench does not use its random_seed here
        folder.mkdir()
        (result,) = main.run_eval(config, [("ours", sae)], "cpu", str(folder)).values()
    return result


def test_every_level_equals_saebench_own_run(
    sae: MatryoshkaSAE, source: ActivationSource, model: Model, upstream_run: Callable[..., Any], tmp_path: Path
):
    ours = Absorption(_config()).run(levels("ours", sae, [0, -1]), source, tmp_path / "ours")
    for evaluated, path in zip(levels("ours", sae, [0, -1]), ours, strict=True):
        theirs = upstream_run(
            _saebench_own_run,
            _config(),
            upstream_sae(evaluated),
            WordPrompts(model, Hook(HOOK, 2), -1),
            tmp_path / f"theirs-{evaluated.level}",
        )
        written = json.loads(path.read_text())
        for part in ("eval_config", "eval_result_metrics", "eval_result_details"):
            assert_equal(written[part], json.loads(json.dumps(theirs[part])))
        beyond, mean = Beyond.of(written["eval_result_unstructured"]), written["eval_result_metrics"]["mean"]
        n_letters = len(written["eval_result_details"])
        assert beyond.metrics["n_letters_told"] == n_letters
        assert sum(f1 > 0.05 for f1 in beyond.details["letter_f1"].values()) == n_letters
        assert beyond.standard_errors["mean_absorption_fraction_score"] == pytest.approx(
            mean["std_dev_absorption_fraction_score"] / n_letters**0.5
        )


def test_a_sample_of_words_is_drawn_by_the_seed_with_some_of_every_letter(
    sae: MatryoshkaSAE, source: ActivationSource, model: Model, tmp_path: Path
):
    everything = WordPrompts(model, Hook(HOOK, 2), -1).words
    drawn, again, other = (WordPrompts(model, Hook(HOOK, 2), -1, 140, seed).words for seed in (1, 1, 2))
    assert drawn == again != other
    assert len(drawn) == 140
    in_order = iter(everything)
    assert all(word in in_order for word in drawn)  # of token ids

    def of_letter(words: list[str]) -> Counter[str]:
        return Counter(word.strip()[0].lower() for word in words)

    assert all(of_letter(drawn)[letter] >= min(5, n) for letter, n in of_letter(everything).items())
    with pytest.raises(UserError, match="max_words=100 must be 130 or more"):
        Absorption(_config(), max_words=100)
    (path,) = Absorption(_config(), max_words=200).run(levels("ours", sae, [-1]), source, tmp_path)
    beyond = Beyond.of(json.loads(path.read_text())["eval_result_unstructured"])
    assert beyond.details["max_words"] == 200
    assert sum(beyond.details["words"].values()) <= 200
    with pytest.raises(UserError, match="max_words=200, now None"):
        Absorption(_config()).run(levels("ours", sae, [-1]), source, tmp_path)


def test_too_few_letters_are_said_before_an_sae_is_looked_at(
    sae: MatryoshkaSAE, source: ActivationSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(upstream.k_sparse_probing, "train_k_sparse_probes", None)
    with pytest.raises(
        UserError, match=r"First letters that can be told .*: \d+, fewer than min_feats_for_eval=26 .*mean F1 0\.\d\d"
    ):
        Absorption(_config(min_feats_for_eval=26, min_GT_probe_f1=0.9)).run(levels("ours", sae, [-1]), source, tmp_path)
