"""The private names of SAELens that we rely on still exist, and still mean the same."""

import inspect

from sae_lens import LanguageModelSAETrainingRunner, MultiSAETrainingRunner
from sae_lens.training.multi_sae_trainer import MultiSAETrainer


def test_multi_sae_runner_trains_between_construction_and_saving():
    method = MultiSAETrainingRunner._run_with_interruption_handling
    assert list(inspect.signature(method).parameters) == ["self", "trainer"]
    run = inspect.getsource(MultiSAETrainingRunner.run)
    assert run.index("_run_with_interruption_handling(trainer)") < run.index("_save_final_outputs(")
    assert {"fit", "save_checkpoint"} <= set(dir(MultiSAETrainer))


def test_single_sae_runner_trains_between_construction_and_saving():
    run = inspect.getsource(LanguageModelSAETrainingRunner.run)
    assert run.index("run_trainer_with_interruption_handling(trainer)") < run.index("save_final_sae(")
