"""An SAE's data type stands in its config too, and both must agree, or what is saved contradicts itself."""

from typing import Any

from sae_lens import SAE
from sae_lens.util import dtype_to_str
from typing_extensions import override


class DtypeInConfig(SAE[Any]):
    """An SAE whose config names the data type of its parameters, however they have come by it.

    SAELens's ``to`` keeps the two together; ``double()``, ``half()``, and a module around the SAE do not.
    """

    @override
    def _apply(self, *arguments: Any, **options: Any) -> Any:
        applied = super()._apply(*arguments, **options)
        self.dtype = self.W_dec.dtype
        self.cfg.dtype = dtype_to_str(self.dtype)
        return applied
