"""``look-at-activations``: its figures against plain float64, what it says of tokens and positions, and its advice."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import ActivationsStore

from sae_lens_matryoshka.cli.command_line import main
from sae_lens_matryoshka.cli.look_at_activations import advice
from sae_lens_matryoshka.errors import ConfigError, UserError
from sae_lens_matryoshka.measuring.activation_profile import ActivationProfile, RunningProfile
from sae_lens_matryoshka.measuring.channel_statistics import UsualActivations
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.training.looking import look_at_activations
from sae_lens_matryoshka.training.run import train
from tests.conftest import real_model, real_text
from tests.tiny_runs import tiny_multi_run, tiny_run, tiny_sae

BOS, NEWLINE = 2, 107


def _batches(n_batches: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Activations as in Gemma: special and extreme tokens, a channel of most of the variance."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(n_batches):
        x = 20 * torch.randn(10, 32, 8, generator=generator)
        x[..., 3] = 1000 + 100 * torch.randn(10, 32, generator=generator)
        ids = torch.randint(200, 300, (10, 32), generator=generator)
        ids[:, 0], x[:, 0] = BOS, 9000
        ids[:3, 5], x[:3, 5, 3] = NEWLINE, -20_000
        ids[3, 6] = NEWLINE
        batches.append((x, ids))
    return batches


@pytest.fixture(scope="module")
def profile() -> ActivationProfile:
    running = RunningProfile([BOS, 1])
    for x, ids in _batches():
        running.add(x, ids)
    return running.result()


def test_shares_against_float64(profile: ActivationProfile):
    x = torch.cat([x for x, _ in _batches()]).double()
    ids = torch.cat([ids for _, ids in _batches()])
    usual = UsualActivations.of(x[:10][ids[:10] != BOS])
    extreme = (x - usual.median).norm(dim=-1) > usual.furthest
    assert extreme[x[..., 3] == -20_000].all()
    for variance, samples in ((profile.ordinary, x[(ids != BOS) & ~extreme]), (profile.with_extreme, x[ids != BOS])):
        mean = samples.mean(0)
        mean_share = mean.norm() ** 2 / samples.pow(2).sum(-1).mean()
        assert variance.mean_share == pytest.approx(mean_share.item(), rel=1e-9)
        shares = samples.var(0) / samples.var(0).sum()
        assert dict(variance.channels) == pytest.approx({c: shares[c].item() for c, _ in variance.channels}, rel=1e-9)
        assert [s for _, s in variance.channels] == pytest.approx(shares.sort(descending=True).values[:5].tolist())
        singular = torch.linalg.svdvals(samples - mean).pow(2)
        assert variance.components == [(1, pytest.approx((singular[0] / singular.sum()).item())), (8, pytest.approx(1))]


def test_tokens_and_positions(profile: ActivationProfile):
    assert profile.n_samples == 6 * 320
    assert profile.special == [(BOS, 60, 60, pytest.approx(9000 * 8**0.5))]
    assert profile.special_are_extreme
    assert profile.extreme[0] == (NEWLINE, 18, 24, pytest.approx(20_000, rel=1e-3))
    assert profile.norms["largest"] == pytest.approx(20_000, rel=1e-3)
    assert 900 < profile.norms["median"] < 1100
    assert profile.dominating_channel is not None
    assert profile.dominating_channel[0] == 3
    assert profile.odd_positions == []


def test_the_first_positions_can_be_odd_without_a_special_token():
    running = RunningProfile([])
    for x, ids in _batches():
        running.add(x, ids)
    profile = running.result()
    assert [position for position, _ in profile.odd_positions] == [0]
    assert profile.first_usual_position == 1
    assert profile.special == []


def test_what_is_not_finite_or_nothing_is_refused():
    with pytest.raises(ValueError, match="1 values are not finite"):
        RunningProfile([]).add(torch.tensor([[[1.0, torch.nan]]]), torch.tensor([[5]]))
    with pytest.raises(ValueError, match="0 ordinary samples"):
        RunningProfile([]).result()


OURS = {"architecture": "matryoshka"}
EXCLUDED = {"exclude_special_tokens": [2]}


@pytest.mark.parametrize(("sae", "run", "settings"), [
    (OURS, {}, "set sae.normalize_activations=channel_standardization, exclude_special_tokens=true ("),
    ({"architecture": "batchtopk"}, EXCLUDED, "set sae.normalize_activations=covariance_whitening ("),
    ({**OURS, "normalize_activations": "covariance_whitening"}, {}, "set exclude_special_tokens=true ("),
    ({**OURS, "normalize_activations": "channel_standardization"}, EXCLUDED, "set as it should be ("),
])  # fmt: skip
def test_the_advice_is_what_the_run_lacks(
    profile: ActivationProfile, sae: dict[str, Any], run: dict[str, Any], settings: str
):
    said = advice(profile, [sae], run)
    assert settings in said
    assert "channel 3 has" in said


def test_the_advice_leaves_out_odd_positions_unless_the_run_does(profile: ActivationProfile):
    odd = replace(profile, special_are_extreme=False, odd_positions=[(0, 9e3), (1, 8e3), (7, 9e3)])
    sae = {**OURS, "normalize_activations": "channel_standardization"}
    assert "set seqpos_slice=[2,null] (" in advice(odd, [sae], {"seqpos_slice": (1, None)})
    assert "as it should be" in advice(odd, [sae], {"seqpos_slice": (2, None)})
    tame = replace(odd, odd_positions=[], with_extreme=profile.ordinary._replace(channels=[(1, 0.1)]))
    assert "set sae.normalize_activations=expected_average_only_in (no channel" in advice(tame, [OURS], {})


def test_the_command_shows_the_runs_hooks_with_their_special_tokens(
    tinystories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tiny_multi_run(tinystories, None, exclude_special_tokens=True, seqpos_slice=(1, None))
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert main(["look-at-activations", str(tmp_path / "run.yaml"), "--samples", "500", "--set", "seed=3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("tokens. Norm, special tokens aside: median") == 2
    assert "model.layers.1, 576 tokens" in shown
    assert "Special tokens: '<s>'" in shown
    assert shown.count("Advice: ") == 2


def test_what_cannot_be_looked_at_is_one_sentence(tinystories: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="is for language models"):
        look_at_activations(read_run_file("synthetic", [], []))
    with pytest.raises(ConfigError, match="set use_cached_activations=false"):
        look_at_activations(tiny_run(tinystories, None, use_cached_activations=True, cached_activations_path="x"))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Once upon a time"}) + "\n")
    run = tiny_run(tinystories, None, dataset_path=str(tmp_path / "text.jsonl"), is_dataset_tokenized=False)
    with pytest.raises(UserError, match="does not fill store_batch_size_prompts=3 contexts of context_size=64"):
        look_at_activations(run)


def _with_a_large_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have channel 5 of every hook vary a hundred times as much."""
    single, several = ActivationsStore.get_activations, ActivationsStore.get_multi_hook_activations
    scale = torch.ones(64).index_fill(0, torch.tensor([5]), 100)
    monkeypatch.setattr(ActivationsStore, "get_activations", lambda *args: single(*args) * scale)
    monkeypatch.setattr(
        ActivationsStore,
        "get_multi_hook_activations",
        lambda *args: {hook: x * scale for hook, x in several(*args).items()},
    )


