"""What a training SAE keeps beside SAELens's tensors, without being part of its state to SAELens.

SAELens's class of the same kind has no such tensors. So ``state_dict()`` has none either, and each class's state loads
strictly into the other. They travel in the state's metadata, where torch keeps the versions of modules, and in
checkpoints as tensors; a state without them starts them afresh.
"""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

METADATA_KEY = "training_statistics"
"""Where a state's metadata hold the statistics."""


class KeepsTrainingStatistics(nn.Module):
    """A module with statistics: buffers that keep their data type and follow resumed runs, but not saved SAEs."""

    _statistics_starts: dict[str, Tensor] = {}

    def _register_statistic(self, name: str, start: Tensor) -> None:
        """Keep a statistic: a buffer of that name, with its value before the first step."""
        self._statistics_starts = {**self._statistics_starts, name: start}
        self._set_statistic(name, start)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The statistics by name."""
        return {name: self.get_buffer(name) for name in self._statistics_starts}

    def _set_statistic(self, name: str, value: Tensor) -> None:
        device = next(self.parameters()).device
        value = value.detach().clone().to(device, self._statistics_starts[name].dtype)
        self.register_buffer(name, value, persistent=False)

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        moved = super()._apply(*args, **kwargs)
        for name, value in self.statistics.items():
            # as SAELens does for learned thresholds: statistics keep their dtype when parameters change theirs
            self._set_statistic(name, value)
        return moved

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        statistics = {name: value.detach().clone() for name, value in self.statistics.items()}
        destination._metadata[prefix[:-1]][METADATA_KEY] = statistics

    @override
    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = local_metadata.get(METADATA_KEY, {})
        values = {
            name: state_dict.pop(prefix + name, given.get(name, start))
            for name, start in self._statistics_starts.items()
        }
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, value in values.items():
            self._set_statistic(name, value)
