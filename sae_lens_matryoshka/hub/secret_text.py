"""Finding what opens doors: tokens, passwords and keys, by the name of their field or by how they look."""

import re
from typing import Any
from urllib.parse import unquote

_KEY = r"api[_-]?key|secret(?:[_-]?key)?|passw(?:or)?d|passphrase|credentials?|(?:private|access|ssh)[_-]?key"
_TOKEN = r"(?:hf|hub|huggingface|github|gitlab|wandb|auth|access|api|refresh|login|session|bearer)[_-]?token"
_SHORT = r"auth|pwd|cookie|session_?id"
_PAT = r"(?:(?:hf|hub|huggingface|github|gh|gitlab|azure|ado|git)_)?pat"
_SECRET_FIELD = re.compile(rf"token|{_PAT}|(?:\w*_)?(?:{_KEY}|{_TOKEN}|{_SHORT}|authorization|bearer|netrc)s?(?:_id)?")

_SECRET = re.compile(
    rf"""(?<![A-Za-z0-9])(?:
    hf_[A-Za-z0-9]{{20,}} | hf_(?:oauth|jwt)_[\w.-]{{8,}} | api_org_[A-Za-z0-9]{{16,}} # of the Hub
    | wandb_v1_\w{{16,}} | gh[opsur]_[A-Za-z0-9]{{20,}} | github_pat_\w{{20,}} | glpat-[\w-]{{16,}}
    | sk-(?:ant|or|proj)-[\w-]{{16,}} | sk-[A-Za-z0-9]{{20,}} | xox[abeoprs]-[\w-]{{10,}}
    | A(?:KIA|SIA)[0-9A-Z]{{16}} | AIza[\w-]{{30,}}
    | eyJ[\w-]{{8,}}\.[\w-]{{8,}}\.[\w-]+ # a JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
    | (?i:{_KEY}|{_TOKEN})["']?\s*[=:]\s*["']?[^\s"']{{4,}} # WANDB_API_KEY=...
    | (?i:--(?:{_KEY}|{_TOKEN}|{_SHORT}|{_PAT}|token))[\s=]+\S+
    | (?i:{_SHORT}|{_PAT})=["']?(?![/~.$])[^\s"']{{4,}} # PWD=/a/folder is none
    | (?i:authorization|(?:set-)?cookie)["']?:\s*["']?\S+[\s=]\S | (?i:bearer)\ (?=\S*\d)[\w.~+/-]{{12,}}
    )""",
    re.VERBOSE,
)
_HEX_KEY = r"(?<![0-9A-Za-z])[0-9a-f]{40}(?![0-9A-Za-z])"
_WANDB_KEY = re.compile(rf"(?i:wandb)(?:(?!commit|revision|sha)[^\n]){{0,60}}?(?<![@/]){_HEX_KEY}")
_WANDB_FIELD = re.compile(r"wandb(?!.*(?:commit|revision|sha)\b)", re.IGNORECASE)

_ADDRESS = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]+://[^\s\"'<>]+")
_BARE_LOGIN = re.compile(r"""(?<![\w.+:/@-])([\w.+-]+):[^\s"'<>/]+@(?!sha\d+:)(?=(?:[\w-]+\.)+[^\W\d_]|[\w.-]+:)""")
_SIGNED = re.compile(r"(?:token|key|sig|signature|secret|password|credential)\w{0,20}=", re.IGNORECASE)


def is_secret(value: Any, field: str, path: str = "") -> bool:
    """Whether a value must not be shown at all.

    Args:
        value: What stands in a config.
        field: The name of its field. What a field called ``token`` or ``wandb_api_key`` holds is a secret, whatever it
            is; so is any text with a token in it.
        path: The names of the fields around it and its own. The 40 hexadecimal digits of wandb's keys are those of a
            commit too, so that they are a key only where wandb is spoken of.
    """
    if value in (None, "", True, False):
        return False
    if _SECRET_FIELD.fullmatch(snake_case(field)):
        return True
    if not isinstance(value, str):
        return False
    if any(pattern.search(text) for text in (value, decoded(value)) for pattern in (_SECRET, _WANDB_KEY)):
        return True
    return _WANDB_FIELD.search(path) is not None and re.search(_HEX_KEY, value) is not None


def decoded(text: str) -> str:
    """A text without the percent signs of URLs, even if it has been encoded several times."""
    return unquote(re.sub(r"%(?:25)+(?=[0-9A-Fa-f]{2})", "%", text))


def snake_case(field: str) -> str:
    """The name of a field as Python spells it: ``userName`` and ``User-Name`` are ``user_name``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", field).replace("-", "_").lower()


def without_login(text: str) -> str:
    """A text with web addresses without account, password and signature, which give access to what lies there.

    Of ``user:password@server`` without a scheme only the password goes: ``user@server:`` is the beginning of a path.
    """
    return _BARE_LOGIN.sub(r"\1@", _ADDRESS.sub(_without_login, text))


def _without_login(match: re.Match[str]) -> str:
    scheme, _, rest = match.group().partition("://")
    server = re.split(r"[/?#]", rest)[0]
    if "@" in server:
        rest = rest[server.rindex("@") + 1 :]
    elif re.search(r":(?!\d*$)", server):  # a password with a slash in it
        rest = rest.rpartition("@")[2]
    address, _, query = rest.partition("?")
    return f"{scheme}://{address if _SIGNED.search(query) else rest}"
