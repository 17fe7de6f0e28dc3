"""Meta-structure: how much of the decoder a smaller SAE explains (arXiv:2503.17547, appendix D; SAEBench's version).

The paper trains a BatchTopK SAE with a quarter of the latents, 4 of them active, on the decoder directions of an SAE.
The more variance of the decoder that explains, the more the SAE's latents share components: lower is better.
"""

from collections.abc import Iterator, Sequence

import torch

from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.upstream import (
    MetaStructureEvalConfig,
    MetaStructureEvalOutput,
    meta_structure_main,
    seed_everything,
)
from sae_lens_matryoshka.errors import UserError


class MetaStructure(Evaluation[MetaStructureEvalConfig]):
    """SAEBench's ``meta_structure_decoder_variance``. It looks at weights only; the model is not used.

    Args:
        config: SAEBench's config; None takes its defaults, which are the paper's width and sparsity.
    """

    name = "meta_structure"
    output_type = MetaStructureEvalOutput
    reads_model = False

    def __init__(self, config: MetaStructureEvalConfig | None = None) -> None:
        config = config or MetaStructureEvalConfig()
        for field in ("width_ratio", "k", "train_steps", "train_batch_size", "eval_batch_size"):
            if not getattr(config, field) > 0:
                raise UserError(f"meta_structure.{field}={getattr(config, field)} must be above 0.")
        super().__init__(config)

    def evaluate(
        self, group: Sequence[EvaluatedSAE], hook: Hook, source: ActivationSource
    ) -> Iterator[tuple[EvaluatedSAE, MetaStructureEvalOutput]]:
        for sae in group:
            view = self.view(sae, hook, source)
            # SAEBench seeds only as a script, not as a function
            seed_everything(self.config.random_seed)
            with torch.enable_grad():
                eval_output = meta_structure_main.run_eval_single_sae(
                    sae.name,
                    sae.sae_id,
                    view,  # type: ignore[arg-type]
                    self.config,
                    str(source.device),
                )
            yield sae, self.output(sae, view, eval_output.eval_result_metrics, eval_output.eval_result_details)

    def completed(self, source: ActivationSource) -> MetaStructureEvalConfig:
        return self.config  # it names neither a model nor its type
