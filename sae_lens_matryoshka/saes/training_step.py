"""What a training step passes on from one part to the next."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_matryoshka.ops.latents import ActiveLatents, DenseLatents, lay_out, lay_out_dense
from sae_lens_matryoshka.ops.selection import Selection


class TrainingPath(NamedTuple):
    """Which of two ways a training step is computed; the results are the same."""

    fast: bool
    """Whether by ``ops/``. Otherwise by SAELens's own code and the definition of the losses."""

    reason: str


class Prefixes(NamedTuple):
    """The prefixes of the dictionary that a step trains, and which latent stands where in it."""

    widths: list[int]
    """The length of each prefix, ascending, the last one d_sae."""

    order: Int[Tensor, " d_sae"] | None = None
    """The latent at each place; None if every latent stands at its index."""

    def lay_out(self, selection: Selection, batch: int) -> ActiveLatents:
        """The layout of selected latents by prefix."""
        return lay_out(selection, batch, self.widths, None if self.order is None else self.order.argsort())

    def lay_out_dense(self, batch: int) -> DenseLatents:
        """The layout of all latents by prefix."""
        return lay_out_dense(batch, self.widths, self.order)

    def by_place(self, values: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Values of latents in the order of their places."""
        return values if self.order is None else values[..., self.order]

    def latent_ids(self, places: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The latents at some places."""
        return places if self.order is None else self.order[places]


class Encoding(NamedTuple):
    """The latents of a batch as functions of the parameters: a value an entry, or the whole matrix."""

    x: Float[Tensor, "batch d_in"]
    """The processed input that they are of."""

    prefixes: Prefixes
    """The prefixes of the step."""

    latents: ActiveLatents | DenseLatents
    """Where the values belong."""

    hidden_pre: Tensor

    coefficients: Tensor
    """What decoder rows are multiplied by."""

    feature_acts: Float[Tensor, "batch d_sae"]
    """SAELens's activations for its trainer, without gradient, perhaps sparse."""
