"""What the baselines beside an SAE are called in tables of results."""

from collections.abc import Collection

CHANNELS = "model channels"
"""Probes on the model's own channels in place of latents."""


def random_name(sae: str) -> str:
    """The name of an SAE's random baseline.

    Args:
        sae: The name of the SAE.
    """
    return f"{sae}_random"


def without_baselines(names: Collection[str]) -> set[str]:
    """The names of what was trained, among all names of a table."""
    random = {random_name(name) for name in names}
    return {name for name in names if name not in random and not name.startswith(CHANNELS)}
