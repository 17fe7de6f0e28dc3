"""Local paths, accounts and tokens are found wherever they stand in a config, and nothing else is changed."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_matryoshka.hub.local_paths import Replacement, is_local_path, last_part, without_local_paths


def _clean(value: Any, field: str = "cfg.json: ") -> tuple[Any, list[Replacement]]:
    replacements: list[Replacement] = []
    return without_local_paths(value, field, replacements), replacements


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("/home/alice/models/gemma", "gemma"),
        ("/home/alice/my models/gemma 2", "gemma 2"),
        ("/scratch/gemma/", "gemma"),
        ("~/models/gemma", "gemma"),
        ("~alice/gemma", "gemma"),
        ("./gemma", "gemma"),
        ("../../alice/gemma", "gemma"),
        ("file:///home/alice/gemma", "gemma"),
        ("C:\\Users\\alice\\gemma", "gemma"),
        ("D:/models/gemma", "gemma"),
        ("\\\\server\\alice\\gemma", "gemma"),
        ("..\\alice\\gemma", "gemma"),
        ("/home/alice", "local"),
        ("/Users/alice/", "local"),
        ("C:\\Users\\alice", "local"),
        ("~", "local"),
        ("~alice", "local"),
        ("/", "local"),
        ("..", "local"),
    ],
)
def test_a_local_path_is_replaced_by_its_last_part(value: str, published: str):
    cleaned, replacements = _clean({"metadata": {"model_name": value}})
    assert cleaned == {"metadata": {"model_name": published}}
    assert replacements == [Replacement("cfg.json: metadata.model_name", value, published)]


@pytest.mark.parametrize(
    "value",
    [
        "google/gemma-2-2b", "gpt2", "blocks.12.hook_resid_post", "roneneldan/TinyStories", "and/or", "n/a", "",
        "https://huggingface.co/google/gemma-2-2b", "s3://bucket/some/key", "hf://datasets/a/b", "cpu", "cuda:0",
        "24/02/2025", "x/" * 5000, "a/b\0", "a / b", "v1.2.3", "3/4 of it", "bos", "lr=1e-3/2", "6.54.12",
    ],
)  # fmt: skip
def test_names_on_the_hub_and_other_text_stay(value: str):
    assert _clean({"name": value, "x": [value]}) == ({"name": value, "x": [value]}, [])
    if value.count("/") == 1:
        assert _clean({"model_name": value}) == ({"model_name": value}, [])


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("python /home/alice/run.py --out=/scratch/alice/out -q", "python run.py --out=out -q"),
        ("json:/home/alice/data.jsonl", "json:data.jsonl"),
        ("see C:\\Users\\alice\\notes.txt", "see notes.txt"),
        ("see file:///home/alice/notes.txt.", "see notes.txt."),
        ("run from ~/projects/saes", "run from saes"),
        ("'/home/alice/a b'", "'a b'"),
        ("https://example.org/a/b and /home/alice/x", "https://example.org/a/b and x"),
    ],
)
def test_paths_inside_a_text_are_replaced(value: str, published: str):
    assert _clean([value])[0] == [published]


def test_output_folders_are_local_whatever_they_look_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    cfg = {"output_path": "alice/out", "checkpoint_path": "checkpoints", "dataset_path": "alice/data", "lr": 1e-3}
    assert _clean(cfg)[0] == {**cfg, "output_path": "out"}
    assert _clean({"dataset_path": "data/of/alice"})[0] == {"dataset_path": "alice"}
    # a name that is a folder here is what was read
    (tmp_path / "alice" / "data").mkdir(parents=True)
    assert _clean(cfg)[0] == {**cfg, "output_path": "out", "dataset_path": "data"}


def test_accounts_and_tokens_are_left_out_and_tokens_not_repeated():
    token = "hf_" + "x" * 34
    cfg = {"wandb_entity": "alice", "kwargs": {"token": "secret", "note": f"use {token}"}, "training_tokens": 5}
    cleaned, replacements = _clean(cfg)
    assert cleaned == {"wandb_entity": None, "kwargs": {"token": None, "note": None}, "training_tokens": 5}
    assert "secret" not in str(replacements)
    assert token not in str(replacements)


def test_paths_in_keys_are_replaced_too():
    assert _clean({"/home/alice/data": {"n": 3}})[0] == {"data": {"n": 3}}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
def test_any_json_is_cleaned_once_and_for_all(value: Any):
    cleaned, _ = _clean(value)
    again, _ = _clean(cleaned)
    assert again == cleaned


@given(
    st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True), min_size=2), st.sampled_from(["/", "~/", "C:\\"])
)
def test_no_folder_above_the_last_part_is_left(parts: list[str], root: str):
    path = root + ("\\" if root == "C:\\" else "/").join(parts)
    assert is_local_path(path)
    assert last_part(path) in (parts[-1], "local")
    for text in (path, f"see {path} there", f"--out={path}"):
        cleaned = str(_clean(text)[0])
        assert "/" not in cleaned
        assert "\\" not in cleaned
