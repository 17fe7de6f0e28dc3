"""Devices as users name them: ``auto`` is the best one at hand, and one that is not there is refused at once."""

import torch

from sae_lens_matryoshka.errors import ConfigError, first_line


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
