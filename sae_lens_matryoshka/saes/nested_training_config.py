"""What every Matryoshka variant can be asked for beside its SAELens twin's fields, checked before a model is loaded."""

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from sae_lens import TrainingSAEConfig
from typing_extensions import override

from sae_lens_matryoshka.levels import validate_level_weights, validate_widths
from sae_lens_matryoshka.normalization import CHANNEL_STANDARDIZATION, COVARIANCE_WHITENING, NormalizeActivations
from sae_lens_matryoshka.ops.nested_loss import NestedObjective
from sae_lens_matryoshka.replaced_fields import REPLACED_FIELDS
from sae_lens_matryoshka.saes.prefix_sampling import PrefixSampling

ORDER_LRS = {"contribution": 0.05, "firing_frequency": 0.01}
"""What latents can be ordered by, and the learning rate of the running mean of each."""


@dataclass
class NestedTrainingSAEConfig(TrainingSAEConfig):
    """The fields that all Matryoshka training configs share. The config is checked when it is made.

    Args:
        matryoshka_widths (list[int]): The number of latents of each level, smallest level first. Copied, never edited.
            A last width below d_sae warns and adds the full level (arXiv:2503.17547, section 3).
        level_weights (list[float] | None): The weight of each level's error in the loss, smallest level first. None
            counts every level once, as in SAELens and arXiv:2503.17547.
        prefix_sampling (dict[str, Any] | None): Train on prefixes drawn afresh each step in place of the levels, which
            then only say what is reported and cut out: ``{n_prefixes, min_width, pareto_power, seed}``, see
            :class:`~saes.prefix_sampling.PrefixSampling` (Nabeshima 2024). Given in Python and in run
            files; SAELens's own command line cannot parse a mapping.
        stop_gradient_between_levels (bool | str): Each level trains only its own new latents, against what the smaller
            levels leave over. With ``"inner"`` only the inner levels do, and the full level trains all latents.
            ``b_dec`` is no level's own: as what is added after decoding it follows the smallest level (and with
            ``"inner"`` the full one), as what is subtracted before encoding (``apply_b_dec_to_input``) all of them.
        snap_loss (bool): Take the L2 norm of the residual in place of its square on all levels but the full one
            (Chanin's "snap loss" Matryoshka SAEs, https://huggingface.co/chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40).
        loss_tilt (float): Let samples that a level reconstructs badly count more in its error: weights softmax(tilt
            e / mean(e)) over the batch, e a sample's squared error (arXiv:2007.01162). 0 weighs all alike.
        aligned_encoder (bool): Keep the inner product of every latent's encoder and decoder direction at 1, by moving
            the encoder along the decoder direction before each step and when saving (arXiv:2605.18629).
        order_latents_by (str | None): Sort the latents after every step, largest first, so that a latent's level is
            decided by it: ``contribution``, the running mean squared contribution to the reconstruction (Nabeshima
            2024), or ``firing_frequency``, how often it fires. The saved SAE is in that order; the SAE in training is
            not, nor is the ``sparsity.safetensors`` that SAELens's own runners write (``train`` puts it in order).
        latent_order_lr (float | None): Learning rate of that running mean. None takes 0.05 for ``contribution``, which
            is Nabeshima's, and 0.01 for ``firing_frequency``.
        normalize_activations (str): SAELens's words, and ``channel_standardization``: each channel less its mean,
            divided by its standard deviation, so that no channel owns the loss. Applied by this plugin's runners, and
            folded into the saved SAE like SAELens's ``covariance_whitening``.
    """

    normalize_activations: NormalizeActivations = "none"  # type: ignore[assignment]

    matryoshka_widths: list[int] = field(default_factory=list)
    level_weights: list[float] | None = None
    prefix_sampling: dict[str, Any] | None = None
    stop_gradient_between_levels: bool | Literal["inner"] = False
    snap_loss: bool = False
    loss_tilt: float = 0.0
    aligned_encoder: bool = False
    order_latents_by: Literal["contribution", "firing_frequency"] | None = None
    latent_order_lr: float | None = None

    def __post_init__(self) -> None:
        self.matryoshka_widths = validate_widths(self.matryoshka_widths, self.d_sae)
        n_levels = len(self.matryoshka_widths)
        if self.level_weights is not None:
            self.level_weights = validate_level_weights(self.level_weights, n_levels)
        if self.prefix_sampling is not None:
            PrefixSampling.from_dict(self.prefix_sampling, self.d_sae)
        if self.stop_gradient_between_levels not in (False, True, "inner"):
            raise ValueError(
                f"stop_gradient_between_levels={self.stop_gradient_between_levels!r} must be true, false or inner."
            )
        tilt = self.loss_tilt
        if isinstance(tilt, bool) or not isinstance(tilt, Real) or not math.isfinite(tilt):
            raise ValueError(f"loss_tilt={tilt!r} must be a number, such as 0.002; 0 weighs all samples alike.")
        if self.order_latents_by not in (None, *ORDER_LRS):
            raise ValueError(f"order_latents_by={self.order_latents_by!r} must be one of {', '.join(ORDER_LRS)}.")
        lr = self.latent_order_lr
        if lr is not None and (isinstance(lr, bool) or not isinstance(lr, Real) or not 0 < lr <= 1):
            raise ValueError(f"latent_order_lr={lr!r} must be above 0 and at most 1, such as 0.05.")
        if lr is not None and self.order_latents_by is None:
            raise ValueError(f"latent_order_lr={lr!r} is for order_latents_by, which is not set; drop it.")
        self._refuse_senseless_combinations(n_levels)
        normalize_activations = self.normalize_activations
        if normalize_activations == CHANNEL_STANDARDIZATION:
            self.normalize_activations = COVARIANCE_WHITENING  # its diagonal case, which SAELens does not know by name
        super().__post_init__()
        self.normalize_activations = normalize_activations  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        if self.normalize_activations == CHANNEL_STANDARDIZATION:
            raise ValueError(
                f"normalize_activations={CHANNEL_STANDARDIZATION!r} is not folded into these weights yet, as it is at "
                f"the end of training; fold in the statistics of the checkpoint with fold_activation_whitening."
            )
        return super().get_inference_sae_cfg_dict()

    @property
    def prefix_law(self) -> PrefixSampling | None:
        """The law that prefixes are drawn from; None where the levels are trained."""
        if self.prefix_sampling is None:
            return None
        return PrefixSampling.from_dict(self.prefix_sampling, self.d_sae)

    @property
    def objective(self) -> NestedObjective:
        """The loss that these fields ask for."""
        weights = None if self.level_weights is None else tuple(self.level_weights)
        return NestedObjective(weights, self.snap_loss, self.stop_gradient_between_levels, float(self.loss_tilt))

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        for old, new in REPLACED_FIELDS.items():  # which SAELens would pass over
            if config_dict.get(old):
                raise ValueError(f"{old}={config_dict[old]!r} is called {new} now (CHANGELOG.md).")
        return super().from_dict(config_dict)

    def _refuse_senseless_combinations(self, n_levels: int) -> None:
        if self.prefix_sampling is not None and self.level_weights is not None:
            raise ValueError(
                "level_weights and prefix_sampling exclude each other: weights belong to fixed levels, and drawn "
                "prefixes are not trained by level; drop one, or use pareto_power to favour short prefixes."
            )
        if n_levels == 1 and self.prefix_sampling is None:
            for name in ("stop_gradient_between_levels", "snap_loss", "order_latents_by"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} changes nothing with the single level matryoshka_widths="
                        f"{self.matryoshka_widths}; add smaller levels or prefix_sampling, or drop it."
                    )
        if self.stop_gradient_between_levels is True and self.level_weights is not None and 0 in self.level_weights:
            raise ValueError(
                f"level_weights={self.level_weights} with stop_gradient_between_levels=True leaves the latents of a "
                "level of weight 0 untrained, since no other level trains them; give it a weight or drop the level."
            )


def validate_k(k: float, d_sae: int, whole: bool = False, name: str = "k") -> None:
    """Check how many latents are to be active.

    Args:
        k: The value of the field.
        d_sae: The number of latents.
        whole: Whether only whole numbers will do.
        name: What the field is called.

    Raises:
        ValueError: If it is not a positive number, or is above ``d_sae``, or has a fraction where none will do.
    """
    if isinstance(k, bool) or not isinstance(k, Real) or not math.isfinite(k) or k <= 0:
        raise ValueError(
            f"{name}={k!r} must be a positive number: how many latents fire on average a sample, such as 40."
        )
    if whole and k != int(k):
        raise ValueError(f"{name}={k!r} must be a whole number: every sample has as many; use {max(1, round(k))}.")
    if k > d_sae:
        raise ValueError(f"{name}={k} is above d_sae={d_sae}: no more latents than there are can fire; lower {name}.")
