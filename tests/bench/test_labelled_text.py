"""The user's own labelled text: mappings and files, and what is wrong with them in one sentence."""

from pathlib import Path

import pandas as pd
import pytest

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
        ("text,label,split\na,x,train\n ,y,train\na,x,test\nb,y,test\n", "has an empty text in class 'y'"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(content: str, message: str, tmp_path: Path):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        LabelledText.from_file(tmp_path / "x.csv")


def test_a_missing_file_and_an_unknown_kind_are_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="There is no file"):
        LabelledText.from_file(tmp_path / "nowhere.csv")
    (tmp_path / "x.txt").touch()
    with pytest.raises(UserError, match=r"must be a \.jsonl, \.csv or \.parquet file"):
        LabelledText.from_file(tmp_path / "x.txt")


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
