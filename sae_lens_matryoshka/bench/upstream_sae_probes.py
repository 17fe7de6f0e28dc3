"""The only place that imports sae_probes and SAEBench's wrapper of it, which reads all of its data sets meanwhile.

That takes some ten seconds, so import this only where the evaluation runs.
"""

# ruff: noqa: F401 -- what is imported here is for the other modules
import contextlib
import io

from sae_lens_matryoshka.bench import upstream  # says what to install where SAEBench is missing

with contextlib.redirect_stdout(io.StringIO()):
    from sae_bench.evals.sparse_probing_sae_probes.eval_config import SparseProbingSaeProbesEvalConfig
    from sae_bench.evals.sparse_probing_sae_probes.eval_output import (
        SparseProbingSaeProbesEvalOutput,
    )
    from sae_probes import DATASETS, utils_data
    from sae_probes.run_baselines import METHODS
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization
    from sae_probes.utils_training import find_best_reg
