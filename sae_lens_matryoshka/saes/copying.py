"""SAEs that can be pickled and copied, as data loaders and process pools do.

SAELens keeps some functions of an SAE as attributes that are closures over it. They cannot be pickled, and in a copy
they would go on writing to the original. So they are left out and made anew from the config.
"""

from typing import Any

from sae_lens import SAE
from typing_extensions import override

_FUNCTIONS = ("reshape_fn_in", "reshape_fn_out", "run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out")


class CopyableSAE(SAE[Any]):
    """An SAE whose pickled and deep-copied forms are whole and its own. Hooks that are lambdas cannot be pickled."""

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
