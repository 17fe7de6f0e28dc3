"""SAEBench leaves no trace, what we rely on in it exists, and repeated constants agree."""

import inspect
import random
import sys

import jaxtyping
import pytest
import torch
from sae_bench.evals.sparse_probing import main as sparse_probing_main

from sae_lens_matryoshka.bench import upstream
from sae_lens_matryoshka.bench.sparse_probing import DENSE_PROBE


def test_nothing_of_saebench_shows(capfd: pytest.CaptureFixture[str]):
    random.seed(0)
    expected = random.random()
    random.seed(0)
    checks = jaxtyping.config.jaxtyping_disable

    def saebench() -> None:
        print("printed")
        print("warned", file=sys.stderr)
        upstream.seed_everything(7)
        torch.set_grad_enabled(False)
        assert jaxtyping.config.jaxtyping_disable
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), upstream.contained():
        saebench()
    assert random.random() == expected
    assert torch.is_grad_enabled()
    assert jaxtyping.config.jaxtyping_disable == checks
    assert capfd.readouterr() == ("", "")


def test_a_random_state_comes_back():
    upstream.seed_everything(3)
    random.gauss(0, 1)
    state = upstream.RandomState.capture()
    drawn = random.random(), random.gauss(0, 1), torch.rand(3)
    state.restore()
    assert (random.random(), random.gauss(0, 1)) == drawn[:2]
    assert torch.rand(3).equal(drawn[2])


def test_private_names_and_repeated_constants_are_still_saebench_own():
    assert list(inspect.signature(upstream.absorption_main._aggregate_results_df).parameters) == ["df"]
    source = inspect.getsource(sparse_probing_main.run_eval_single_dataset)
    for name, value in DENSE_PROBE.items():
        written = "1e-2" if name == "lr" else repr(value)
        assert source.count(f"{name}={written}") == 2
    assert "max_icl_examples=10" in inspect.getsource(upstream.feature_absorption.run_feature_absortion_experiment)
    assert "shuffle_input_dataset(seed=42)" in inspect.getsource(upstream.core_main.multiple_evals)
