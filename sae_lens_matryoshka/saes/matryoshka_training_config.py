"""What a Matryoshka training run can be asked for, checked before any model is loaded."""

import math
from dataclasses import dataclass
from numbers import Real

from sae_lens import MatryoshkaBatchTopKTrainingSAEConfig
from typing_extensions import override

from sae_lens_matryoshka.levels import validate_level_weights, validate_widths


@dataclass
class MatryoshkaTrainingSAEConfig(MatryoshkaBatchTopKTrainingSAEConfig):
    """Configuration for training a Matryoshka SAE.

    The fields are those of SAELens's ``matryoshka_batchtopk``, so a working config of it becomes ours by changing the
    architecture name. The config is checked when it is made, before any model is loaded.

    Args:
        matryoshka_widths (list[int]): The number of latents of each level, smallest level first. Copied, never edited.
            A last width below d_sae warns and adds the full level.
        level_weights (list[float] | None): The weight of each level's squared error in the loss, smallest level
            first. None counts every level once, as in SAELens and arXiv:2503.17547.
        k (float): The mean number of latents to keep active a sample. Inherited from BatchTopKTrainingSAEConfig.
        topk_threshold_lr (float): Learning rate of the running inference threshold. Inherited from
            BatchTopKTrainingSAEConfig.
        use_matryoshka_aux_loss (bool): Whether dead latents reconstruct the error of their own level rather than of
            the whole SAE. Inherited from MatryoshkaBatchTopKTrainingSAEConfig.
        aux_loss_coefficient (float): Coefficient of the auxiliary loss for dead latents. Inherited from
            TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Select latents as if the decoder were normalized. Inherited from
            TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Norm to initialize decoder rows to. Inherited from TrainingSAEConfig.
        d_in (int): Width of the activations. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Data type of the parameters. Inherited from SAEConfig.
        device (str): Device of the parameters. Inherited from SAEConfig.
    """

    level_weights: list[float] | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka"

    def __post_init__(self) -> None:
        _validate_k(self.k, self.d_sae)
        self.matryoshka_widths = validate_widths(self.matryoshka_widths, self.d_sae)
        if self.level_weights is not None:
            self.level_weights = validate_level_weights(self.level_weights, len(self.matryoshka_widths))
        super().__post_init__()


def _validate_k(k: float, d_sae: int) -> None:
    if isinstance(k, bool) or not isinstance(k, Real) or not math.isfinite(k) or k <= 0:
        raise ValueError(f"k={k!r} must be a positive number: how many latents fire on average a sample, such as 40.")
    if k > d_sae:
        raise ValueError(f"k={k} is above d_sae={d_sae}: no more latents than there are can fire; lower k.")
