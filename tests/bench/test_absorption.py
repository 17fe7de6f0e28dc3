"""Absorption equals SAEBench's own run, for every level."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench import upstream
from sae_lens_matryoshka.bench.absorption import Absorption
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.evaluated_saes import Hook, levels
from sae_lens_matryoshka.bench.models import Model
from sae_lens_matryoshka.bench.upstream import AbsorptionEvalConfig
from sae_lens_matryoshka.bench.word_prompts import WordPrompts
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
