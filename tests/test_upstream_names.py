"""The private names of SAELens that we rely on still exist, and still mean the same."""

import inspect
import io
import re
from pathlib import Path
from typing import Any

import pytest
import sae_lens
from sae_lens import (
    ActivationsStore,
    HookedSAETransformer,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    SAETrainer,
    SAETransformerBridge,
)
from sae_lens.analysis.hooked_sae_transformer import get_deep_attr
from sae_lens.tokenization_and_batching import _add_tokens_to_batch
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tqdm.auto import tqdm

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.run_files.checking import NEVER_READ


def test_multi_sae_runner_trains_between_construction_and_saving():
    method = MultiSAETrainingRunner._run_with_interruption_handling
    assert list(inspect.signature(method).parameters) == ["self", "trainer"]
    run = inspect.getsource(MultiSAETrainingRunner.run)
    assert run.index("_run_with_interruption_handling(trainer)") < run.index("_save_final_outputs(")
    assert {"fit", "save_checkpoint"} <= set(dir(MultiSAETrainer))


def test_single_sae_runner_trains_between_construction_and_saving():
    run = inspect.getsource(LanguageModelSAETrainingRunner.run)
    assert run.index("run_trainer_with_interruption_handling(trainer)") < run.index("save_final_sae(")


def test_the_store_reads_rows_sequences_and_activations_through_the_methods_that_we_override():
    for name in (
        "_iterate_raw_dataset",
        "_iterate_raw_dataset_tokens",
        "_iterate_tokenized_sequences",
        "_iterate_filtered_activations",
        "_iterate_filtered_multi_hook_activations",
    ):
        assert list(inspect.signature(getattr(ActivationsStore, name)).parameters) == ["self"]
    assert "self._iterate_raw_dataset()" in inspect.getsource(ActivationsStore._iterate_raw_dataset_tokens)
    assert "self._iterate_raw_dataset()" in inspect.getsource(ActivationsStore._iterate_tokenized_sequences)
    for batches, batch in (
        ("_iterate_filtered_activations", "get_filtered_llm_batch"),
        ("_iterate_filtered_multi_hook_activations", "_get_filtered_multi_hook_llm_batch"),
    ):
        assert list(inspect.signature(getattr(ActivationsStore, batch)).parameters) == ["self", "raise_on_epoch_end"]
        assert f"self.{batch}(raise_on_epoch_end=True)" in inspect.getsource(getattr(ActivationsStore, batches))
    epoch_end = inspect.getsource(ActivationsStore.get_batch_tokens)
    assert "self.iterable_sequences = self._iterate_tokenized_sequences()" in epoch_end
    assert "self._dataloader = self.get_data_loader()" in inspect.getsource(ActivationsStore.__next__)
    multi_hook = inspect.getsource(ActivationsStore.from_config_multi_hook)
    assert "store._hook_names =" in multi_hook
    assert "store._hook_d_ins =" in multi_hook
    assert list(inspect.signature(_add_tokens_to_batch).parameters) == [
        "batch",
        "tokens",
        "offset",
        "context_size",
        "is_start_of_sequence",
        "begin_batch_token_id",
        "begin_sequence_token_id",
        "sequence_separator_token_id",
    ]


def test_fields_that_we_refuse_are_read_nowhere():
    sources = [path.read_text(encoding="utf-8") for path in Path(sae_lens.__file__).parent.rglob("*.py")]
    for field in NEVER_READ:
        readers = [source for source in sources if re.search(rf"\.{field}\b|{field}=", source)]
        assert readers == [] or field == "hook_eval"  # which SAELens reads to warn that it does not use it


@pytest.mark.parametrize("trainer", [SAETrainer, MultiSAETrainer])
def test_trainers_save_a_finished_step_before_they_count_it(trainer: type):
    fit = inspect.getsource(trainer.fit)
    assert fit.index("self._checkpoint_if_needed()") < fit.index("n_training_steps += 1")
    save_if_needed = inspect.getsource(trainer._checkpoint_if_needed)
    assert "self.n_training_samples > self.checkpoint_thresholds[0]" in save_if_needed
    assert "self.save_checkpoint(checkpoint_name=str(self.n_training_samples))" in save_if_needed


def test_models_keep_their_attached_saes_where_they_are_put_back(
    bridge: SAETransformerBridge, hooked: HookedSAETransformer, matryoshka_sae: MatryoshkaSAE
):
    assert bridge._resolve_hook_name("blocks.1.hook_resid_post") == "blocks.1.hook_out"
    hooks: list[tuple[SAETransformerBridge | HookedSAETransformer, str]] = [
        (bridge, "blocks.1.hook_out"),
        (hooked, "blocks.1.hook_resid_post"),
    ]
    for model, name in hooks:
        matryoshka_sae.cfg.metadata.hook_name = name
        with model.saes([matryoshka_sae]):
            wrapper = model._acts_to_saes[name]
            assert get_deep_attr(model, name) is wrapper
            assert wrapper.sae is matryoshka_sae
            assert {f"{name}.hook_sae_input", f"{name}.hook_sae_acts_post"} <= model.hook_dict.keys()
            if isinstance(model, SAETransformerBridge):
                assert model._hook_registry[name] is wrapper
                inside = {key for key in model._hook_registry if key.startswith(f"{name}.")}
                assert inside == {f"{name}.{hook}" for hook, _ in wrapper.named_children()}
                assert all(key.startswith(f"{name}.hook_sae_") for key in inside)
        assert model._acts_to_saes == {}


@pytest.mark.parametrize(("trainer", "outputs"), [(SAETrainer, "step_output"), (MultiSAETrainer, "step_outputs")])
def test_trainers_move_their_bar_in_one_place(trainer: Any, outputs: str):
    assert list(inspect.signature(trainer._update_pbar).parameters) == ["self", outputs, "pbar", "update_interval"]
    assert f"self._update_pbar({outputs}, pbar)" in inspect.getsource(trainer.fit)


def test_tqdm_knows_its_bars():
    bar = tqdm(total=1, disable=False, file=io.StringIO())
    assert bar in tqdm._instances  # pyright: ignore[reportAttributeAccessIssue]
    bar.close()
