"""Publishing SAEs on the Hugging Face Hub in one commit.

The data's way: folder -> SAEs, checked and loaded once (:mod:`saved_saes`) -> files and what the card says
(:mod:`upload_plan`) -> the repository as it is now, with its card -> one commit on top of exactly that state. What can
be wrong on this machine is found before the Hub is asked for anything; until the commit the repository stays as it was.
"""

import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session, validate_repo_id

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.model_card import check_license, render_card
from sae_lens_matryoshka.hub.privacy import Replacement
from sae_lens_matryoshka.hub.saved_saes import check_sae_id, find_saved_saes
from sae_lens_matryoshka.hub.upload_plan import UploadPlan, keep_what_stays, plan_upload
from sae_lens_matryoshka.saved.hub_errors import causes, hub_errors

CARD_FILENAME = "README.md"


@dataclass(frozen=True)
class Push:
    """What a push writes, or would write."""

    repo_id: str

    revision: str | None
    """The branch; None for the main one."""

    sae_ids: list[str]
    """The SAEs, by id."""

    files: dict[str, int]
    """Bytes of every file, by path in the repository."""

    levels_size: int
    """Bytes that publishing levels as SAEs of their own adds."""

    obsolete: list[str]
    """Files of an earlier push of the same SAEs that are removed, since they are of no use with these."""

    replacements: list[Replacement]
    """What is published otherwise than it stands on disk."""

    card: str

    new_repository: bool
    """Whether the repository does not exist yet."""

    note: str = ""
    """Why a dry run could not look at the repository."""

    url: str | None = None
    """Where the commit is shown; None before it is made."""

    changed: bool = True
    """Whether there was anything to commit; pushing the same again changes nothing."""


@dataclass(frozen=True)
class _Repository:
    """A repository as it is before a push."""

    commit: str | None
    """Its last commit; None where there is no repository."""

    files: dict[str, str | None]
    """The SHA-256 of every file by path, where the Hub tells it: of weights and figures."""

    card: str | None
    new_branch: bool = False
    note: str = ""


def push_to_hub(
    path: str | Path,
    repo_id: str,
    sae_id: str | None = None,
    *,
    private: bool = False,
    revision: str | None = None,
    results: str | Path | None = None,
    levels: bool = False,
    hub_names: Collection[str] = (),
    license: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    show: Callable[[Push], None] | None = None,
    timeout: float = 120.0,
) -> Push:
    """Publish a saved SAE, or a folder of them, with a model card, in one commit.

    The repository is made if it does not exist; after an interruption it stays, empty. What an earlier push of the same
    SAEs has written is replaced; results, and levels of the same weights, stay where this push has none. The rest of
    the repository is left as it is.

    Args:
        path: A folder that SAELens or this plugin has saved, or a folder of such folders.
        repo_id: The repository, ``user/name``.
        sae_id: The id of a single SAE; None takes its hook's name, or its folder's where it has no hook. SAEs of a
            folder of folders are called by their paths in it.
        private: Whether a new repository is private.
        revision: The branch to publish on, made if it does not exist; None means the main one.
        results: A folder with benchmark results, ``results.csv`` and PNG figures, to show in the card.
        levels: Whether to publish each level as an SAE of its own too.
        hub_names: Names of models and data sets that are on the Hub, for SAEs that do not record it; other names that
            no table knows are taken for paths, see :mod:`hub.privacy`.
        license: The weights' licence for the card, one of the Hub's identifiers such as ``apache-2.0``. It is yours to
            choose; None leaves what the card says, which for a new one is nothing.
        dry_run: Whether to only return what would be written; the repository is read if it can be reached.
        token: The Hub token; None takes the one that was logged in with.
        show: Called with what will be written before anything is.
        timeout: Seconds to wait for an answer of the Hub, each time. Before version 1, huggingface_hub waits for ever.

    Raises:
        UserError: If there is nothing to publish at ``path`` or it is damaged, a name, id or licence is not possible,
            the card names another licence, there is no token, or the Hub refuses, fails or cannot be reached. The
            repository is then as it was.
    """
    _check_names(repo_id, sae_id, revision)
    if license is not None:
        check_license(license)
    token = token or get_token()
    if token is None and not dry_run:
        raise UserError("There is no Hugging Face token: log in with 'hf auth login', or set HF_TOKEN.")
    saes = find_saved_saes(path, sae_id, hub_names)
    with tempfile.TemporaryDirectory(prefix="sae-lens-matryoshka-") as scratch:
        plan = plan_upload(saes, Path(scratch), levels, results)
        api = HfApi(token=token)
        with _answers_within(timeout):
            repository = _look_at(api, repo_id, revision, private, dry_run, timeout)
            push = _describe(plan, repo_id, revision, repository, license)
            if show is not None:
                show(push)
            return push if dry_run else _commit(api, plan, push, repository, private)


