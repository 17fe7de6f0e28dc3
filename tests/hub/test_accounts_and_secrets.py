"""Secrets, and who made something on which machine, are found by the names of fields and by how they look."""

import re
from typing import Any

import pytest

from sae_lens_matryoshka.hub.privacy import PrivacyFilter, Replacement


def _clean(value: Any, field: str = "cfg.json: ") -> tuple[Any, list[Replacement]]:
    privacy = PrivacyFilter()
    return privacy.contents(value, field), privacy.replacements


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "x" * 34, "hf_oauth_eyJhbGciOiJ.eyJzdWIi.abc-_d", "hf_jwt_eyJhbGciOiJFZERT", "api_org_" + "x" * 34,
        "github_pat_" + "1x" * 20, "ghp_" + "x" * 36, "sk-ant-api03-" + "x" * 30, "AKIA" + "A1B2C3D4" * 2,
        "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJ", "WANDB_API_KEY=0123abcd", "--password hunter2", "password: hunter2",
        "-----BEGIN OPENSSH PRIVATE KEY-----", "pwd=hunter2", "--pat hunter2", "--auth hunter2", "Cookie: id=hunter2",
        "Authorization: Basic aHVudGVyMg==", "Bearer hunter2hunter2",
        "wandb login " + "0123456789abcdef" * 2 + "01234567",
        "WANDB_API_KEY%3D0123abcd",
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
        "auth",
        "proxy_auth",
        "pat",
        "github_pat",
        "pwd",
        "cookie",
        "cookies",
        "X-Api-Key",
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


@pytest.mark.parametrize(
    "field",
    [
        "user", "username", "userName", "git_user", "author", "authors", "login", "email", "git_email", "owner",
        "account", "created_by", "host", "hostname", "host-name", "node_name", "wandb_username", "ip_address",
    ],
)  # fmt: skip
def test_fields_for_persons_and_machines_are_left_out_whatever_they_hold(field: str):
    for value in ("alice", ["alice"], {"name": "alice", "password": "hunter2"}, "alice:hunter2"):
        cleaned, replacements = _clean({"metadata": {field: value}})
        assert cleaned == {"metadata": {field: None}}
        assert "hunter2" not in str(replacements)


def test_counts_and_fields_that_only_sound_like_accounts_stay():
    cfg = {
        "num_users": 3,
        "users": 3,
        "named_entity": "x",
        "author_note": "x",
        "guid": "x",
        "pattern": "x",
        "host": True,
    }
    assert _clean({"metadata": cfg}) == ({"metadata": cfg}, [])
    assert _clean({"user_id": 48211, "uid": 1000})[0] == {"user_id": None, "uid": None}


def test_forty_hexadecimal_digits_are_a_key_only_where_wandb_is_spoken_of():
    digits = "0123456789" * 4
    wandb = {"key": digits, "list": [digits], "git": {"commit": digits}, "run": "a1"}
    cleaned, replacements = _clean({"revision": digits, "wandb": wandb, "wandb_login": digits})
    kept = {"key": None, "list": [None], "git": {"commit": digits}, "run": "a1"}
    assert cleaned == {"revision": digits, "wandb": kept, "wandb_login": None}
    assert digits not in str(replacements)


@pytest.mark.parametrize(
    "value",
    ["ALICE:hunter2@proxy.example:80", "ALICE:hunter@2@proxy", "http://ALICE:hunter2@proxy:80", "proxy.example:80"],
)
def test_of_a_proxy_neither_login_nor_server_is_published(value: str):
    cleaned, replacements = _clean({"proxy": value, "proxies": {"https": value}})
    assert cleaned == {"proxy": "local", "proxies": {"https": "local"}}
    assert not re.search("hunter2|ALICE:", str(replacements))
