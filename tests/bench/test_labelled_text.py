"""The user's own labelled text: mappings and files, and what is wrong with them in one sentence."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.bench.labelled_text import DataUnavailableError, LabelledText, named_text
from sae_lens_matryoshka.bench.spurious_text import class_pairs, named_spurious_text, spurious_text
from sae_lens_matryoshka.errors import UserError


def _rows() -> pd.DataFrame:
    labels = ["cat", "dog"] * 50
    second = ["day", "day", "night", "night"] * 25
    return pd.DataFrame({"text": [f"text {i}" for i in range(100)], "label": labels, "second_label": second})


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same(suffix: str, tmp_path: Path):
    path = tmp_path / f"animals{suffix}"
    rows = _rows().drop(columns="second_label")
    {
        ".jsonl": lambda: rows.to_json(path, orient="records", lines=True),
        ".csv": lambda: rows.to_csv(path, index=False),
        ".parquet": lambda: rows.to_parquet(path),
    }[suffix]()
    text = LabelledText.from_file(path)
    assert (text.name, text.classes, text.crossed) == ("animals", ["cat", "dog"], False)
    train, test = text.by_class(30, 100)
    assert {label: len(texts) for label, texts in train.items()} == {"cat": 30, "dog": 30}
    assert {label: len(texts) for label, texts in test.items()} == {"cat": 10, "dog": 10}
    assert not set(train["cat"]) & set(test["cat"])
    assert LabelledText.from_file(path) == text  # the split has a seed


def test_a_column_can_say_what_is_for_testing(tmp_path: Path):
    rows = _rows().assign(split=["train"] * 60 + ["test"] * 40)
    rows.to_csv(tmp_path / "x.csv", index=False)
    _, test = LabelledText.from_file(tmp_path / "x.csv").by_class(100, 100)
    assert sorted(test["cat"] + test["dog"]) == sorted(f"text {i}" for i in range(60, 100))


def test_classes_of_two_labels_are_mixed_and_scr_is_put_together(tmp_path: Path):
    rows = _rows()
    rows.to_csv(tmp_path / "x.csv", index=False)
    text = LabelledText.from_file(tmp_path / "x.csv")
    assert text.crossed
    train, _ = text.by_class(4, 4)
    seconds = rows.set_index("text")["second_label"]
    assert sorted(seconds[train["cat"]]) == ["day", "day", "night", "night"]
    assert class_pairs(text) == [("cat", "dog")]
    train, _ = spurious_text(text, ("cat", "dog"), 20, 20, seed=0)
    assert {len(texts) for texts in train.values()} == {10}
    both = rows.set_index("text").loc[train["male_professor / female_nurse"]]
    assert set(both["label"]) == {"cat"}
    assert set(both["second_label"]) == {"day"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,x\nb,x\n", "needs the same two or more classes"),
        ("text,class\na,x\n", "has no column 'label', only text, class"),
        ("text,label,split\na,x,train\nb,y,train\na,x,test\n", r"classes in train and test, but has \['x', 'y'\] and"),
        ("text,label,split\na,x,train\n ,y,train\na,x,test\nb,y,test\n", "^Row 2 of .*x.csv has an empty text"),
        ("text,label\na,x\nb,\n", "^Row 2 of .*x.csv has '' for label"),
        ("text,label,split\na,x,train\nb,y,dev\n", "^Row 2 of .*x.csv has 'dev' for split; write train or test"),
        ("text,label\na,x\nb\n", "^Row 2 of .*x.csv has 1 cells, but there are 2 columns"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(content: str, message: str, tmp_path: Path):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        LabelledText.from_file(tmp_path / "x.csv")


def test_a_missing_file_and_an_unknown_kind_are_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="There is no file"):
        LabelledText.from_file(tmp_path / "nowhere.csv")
    (tmp_path / "x.xlsx").touch()
    with pytest.raises(UserError, match=r"must be a file of one of the kinds \.jsonl, "):
        LabelledText.from_file(tmp_path / "x.xlsx")


ODD = [
    "NA",
    "nan",
    "null",
    "None",
    "007",
    "1e5",
    "-0",
    "True",
    "2020-01-01",
    " x ",
    '"',
    "a,b",
    "a\nb",
    "\r",
    "\ufeff",
    "'",
]
texts = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=len(row["text"]) % 2 == 0) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    classes=st.dictionaries(texts.filter(bool), st.lists(texts.filter(str.strip), min_size=1), min_size=2, max_size=4)
)
def test_texts_and_labels_are_read_as_they_stand(tmp_path: Path, suffix: str, classes: dict[str, list[str]]):
    rows = [{"text": text, "label": label} for label, in_class in classes.items() for text in in_class]
    _write(tmp_path / f"x{suffix}", [{**row, "split": split} for split in ("train", "test") for row in rows])
    read = LabelledText.from_file(tmp_path / f"x{suffix}")
    assert read.train == read.test == classes


@pytest.mark.parametrize("write", [pd.DataFrame.to_json, pd.DataFrame.to_parquet])
def test_whole_numbers_are_classes_and_other_values_are_refused(tmp_path: Path, write: Any):
    def read(values: list[Any], column: str) -> LabelledText:
        rows = pd.DataFrame({"text": ["a", "b"] * 2, "label": [0, 10, 0, 10], "split": ["train"] * 2 + ["test"] * 2})
        rows[column] = pd.Series(values, dtype=object)
        path = tmp_path / ("x.jsonl" if write is pd.DataFrame.to_json else "x.parquet")
        write(rows, path, **({"orient": "records", "lines": True} if path.suffix == ".jsonl" else {}))
        return LabelledText.from_file(path)

    assert read([0, 10, 0, 10], "label").classes == ["0", "10"]
    with pytest.raises(UserError, match=r"^Row 2 of .* has null for label; write a text or a whole number"):
        read([0, None, 0, 10], "label")
    with pytest.raises(UserError, match=r"^Row 1 of .* has True for label"):
        read([True, False, True, False], "label")
    with pytest.raises(UserError, match=r"^Row 1 of .* has 0\.5 for label"):
        read([0.5, 1.5, 0.5, 1.5], "label")
    with pytest.raises(UserError, match=r"^Row 2 of .* holds null where its text should be"):
        read(["a", None, "a", "b"], "text")
    with pytest.raises(UserError, match=r"^Row 1 of .* holds 1 where its text should be"):
        read([1, 2, 3, 4], "text")


@pytest.mark.parametrize(
    ("in_class", "message"),
    [
        ("some text", "texts of class 'b' of data set 'x' must be a list of strings, not 'some text'"),
        (["some text", None], "Text 1 of class 'b' of data set 'x' holds null"),
        ([float("nan")], "Text 0 of class 'b' of data set 'x' holds nan"),
        (["\t"], "Text 0 of class 'b' of data set 'x' has an empty text"),
        ({"c": "some text"}, "texts of class 'b' of data set 'x' must be a list of strings"),
        ({1: ["some text"]}, "classes 'b', 1 must be strings"),
    ],
)
def test_texts_from_python_are_looked_at_too(in_class: Any, message: str):
    usable = {"a": ["text"], "b": ["text"]}
    with pytest.raises(UserError, match=message):
        LabelledText("x", {"a": ["text"], "b": in_class}, usable)
    with pytest.raises(UserError, match=message):
        LabelledText("x", usable, {"a": ["text"], "b": in_class})


def test_scr_says_what_it_lacks():
    plain = LabelledText("plain", {"a": ["x"], "b": ["y"]}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(UserError, match="has one label a text, but SCR needs two"):
        spurious_text(plain, ("a", "b"), 20, 20, seed=0)
    few = {"a": {"c": ["x"], "d": ["y"]}, "b": {"c": ["x"], "d": ["y"]}}
    with pytest.raises(UserError, match="has too few texts for SCR"):
        spurious_text(LabelledText("few", few, few), ("a", "b"), 20, 20, seed=0)


def test_a_data_set_that_cannot_be_fetched_is_named():
    with pytest.raises(DataUnavailableError, match="'fancyzhx/ag_news' cannot be fetched"):
        named_text("fancyzhx/ag_news", 20, 20, seed=0)
    with pytest.raises(DataUnavailableError, match="'LabHC/bias_in_bios_class_set1' cannot be fetched"):
        named_spurious_text("LabHC/bias_in_bios_class_set1", ("professor", "nurse"), 20, 20, seed=0)
    with pytest.raises(UserError, match="There is no data set 'nonsense'; pass your own"):
        named_text("nonsense", 20, 20, seed=0)
