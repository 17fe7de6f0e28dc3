"""SAEBench's evaluations on every level of a Matryoshka SAE, beside any other SAE, for about the price of one.

Needs the extra ``bench``; without it, importing this is an ``ImportError`` that says so.
"""

from sae_lens_matryoshka.bench.absorption import Absorption
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.cache import Cache
from sae_lens_matryoshka.bench.concept_erasure import ConceptErasure
from sae_lens_matryoshka.bench.core import Core
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, levels
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.figures import plot_results
from sae_lens_matryoshka.bench.labelled_text import DataUnavailableError, LabelledText
from sae_lens_matryoshka.bench.meta_structure import MetaStructure
from sae_lens_matryoshka.bench.models import load_model
from sae_lens_matryoshka.bench.report import Report, evaluate
from sae_lens_matryoshka.bench.results import headline_table, load_results
from sae_lens_matryoshka.bench.sparse_probing import SparseProbing

__all__ = [
    "Absorption",
    "ActivationSource",
    "Cache",
    "ConceptErasure",
    "Core",
    "DataUnavailableError",
    "EvaluatedSAE",
    "Evaluation",
    "LabelledText",
    "MetaStructure",
    "Report",
    "SparseProbing",
    "evaluate",
    "headline_table",
    "levels",
    "load_model",
    "load_results",
    "plot_results",
]
