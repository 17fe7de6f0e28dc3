"""Finding what opens doors: tokens, passwords and keys, by the name of their field or by how they look."""

import re
from typing import Any

_KEY = r"api[_-]?key|secret(?:[_-]?key)?|passw(?:or)?d|passphrase|credentials?|(?:private|access)[_-]?key"
_TOKEN = r"(?:hf|hub|huggingface|github|wandb|auth|access|api|refresh|login)_?token"
_SECRET_FIELD = re.compile(rf"token|authorization|bearer|(?:\w*_)?(?:{_KEY}|{_TOKEN})(?:_id)?", re.IGNORECASE)

_SECRET = re.compile(
    rf"""(?<![A-Za-z0-9])(?:
    hf_[A-Za-z0-9]{{20,}} | hf_(?:oauth|jwt)_[\w.-]{{8,}} | api_org_[A-Za-z0-9]{{16,}} # of the Hub
    | wandb_v1_\w{{16,}} | gh[opsur]_[A-Za-z0-9]{{20,}} | github_pat_\w{{20,}} | glpat-[\w-]{{16,}}
    | sk-(?:ant|or|proj)-[\w-]{{16,}} | sk-[A-Za-z0-9]{{20,}} | xox[abeoprs]-[\w-]{{10,}}
    | A(?:KIA|SIA)[0-9A-Z]{{16}} | AIza[\w-]{{30,}}
    | eyJ[\w-]{{8,}}\.[\w-]{{8,}}\.[\w-]+ # a JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
    | (?i:{_KEY}|{_TOKEN})["']?\s*[=:]\s*["']?[^\s"']{{4,}} # WANDB_API_KEY=...
    | (?i:--(?:{_KEY}|{_TOKEN}|token))[\s=]+\S+
    )""",
    re.VERBOSE,
)

_ADDRESS = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]+://[^\s\"'<>]+")
_SIGNED = re.compile(r"(?:token|key|sig|signature|secret|password|credential)\w{0,20}=", re.IGNORECASE)


def is_secret(value: Any, field: str) -> bool:
    """Whether a value must not be shown at all.

    Args:
        value: What stands in a config.
        field: The name of its field. What a field called ``token`` or ``wandb_api_key`` holds is a secret, whatever it
            is; so is any text with a token in it.
    """
    if value in (None, "", True, False):
        return False
    if _SECRET_FIELD.fullmatch(field):
        return True
    return isinstance(value, str) and _SECRET.search(value) is not None


def without_login(text: str) -> str:
    """Web addresses without account, password and signature, which give access to what lies there."""
    return _ADDRESS.sub(_without_login, text)


def _without_login(match: re.Match[str]) -> str:
    scheme, _, rest = match.group().partition("://")
    server = re.split(r"[/?#]", rest)[0]
    if "@" in server:
        rest = rest[server.rindex("@") + 1 :]
    elif re.search(r":(?!\d*$)", server):  # a password with a slash in it
        rest = rest.rpartition("@")[2]
    address, _, query = rest.partition("?")
    return f"{scheme}://{address if _SIGNED.search(query) else rest}"
