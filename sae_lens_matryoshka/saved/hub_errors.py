"""What the Hugging Face Hub and the way there can answer, as one sentence that says what to do.

huggingface_hub changed its HTTP library between major versions, so transport errors are told apart by the base class
that its own errors have, not by the library's name.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.saved.checks import one_line

# httpx2.HTTPError, httpx.HTTPError or requests.RequestException, whichever huggingface_hub uses
_TRANSPORT_ERROR: type[Exception] = next(
    base for base in reversed(HfHubHTTPError.__bases__[0].__mro__) if base.__module__ != "builtins"
)


@contextmanager
def hub_errors(repo_id: str, afterwards: str = "", uploading: bool = False) -> Iterator[None]:
    """Turn errors of the Hub, of the network and of huggingface_hub's own checks into a :class:`UserError`.

    Args:
        repo_id: The repository that is asked for.
        afterwards: A sentence on the state that an error leaves behind.
        uploading: Whether files are sent, when huggingface_hub also raises plain ValueError and RuntimeError for what
            the Hub or its storage answers.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(filter(None, (_explain(cause, repo_id) for cause in causes(error))), None)
        if uploading and isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            reason = f"The Hub did not take the upload: {one_line(error)}."
        elif uploading and reason is None and isinstance(error, RuntimeError):
            # also where one thread has closed the HTTP client that the others still use, after a lost connection
            reason = f"The upload broke off ({one_line(error.__cause__ or error)}); try again."
        if reason is None:
            raise
        raise UserError(f"{reason} {afterwards}".strip()) from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from: uploads in threads wrap what happened in a RuntimeError."""
    while error is not None:
        yield error
        error = error.__cause__


def _explain(error: BaseException, repo_id: str) -> str | None:
    for kind, answer in _ANSWERS.items():
        if isinstance(error, kind):
            return answer.format(repo_id=repo_id, error=one_line(error))
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        other = "The Hub failed ({status}); try again later." if status >= 500 else _REFUSED
        return _STATUSES.get(status, other).format(repo_id=repo_id, status=status, error=one_line(error))
    if isinstance(error, (_TRANSPORT_ERROR, ConnectionError, TimeoutError)):
        if "timeout" in type(error).__name__.lower():
            return "The Hub did not answer in time; try again."
        return f"The Hub cannot be reached, or broke off ({one_line(error) or type(error).__name__}); try again."
    return None


_NO_REPOSITORY = "There is no repository {repo_id} that you may see; check the name, or log in with 'hf auth login'."
_REFUSED = "The Hub refused the request ({status}): {error}."
_CHANGED = "{repo_id} was changed by someone else meanwhile ({status}); push again."
_ANSWERS: dict[type[Exception], str] = {
    HFValidationError: "{repo_id!r} is not a repository name: {error}.",
    OfflineModeIsEnabled: "{repo_id} cannot be asked for, since HF_HUB_OFFLINE is set; unset it to use the Hub.",
    GatedRepoError: "{repo_id} is gated: accept its terms on its page on the Hub, then log in with 'hf auth login'.",
    LocalEntryNotFoundError: "The Hub cannot be reached, and the local cache does not hold what is needed of "
    "{repo_id}.",
    RevisionNotFoundError: "{repo_id} has no such revision; the Hub's page of the repository lists its branches.",
    RepositoryNotFoundError: _NO_REPOSITORY,
    EntryNotFoundError: "{repo_id} does not hold the file that is needed: {error}.",
}
"""The first that fits counts: some of them are kinds of others."""

_STATUSES = {
    401: "The Hub refused the token ({status}); log in again with 'hf auth login', or set HF_TOKEN.",
    403: "Your token does not allow that on {repo_id} ({status}); use one with the right to write there.",
    404: _NO_REPOSITORY,
    409: _CHANGED,
    412: _CHANGED,
    429: "The Hub has had too many requests ({status}); try again in some minutes.",
}
