"""What goes wrong with the Hub or on the way there: one sentence each, and the repository as it was or complete."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import _http

from sae_lens_matryoshka import hub
from sae_lens_matryoshka.cli.command_line import main
from sae_lens_matryoshka.errors import UserError
from tests.hub.conftest import save_trained_sae
from tests.hub.local_hub import STRANGER_TOKEN, Fault, LocalHub

ID = "blocks.2.hook_resid_post"
COMMIT = "POST /api/models/owner/saes/commit"
INFO = "GET /api/models/owner/saes$"
STORAGE = "PUT /storage"


def _push_fails(local_hub: LocalHub, saved_sae: Path, message: str, **options: object) -> None:
    """Push, and check that the error is one sentence and the repository as it was."""
    before = {name: dict(repository.branches) for name, repository in local_hub.repositories.items()}
    with pytest.raises(UserError, match=message) as error:
        hub.push_to_hub(saved_sae, "owner/saes", levels=True, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert {name: dict(repository.branches) for name, repository in local_hub.repositories.items()} == before


@pytest.fixture
def filled_hub(local_hub: LocalHub) -> LocalHub:
    """A Hub where the repository exists, with a card."""
    local_hub.create("owner/saes", {"README.md": b"---\nlicense: mit\n---\n\nMine.\n"})
    return local_hub


def test_no_token(filled_hub: LocalHub, saved_sae: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    _push_fails(filled_hub, saved_sae, "There is no Hugging Face token: log in with 'hf auth login'")
    assert filled_hub.requests == []


def test_a_token_that_the_hub_does_not_know(filled_hub: LocalHub, saved_sae: Path):
    _push_fails(filled_hub, saved_sae, r"The Hub refused the token \(401\).* Nothing was published", token="hf_stale")


def test_no_right_to_write(filled_hub: LocalHub, saved_sae: Path):
    _push_fails(
        filled_hub, saved_sae, r"does not allow that on owner/saes \(403\).* Nothing was pub", token=STRANGER_TOKEN
    )


def test_no_right_to_make_the_repository(local_hub: LocalHub, saved_sae: Path):
    _push_fails(local_hub, saved_sae, r"does not allow that on owner/saes \(403\)", token=STRANGER_TOKEN)


def test_a_private_repository_of_someone_else_looks_like_none(local_hub: LocalHub, saved_sae: Path):
    local_hub.create("owner/saes", private=True)
    _push_fails(local_hub, saved_sae, r"\(403\)", token=STRANGER_TOKEN)


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        (INFO, 500, r"The Hub failed \(500\); try again later. Nothing was published."),
        (INFO, 503, r"The Hub failed \(503\)"),
        (INFO, 429, r"too many requests \(429\)"),
        (COMMIT, 401, r"The Hub refused the token \(401\).*Nothing was published"),
        (COMMIT, 403, r"does not allow that on owner/saes \(403\).*Nothing was published"),
        (COMMIT, 404, r"There is no repository owner/saes that you may see.*Nothing was published"),
        (COMMIT, 413, r"The Hub refused the request \(413\).*Nothing was published"),
        (COMMIT, 500, r"The Hub failed \(500\).*made whole or not at all; push again"),
        ("POST /api/validate-yaml", 400, r"The Hub did not take the upload: Invalid metadata in README.md"),
        ("POST /api/validate-yaml", 500, r"The Hub failed \(500\)"),
        (STORAGE, 403, r"\(403\).*Nothing was published"),
    ],
)
def test_the_hub_refuses_or_fails(filled_hub: LocalHub, saved_sae: Path, pattern: str, status: int, message: str):
    filled_hub.faults = [Fault(pattern, status)]
    _push_fails(filled_hub, saved_sae, message)
    filled_hub.faults = []
    hub.push_to_hub(saved_sae, "owner/saes", levels=True)
    assert hub.load("owner/saes", ID).widths == [3, 8, 20]


@pytest.fixture
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries as often as ever, but waits a twentieth of the time in between, which is half a minute else."""
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 20)))


@pytest.mark.usefixtures("_quick_retries")
def test_the_storage_fails_again_and_again(filled_hub: LocalHub, saved_sae: Path):
    filled_hub.faults = [Fault(STORAGE, 500)]
    _push_fails(filled_hub, saved_sae, r"The Hub failed \(500\).*Nothing was published")
    assert sum(request.startswith("PUT") for request in filled_hub.requests) >= 6  # the client tries six times


@pytest.mark.usefixtures("_quick_retries")
def test_the_server_dies_while_a_file_is_sent_and_the_next_push_goes_on(filled_hub: LocalHub, saved_sae: Path):
    filled_hub.faults = [Fault(STORAGE, dies=True)]
    _push_fails(filled_hub, saved_sae, r"(cannot be reached, or broke off|upload broke off) .*Nothing was published")
    assert set(filled_hub.repositories["owner/saes"].files()) == {".gitattributes", "README.md"}
    filled_hub.faults = []
    filled_hub.start()
    assert hub.push_to_hub(saved_sae, "owner/saes", levels=True).changed
    assert hub.load("owner/saes", ID).widths == [3, 8, 20]


