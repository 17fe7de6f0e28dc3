"""Tokens made beforehand: they train as their text does, and another model's or another run's are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import PretokenizeRunner, PretokenizeRunnerConfig
from transformers import AutoTokenizer

from sae_lens_matryoshka.errors import ConfigError, UserError
from sae_lens_matryoshka.training import language_model
from sae_lens_matryoshka.training.options import CheckpointOptions
from sae_lens_matryoshka.training.run import train
from tests.tiny_runs import assert_equal_weights, tiny_multi_run, tiny_run, trained_weights, write_jsonl


@pytest.fixture(scope="module")
def pretokenized(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens as SAELens's own runner leaves them, of the text that tiny runs train on."""
    return _pretokenize(tinystories, tmp_path_factory.mktemp("pretokenized") / "tokens")


def _pretokenize(tinystories: Path, path: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "tokenizer_name": str(tinystories / "model"),
        "dataset_path": str(tinystories / "data"),
        "context_size": 64,
        "shuffle": False,
        "num_proc": 1,
        "save_path": str(path),
        **changes,
    }
    PretokenizeRunner(PretokenizeRunnerConfig(**settings)).run()
    return path


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("make", [tiny_run, tiny_multi_run])
def test_tokens_that_saelens_has_saved_train_as_their_text_does(
    tinystories: Path, tmp_path: Path, pretokenized: Path, make: Any, exact: bool
):
    expected = trained_weights(make(tinystories, None), tmp_path / "text", exact)
    for streaming in (False, True):
        run = make(tinystories, None, dataset_path=str(pretokenized), streaming=streaming)
        assert_equal_weights(trained_weights(run, tmp_path / f"tokens {streaming}", exact), expected)


def test_parquet_files_of_longer_rows_train_as_if_cut(tinystories: Path, tmp_path: Path):
    tokens = torch.randint(3, 512, (60, 100), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 1
    for name, columns in [("cut", tokens[:, :64]), ("long", tokens)]:
        (tmp_path / name).mkdir()
        Dataset.from_dict({"tokens": columns.tolist()}).to_parquet(tmp_path / name / "train.parquet")
    run = tiny_run(tinystories, None)
    expected = trained_weights({**run, "dataset_path": str(tmp_path / "cut")}, tmp_path / "expected")
    for streaming in (False, True):
        long_run = {**run, "dataset_path": str(tmp_path / "long"), "streaming": streaming}
        assert_equal_weights(trained_weights(long_run, tmp_path / f"ours {streaming}"), expected)


def test_what_tokens_were_made_with_is_not_a_file_of_tokens(tinystories: Path, tmp_path: Path):
    write_jsonl(tmp_path / "tokens" / "a.jsonl", [{"tokens": [1] + 70 * [5]}] * 20)
    (tmp_path / "tokens" / "sae_lens.json").write_text(json.dumps({"begin_batch_token": "bos", "context_size": 71}))
    assert trained_weights(tiny_run(tinystories, None, dataset_path=str(tmp_path / "tokens")), tmp_path / "out")


@pytest.mark.parametrize(
    ("made", "changes", "message"),
    [
        ({}, {"context_size": 128}, r"context_size=128, .* speaks of rows of 64 tokens; set context_size=64"),
        ({}, {"disable_concat_sequences": True}, "made with False; set disable_concat_sequences=false"),
        ({}, {"sequence_separator_token": "eos"}, "made with 'bos'; set sequence_separator_token=bos"),
        ({}, {"prepend_bos": False}, "prepend_bos=False, but all rows looked at begin .* set prepend_bos=true"),
        (
            {"begin_batch_token": None},
            {},
            "prepend_bos=True, but not all rows looked at begin .* set prepend_bos=false",
        ),
        ({"tokenizer_name": "tinystories-chars/model"}, {}, "whose vocabulary is not that of model_name="),
    ],
    ids=str,
)
def test_a_run_that_contradicts_its_tokens_is_refused(
    tinystories: Path, tmp_path: Path, pretokenized: Path, made: dict[str, Any], changes: dict[str, Any], message: str
):
    if "tokenizer_name" in made:
        made = {"tokenizer_name": str(tinystories.parent / made["tokenizer_name"])}
    path = _pretokenize(tinystories, tmp_path / "tokens", split="train[:20]", **made) if made else pretokenized
    with pytest.raises(UserError, match=message) as error:
        train(tiny_run(tinystories, None, dataset_path=str(path), **changes), output=tmp_path / "out")
    assert "\n" not in str(error.value)


def test_what_cannot_be_compared_is_said(tinystories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    Dataset.from_dict({"tokens": torch.full((20, 64), 5).tolist()}).save_to_disk(tmp_path / "tokens")
    (tmp_path / "tokens" / "sae_lens.json").write_text(json.dumps({"tokenizer_name": "nobody/nothing"}))
    trained_weights(tiny_run(tinystories, None, dataset_path=str(tmp_path / "tokens"), lr=1e-3), tmp_path / "out")
    assert "'nobody/nothing', which cannot be compared" in caplog.text
    assert "prepend_bos=True, but not all rows looked at begin with the BOS token 1" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("token", [512, -3, None])
@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_tokens_outside_the_vocabulary_are_found_before_training(
    tinystories: Path, tmp_path: Path, form: str, token: int | None, streaming: bool, monkeypatch: pytest.MonkeyPatch
):
    rows: list[Any] = torch.full((200, 64), 5).tolist()
    rows[149][63] = token
    dataset = Dataset.from_dict({"input_ids": rows})
    if form == "saved":
        dataset.save_to_disk(tmp_path / "tokens")
    else:
        (tmp_path / "tokens").mkdir()
        dataset.to_parquet(tmp_path / "tokens" / "a.parquet")
    monkeypatch.setattr(language_model, "fuse_adam", lambda trainer: pytest.fail("training has begun"))
    run = tiny_run(tinystories, None, dataset_path=str(tmp_path / "tokens"), streaming=streaming)
    with pytest.raises(UserError, match=r"^Row 150 of"):
        train(run, output=tmp_path / "out")


def test_tokens_that_the_run_file_calls_text_are_refused(tinystories: Path, tmp_path: Path):
    Dataset.from_dict({"tokens": torch.full((20, 64), 5).tolist()}).save_to_disk(tmp_path / "tokens")
    run = tiny_run(tinystories, None, dataset_path=str(tmp_path / "tokens"), is_dataset_tokenized=False)
    with pytest.raises(ConfigError, match="is_dataset_tokenized=False, but the data set has a column 'tokens'"):
        train(run, output=tmp_path / "out")


@pytest.mark.parametrize("exact", [True, False])
def test_text_with_a_token_that_the_model_has_no_embedding_for_is_named(tinystories: Path, tmp_path: Path, exact: bool):
    """As Gemma 3's tokenizer has one for images, which its text models have not."""
    model = shutil.copytree(tinystories / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(model)
    write_jsonl(tmp_path / "text.jsonl", [{"text": "Once upon a time"}] * 4 + [{"text": "Look: <image>"}])
    run = tiny_run(tinystories, None, model_name=str(model), dataset_path=str(tmp_path / "text.jsonl"))
    with pytest.raises(UserError, match=r"Row 5 of the data set gives, .*, the token id 512, but the model has"):
        train(run, output=tmp_path / "sae", checkpointing=CheckpointOptions(exact))
