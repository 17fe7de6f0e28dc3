"""Options of a run that are not SAELens's, checked before anything is loaded."""

from dataclasses import dataclass

from sae_lens_matryoshka.errors import ConfigError


@dataclass(frozen=True)
class CheckpointOptions:
    """What checkpoints hold and how many are kept; when they are made says the run file's ``n_checkpoints``."""

    exact: bool = True
    """Whether checkpoints hold the activation buffer, random states and exact position, so that a resumed run ends
    bit-equal (on CPU) to an uninterrupted one. Otherwise they are SAELens's."""

    max_buffer_bytes: int = 2_000_000_000
    """The largest activation buffer to put into checkpoints. A larger one is filled anew on resuming, not bit-equal."""

    keep: int | None = None
    """How many of the newest checkpoints to keep; None keeps all that the run file asks for."""

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise ConfigError(f"--keep-checkpoints {self.keep} must be at least 1.")
        if not self.max_buffer_bytes >= 0:
            raise ConfigError(f"--max-buffer-gb {self.max_buffer_bytes / 1e9:g} must be at least 0.")
        if not self.exact and self.max_buffer_bytes != type(self).max_buffer_bytes:
            raise ConfigError("--max-buffer-gb is for checkpoints that hold the buffer; leave out --no-exact-resume.")


def check_sample_numbers(calibration_samples: int | None, measure_samples: int | None) -> None:
    """Refuse numbers of samples that cannot be.

    Args:
        calibration_samples: How many samples to calibrate thresholds on; None if the user has not said.
        measure_samples: How many samples to measure levels on; None if the user has not said.

    Raises:
        ConfigError: If one of them is too small.
    """
    for option, n_samples, least in (
        ("--calibration-samples", calibration_samples, 0),
        ("--measure-samples", measure_samples, 1),
    ):
        if n_samples is not None and n_samples < least:
            raise ConfigError(f"{option} {n_samples} must be at least {least}.")
