"""Meta-structure equals SAEBench's own run, for every level."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.evaluated_saes import levels
from sae_lens_matryoshka.bench.meta_structure import MetaStructure
from sae_lens_matryoshka.bench.upstream import MetaStructureEvalConfig, meta_structure_main, seed_everything
from sae_lens_matryoshka.errors import UserError
from tests.bench.fixtures import assert_equal, upstream_sae


def test_every_level_equals_saebench_own_run(
    sae: MatryoshkaSAE, source: ActivationSource, upstream_run: Callable[..., Any], tmp_path: Path
):
    config = MetaStructureEvalConfig(train_steps=20, train_batch_size=64, autocast=False)
    ours = MetaStructure(config).run(levels("ours", sae), source, tmp_path / "ours")

    def seeded(*arguments: Any) -> Any:
        seed_everything(config.random_seed)
        return meta_structure_main.run_eval(*arguments)

    for evaluated, path in zip(levels("ours", sae), ours, strict=True):
        folder = tmp_path / f"theirs-{evaluated.level}"
        upstream_run(seeded, config, [("ours", upstream_sae(evaluated))], "cpu", str(folder))
        theirs = json.loads((folder / "ours_custom_sae_eval_results.json").read_text())
        written = json.loads(path.read_text())
        for result in (written, theirs):
            del result["eval_result_metrics"]["meta_structure"]["train_time_seconds"]
        for part in ("eval_config", "eval_result_metrics"):
            assert_equal(written[part], theirs[part])


@pytest.mark.parametrize("field", ["width_ratio", "k", "train_steps", "train_batch_size", "eval_batch_size"])
def test_numbers_with_which_nothing_would_be_trained(field: str):
    with pytest.raises(UserError, match=rf"meta_structure.{field}=0(\.0)? must be above 0"):
        MetaStructure(dataclasses.replace(MetaStructureEvalConfig(), **{field: 0}))