def _check_names(repo_id: str, sae_id: str | None, revision: str | None) -> None:
    with hub_errors(repo_id):
        validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} must name its owner too, as user/{repo_id or 'name'}; SAELens loads by that.")
    if sae_id is not None:
        check_sae_id(sae_id)
    if revision == "":
        raise UserError("The revision is empty; leave it out for the main branch.")


def _look_at(
    api: HfApi, repo_id: str, revision: str | None, private: bool, dry_run: bool, timeout: float
) -> _Repository:
    """Read the commit, the files and the card that a push goes on top of. Nothing is written."""
    try:
        with hub_errors(repo_id, "" if dry_run else "Nothing was published."):
            return _read_repository(api, repo_id, revision, private, timeout)
    except UserError as error:
        if not dry_run:
            raise
        return _Repository(None, {}, None, note=f"The repository was not looked at: {error}")


def _read_repository(api: HfApi, repo_id: str, revision: str | None, private: bool, timeout: float) -> _Repository:
    new_branch = False
    try:
        info = api.model_info(repo_id, revision=revision, timeout=timeout, files_metadata=True)
    except RevisionNotFoundError:  # the branch is made from the main one
        new_branch = True
        info = api.model_info(repo_id, timeout=timeout, files_metadata=True)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise
        return _Repository(None, {}, None, new_branch=revision is not None)
    if private and not info.private:
        raise UserError(f"{repo_id} exists and is public; make it private in its settings first, or leave out private.")
    files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}
    card = None
    if CARD_FILENAME in files:
        downloaded = api.hf_hub_download(repo_id, CARD_FILENAME, revision=info.sha)
        try:
            card = Path(downloaded).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"The {CARD_FILENAME} of {repo_id} is not UTF-8 text; mend it first.") from error
    return _Repository(info.sha, files, card, new_branch)


def _describe(
    plan: UploadPlan, repo_id: str, revision: str | None, repository: _Repository, license: str | None
) -> Push:
    obsolete = keep_what_stays(plan, repository.files, repository.card)
    card = render_card(repository.card, repo_id, plan.entries, revision, license)
    return Push(
        repo_id=repo_id,
        revision=revision,
        sae_ids=[entry.sae_id for entry in plan.entries],
        files={**{path: plan.size(path) for path in plan.files}, CARD_FILENAME: len(card.encode())},
        levels_size=plan.levels_size,
        obsolete=obsolete,
        replacements=plan.replacements,
        card=card,
        new_repository=repository.commit is None and not repository.note,
        note=repository.note,
    )


def _commit(api: HfApi, plan: UploadPlan, push: Push, repository: _Repository, private: bool) -> Push:
    contents = {**plan.files, CARD_FILENAME: push.card.encode()}
    operations = [
        *(CommitOperationAdd(path, content) for path, content in contents.items()),
        *(CommitOperationDelete(path) for path in push.obsolete),
    ]
    parent = repository.commit
    with hub_errors(push.repo_id, "Nothing was published."):
        if parent is None:
            api.create_repo(push.repo_id, private=private)
            parent = api.model_info(push.repo_id).sha
        if repository.new_branch and push.revision is not None:
            api.create_branch(push.repo_id, branch=push.revision)
    try:
        with hub_errors(push.repo_id, uploading=True):
            commit = api.create_commit(
                push.repo_id,
                operations,
                commit_message=f"Publish {', '.join(push.sae_ids[:3])}{' and more' if len(push.sae_ids) > 3 else ''}",
                revision=push.revision,
                parent_commit=parent,
            )
    except UserError as error:
        raise UserError(f"{error} {_state_after(error)}") from error
    return replace(push, url=commit.commit_url, changed=commit.oid != parent)


def _state_after(error: BaseException) -> str:
    """What a failed upload or commit has left behind, as far as that is known."""
    for cause in causes(error):
        refused = isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500
        if refused or isinstance(cause, RuntimeError):  # the latter is huggingface_hub's for uploads of large files
            return "Nothing was published; pushing again goes on from what was uploaded."
    return "The commit is made whole or not at all; push again to be sure."


@contextmanager
def _answers_within(seconds: float) -> Iterator[None]:
    """Let no request wait for ever: huggingface_hub 1 and later give uploads and commits no time limit."""
    session = get_session()
    if not hasattr(session, "timeout"):  # before version 1, built on requests
        yield
        return
    previous = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = previous
