"""Architecture ``matryoshka``: the paper's BatchTopK Matryoshka SAE (arXiv:2503.17547), saved as a JumpReLU SAE."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.ops.selection import Selection, select_batch_topk
from sae_lens_matryoshka.saes.nested_training_config import validate_k
from sae_lens_matryoshka.saes.topk_family import TopKFamilyTrainingSAE, TopKFamilyTrainingSAEConfig


@dataclass
class MatryoshkaTrainingSAEConfig(TopKFamilyTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAEConfig):  # pyright: ignore[reportIncompatibleVariableOverride] # one word more
    """Configuration for training a Matryoshka SAE with BatchTopK.

    The fields are those of SAELens's ``matryoshka_batchtopk``, so a working config of it becomes ours by changing the
    architecture name, and those of :class:`NestedTrainingSAEConfig`.

    Args:
        k (float): The mean number of latents to keep active a sample. Inherited from BatchTopKTrainingSAEConfig.
        topk_threshold_lr (float): Learning rate of the running inference threshold. Inherited from
            BatchTopKTrainingSAEConfig.
        use_matryoshka_aux_loss (bool): Whether dead latents reconstruct the error of their own level rather than of
            the whole SAE. Inherited from MatryoshkaBatchTopKTrainingSAEConfig.
        aux_loss_coefficient (float): Coefficient of the auxiliary loss for dead latents. Inherited from
            TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Select latents as if the decoder were normalized. Inherited from
            TopKTrainingSAEConfig.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka"

    def __post_init__(self) -> None:
        validate_k(self.k, self.d_sae)
        super().__post_init__()


class MatryoshkaTrainingSAE(TopKFamilyTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """A Matryoshka SAE in training, saved for inference as a JumpReLU SAE whose metadata hold the widths.

    Differences to SAELens's ``matryoshka_batchtopk``: the same step at a fraction of the time and memory, the options
    of :class:`NestedTrainingSAEConfig`, figures for every level on logging steps, a running threshold that is unbiased
    from the first step, and training with ``normalize_activations`` of every kind.
    """

    cfg: MatryoshkaTrainingSAEConfig  # type: ignore[assignment]
    topk_threshold_updates: Tensor

    def __init__(self, cfg: MatryoshkaTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self._register_statistic("topk_threshold_updates", torch.zeros((), dtype=torch.long))

    @override
    def _select(self, x: Float[Tensor, "batch d_in"], decoder_norms: Float[Tensor, " d_sae"] | None) -> Selection:
        n_selected = int(self._k * x.shape[0])
        parameters = (self.W_enc.detach(), self.b_enc.detach(), decoder_norms)
        return select_batch_topk(x, *parameters, n_selected, self.selection_guess)

    @override
    def _after_step(self, output: TrainStepOutput) -> None:
        super()._after_step(output)
        acts = output.feature_acts.detach()
        self._move_topk_threshold(acts.values() if acts.is_sparse else acts[acts > 0])
        output.metrics["topk_threshold"] = self.topk_threshold

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Float[Tensor, "batch d_sae"]) -> None:
        self._move_topk_threshold(acts_topk[acts_topk > 0])

    @torch.no_grad()
    def _move_topk_threshold(self, positive_acts: Float[Tensor, " n"]) -> None:
        """Move the running threshold towards just below the smallest selected activation of this batch.

        A saved SAE fires above its threshold: at the smallest selected activation itself, as SAELens sets it, a batch
        that stays the same would lose that latent.

        SAELens averages from a start value of 0, which for hundreds of steps keeps the threshold far too low. Dividing
        the average by the weight it has gathered so far, as Adam does (Kingma & Ba, arXiv:1412.6980, section 3),
        removes the start value. Written as a step towards the new value, that is a learning rate which starts at 1
        and falls to ``topk_threshold_lr``.
        """
        if positive_acts.numel() == 0:
            return
        self.topk_threshold_updates = self.topk_threshold_updates + 1
        lr = self.cfg.topk_threshold_lr
        # at least the spacing of numbers in the data type that it is saved in; in float32 a little more, since the
        # encoder product of a saved SAE need not round as that of the training step
        spacing = torch.finfo(self.dtype).eps
        margin = max(spacing, min(4 * spacing, 1e-6))
        unbiased_lr = lr / (1 - (1 - lr) ** self.topk_threshold_updates.to(self.topk_threshold.dtype))
        # autocast would round the threshold to bfloat16
        with torch.autocast(self.topk_threshold.device.type, enabled=False):
            min_positive = positive_acts.min().to(self.topk_threshold.dtype)
            just_below = min_positive * (1 - margin)
            self.topk_threshold = self.topk_threshold + unbiased_lr * (just_below - self.topk_threshold)
        self.selection_guess = min_positive.to(self.selection_guess.dtype)
