"""Paths, accounts and secrets are found wherever they stand in a config, and nothing else is changed."""

import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.local_paths import is_path, last_part
from sae_lens_matryoshka.hub.privacy import PrivacyFilter, Replacement
from sae_lens_matryoshka.hub.secret_text import without_login


def _clean(value: Any, field: str = "cfg.json: ") -> tuple[Any, list[Replacement]]:
    privacy = PrivacyFilter()
    return privacy.contents(value, field), privacy.replacements


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("/home/alice/models/gemma", "gemma"),
        ("/home/alice/my models/gemma 2", "gemma 2"),
        ("/models/gemma/", "gemma"),
        ("/data/models/gemma", "gemma"),
        ("/scratch/alice.jsonl", "alice.jsonl"),
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
        ("/nfs/home/alice", "local"),
        ("/export/home/alice", "local"),
        ("/mnt/users/alice", "local"),
        ("/mnt/c/Users/alice", "local"),
        ("/home2/alice/", "local"),
        ("/scratch/alice", "local"),
        ("/lustre/scratch/alice", "local"),
        ("/data/alice", "local"),
        ("/afs/cern.ch/user/a/alice", "local"),
        ("/home/alice/models/alice", "local"),
        ("C:\\Documents and Settings\\alice", "local"),
        ("\\\\server\\alice", "local"),
        ("s3://bucket/users/alice", "local"),
        ("alice@server:8080", "local"),
        ("alice@example.org:hunter2", "local"),
        ("%2Fhome%2Falice%2Fgemma", "gemma"),
        ("%252Fhome%252Falice%252Fgemma", "gemma"),
        ("C%3A%5CUsers%5Calice", "local"),
        ("~", "local"),
        ("~alice", "local"),
        ("/", "local"),
        ("..", "local"),
    ],
)
def test_a_path_is_replaced_by_its_last_part(value: str, published: str):
    cleaned, replacements = _clean({"metadata": {"model_name": value}})
    assert cleaned == {"metadata": {"model_name": published}}
    (replacement,) = replacements
    assert (replacement.field, replacement.published) == ("cfg.json: metadata.model_name", published)
    assert replacement.value in (value, f"{without_login(value)} (with a login)")


@pytest.mark.parametrize(
    "value",
    [
        "google/gemma-2-2b", "gpt2", "blocks.12.hook_resid_post", "roneneldan/TinyStories", "and/or", "n/a", "",
        "https://huggingface.co/google/gemma-2-2b", "hf://datasets/a/b", "cpu", "cuda:0", "24/02/2025", "a/b\0",
        "a / b", "v1.2.3", "3/4 of it", "bos", "lr=1e-3/2", "6.54.12", "https://medium.com/@alice/post",
        "gemma-2-2b/12-res-16k", "a" * 40, "hf_transfer", "token", "passwords are bad",
        "by the author of TinyStories", "user: hello", "user=5", "cookies are nice", "the bearer of good news",
        "precision@10", "@torch.no_grad", "sae-lens@6.54.1", "python:3.11@sha256:0123abcd", "100%25 of 3%2F4",
        "https://huggingface.co/a%2Fb", "wandb at commit " + "0123456789" * 4, "W @ x.mean", "auth: none",
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
        ("ask alice.b+c@uni.example.org, please", "ask (an e-mail address), please"),
        ("ask alice%40example.org, please", "ask (an e-mail address), please"),
        ("via ALICE:pa@ss@proxy.example:80 on", "via local on"),
        ("via ALICE:secret@proxy.example on", "via (an e-mail address) on"),
        ("rsync alice:secret@cluster:models/x .", "rsync x ."),
        ("HOME=/nfs/home/alice USER=alice run -q", "HOME=local USER=(an account) run -q"),
        ("run --wandb_entity alice --user=alice -q", "run --wandb_entity (an account) --user=(an account) -q"),
        ("see %2Fhome%2Falice%2Fx now", "see x now"),
        ("https://huggingface.co/a/b?path=%2Fhome%2Falice%2Fx", "https://huggingface.co/a/b?path=x"),
        ("https%3A%2F%2Falice%3Asecret%40example.org%2Fx", "https://example.org/x"),
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


def test_what_training_has_recorded_is_about_names_not_about_folders():
    metadata = {"model_name": "a/b", "model_from_pretrained_kwargs": {"cache_dir": "alice/c", "tokenizer": "a/c"}}
    privacy = PrivacyFilter({**metadata, "local_paths": []})
    kwargs = {"cache_dir": "c", "tokenizer": "a/c"}
    assert privacy.contents(metadata, "") == {"model_name": "a/b", "model_from_pretrained_kwargs": kwargs}


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


def test_paths_in_keys_are_replaced_too():
    assert _clean({"/home/alice/data": {"n": 3}})[0] == {"data": {"n": 3}}


@pytest.mark.parametrize(
    "unit",
    [
        "x/", " /a b c", "a@", "https://u:", "https://h?token", "a.", "'/", "_token", "api_key", "a:", "/a -", "%2F",
        "%25", "a%40b.", "wandb ", "a" * 40 + " ", "user=", "a@b.", "a:b@", "--user ", "user_", "bearer a",
    ],
)  # fmt: skip
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


@given(
    st.lists(st.sampled_from(["home", "nfs", "mnt", "c", "data", "x1"]), max_size=3),
    st.sampled_from(["home", "Users", "users", "home2", "scratch"]),
    st.from_regex(r"[a-z][a-z0-9._-]{1,8}[a-z0-9]", fullmatch=True),
    st.sampled_from(["{}", "see {} there", "--out={}", "'{}'"]),
    st.booleans(),
)
def test_no_home_folder_tells_whose_it_is(above: list[str], homes: str, person: str, text: str, encoded: bool):
    path = "/" + "/".join([*above, homes, f"qz{person}"])  # qz: in none of the other words
    cleaned = str(_clean([text.format(quote(path, safe="") if encoded else path)])[0])
    assert "qz" not in cleaned or re.search(
        r"\.(py|sh|pt|txt|csv|tsv|bin|png|npz?|pkl|ya?ml|jsonl?|ckpt|gguf)\b", person
    )


@given(st.text("a1@:.%2F5C40/\\= -user'"))
def test_texts_of_the_characters_that_matter_are_cleaned_once_and_for_all(text: str):
    cleaned, _ = _clean([text])
    assert _clean(cleaned) == (cleaned, [])
