"""Checkpoints of dictionary_learning, compared with its own class where it is installed."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from sae_lens_matryoshka import MatryoshkaSAE, hub
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.saved.dictionary_learning import dictionary_learning_disk_loader

GROUP_SIZES = [3, 5, 12]


def _theirs() -> ModuleType:
    """Its module, with an empty stand-in for nnsight, a dependency that nothing here uses."""
    nnsight = ModuleType("nnsight")
    nnsight.LanguageModel = object  # type: ignore[attr-defined]
    sys.modules.setdefault("nnsight", nnsight)
    return pytest.importorskip(
        "dictionary_learning.trainers.matryoshka_batch_top_k", reason="dictionary_learning is not installed"
    )


def fake_checkpoint(d_in: int = 6, group_sizes: list[int] = GROUP_SIZES) -> dict[str, torch.Tensor]:
    """What their class saves, made by hand, for tests of what can be wrong with it."""
    d_sae = sum(group_sizes)
    return {
        "W_enc": torch.randn(d_in, d_sae),
        "b_enc": torch.randn(d_sae),
        "W_dec": torch.randn(d_sae, d_in),
        "b_dec": torch.randn(d_in),
        "threshold": torch.tensor(0.25),
        "k": torch.tensor(4, dtype=torch.int),
        "group_sizes": torch.tensor(group_sizes),
    }


@pytest.mark.parametrize("steps", [0, 30])
def test_every_level_computes_what_theirs_does(tmp_path: Path, steps: int):
    module = _theirs()
    trainer = module.MatryoshkaBatchTopKTrainer(
        steps=100, activation_dim=6, dict_size=20, k=4, layer=12, lm_name="google/gemma-2-2b", device="cpu", seed=0,
        group_fractions=[3 / 20, 5 / 20, 12 / 20], warmup_steps=0, threshold_start_step=5,
        submodule_name="resid_post_layer_12",
    )  # fmt: skip
    for step in range(steps):
        trainer.update(step, torch.randn(256, 6) + 0.3)
    # as their training script saves
    torch.save({name: value.cpu() for name, value in trainer.ae.state_dict().items()}, tmp_path / "ae.pt")
    config = {"trainer": trainer.config, "buffer": {"ctx_len": 1024}}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))

    theirs = module.MatryoshkaBatchTopKSAE.from_pretrained(tmp_path / "ae.pt")
    ours = hub.load(tmp_path)
    assert ours.widths == [3, 8, 20]
    # until threshold_start_step theirs has the threshold -1, which lets every positive activation through
    assert ours.state_dict()["threshold"].unique().tolist() == [theirs.threshold.item()]
    assert (theirs.threshold.item() > 0) if steps else (theirs.threshold.item() == -1)
    x = torch.randn(500, 6)
    for level, width in enumerate(ours.widths):
        theirs.active_groups = level + 1
        their_acts = theirs.encode(x)
        torch.testing.assert_close(ours.encode(x, level), their_acts[:, :width], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.decode(ours.encode(x, level), level), theirs(x), atol=1e-5, rtol=0)
        assert (their_acts != 0).any()
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)
    metadata = ours.cfg.metadata
    assert metadata.model_name == "google/gemma-2-2b"
    assert metadata.hook_name == "blocks.12.hook_resid_post"
    assert metadata.context_size == 1024
    assert metadata.training_architecture_details == {"k": 4}


def test_it_is_saved_as_any_other_sae(tmp_path: Path):
    torch.save(fake_checkpoint(), tmp_path / "model.pt")
    sae = hub.load(tmp_path / "model.pt", dtype="float64")
    assert sae.W_enc.dtype == torch.float64
    sae.save_model(tmp_path / "saved")
    again = MatryoshkaSAE.load_from_disk(tmp_path / "saved")
    assert again.widths == [3, 8, 20]
    assert again.state_dict()["threshold"].equal(sae.state_dict()["threshold"])
    by_converter = MatryoshkaSAE.load_from_disk(tmp_path / "model.pt", converter=dictionary_learning_disk_loader)
    assert by_converter.widths == [3, 8, 20]


class _Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return (Path.touch, (Path("harmed"),))


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**fake_checkpoint(), "extra": _Harmful()}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="holds more than tensors"):
        hub.load(tmp_path)
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(UserError, match="holds more than tensors"):
        hub.load(tmp_path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("group_sizes"), "is not a checkpoint of .*: group_sizes missing"),
        (lambda c: c.pop("threshold"), "threshold missing"),
        (lambda c: c.update(group_sizes=torch.tensor([3, 5, 11])), r"group_sizes=\[3, 5, 11\] must be .* sum to 20"),
        (lambda c: c.update(group_sizes=torch.tensor([20.0])), "must be positive whole numbers"),
        (lambda c: c.update(group_sizes=torch.tensor([25, -5])), "must be positive whole numbers"),
        (lambda c: c.update(W_dec=c["W_dec"].t()), r"W_dec has shape \[6, 20\] instead of \[20, 6\]"),
        (lambda c: c.update(W_enc=c["W_enc"][0]), r"W_enc has shape \[20\]"),
        (lambda c: c.update(threshold=torch.zeros(20)), r"threshold has shape \[20\]"),
        (lambda c: c.update(b_enc=torch.zeros(20, dtype=torch.int)), "b_enc is stored as torch.int32"),
        (lambda c: c["W_enc"].fill_(torch.nan), "W_enc of this SAE holds 120 values"),
        (lambda c: c.update(k="four"), "does not hold the parameters of an SAE by name"),
    ],
)
def test_wrong_checkpoints_are_one_sentence(tmp_path: Path, change: Callable[[Any], Any], message: str):
    checkpoint = fake_checkpoint()
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=message):
        hub.load(tmp_path)


@pytest.mark.parametrize("n_bytes", [0, 10, 1000, -5])
def test_a_truncated_checkpoint_is_one_sentence(tmp_path: Path, n_bytes: int):
    torch.save(fake_checkpoint(), tmp_path / "ae.pt")
    (tmp_path / "ae.pt").write_bytes((tmp_path / "ae.pt").read_bytes()[:n_bytes])
    with pytest.raises(UserError, match=r"truncated or damaged|no checkpoint"):
        hub.load(tmp_path)


class _Large:
    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return (bytearray, (2**40,))


def _packed(folder: Path) -> None:
    torch.save({**fake_checkpoint(), "zeros": torch.zeros(10_000_000)}, folder / "whole.pt")
    with ZipFile(folder / "whole.pt") as whole, ZipFile(folder / "ae.pt", "w", ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry, whole.read(entry), ZIP_DEFLATED)
    assert (folder / "ae.pt").stat().st_size < 100_000


def _saved(changes: dict[str, Any], **options: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save({**fake_checkpoint(), **changes}, folder / "ae.pt", **options)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        # one value on disk
        (_saved({"W_enc": torch.zeros(1).expand(2**20, 2**20)}), "W_enc declares 1,099,511,627,776 values, more than"),
        (_packed, "is truncated or damaged .it is packed"),
        (_saved({"k": _Large()}), "holds more than tensors"),
        (_saved({}, _use_new_zipfile_serialization=False), "holds more than tensors, or is no checkpoint"),
        (_saved({"W_enc": torch.zeros(2, 2).to_sparse()}), "holds more than tensors"),
        (_saved({"W_enc": torch.zeros(2, device="meta")}), "holds more than tensors"),
    ],
)
def test_a_file_that_declares_more_than_it_holds_is_refused(
    tmp_path: Path, write: Callable[[Path], None], message: str
):
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        hub.load(tmp_path)
