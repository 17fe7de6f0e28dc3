"""Labelled text for probing and erasure: SAEBench's named data sets, or the user's own."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from requests import RequestException

from sae_lens_matryoshka.bench.upstream import dataset_info, dataset_utils
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.text.data_files import check_text, read_rows, shown

Texts = dict[str, list[str]]
"""Texts by class."""


FEWEST_TRAIN = 2
"""Texts of a class that a probe needs: with fewer nothing is known of how they vary."""


class DataUnavailableError(UserError):
    """A data set that an evaluation needs cannot be fetched."""


@dataclass(frozen=True)
class LabelledText:
    """Texts in classes, for training probes and for testing them.

    Args:
        name: The name that results carry, in SAEBench's ``dataset_names``.
        train: Class -> texts to train probes on. With a second label, class -> second class -> texts.
        test: The same to test them on.
    """

    name: str
    train: Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]]
    test: Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]]

    def __post_init__(self) -> None:
        if len(self.train) < 2 or set(self.train) != set(self.test):
            raise UserError(
                f"Data set {self.name!r} needs the same two or more classes in train and test, but has "
                f"{sorted(self.train)} and {sorted(self.test)}; give more texts of those that are missing."
            )
        for split in (self.train, self.test):
            for label, texts in split.items():
                for second, in_class in texts.items() if isinstance(texts, Mapping) else [("", texts)]:
                    if not isinstance(label, str) or not isinstance(second, str):
                        raise UserError(f"Data set {self.name!r}: classes {label!r}, {second!r} must be strings.")
                    _check_texts(in_class, f"class {label!r} of data set {self.name!r}")

    @property
    def classes(self) -> list[str]:
        return list(self.train)

    @property
    def crossed(self) -> bool:
        """Whether every text has two labels, as spurious correlation removal (SCR) needs."""
        return all(isinstance(texts, Mapping) for texts in self.train.values())

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        name: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        second_label_column: str = "second_label",
        split_column: str = "split",
        test_fraction: float = 0.2,
        seed: int = 42,
    ) -> "LabelledText":
        """Read a JSONL, CSV or Parquet file with a row a text. Values are taken as they stand; see :func:`read_rows`.

        Args:
            path: The file; its ending says what it is.
            name: The name of the data set; None takes the file's.
            text_column: The column of the texts.
            label_column: The column of the classes: texts, or whole numbers, which become their decimal text.
            second_label_column: The column of a second label with two classes, which SCR needs. It may be missing.
            split_column: The column that says ``train`` or ``test``. Where it is missing, rows are split at random.
            test_fraction: The part of each class that is for testing where no column says.
            seed: The seed of that split.

        Raises:
            UserError: If the file or a column is missing, the file cannot be read, or a row lacks a value or has one
                that is not of its kind; the sentence names the row.
        """
        path = Path(path)
        if not 0 < test_fraction < 1:
            raise UserError(f"test_fraction={test_fraction} must lie between 0 and 1.")
        numbered = list(read_rows(path))
        columns = dict.fromkeys(column for _, row in numbered for column in row)
        for column in (text_column, label_column):
            if column not in columns:
                raise UserError(f"{path} has no column {column!r}, only {', '.join(columns)}.")
        readers = {text_column: _text, label_column: _label, second_label_column: _label, split_column: _split}
        rows: Any = pd.DataFrame(
            {
                column: [read(row.get(column), f"Row {number} of {path}", column) for number, row in numbered]
                for column, read in readers.items()
                if column in columns
            },
            dtype=object,
        )
        labels = [label_column, second_label_column] if second_label_column in rows else [label_column]
        if split_column in rows:
            splits = {split: rows[rows[split_column] == split] for split in ("train", "test")}
        else:
            test = rows.groupby(labels, group_keys=False).sample(frac=test_fraction, random_state=seed)
            splits = {"train": rows.drop(test.index), "test": test}
        train, test = (_by_class(splits[split], text_column, labels) for split in ("train", "test"))
        return cls(name or path.stem, train, test)

    def check_enough(self) -> None:
        """Refuse a class with too few texts for a probe.

        Raises:
            UserError: If there is one.
        """
        for label in self.train:
            of_label = [self.train[label], self.test[label]]
            n_train, n_test = (
                sum(map(len, texts.values())) if isinstance(texts, Mapping) else len(texts) for texts in of_label
            )
            if n_train < FEWEST_TRAIN or n_test < 1:
                raise UserError(
                    f"Class {label!r} of data set {self.name!r} has too few texts for a probe: {n_train} to train on "
                    f"and {n_test} to test on; give at least {FEWEST_TRAIN} and 1, or leave the class out."
                )

    def by_class(self, n_train: int, n_test: int) -> tuple[Texts, Texts]:
        """Equally many texts of every class, at most as many as asked for, since SAEBench compares classes one to one.

        Args:
            n_train: How many texts of a class to train on.
            n_test: How many texts of a class to test on.
        """
        return _balanced(self.train, n_train), _balanced(self.test, n_test)


def named_text(name: str, n_train: int, n_test: int, seed: int) -> tuple[Texts, Texts]:
    """One of SAEBench's data sets for probing and targeted probe perturbation, fetched as SAEBench fetches it.

    Args:
        name: Its name in SAEBench.
        n_train: Size of the training set of a probe: twice the texts of a class.
        n_test: Size of the test set of a probe.
        seed: The seed of the sampling.

    Raises:
        UserError: If SAEBench has no such data set.
        DataUnavailableError: If it cannot be fetched.
    """
    known = dataset_info.chosen_classes_per_dataset
    if name not in known:
        raise UserError(f"There is no data set {name!r}; pass your own as data, or name one of {', '.join(known)}.")
    with fetching(name):
        train, test = dataset_utils.get_multi_label_train_test_data(name, n_train, n_test, seed)
        return dataset_utils.filter_dataset(train, known[name]), dataset_utils.filter_dataset(test, known[name])


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """Turns whatever a missing network or data set raises into one sentence that names the data set.

    Raises:
        DataUnavailableError: If the data set cannot be fetched.
    """
    try:
        yield
    except UserError:
        raise
    # datasets and huggingface_hub raise OSErrors, among them ConnectionError and FileNotFoundError; datasets raises
    # RuntimeError for data sets that are scripts, ValueError for offline ones that are not in the local cache
    except (OSError, RequestException, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise DataUnavailableError(f"The data set {name!r} cannot be fetched: {reason}.") from error


def _check_texts(texts: Any, where: str) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise UserError(f"The texts of {where} must be a list of strings, not {shown(texts)}.")
    for number, text in enumerate(texts):
        _text(text, f"Text {number} of {where}")


def _text(value: Any, where: str, column: str = "text") -> str:
    check_text(value, where)
    if not value.strip():
        raise UserError(f"{where} has an empty text; remove it.")
    return value


def _label(value: Any, where: str, column: str) -> str:
    """A label as text: whole numbers are common for classes, other values have no one way of being written."""
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} has {shown(value)} for {column}; write a text or a whole number, or remove the row.")
    return value


def _split(value: Any, where: str, column: str) -> str:
    if value not in ("train", "test"):
        raise UserError(f"{where} has {shown(value)} for {column}; write train or test, or remove the row.")
    return value


def _by_class(rows: pd.DataFrame, text: str, labels: Sequence[str]) -> Any:
    """Class -> texts, or class -> second class -> texts."""
    if not labels:
        return rows[text].tolist()
    return {str(label): _by_class(part, text, labels[1:]) for label, part in rows.groupby(labels[0])}


def _balanced(split: Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]], n: int) -> Texts:
    """Up to n texts of each class, those of all second labels in turn."""
    joined: Texts = {}
    for label, texts in split.items():
        parts = texts.values() if isinstance(texts, Mapping) else [texts]
        joined[label] = [text for turn in itertools.zip_longest(*parts) for text in turn if text is not None]
    n = min(n, *map(len, joined.values()))
    return {label: texts[:n] for label, texts in joined.items()}
