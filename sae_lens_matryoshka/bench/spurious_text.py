"""Texts for spurious correlation removal (SCR): two labels, of which one is made to give away the other.

SAEBench names the classes after its first example, whatever the data: ``male / female`` stands for the second label,
``professor / nurse`` for the first, ``male_professor / female_nurse`` for both at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pandas as pd

from sae_lens_matryoshka.bench.labelled_text import LabelledText, Texts, fetching
from sae_lens_matryoshka.bench.upstream import dataset_info, scr_and_tpp_main, scr_dataset_creation
from sae_lens_matryoshka.errors import UserError

Pair = tuple[str, str]


def class_pairs(data: LabelledText) -> list[Pair]:
    """The classes in pairs, in their order: SCR tells two classes apart."""
    return list(zip(data.classes[0::2], data.classes[1::2], strict=False))


def spurious_text(data: LabelledText, pair: Pair, n_train: int, n_test: int, seed: int) -> tuple[Texts, Texts]:
    """The user's text, put together for one pair of classes by SAEBench.

    Args:
        data: Text with two labels.
        pair: The two classes of the first label.
        n_train: Size of the training set of a probe; less where a class has too few texts.
        n_test: Size of the test set of a probe; the same.
        seed: The seed of the shuffling.

    Raises:
        UserError: If there is no second label with two values, or there are too few texts.
    """
    if not data.crossed:
        raise UserError(
            f"Data set {data.name!r} has one label a text, but SCR needs two; give a mapping class -> second class -> "
            "texts, or a file with a column second_label."
        )
    found = sorted({value for texts in data.train.values() for value in texts})
    if len(found) != 2:
        raise UserError(f"Data set {data.name!r} has the second labels {found}, but SCR needs exactly two.")
    second = (found[0], found[1])
    with _registered(data.name, pair, second):
        train = _put_together(data, data.train, pair, second, n_train // 4, seed)
        return train, _put_together(data, data.test, pair, second, n_test // 4, seed)


def named_spurious_text(name: str, pair: Pair, n_train: int, n_test: int, seed: int) -> tuple[Texts, Texts]:
    """One of SAEBench's data sets for SCR, fetched as SAEBench fetches it.

    Raises:
        UserError: If SAEBench has no such data set.
        DataUnavailableError: If it cannot be fetched.
    """
    known = scr_and_tpp_main.COLUMN2_VALS_LOOKUP
    if name not in known:
        raise UserError(f"SCR has no data set {name!r}; pass your own as data, or name one of {', '.join(known)}.")
    with fetching(name):
        return scr_dataset_creation.get_train_test_data(name, True, n_train, n_test, seed, pair, known[name])


def _put_together(
    data: LabelledText,
    split: Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]],
    pair: Pair,
    second: Pair,
    n_a_quadrant: int,
    seed: int,
) -> Texts:
    quadrants = {(a, b): list(dict(split[a]).get(b, [])) for a in pair for b in second}  # type: ignore[arg-type]
    # SAEBench takes n texts of every quadrant and wants more than 2n where both labels agree
    n = min(
        n_a_quadrant,
        *map(len, quadrants.values()),
        (len(quadrants[pair[0], second[0]]) - 1) // 2,
        (len(quadrants[pair[1], second[1]]) - 1) // 2,
    )
    if n < 2:
        counts = ", ".join(f"{a} and {b}: {len(texts)}" for (a, b), texts in quadrants.items())
        raise UserError(f"Data set {data.name!r} has too few texts for SCR ({counts}).")
    rows = [{"text": text, "label": a, "second_label": b} for (a, b), texts in quadrants.items() for text in texts]
    return scr_dataset_creation.get_spurious_corr_data(pd.DataFrame(rows), pair, second, data.name, n, seed)


@contextmanager
def _registered(name: str, pair: Pair, second: Pair) -> Iterator[None]:
    """The data set's columns in SAEBench's table of data sets, where its own function looks them up."""
    dataset_info.dataset_metadata[name] = {
        "text_column_name": "text",
        "column1_name": "label",
        "column2_name": "second_label",
        "column1_mapping": {value: value for value in pair},
        "column2_mapping": {value: value for value in second},
    }
    try:
        yield
    finally:
        del dataset_info.dataset_metadata[name]
