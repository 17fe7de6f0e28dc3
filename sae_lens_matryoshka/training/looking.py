"""Looking at the activations that a run would train on, before it does: its model, text and hooks, nothing left out."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sae_lens import MultiSAETrainingRunnerConfig
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_matryoshka.errors import ConfigError, UserError
from sae_lens_matryoshka.measuring.activation_profile import ActivationProfile, RunningProfile
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.training.language_model import LanguageModelRunner, MultiSAERunner, language_model_runner
from sae_lens_matryoshka.training.options import CheckpointOptions


class LookedAt(NamedTuple):
    """What has been seen."""

    profiles: dict[str, ActivationProfile]
    """The activations by hook."""

    token_texts: dict[int, str]
    """The tokens that the profiles name, as text."""


def look_at_activations(run: Mapping[str, Any], n_samples: int = 50_000, trust_remote_code: bool = False) -> LookedAt:
    """Look at the activations of a run's hooks, at special tokens and all positions too.

    Args:
        run: A run file's contents (:func:`read_run_file`), of a run on a language model.
        n_samples: How many tokens to look at, rounded up to whole batches; fewer where the text ends.
        trust_remote_code: Whether the run file may ask for code of a model or data set to be run.

    Raises:
        ConfigError: If the run cannot be used, or is not one on a language model whose activations are computed.
        UserError: If there is too little text, or activations are not finite.
    """
    cfg = copy.deepcopy(build_runner_configs(run, trust_remote_code))
    if isinstance(cfg, dict):
        raise ConfigError("look-at-activations is for language models; this run file has a synthetic_model.")
    if getattr(cfg, "use_cached_activations", False):
        raise ConfigError(
            "use_cached_activations=True, but look-at-activations runs the model on the text, since what is cached may "
            "lack the tokens; set use_cached_activations=false."
        )
    cfg.exclude_special_tokens, cfg.seqpos_slice = False, (None,)
    runner = language_model_runner(cfg, CheckpointOptions(exact=False))
    tokenizer: Any = runner.model.tokenizer
    running: dict[str, RunningProfile] = {}
    with tqdm(total=n_samples, desc="Looking at activations", unit=" tokens", unit_scale=True) as progress:
        for tokens, by_hook in _batches(runner):
            for hook, activations in by_hook.items():
                try:
                    running.setdefault(hook, RunningProfile(tokenizer.all_special_ids)).add(activations, tokens)
                except ValueError as error:
                    raise UserError(f"The activations at {hook} cannot be looked at: {error}.") from error
            progress.update(tokens.numel())
            if progress.n >= n_samples:
                break
    if not running:
        raise UserError(
            f"The data set does not fill store_batch_size_prompts={cfg.store_batch_size_prompts} contexts of "
            f"context_size={cfg.context_size}; lower one of them, or take more text."
        )
    profiles = {hook: profile.result() for hook, profile in running.items()}
    named = {token.token_id for p in profiles.values() for token in (*p.special, *p.extreme)}
    return LookedAt(profiles, {token_id: tokenizer.decode([token_id]) for token_id in named})


def _batches(runner: LanguageModelRunner | MultiSAERunner) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Tokens of shape (batch, context) and the activations of every hook at them, once through the text."""
    store = runner.activations_store
    while True:
        try:
            tokens = store.get_batch_tokens(raise_at_epoch_end=True)
        except StopIteration:
            return
        if isinstance(runner.cfg, MultiSAETrainingRunnerConfig):
            yield tokens, store.get_multi_hook_activations(tokens)
        else:
            yield tokens, {runner.cfg.hook_name: store.get_activations(tokens)}
