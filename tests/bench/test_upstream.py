"""SAEBench leaves no trace, what we rely on in it exists, and repeated constants agree."""

import inspect
import random
import sys

import jaxtyping
import pytest
import torch
from sae_bench.evals.sparse_probing import main as sparse_probing_main
from tqdm import tqdm

from sae_lens_matryoshka.bench import upstream
from sae_lens_matryoshka.bench.k_sparse_probes import DENSE_PROBE
from sae_lens_matryoshka.bench.progress import progress_bar
from sae_lens_matryoshka.cli.progress import write_line


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


def test_our_bars_show_all_the_same_and_so_do_lines_about_them(capfd: pytest.CaptureFixture[str]):
    with tqdm(total=1, desc="outer"), upstream.contained():
        with progress_bar(3, "inner", "words") as bar:
            bar.delay = 0
            bar.update(2)
            bar.refresh()
        shown = capfd.readouterr().err
        assert "inner" in shown
        assert "2.00/3.00" in shown
        print("dropped", file=sys.stderr)
        write_line()
    assert "outer:   0%" in capfd.readouterr().err


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
    assert source.count("use_sklearn=False") == 2
    losses = inspect.getsource(upstream.core_main.get_downstream_reconstruction_metrics)
    assert "in get_recons_loss(" in losses  # which is looked up when it is called
    assert "max_icl_examples=10" in inspect.getsource(upstream.feature_absorption.run_feature_absortion_experiment)
    assert "shuffle_input_dataset(seed=42)" in inspect.getsource(upstream.core_main.multiple_evals)