def test_training_warns_of_a_channel_with_most_of_the_variance_unless_it_is_normalized(
    tinystories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    _with_a_large_channel(monkeypatch)
    short: Any = {"training_tokens": 4 * 128, "lr_warm_up_steps": 0, "lr_decay_steps": 0}
    samples: Any = {"calibration_samples": 0, "measure_samples": 300}
    word = "channel_standardization"
    saes = {"early": tiny_sae(normalize_activations=word), "late": tiny_sae()}
    train(tiny_multi_run(tinystories, None, saes=saes, **short), output=tmp_path / "several", **samples)
    train(tiny_run(tinystories, None, **short), output=tmp_path / "one", **samples)
    warnings = [record.getMessage() for record in caplog.records if "of the variance" in record.getMessage()]
    assert len(warnings) == 2  # once a run, not once a step, and of the one that is not normalized
    assert warnings[0].startswith("late: channel 5 has ")
    assert f"at model.layers.2, so loss and latents go to it; sae.normalize_activations={word}" in warnings[1]
    monkeypatch.undo()
    train(tiny_run(tinystories, None, **short), output=tmp_path / "without", **samples)
    assert len([record for record in caplog.records if "of the variance" in record.getMessage()]) == 2


def test_a_real_gemma(tmp_path: Path):
    """The facts that standardizing channels and leaving out special tokens are for, docs/activations.md."""
    text = real_text("text/train.jsonl")
    run = {
        "model_name": str(real_model("gemma-3-270m")), "model_class_name": "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": {"dtype": "bfloat16"}, "hook_name": "model.layers.9",
        "dataset_path": str(text), "streaming": False, "is_dataset_tokenized": False, "context_size": 128,
        "store_batch_size_prompts": 8, "training_tokens": 4096, "train_batch_size_tokens": 2048, "lr": 1e-3,
        "n_batches_in_buffer": 64, "checkpoint_path": None, "device": "cpu",
        "sae": {"architecture": "matryoshka", "d_in": 640, "d_sae": 1024, "k": 32, "matryoshka_widths": [128, 1024]},
    }  # fmt: skip
    looked_at = look_at_activations(run, 2048)
    [profile] = looked_at.profiles.values()
    channel, share = profile.ordinary.channels[0]
    assert channel == 163
    assert share > 0.35
    assert share > 8 * profile.ordinary.channels[1][1]
    assert 0.9 < profile.ordinary.mean_share < 0.97
    assert 5500 < profile.norms["median"] < 7000
    [bos] = profile.special
    assert looked_at.token_texts[bos.token_id] == "<bos>"
    assert bos.norm > 10 * profile.norms["median"]
    assert "exclude_special_tokens=true" in advice(profile, [run["sae"]], run)
