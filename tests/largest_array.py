"""How large the arrays are that code makes, to tell what fits where training fits."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestArray(TorchDispatchMode):
    """Inside its block, remembers the largest storage that an operation returned, in elements."""

    n_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # views are of arrays that were there before
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf._is_view():
                self.n_elements = max(self.n_elements, leaf.numel())
        return result
