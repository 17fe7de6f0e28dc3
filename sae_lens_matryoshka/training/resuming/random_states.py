"""The state of every random number generator that training may draw from."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the global generators of torch (CPU and CUDA), Python and numpy.

    Returns:
        Torch's as byte tensors by name, and the others as plain JSON values.
    """
    tensors = {"random_state.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for device, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random_state.cuda_{device}"] = state
    version, words, gauss = random.getstate()
    algorithm, keys, *rest = np.random.get_state()
    plain = {"python": [version, list(words), gauss], "numpy": [algorithm, np.asarray(keys).tolist(), *rest]}
    return tensors, plain


def set_random_states(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what :func:`random_states` has returned. CUDA devices that are not there are left out."""
    torch.set_rng_state(tensors["random_state.torch"])
    for device in range(torch.cuda.device_count()):
        state = tensors.get(f"random_state.cuda_{device}")
        if state is not None:
            torch.cuda.set_rng_state(state, device)
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, keys, *rest = plain["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
