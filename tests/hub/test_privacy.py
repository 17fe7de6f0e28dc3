"""Paths, accounts and secrets are found wherever they stand in a config, and nothing else is changed."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.local_paths import is_path, last_part
from sae_lens_matryoshka.hub.privacy import PrivacyFilter, Replacement


def _clean(value: Any, field: str = "cfg.json: ") -> tuple[Any, list[Replacement]]:
    privacy = PrivacyFilter()
    return privacy.contents(value, field), privacy.replacements


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
        ("alice\\gemma", "gemma"),
        ("alice/models/gemma", "gemma"),
        ("alice@server:models/gemma", "gemma"),
        ("s3://alice-bucket/models/gemma", "gemma"),
        ("gs://alice-bucket/my models/gemma", "gemma"),
        ("az://alice/container/gemma", "gemma"),
        ("abfss://container@alice.dfs.core.windows.net/gemma", "gemma"),
        ("https://alice-bucket.s3.eu-west-1.amazonaws.com/models/gemma?X-Amz-Signature=abc", "gemma"),
        ("https://storage.googleapis.com/alice/gemma", "gemma"),
        ("http://10.0.0.7/alice/gemma", "gemma"),
        ("http://alice-desktop:8000/gemma", "gemma"),
        ("https://models.alice.internal/gemma", "gemma"),
        ("s3://alice-bucket", "local"),
        ("/home/alice", "local"),
        ("/Users/alice/", "local"),
        ("file:///home/alice", "local"),
        ("C:\\Users\\alice", "local"),
        ("~", "local"),
        ("~alice", "local"),
        ("/", "local"),
        ("..", "local"),
    ],
)
def test_a_path_is_replaced_by_its_last_part(value: str, published: str):
    cleaned, replacements = _clean({"metadata": {"model_name": value}})
    assert cleaned == {"metadata": {"model_name": published}}
    assert replacements == [Replacement("cfg.json: metadata.model_name", value, published)]


@pytest.mark.parametrize(
    "value",
    [
        "google/gemma-2-2b", "gpt2", "blocks.12.hook_resid_post", "roneneldan/TinyStories", "and/or", "n/a", "",
        "https://huggingface.co/google/gemma-2-2b", "hf://datasets/a/b", "cpu", "cuda:0", "24/02/2025", "a/b\0",
        "a / b", "v1.2.3", "3/4 of it", "bos", "lr=1e-3/2", "6.54.12", "https://medium.com/@alice/post",
        "gemma-2-2b/12-res-16k", "a" * 40, "hf_transfer", "token", "passwords are bad",
    ],
)  # fmt: skip
def test_names_on_the_hub_and_other_text_stay(value: str):
    assert _clean({"name": value, "x": [value]}) == ({"name": value, "x": [value]}, [])


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("python /home/alice/run.py --out=/scratch/alice/out -q", "python run.py --out=out -q"),
        ("python /home/alice/my code/run.py --out '/scratch/alice b/my out' -q", "python run.py --out 'my out' -q"),
        ("see C:\\Users\\alice\\my notes\\notes.txt now", "see notes.txt now"),
        ("see file:///home/alice/notes.txt.", "see notes.txt."),
        ("run from ~/projects/saes", "run from saes"),
        ("'/home/alice/a b'", "'a b'"),
        ("https://example.org/a/b and /home/alice/x", "https://example.org/a/b and x"),
        ("text of s3://alice/my bucket/x.jsonl, clean", "text of x.jsonl, clean"),
        ("git+https://alice:pa@ss@github.com/a/b", "b"),
        ("from https://alice:secret@example.org/a/b?x=1 on", "from https://example.org/a/b?x=1 on"),
        ("from https://example.org/a/b?x=1&access_token=abc on", "from https://example.org/a/b on"),
        ("rsync alice@cluster:/home/alice/x .", "rsync x ."),
        ("on data/alice/private.jsonl and data/x.csv", "on private.jsonl and x.csv"),
        ("with models/alice/gemma inside", "with gemma inside"),
    ],
)
def test_paths_and_logins_inside_a_text_are_replaced(value: str, published: str):
    cleaned, replacements = _clean([value])
    assert cleaned == [published]
    assert not re.search("pa@ss|secret|token=abc", str(replacements))


def test_fields_of_folders_hold_paths_whatever_they_look_like():
    cfg = {"output_path": "alice/out", "checkpoint_path": "checkpoints", "cache_dir": "alice/cache", "lr": 1e-3}
    assert _clean(cfg)[0] == {**cfg, "output_path": "out", "cache_dir": "cache"}
    assert _clean({"revision": "refs/pr/3"})[0] == {"revision": "refs/pr/3"}


@pytest.mark.parametrize("field", ["model_name", "dataset_path"])
def test_what_training_has_recorded_says_whether_a_name_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
):
    other = {"model_name": "dataset_path", "dataset_path": "model_name"}[field]
    metadata = {field: "models/acme-internal-7b", other: "someone/other", "local_paths": [field]}
    for folder in (tmp_path, tmp_path / "elsewhere"):
        (folder / "someone" / "other").mkdir(parents=True)  # which is here now, and was not when it was trained
        monkeypatch.chdir(folder)
        privacy = PrivacyFilter(metadata)
        assert privacy.contents(metadata, "") == {**metadata, field: "acme-internal-7b"}
        # wherever the same path stands again, be it in a command line
        assert privacy.contents({"run": "train models/acme-internal-7b -q"}, "") == {"run": "train acme-internal-7b -q"}
        assert privacy.contents({field: "models/acme-internal-7b"}, "") == {field: "acme-internal-7b"}
        on_hub = {"model_name": privacy.hub_model, "dataset_path": privacy.hub_dataset}
        assert on_hub[field](metadata[field]) is None
        assert on_hub[other](metadata[other]) == "someone/other"


def test_without_a_record_only_known_names_are_taken_for_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    metadata = {"model_name": "google/gemma-2-2b", "dataset_path": "someone/text", "kwargs": {"tokenizer": "a/b"}}
    privacy = PrivacyFilter(metadata)
    assert privacy.contents(metadata, "") == {**metadata, "dataset_path": "text", "kwargs": {"tokenizer": "b"}}
    assert [(guess.value, guess.guessed) for guess in privacy.replacements] == [("someone/text", True), ("a/b", True)]
    assert privacy.hub_model("google/gemma-2-2b") == privacy.hub_model("gemma-2-2b") == "google/gemma-2-2b"
    assert privacy.hub_model("gpt2-small") == "gpt2"
    assert privacy.hub_dataset("roneneldan/TinyStories") == "roneneldan/TinyStories"
    for name in ("someone/own-model", "own-model", "my model", "a/b/c", "", None):
        assert privacy.hub_model(name) is None
        assert privacy.hub_dataset(name) is None
    told = PrivacyFilter(metadata, hub_names=["someone/text", "a/b"])
    assert told.contents(metadata, "") == metadata
    assert told.hub_dataset("someone/text") == "someone/text"
    # a folder of that name is what was read
    (tmp_path / "google" / "gemma-2-2b").mkdir(parents=True)
    assert PrivacyFilter(metadata).hub_model("google/gemma-2-2b") is None
    with pytest.raises(UserError, match="'someone/text' was a path when this SAE was trained"):
        PrivacyFilter({**metadata, "local_paths": ["dataset_path"]}, ["someone/text"])


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "x" * 34, "hf_oauth_eyJhbGciOiJ.eyJzdWIi.abc-_d", "hf_jwt_eyJhbGciOiJFZERT", "api_org_" + "x" * 34,
        "github_pat_" + "1x" * 20, "ghp_" + "x" * 36, "sk-ant-api03-" + "x" * 30, "AKIA" + "A1B2C3D4" * 2,
        "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJ", "WANDB_API_KEY=0123abcd", "--password hunter2", "password: hunter2",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_secrets_are_left_out_wherever_they_stand_and_not_repeated(secret: str):
    contents = {"note": secret, "longer": f"run with {secret} please", "list": [[secret]], "nested": {secret: 1}}
    cleaned, replacements = _clean(contents)
    assert cleaned == {"note": None, "longer": None, "list": [[None]], "nested": {"(a secret)": 1}}
    assert len(replacements) == 3
    assert secret not in str(replacements)


@pytest.mark.parametrize(
    "field",
    [
        "token",
        "hf_token",
        "use_auth_token",
        "wandb_api_key",
        "apiKey",
        "aws_secret_access_key",
        "password",
        "credentials",
    ],
)
def test_what_fields_for_secrets_hold_is_left_out_whatever_it_is(field: str):
    for value in ("hunter2", 12345, ["hunter2"], {"user": "hunter2"}):
        cleaned, replacements = _clean({"kwargs": {field: value}})
        assert cleaned == {"kwargs": {field: None}}
        assert "hunter2" not in str(replacements)
    for value in (None, True, False, ""):
        assert _clean({field: value}) == ({field: value}, [])


def test_accounts_are_left_out_and_fields_that_only_sound_like_secrets_are_not():
    cfg = {"wandb_entity": "alice", "training_tokens": 5, "sequence_separator_token": "bos", "begin_batch_token": "eos"}
    cleaned, replacements = _clean(cfg)
    assert cleaned == {**cfg, "wandb_entity": None}
    assert replacements == [Replacement("cfg.json: wandb_entity", "alice", None)]


def test_paths_in_keys_are_replaced_too():
    assert _clean({"/home/alice/data": {"n": 3}})[0] == {"data": {"n": 3}}


@pytest.mark.parametrize(
    "unit", ["x/", " /a b c", "a@", "https://u:", "https://h?token", "a.", "'/", "_token", "api_key", "a:", "/a -"]
)
def test_no_text_takes_long(unit: str):
    started = time.process_time()
    _clean({"note": unit * (60_000 // len(unit))})
    assert time.process_time() - started < 2


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
    st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True), min_size=2),
    st.sampled_from(["/", "~/", "C:\\", "./", "../", "s3://bucket/"]),
)
def test_no_folder_above_the_last_part_is_left(parts: list[str], root: str):
    path = root + ("\\" if root == "C:\\" else "/").join(parts)
    assert is_path(path)
    assert last_part(path) in (parts[-1], "local")
    for text in (path, f"see {path} there", f"--out={path}"):
        cleaned = str(_clean(text)[0])
        assert "/" not in cleaned
        assert "\\" not in cleaned
