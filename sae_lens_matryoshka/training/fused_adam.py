"""Adam in one pass over memory, whatever way the gradients and the moments came about.

The fused kernel walks memory: of a parameter, its gradient and its moments, it updates the i-th numbers in storage
together. Training keeps ``W_enc`` column by column; moments from a checkpoint of another class, or made under another
layout, lie row by row, and would belong to other weights without a word.
"""

from typing import Any

import torch
from sae_lens import SAETrainer
from torch import Tensor, nn
from torch.optim import Optimizer


def fuse_adam(trainer: SAETrainer[Any, Any]) -> None:
    """Let torch update each parameter in one pass instead of ten; the same numbers (benchmarks/README.md).

    Args:
        trainer: A trainer, after a state to resume from has been loaded, which would replace the setting.
    """
    for group in trainer.optimizer.param_groups:
        group["fused"] = True
    trainer.optimizer.register_step_pre_hook(_lay_out_like_parameters)


def _lay_out_like_parameters(optimizer: Optimizer, *_: Any) -> None:
    """Give gradients and moments the strides of their parameter. Costs nothing where they have them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = _laid_out(parameter.grad, parameter)
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = _laid_out(value, parameter)


def _laid_out(value: Tensor, parameter: nn.Parameter) -> Tensor:
    if value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
