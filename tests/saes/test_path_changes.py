"""Whatever way the steps of a run take, in whatever order, the parameters are those of SAELens's class and Adam."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from torch import Tensor

from sae_lens_matryoshka.saes.nested_training_sae import NestedTrainingSAE
from sae_lens_matryoshka.training.fused_adam import fuse_adam

D_IN, D_SAE, BATCH = 12, 40, 32
TWINS = {
    "matryoshka": "matryoshka_batchtopk",
    "matryoshka_topk": "topk",
    "matryoshka_jumprelu": "jumprelu",
    "matryoshka_standard": "standard",
}
Way = Literal["fast", "hooked", "compiled", "resumed"]


def _trainer(architecture: str, fused: bool) -> SAETrainer[Any, Any]:
    torch.manual_seed(0)
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    options: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64"}
    if architecture.startswith("matryoshka"):
        options["matryoshka_widths"] = [10, D_SAE] if "batchtopk" in TWINS.get(architecture, architecture) else [D_SAE]
    if "topk" in TWINS.get(architecture, architecture):
        options["k"] = 4
    sae = sae_class(config_class(**options))
    config = SAETrainerConfig(100 * BATCH, BATCH, lr=1e-2, lr_end=1e-2, dead_feature_window=3)
    trainer = SAETrainer(config, sae, iter(()))
    if fused:
        fuse_adam(trainer)
    return trainer


def _batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, D_IN, generator=generator, dtype=torch.float64) for _ in range(n)]


@contextmanager
def _hooked(sae: TrainingSAE[Any]) -> Iterator[None]:
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda tensor, hook: tensor)]):
        yield


@contextmanager
def _compiled(sae: TrainingSAE[Any]) -> Iterator[None]:
    compiled = torch.compile(sae.training_forward_pass, backend="aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae, "training_forward_pass", compiled)
        yield


def _run(trainer: SAETrainer[Any, Any], ways: list[Way], folder: Path) -> SAETrainer[Any, Any]:
    for batch, way in zip(_batches(len(ways)), ways, strict=True):
        sae = trainer.sae
        assert isinstance(sae, NestedTrainingSAE)
        if way == "resumed":
            trainer = _resumed(trainer, folder)
        contexts = {"hooked": _hooked, "compiled": _compiled}
        with contexts.get(way, nullcontext)(sae):
            _step(trainer, batch)
    return trainer


def _step(trainer: SAETrainer[Any, Any], batch: Tensor) -> None:
    trainer.step(batch)
    trainer.n_training_steps += 1


def _resumed(
    trainer: SAETrainer[Any, Any], folder: Path, architecture: str | None = None, fused: bool | None = None
) -> SAETrainer[Any, Any]:
    """A new trainer that goes on from a checkpoint of one, perhaps as another class."""
    trainer.cfg.checkpoint_path = str(folder)
    trainer.save_checkpoint("checkpoint")
    was_fused = bool(trainer.optimizer.param_groups[0].get("fused"))
    resumed = _trainer(architecture or trainer.sae.cfg.architecture(), was_fused if fused is None else fused)
    resumed.sae.load_weights_from_checkpoint(folder / "checkpoint")
    resumed.load_trainer_state(folder / "checkpoint")
    return resumed


def _assert_as_the_reference(trainer: SAETrainer[Any, Any], reference: SAETrainer[Any, Any]) -> None:
    # SAELens keeps JumpReLU's thresholds in float32, whose rounding the other parameters feel
    tolerance = 1e-8 if all(p.dtype == torch.float64 for p in reference.sae.parameters()) else 1e-5
    for (name, parameter), expected in zip(trainer.sae.named_parameters(), reference.sae.parameters(), strict=True):
        error = ((parameter - expected).norm() / expected.norm().clamp(min=1e-12)).item()
        assert error < tolerance, f"{name} is {error:.1%} away"


@pytest.fixture(scope="module")
def references() -> dict[str, SAETrainer[Any, Any]]:
    """Eight steps of SAELens's own class with SAELens's Adam."""
    trainers: dict[str, SAETrainer[Any, Any]] = {}
    for ours, twin in TWINS.items():
        trainers[ours] = _trainer(twin, fused=False)
        for batch in _batches(8):
            _step(trainers[ours], batch)
    return trainers


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "ways",
    [
        ["hooked"] * 3 + ["fast"] * 5,
        ["fast"] * 3 + ["hooked"] * 5,
        ["hooked", "fast"] * 4,
        ["hooked"] * 3 + ["resumed"] + ["fast"] * 4,
        ["fast"] * 3 + ["resumed"] + ["hooked"] * 4,
    ],
    ids=lambda ways: "-".join(dict.fromkeys(ways)) + str(len(ways)),
)
@pytest.mark.parametrize("architecture", TWINS)
def test_every_change_of_path(
    architecture: str, ways: list[Way], fused: bool, references: dict[str, Any], tmp_path: Path
):
    _assert_as_the_reference(_run(_trainer(architecture, fused), ways, tmp_path), references[architecture])


@pytest.mark.parametrize("ways", [["compiled"] * 3 + ["fast"] * 5, ["fast"] * 3 + ["compiled"] * 5])
def test_a_step_that_is_no_longer_compiled_and_one_that_becomes_it(
    ways: list[Way], references: dict[str, Any], tmp_path: Path
):
    _assert_as_the_reference(_run(_trainer("matryoshka", True), ways, tmp_path), references["matryoshka"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("architecture", TWINS)
def test_a_checkpoint_of_saelens_own_class_goes_on(
    architecture: str, fused: bool, references: dict[str, Any], tmp_path: Path
):
    trainer = _trainer(TWINS[architecture], fused=False)
    for batch in _batches(3):
        _step(trainer, batch)
    trainer = _resumed(trainer, tmp_path, architecture, fused)
    for batch in _batches(8)[3:]:
        _step(trainer, batch)
    _assert_as_the_reference(trainer, references[architecture])


def test_moments_that_lie_otherwise_are_laid_out_before_the_fused_kernel_walks_them(references: dict[str, Any]):
    trainer = _trainer("matryoshka", fused=True)
    for step, batch in enumerate(_batches(8)):
        if step == 3:  # as a loop of somebody's own may leave them
            W_dec_state = trainer.optimizer.state[trainer.sae.W_dec]
            for name in ("exp_avg", "exp_avg_sq"):
                W_dec_state[name] = W_dec_state[name].t().contiguous().t()
            trainer.sae.W_enc.data = trainer.sae.W_enc.data.contiguous()
        _step(trainer, batch)
    _assert_as_the_reference(trainer, references["matryoshka"])
