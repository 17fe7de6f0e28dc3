"""What a user does with a real Gemma, small: cache, train, probe, use a level in the model. Minutes on two cores."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAETransformerBridge

from sae_lens_matryoshka import MatryoshkaSAE, for_transformer_lens, levels_in_model
from sae_lens_matryoshka.bench import load_results
from sae_lens_matryoshka.cli.command_line import main
from sae_lens_matryoshka.saved.level_figures import read_level_figures
from tests.conftest import real_model, real_text

K = 32
TEXT = (
    "The old harbour town had three churches and a library, and in winter the ferries stopped when the ice came. "
    "Most of the people who lived there worked in the shipyard, until it was sold and the cranes were taken down."
)


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return real_model("gemma-3-270m")


@pytest.fixture(scope="module")
def saved(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of 1,024 latents, trained on five times 47,500 activations by the run file for that model."""
    folder = tmp_path_factory.mktemp("gemma")
    run = ["gemma-3-270m"]
    for setting in (
        f"model_name={model_folder}", f"dataset_path={real_text('text/train.jsonl')}", "streaming=false", "device=cpu",
        "sae.d_sae=1024", "sae.matryoshka_widths=[64, 256, 1024]", f"sae.k={K}", "training_tokens=245_760", "lr=1e-3",
        "lr_warm_up_steps=10", "lr_decay_steps=40", "dead_feature_window=50", "n_batches_for_norm_estimate=10",
    ):  # fmt: skip
        run += ["--set", setting]
    assert main(["cache", *run, "--tokens", "50000", "--output", str(folder / "cache")]) == 0
    assert main(["train", *run, "--activations", str(folder / "cache"), "--output", str(folder / "sae")]) == 0
    return folder / "sae"


@pytest.fixture(scope="module")
def gemma(model_folder: Path) -> SAETransformerBridge:
    return SAETransformerBridge.boot_transformers(str(model_folder), device="cpu", dtype=torch.float32)


def test_levels_are_calibrated_and_each_explains_more(saved: Path):
    levels = read_level_figures(saved)
    assert [level.width for level in levels] == [64, 256, 1024]
    assert levels[-1].l0 == pytest.approx(K, rel=0.01)
    assert levels[-1].fvu < 0.6
    assert levels[-1].fvu_standardized is not None
    assert levels[-1].fvu_standardized < 0.75
    assert [level.fvu for level in levels] == sorted((level.fvu for level in levels), reverse=True)
    assert levels[-1].above_half is not None
    assert levels[-1].above_half <= 5


@torch.no_grad()
def test_the_model_keeps_most_of_what_it_knows_with_the_sae_in_it(saved: Path, gemma: SAETransformerBridge):
    sae: Any = MatryoshkaSAE.load_from_disk(saved)
    assert all(parameter.isfinite().all() for parameter in sae.parameters())
    tokens = gemma.to_tokens(TEXT)
    hook = for_transformer_lens(sae, gemma).cfg.metadata.hook_name
    assert hook == "blocks.9.hook_out"
    _, cache = gemma.run_with_cache(tokens, names_filter=[hook])
    acts = sae.encode(cache[hook][0, 1:].float())
    assert acts.isfinite().all()

    def loss() -> float:
        return gemma(tokens, return_type="loss").item()

    as_it_is = loss()
    with gemma.hooks(fwd_hooks=[(hook, lambda activation, hook: torch.zeros_like(activation))]):
        ablated = loss()

    def recovered(level: int) -> float:
        with levels_in_model(gemma, sae, level=level):
            return (ablated - loss()) / (ablated - as_it_is)

    assert recovered(-1) > 0.6
    assert recovered(-1) > recovered(0)
    assert loss() == as_it_is


def test_probes_see_the_language_of_a_text(saved: Path, model_folder: Path, tmp_path: Path):
    """By all latents; a few of an SAE of two minutes say little, and single channels of this model much."""
    command = ["evaluate", f"sae={saved}", "--model", str(model_folder), "--dtype", "bfloat16", "--no-baselines"]
    command += ["--evals", "sparse_probing", "--data", f"language={real_text('probing/language.jsonl')}"]
    command += ["--limit-texts", "12", "--levels", "-1", "--output", str(tmp_path)]
    assert main(command) == 0
    results = load_results(tmp_path).set_index(["sae", "metric"])["value"]
    assert results["sae", "sae_test_accuracy"] > 0.7
    assert results["model channels", "sae_top_1_standardized_test_accuracy"] > 0.7
    assert results["model channels", "sae_top_1_test_accuracy"] < 0.6  # chance, by SAEBench's rule