def test_the_server_dies_at_the_commit(filled_hub: LocalHub, saved_sae: Path):
    filled_hub.faults = [Fault(COMMIT, dies=True)]
    _push_fails(filled_hub, saved_sae, "The Hub cannot be reached, or broke off.*made whole or not at all")
    filled_hub.faults = []
    filled_hub.start()
    sent = filled_hub.uploads
    hub.push_to_hub(saved_sae, "owner/saes", levels=True)
    assert filled_hub.uploads == sent  # everything had been uploaded before
    assert hub.load("owner/saes", ID).widths == [3, 8, 20]


def test_no_server(filled_hub: LocalHub, saved_sae: Path):
    filled_hub.stop()
    _push_fails(filled_hub, saved_sae, "The Hub cannot be reached, or broke off.*Nothing was published")


@pytest.mark.parametrize("pattern", [INFO, COMMIT, "POST /api/validate-yaml"])
def test_a_slow_server_is_not_waited_for_for_ever(filled_hub: LocalHub, saved_sae: Path, pattern: str):
    filled_hub.faults = [Fault(pattern, 500, delay=3.0)]
    started = time.monotonic()
    _push_fails(filled_hub, saved_sae, "The Hub did not answer in time", timeout=0.5)
    assert time.monotonic() - started < 3


def test_someone_else_commits_meanwhile(filled_hub: LocalHub, saved_sae: Path):
    """Their change of the card would be lost if the commit went on top of it."""

    def interfere(push: hub.Push) -> None:
        repository = filled_hub.repositories["owner/saes"]
        repository.commit("main", {**repository.files(), "README.md": b"theirs"}, "theirs")

    with pytest.raises(UserError, match=r"changed by someone else meanwhile.*Nothing was published"):
        hub.push_to_hub(saved_sae, "owner/saes", show=interfere)
    assert filled_hub.repositories["owner/saes"].files()["README.md"] == b"theirs"


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (b"---\nlicense: [\n---\n", "front matter of the README.md of owner/saes is not valid"),
        (b"---\n- a\n---\n", "front matter of the README.md of owner/saes is not valid"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"x <!-- sae-lens-matryoshka:begin --> y", "once each and in this order"),
        (b"<!-- sae-lens-matryoshka:end --> <!-- sae-lens-matryoshka:begin -->", "once each and in this order"),
    ],
)
def test_a_card_that_cannot_be_kept_is_not_replaced(local_hub: LocalHub, saved_sae: Path, card: bytes, message: str):
    local_hub.create("owner/saes", {"README.md": card})
    _push_fails(local_hub, saved_sae, message)


def test_ctrl_c_while_files_are_sent(filled_hub: LocalHub, saved_sae: Path, hub_environment: dict[str, str]):
    filled_hub.faults = [Fault(STORAGE, delay=2.0)]
    command = [sys.executable, "-m", "sae_lens_matryoshka", "push", str(saved_sae), "owner/saes"]
    process = subprocess.Popen(command, env=hub_environment, stderr=subprocess.PIPE, text=True)
    while not any(request.startswith("PUT") for request in filled_hub.requests):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert len(filled_hub.repositories["owner/saes"].commits) == 1


def test_the_command_line_says_it_in_one_line(
    filled_hub: LocalHub, saved_sae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["push", str(saved_sae), "owner/saes", "--dry-run", "--levels"]) == 0
    printed = capsys.readouterr().out
    assert "Mine." in printed
    assert f"{ID}/level_0_width_3/sae_weights.safetensors" in printed
    assert "Levels as SAEs of their own add" in printed
    assert "is published as 'tiny-model'" in printed
    assert "hf_aaa" not in printed
    assert main(["push", str(saved_sae), "owner/saes"]) == 0
    assert f"Published {ID}: {filled_hub.endpoint}/owner/saes/commit/" in capsys.readouterr().out
    assert main(["push", str(saved_sae), "owner/saes"]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert main(["inspect", "owner/saes", "--id", ID]) == 0
    capsys.readouterr()

    cfg = json.loads((saved_sae / "cfg.json").read_text())
    cfg["metadata"]["dataset_path"] = "someone/text"
    del cfg["metadata"]["local_paths"]
    (saved_sae / "cfg.json").write_text(json.dumps(cfg))
    assert main(["push", str(saved_sae), "owner/saes", "--dry-run"]) == 0
    hint = "'someone/text' is published as 'text'; if it is a name on the Hub, add --hub-name someone/text."
    assert hint in capsys.readouterr().out
    assert main(["push", str(saved_sae), "owner/saes", "--dry-run", "--hub-name", "someone/text"]) == 0
    assert "| data set | someone/text |" in capsys.readouterr().out

    save_trained_sae(saved_sae, tmp_path, seed=1)
    filled_hub.faults = [Fault(COMMIT, 403)]
    for arguments in (["owner/saes"], ["owner/saes", "--id", "../up"], ["saes"], ["owner/saes", "--results", "no"]):
        assert main(["push", str(saved_sae), *arguments]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
