"""Architecture ``matryoshka_topk``: the k largest latents of each sample, saved as a TopK SAE.

TopK: Gao et al., arXiv:2406.04093. With a single level it is SAELens's ``topk``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from sae_lens import TopKSAEConfig, TopKTrainingSAE
from sae_lens.saes.sae import SAEConfig, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.ops.selection import Selection, select_topk
from sae_lens_matryoshka.saes.nested_training_config import validate_k
from sae_lens_matryoshka.saes.topk_family import TopKFamilyTrainingSAE, TopKFamilyTrainingSAEConfig

GUESS_SHARE = 0.01
"""The share of samples whose k-th largest score may lie below the guess for the next step's. Those are sorted alone."""


@dataclass
class MatryoshkaTopKTrainingSAEConfig(TopKFamilyTrainingSAEConfig):
    """Configuration for training a Matryoshka SAE with TopK.

    The fields are those of SAELens's ``topk`` and of :class:`NestedTrainingSAEConfig`.

    Args:
        k (int): The number of latents to keep active a sample. Inherited from TopKTrainingSAEConfig.
        aux_loss_coefficient (float): Coefficient of the auxiliary loss for dead latents. Inherited from
            TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Select latents as if the decoder were normalized. Inherited from
            TopKTrainingSAEConfig.
        use_sparse_activations (bool): Read by SAELens's own code only; the fast step is sparse anyway. Inherited from
            TopKTrainingSAEConfig.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_topk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig

    def __post_init__(self) -> None:
        validate_k(self.k, self.d_sae, whole=True)
        self.k = int(self.k)
        super().__post_init__()


class MatryoshkaTopKTrainingSAE(TopKFamilyTrainingSAE, TopKTrainingSAE):
    """A Matryoshka SAE in training that keeps the k largest latents of each sample.

    In training every prefix reconstructs from its part of one selection among all latents. In the saved SAE a level
    stands alone and fires the k largest of its own latents.
    """

    cfg: MatryoshkaTopKTrainingSAEConfig  # type: ignore[assignment]

    @override
    def _whole(self, k: float) -> int:
        return round(k)

    @override
    def _select(self, x: Float[Tensor, "batch d_in"], decoder_norms: Float[Tensor, " d_sae"] | None) -> Selection:
        parameters = (self.W_enc.detach(), self.b_enc.detach(), decoder_norms)
        return select_topk(x, *parameters, int(self._k), self.selection_guess)

    @override
    @torch.no_grad()
    def _after_step(self, output: TrainStepOutput) -> None:
        super()._after_step(output)
        acts = output.feature_acts.detach()
        if acts.is_sparse:  # as the fast step, which alone reads the guess, gives them
            smallest = acts.values().new_full((acts.shape[0],), torch.inf)
            smallest.scatter_reduce_(0, acts.indices()[0], acts.values(), "amin")
            guess = smallest.nan_to_num(posinf=0.0).kthvalue(max(1, int(GUESS_SHARE * acts.shape[0]))).values
            self.selection_guess = guess.to(self.selection_guess.dtype)
