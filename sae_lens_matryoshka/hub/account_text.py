"""Finding who made something and on which machine, by the name of a field or by how a text looks."""

import re
from typing import Any

from sae_lens_matryoshka.hub.secret_text import snake_case

_PERSON = r"user|user_?names?|logname|login|author|maintainer|owner|account|e_?mail|contact"
_MACHINE = r"host|host_?name|node_?name|node_?list|fqdn|(?:computer|machine)_?name|(?:ip|mac)(?:_?addr(?:ess)?)?"
_BY = r"(?:created|made|trained|run|submitted|uploaded|pushed|written|owned)_by"
_ACCOUNT = rf"(?:\w+_)?(?:(?:{_PERSON})(?:_(?:name|id|e_?mail|handle))?s?|{_BY})|(?:wandb_)?entity|uid"
_MACHINE_FIELD = rf"(?:\w+_)?(?:{_MACHINE})s?|master_addr(?:ess)?"
_ACCOUNT_FIELD = re.compile(rf"{_ACCOUNT}|{_MACHINE_FIELD}")
_NUMBERED_FIELD = re.compile(r"(?:\w+_)?account|\w*id")

_SERVER_FIELD = re.compile(r"(?:\w+_)?(?:prox(?:y|ies)|https?|server|endpoint|addr(?:ess)?)")
_SERVER = re.compile(r"\S*@\S+|[\w.-]+:\d+/?")

_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]+@(?:[\w-]+\.)+[^\W\d_]{2,}(?![\w@])")

_OPTION = r"user|user_?name|logname|author|e_?mail|host_?name|(?:wandb_)?entity"
_ACCOUNT_OPTION = re.compile(
    rf"""(?P<option>(?<![^\W_])(?:{_OPTION})(?:=["']?|["']\s*[:=]\s*["'])|(?<!\S)--(?:\w+[_-])?(?:{_OPTION})[ =]["']?)
    (?!\d+\b|(?:None|null|true|false)\b)[^\s"'(&,;=-][^\s"'&,;]*""",
    re.VERBOSE | re.IGNORECASE,
)


def is_account(value: Any, field: str) -> bool:
    """Whether a value says who someone is or which machine was used, by the name of its field.

    Args:
        value: What stands in a config. Numbers are counts, unless the field asks for an id.
        field: The name of its field, such as ``author`` or ``wandb_username``.
    """
    if value in (None, "", True, False, [], {}):
        return False
    field = snake_case(field)
    if not isinstance(value, (str, list, dict)) and not _NUMBERED_FIELD.fullmatch(field):
        return False
    return _ACCOUNT_FIELD.fullmatch(field) is not None


def is_server(value: str, field: str) -> bool:
    """Whether a string is a server without a scheme, such as ``proxy.example:80``, in a field for servers."""
    return _SERVER_FIELD.fullmatch(snake_case(field)) is not None and _SERVER.fullmatch(value) is not None


def without_accounts(text: str) -> str:
    """A text without e-mail addresses and without what options such as ``--user`` and ``USER=`` name."""
    return _ACCOUNT_OPTION.sub(r"\g<option>(an account)", _EMAIL.sub("(an e-mail address)", text))
