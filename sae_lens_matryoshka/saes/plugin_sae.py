"""What all SAEs of this plugin share: cast, copied and pickled, they stay whole.

SAELens keeps some functions of an SAE as attributes that are closures over it. They cannot be pickled, as data loaders
and process pools do, and in a copy they would go on writing to the original. So they are made anew from the config.
"""

from typing import Any

from sae_lens import SAE
from sae_lens.util import dtype_to_str
from typing_extensions import override

_FUNCTIONS = ("reshape_fn_in", "reshape_fn_out", "run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out")


class PluginSAE(SAE[Any]):
    """An SAE whose copies are its own, and whose config names the data type of its parameters.

    Hooks that are lambdas cannot be pickled.
    """

    @override
    def _apply(self, *arguments: Any, **options: Any) -> Any:
        applied = super()._apply(*arguments, **options)
        # SAELens's `to` keeps the two together; `double()`, `half()`, and a module around the SAE do not
        self.dtype = self.W_dec.dtype
        self.cfg.dtype = dtype_to_str(self.dtype)
        return applied

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _FUNCTIONS}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        d_head = self.d_head
        if self.hook_z_reshaping_mode:
            self.turn_on_forward_pass_hook_z_reshaping()
        else:
            self.turn_off_forward_pass_hook_z_reshaping()
        self.d_head = d_head
        self._setup_activation_normalization()
