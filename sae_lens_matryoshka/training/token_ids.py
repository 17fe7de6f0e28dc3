"""Token ids in a run file, compared with the vocabulary of the model once it is loaded."""

from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig

from sae_lens_matryoshka.errors import ConfigError


def check_token_ids(cfg: "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig", model: Any) -> None:
    """Refuse token ids that the model does not have: excluding them would exclude nothing.

    Args:
        cfg: The run's config.
        model: The model that SAELens has loaded, with its tokenizer where it has one.

    Raises:
        ConfigError: If ``exclude_special_tokens`` or ``sequence_separator_token`` names such an id.
    """
    tokenizer = getattr(model, "tokenizer", None)
    vocabulary = range(model.cfg.d_vocab) if tokenizer is None else set(tokenizer.get_vocab().values())
    excluded = cfg.exclude_special_tokens if isinstance(cfg.exclude_special_tokens, list) else []
    for field, ids in (
        ("exclude_special_tokens", excluded),
        ("sequence_separator_token", [cfg.sequence_separator_token]),
    ):
        if unknown := [i for i in ids if isinstance(i, int) and i not in vocabulary]:
            raise ConfigError(
                f"{field}={getattr(cfg, field)!r}: {unknown[0]} is not a token of {cfg.model_name}, whose ids go up to "
                f"{max(vocabulary)}."
            )
