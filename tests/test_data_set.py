"""Text as people have it: what can be used is read as it stands, anything else is one sentence before a model loads."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.text.data_set import open_data_set
from sae_lens_matryoshka.training.options import CheckpointOptions
from sae_lens_matryoshka.training.run import train
from tests.tiny_runs import assert_equal_weights, tiny_multi_run, tiny_run, trained_weights, write_jsonl


@pytest.fixture(scope="module")
def texts(tinystories: Path) -> list[str]:
    lines = (tinystories / "data" / "train.jsonl").read_text().splitlines()[:30]
    return [json.loads(line)["text"] for line in lines]


def _open(tinystories: Path, path: Path, **changes: Any) -> list[dict[str, Any]]:
    """The rows of a run's data set."""
    cfg: Any = build_runner_configs(tiny_run(tinystories, None, dataset_path=str(path), **changes))
    dataset = open_data_set(cfg)
    assert dataset is not None
    return [dict(row) for row in dataset]


def _rows(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def _two_files(path: Path, texts: list[str]) -> None:
    write_jsonl(path / "train-0.jsonl", _rows(texts[:9]))
    write_jsonl(path / "train-1.jsonl", _rows(texts[9:]))


def _splits(path: Path, name: str, texts: list[str]) -> None:
    DatasetDict({name: Dataset.from_dict({"text": texts})}).save_to_disk(path)


FORMS: dict[str, Callable[[Path, list[str]], Any]] = {
    "folder": lambda path, texts: write_jsonl(path / "train.jsonl", _rows(texts)),
    "two files": _two_files,
    "x.jsonl": lambda path, texts: write_jsonl(path, _rows(texts)),
    "x.json": lambda path, texts: path.write_text(json.dumps(_rows(texts), indent=1)),
    "x.csv": lambda path, texts: Dataset.from_dict({"text": texts}).to_csv(path),
    "x.tsv": lambda path, texts: Dataset.from_dict({"text": texts}).to_csv(path, sep="\t"),
    "x.parquet": lambda path, texts: Dataset.from_dict({"text": texts}).to_parquet(path),
    "x.txt": lambda path, texts: path.write_text("\n".join(texts)),
    "saved": lambda path, texts: Dataset.from_dict({"text": texts}).save_to_disk(path),
    "saved splits": lambda path, texts: _splits(path, "train", texts),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_its_rows(tinystories: Path, tmp_path: Path, texts: list[str], form: str, streaming: bool):
    texts = [text.replace("\n", " ") for text in texts]
    FORMS[form](tmp_path / form, texts)
    rows = _open(tinystories, tmp_path / form, streaming=streaming)
    assert rows == _rows(texts)
    if form in ("folder", "two files"):
        assert rows == list(load_dataset(str(tmp_path / form), split="train"))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_with_different_columns_go_together(tinystories: Path, tmp_path: Path, texts: list[str], streaming: bool):
    write_jsonl(tmp_path / "data" / "a.jsonl", _rows(texts[:10]))
    write_jsonl(tmp_path / "data" / "b.jsonl", [{"id": 3, "text": t, "meta": {"url": None}} for t in texts[10:20]])
    write_jsonl(tmp_path / "data" / "c.jsonl", [{"id": "three", "meta": [1], "text": t} for t in texts[20:]])
    write_jsonl(tmp_path / "plain" / "a.jsonl", _rows(texts))
    run = tiny_run(tinystories, None, streaming=streaming)
    ours = trained_weights({**run, "dataset_path": str(tmp_path / "data")}, tmp_path / "ours")
    assert_equal_weights(ours, trained_weights({**run, "dataset_path": str(tmp_path / "plain")}, tmp_path / "expected"))


def test_a_file_that_has_changed_is_read_again(tinystories: Path, tmp_path: Path):
    """Also where it is as long and as old as the one before, as a copy by tar or rsync may be."""
    for text in ("one", "two", "eleven"):
        write_jsonl(tmp_path / "a.jsonl", _rows([text]))
        os.utime(tmp_path / "a.jsonl", (1, 1))
        assert _open(tinystories, tmp_path) == [{"text": text}]


def test_text_in_csv_stays_text(tinystories: Path, tmp_path: Path):
    (tmp_path / "x.csv").write_text('id,text\n1,NA\n2,007\n3,"a,\nb"\n4,\n')
    assert _open(tinystories, tmp_path / "x.csv") == _rows(["NA", "007", "a,\nb", ""])


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations(tinystories: Path, tmp_path: Path, streaming: bool):
    rows: list[Any] = [{"messages": [{"role": "user", "content": text}], "id": text} for text in ("Hello", "Bye")]
    write_jsonl(tmp_path / "x.jsonl", rows)
    opened = _open(tinystories, tmp_path / "x.jsonl", streaming=streaming, use_chat_formatting=True)
    assert opened == [{"messages": row["messages"]} for row in rows]
    write_jsonl(tmp_path / "x.jsonl", [*rows, {"messages": None}])
    with pytest.raises(UserError, match=r"Row 3 of .*x\.jsonl holds null"):
        _open(tinystories, tmp_path / "x.jsonl", streaming=streaming, use_chat_formatting=True)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that gets as far as loading its model fails."""

    def load_model(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    for runner in ("llm_sae_training_runner", "multi_sae_training_runner"):
        monkeypatch.setattr(f"sae_lens.{runner}.load_model", load_model)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "holds null"),
        (7, "holds 7"),
        (["a", "b"], r"holds \['a', 'b'\]"),
        ({"en": "a"}, r"holds \{'en': 'a'\}"),
        ("\ud83d", r"holds half a character, '\\ud83d'"),
    ],
)
def test_a_row_without_text_is_named_with_its_file(
    tinystories: Path, tmp_path: Path, streaming: bool, value: Any, message: str
):
    write_jsonl(tmp_path / "data" / "a.jsonl", _rows(["Once", "upon"]))
    write_jsonl(tmp_path / "data" / "b.jsonl", [{"text": "a time"}, {"id": 1, "text": value}])
    run = tiny_run(tinystories, None, dataset_path=str(tmp_path / "data"), streaming=streaming)
    with pytest.raises(UserError, match=rf"^Row 2 of .*b\.jsonl {message}"):
        train(run, output=tmp_path / "out")


def _write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda path: (path.mkdir(), (path / name).write_bytes(content))


def _save(**columns: list[Any]) -> Callable[[Path], Any]:
    return lambda path: Dataset.from_dict(columns).save_to_disk(path)


UNUSABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other column": (_write("a.jsonl", b'{"story": "a"}'), "none of the columns tokens, .*, but story"),
    "no row": (_write("a.jsonl", b"\n"), "There are no rows in"),
    "no file": (Path.mkdir, "holds no data files"),
    "no train split": (_write("test.jsonl", b'{"text": "a"}'), "no split 'train' .*, only test"),
    "no JSON": (_write("a.jsonl", b'{"text'), r"Row 1 of .*a\.jsonl is not JSON"),
    "no object": (_write("a.jsonl", b'"text"'), r"Row 1 of .*a\.jsonl is 'text' instead of an object"),
    "no UTF-8": (_write("a.txt", b"\xff\xfe"), r"a\.txt cannot be read: 'utf-8'"),
    "no cell": (_write("a.csv", b"a,text\n1,a\n2\n"), r"Row 2 of .*a\.csv has 1 cells"),
    "same name": (_write("a.csv", b"text,text\n1,a\n"), r"Two columns of .*a\.csv have the same name"),
    "no Parquet": (_write("a.parquet", b"PAR"), r"a\.parquet cannot be read"),
    "x.pdf": (Path.touch, r"x\.pdf must be a file of one of the kinds \.jsonl, "),
    "a[b]": (Path.mkdir, "is a pattern to datasets"),
    "saved null": (_save(text=["a", None]), "Row 2 of .* is null"),
    "saved numbers": (_save(text=[1, 2]), "holds int64, not text"),
    "saved nothing": (_save(text=[]), "There are no rows"),
    "saved test": (lambda path: _splits(path, "test", ["a"]), "no split 'train' .*, only test"),
    "saved text as tokens": (_save(tokens=["a"]), "holds string, not lists of token ids"),
    "saved fractions": (_save(tokens=[[1.5]]), "not lists of token ids"),
    "saved too short": (_save(tokens=[[1] * 64, [1] * 63]), "Row 2 .* has fewer tokens than context_size=64"),
    "null token": (_write("a.jsonl", b'{"tokens": [1, null]}'), r"holds \[1, None\] where a list of token ids"),
    "negative token": (_write("a.jsonl", b'{"tokens": %s}' % str([-1] * 64).encode()), "holds -1, which is no token"),
    "too short": (_write("a.jsonl", b'{"tokens": [1, 2]}'), "has 2 tokens, fewer than context_size=64"),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("make", [tiny_run, tiny_multi_run])
@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_is_one_sentence(tinystories: Path, tmp_path: Path, name: str, make: Any):
    create, message = UNUSABLE[name]
    create(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        train(make(tinystories, None, dataset_path=str(tmp_path / name)), output=tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


ALL_TOKENS = list(range(512))
FEW = "few rows"
"""Stands for a data set of two short rows."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude_special_tokens": ALL_TOKENS}, r"exclude_special_tokens=\[0, 1, .* all of the 50,\d+ tokens read, "),
        ({"exclude_special_tokens": [1], "seqpos_slice": (0, 1)}, r"tokens read with seqpos_slice=\(0, 1\)"),
        ({"dataset_path": FEW}, "The 2 rows of the data set have 9 tokens together, .* context_size=64"),
        (
            {"dataset_path": FEW, "disable_concat_sequences": True},
            "disable_concat_sequences=true leaves out rows shorter than context_size=64, .* longest of 2 has 5 tokens",
        ),
        # so little text is read to its end
        ({"dataset_path": FEW, "context_size": 4, "exclude_special_tokens": ALL_TOKENS}, "all of the 12 tokens read, "),
        ({"context_size": 1}, "context_size=1 has room for BOS alone"),
        ({"seqpos_slice": (5, 5)}, r"slice[ =]\(5, 5\) .*(empty|nothing)"),
    ],
    ids=["excluded", "sliced", "short", "short apart", "short excluded", "no room", "no slice"],
)
@pytest.mark.parametrize("kind", ["exact", "saelens", "prefetch", "several"])
def test_a_run_that_would_stand_still_ends(
    tinystories: Path, tmp_path: Path, kind: str, changes: dict[str, Any], message: str
):
    if changes.get("dataset_path") == FEW:
        write_jsonl(tmp_path / "data" / "a.jsonl", _rows(["Once upon a time", "the end"]))
        changes = {**changes, "dataset_path": str(tmp_path / "data")}
    make = tiny_multi_run if kind == "several" else tiny_run
    run = make(tinystories, None, **{"n_batches_in_buffer": 200, "prefetch_llm_batches": kind == "prefetch", **changes})
    with pytest.raises(UserError, match=message) as error:
        train(run, output=tmp_path / "out", checkpointing=CheckpointOptions(exact=kind != "saelens"))
    assert not re.search(r"\n|Traceback", str(error.value))
