"""The only place that imports SAEBench, and where everything it does to its surroundings is contained.

SAEBench prints, draws progress bars, seeds and switches global state, and checks array shapes at run time in a way that
fails with the jaxtyping and beartype of today. Call it inside :func:`contained`, which takes care of all of that.
"""

# ruff: noqa: F401 -- what is imported here is for the other modules
import contextlib
import io
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import jaxtyping
import torch
from torch import Tensor

from sae_lens_matryoshka.bench.progress import shown_stderr

try:
    import sae_bench
except ModuleNotFoundError as error:
    raise ImportError(
        "Evaluations need SAEBench: install it with pip install 'sae-lens-matryoshka[bench]' (Python 3.10 to 3.12)."
    ) from error

with contextlib.redirect_stdout(io.StringIO()):
    from sae_bench.evals.absorption import common as absorption_common
    from sae_bench.evals.absorption import feature_absorption, k_sparse_probing, vocab
    from sae_bench.evals.absorption import main as absorption_main
    from sae_bench.evals.absorption import probing as absorption_probing
    from sae_bench.evals.absorption import prompting as absorption_prompting
    from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
    from sae_bench.evals.absorption.eval_output import AbsorptionEvalOutput
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
    from sae_bench.evals.base_eval_output import BaseEvalConfig, BaseEvalOutput
    from sae_bench.evals.core import main as core_main
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.eval_output import CoreEvalOutput
    from sae_bench.evals.meta_structure import main as meta_structure_main
    from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig
    from sae_bench.evals.meta_structure.eval_output import MetaStructureEvalOutput
    from sae_bench.evals.scr_and_tpp import dataset_creation as scr_dataset_creation
    from sae_bench.evals.scr_and_tpp import main as scr_and_tpp_main
    from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
    from sae_bench.evals.scr_and_tpp.eval_output import ScrEvalOutput, TppEvalOutput
    from sae_bench.evals.sparse_probing import probe_training
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput
    from sae_bench.sae_bench_utils import (
        activation_collection,
        dataset_info,
        dataset_utils,
        general_utils,
        get_eval_uuid,
        get_sae_lens_version,
    )


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Run SAEBench so that nothing of it shows: neither output nor changes of global state.

    Inside, jaxtyping's run-time checks are off, as with ``JAXTYPING_DISABLE=1``: with them SAEBench's probes fail on
    classes of unequal size and its activation collection refuses a ``TransformerBridge``. What SAEBench prints is
    dropped, progress bars and warnings included; bars made outside, or by ``progress.progress_bar``, still show.
    """
    checks_were_disabled = jaxtyping.config.jaxtyping_disable
    grad_was_enabled = torch.is_grad_enabled()
    random_state = RandomState.capture()
    jaxtyping.config.update("jaxtyping_disable", True)
    outside = shown_stderr.set(shown_stderr.get() or sys.stderr)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        shown_stderr.reset(outside)
        jaxtyping.config.update("jaxtyping_disable", checks_were_disabled)
        torch.set_grad_enabled(grad_was_enabled)
        random_state.restore()


@dataclass(frozen=True)
class RandomState:
    """Where Python's and torch's CPU generators stand, so that what comes after shared work is as without sharing."""

    python: str
    """``random.getstate()`` as JSON."""

    torch: Tensor
    """``torch.get_rng_state()``."""

    @classmethod
    def capture(cls) -> "RandomState":
        return cls(json.dumps(random.getstate()), torch.get_rng_state())

    def restore(self) -> None:
        format_version, internal, gauss_next = json.loads(self.python)
        random.setstate((format_version, tuple(internal), gauss_next))
        torch.set_rng_state(self.torch)


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators, as SAEBench does before it evaluates an SAE."""
    random.seed(seed)
    torch.manual_seed(seed)
