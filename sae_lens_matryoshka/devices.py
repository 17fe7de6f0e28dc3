"""Devices as users name them: ``auto`` is the best one at hand, and one that is not there is refused at once."""

import logging

import torch

from sae_lens_matryoshka.errors import ConfigError, first_line

logger = logging.getLogger(__name__)


def resolve_device(device: str, field: str) -> str:
    """The device to use.

    Args:
        device: ``auto``, or a device of torch.
        field: What the user has named it with, for errors: ``device`` of a run file, or an option.

    Raises:
        ConfigError: If torch knows no such device, or it is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{field}={device!r} cannot be used on this machine ({first_line(error)}); set {field}=cpu or {field}=auto."
        ) from None
    return device


def warn_of_slow_bfloat16(device: str | torch.device, dtype: torch.dtype, remedy: str) -> None:
    """Say that a CPU computes in bfloat16 much more slowly than in float32, where it does.

    Without AVX-512 a matrix product in bfloat16 takes six times as long as in float32 and more (Gemma 3 270M to layer 9
    on an x86 CPU with AVX2: 171 tokens/s and 1,030); with its bfloat16 instructions it takes about half as long.

    Args:
        device: Where the model runs.
        dtype: What it computes in.
        remedy: How the user changes that, as ``--dtype float32``.
    """
    if (
        torch.device(device).type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    ):
        logger.warning(
            f"The language model computes in bfloat16, which is several times slower than float32 on this CPU (it has "
            f"no AVX-512): {remedy} is faster here."
        )
