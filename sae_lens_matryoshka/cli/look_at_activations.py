"""``look-at-activations``: what a run's activations are like, and how it should therefore be trained."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sae_lens_matryoshka.cli.arguments import add_run_file_arguments, positive_count
from sae_lens_matryoshka.cli.loading import load_saelens
from sae_lens_matryoshka.normalization import CHANNEL_STANDARDIZATION, COVARIANCE_WHITENING
from sae_lens_matryoshka.run_files.checking import ONE_LEVEL_TWINS, check_run_file
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.untrusted.terminal import PlainConsole

if TYPE_CHECKING:
    from sae_lens_matryoshka.measuring.activation_profile import ActivationProfile, TokenNorms

OF_EACH_CHANNEL = (CHANNEL_STANDARDIZATION, COVARIANCE_WHITENING)
"""Normalizations after which no channel has more variance than another."""

MOST_TOKENS = 8
"""How many tokens of a kind are listed."""


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "look-at-activations", help="show what a run would train on: norms, channels, extreme tokens, and what to set"
    )
    parser.add_argument("config", help="a YAML file, or the name of an embedded one")
    add_run_file_arguments(parser)
    parser.add_argument(
        "--samples", type=positive_count, default=50_000, metavar="N", help="tokens to look at (default: 50000)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Look, and print what there is to see.

    Raises:
        UserError: If the run cannot be used, or its activations cannot be looked at.
    """
    run_file = read_run_file(options.config, options.settings, options.unset)
    checked = check_run_file(run_file, options.trust_remote_code)
    load_saelens()
    from sae_lens_matryoshka.training.looking import look_at_activations

    looked_at = look_at_activations(run_file, options.samples, options.trust_remote_code)
    console = PlainConsole()
    saes = [{"architecture": sae.architecture, **sae.values} for sae in checked.saes.values()]
    for hook, profile in looked_at.profiles.items():
        _show(hook, profile, looked_at.token_texts, console)
        console.print(advice(profile, saes, checked.values), soft_wrap=True)


def advice(profile: "ActivationProfile", saes: "list[dict[str, Any]]", run: Mapping[str, Any]) -> str:
    """What a run should set, in one sentence.

    Args:
        profile: What its activations are like.
        saes: The configs of its SAEs as the run file gives them.
        run: Its other fields.
    """
    settings: list[str] = []
    normalizations = {sae.get("normalize_activations", "none") for sae in saes}
    if profile.dominating_channel is None:
        reasons = ["no channel has most of the variance"]
        if "none" in normalizations:
            settings.append("sae.normalize_activations=expected_average_only_in")
    else:
        channel, share = profile.dominating_channel
        reasons = [f"channel {channel} has {share:.0%} of the variance"]
        if not normalizations <= set(OF_EACH_CHANNEL):
            ours = any(sae["architecture"] in ONE_LEVEL_TWINS.values() for sae in saes)
            settings.append(f"sae.normalize_activations={CHANNEL_STANDARDIZATION if ours else COVARIANCE_WHITENING}")
    if profile.special_are_extreme:
        reasons.append("activations at special tokens are far from all others")
        if run.get("exclude_special_tokens") in (None, False):
            settings.append("exclude_special_tokens=true")
    if n_odd := profile.first_usual_position:
        reasons.append(f"norms at the first {n_odd} positions are far from all others")
        if (slice(*run.get("seqpos_slice", (None,))).start or 0) < n_odd:
            settings.append(f"seqpos_slice=[{n_odd},null]")
    todo = f"set {', '.join(settings)}" if settings else "the run is set as it should be"
    return f"Advice: {todo} ({'; '.join(reasons)})."


def _show(hook: str, profile: "ActivationProfile", texts: Mapping[int, str], console: PlainConsole) -> None:
    norms = ", ".join(f"{name} {norm:,.0f}" for name, norm in profile.norms.items())
    console.print(f"{hook}, {profile.n_samples:,} tokens. Norm, special tokens aside: {norms}.", soft_wrap=True)
    table = Table("", "ordinary tokens", "with extreme ones", title=f"Shares of the variance at {hook}")
    pairs = (profile.ordinary, profile.with_extreme)
    table.add_row("mean, of the second moment", *(f"{v.mean_share:.1%}" for v in pairs))
    for place in range(len(pairs[0].channels)):
        table.add_row(
            "largest channels" if place == 0 else "",
            *(f"{v.channels[place][1]:.1%} (channel {v.channels[place][0]})" for v in pairs),
        )
    for place, (n, _) in enumerate(pairs[0].components):
        table.add_row(
            f"{n} principal component{'s' if n > 1 else ''}",
            *(f"{v.components[place][1]:.1%}" for v in pairs),
        )
    console.print(table)
    console.print(f"Special tokens: {_tokens(profile.special, texts)}", soft_wrap=True)
    console.print(f"Extreme tokens, {profile.n_extreme:,} in all: {_tokens(profile.extreme, texts)}", soft_wrap=True)
    odd = ", ".join(f"{position} ({norm:,.0f})" for position, norm in profile.odd_positions[:MOST_TOKENS])
    more = len(profile.odd_positions) - MOST_TOKENS
    console.print(
        f"Positions of unusual median norm: {odd or 'none'}{f' and {more} more' if more > 0 else ''}", soft_wrap=True
    )


def _tokens(tokens: "list[TokenNorms]", texts: Mapping[int, str]) -> str:
    shown = [
        f"{texts[token.token_id]!r} {token.n_samples} of {token.n_occurrences} (norm {token.norm:,.0f})"
        for token in tokens[:MOST_TOKENS]
    ]
    more = len(tokens) - MOST_TOKENS
    return (", ".join(shown) or "none") + (f" and {more} more tokens" if more > 0 else "")
