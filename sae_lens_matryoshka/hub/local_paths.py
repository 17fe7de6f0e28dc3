"""Telling paths from other text by how they look, and what of a path may be shown: its last part.

Where something lies on a machine or in a bucket says who made it and for whom. The last part still says what was used.
"""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from sae_lens_matryoshka.hub.secret_text import without_login


def is_path(value: str) -> bool:
    """Whether a string can be nothing but the place of a file or folder, here, on another machine or in a bucket.

    Args:
        value: The whole string. Relative paths without a dot in front look like names on the Hub; see
            :mod:`hub.privacy` for those.
    """
    if "\n" in value or not value.strip():
        return False
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", value):
        return _is_private_address(value)
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith("\\\\"):
        return True
    return re.match(r"(?:file|dbfs):|(?:\.{1,2}|~[^/\\]*)(?:[/\\]|$)|[\w.-]+@[\w.-]+:\S", value) is not None


def last_part(path: str) -> str:
    """The last part of a path, or ``local`` where that would tell who someone is."""
    scheme, separator, rest = without_login(path).partition("://")
    if separator and scheme.lower() == "file":
        path = rest
    elif separator:
        path = re.split(r"[?#]", rest.lstrip("/"))[0].partition("/")[2]  # without the bucket or server
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    if parts:
        parts[-1] = re.sub(r"^([\w.-]+@[\w.-]+:)+", "", parts[-1]) or "~"  # user@server:
    if not parts or parts[-1].startswith("~") or parts[-1].endswith(":"):
        return "local"
    is_home = (len(parts) == 2 and parts[0].lower() in ("home", "users")) or parts[-1] == Path.home().name
    is_home |= len(parts) == 3 and parts[0].endswith(":") and parts[1].lower() == "users"
    return "local" if is_home else parts[-1]


def without_paths(text: str) -> str:
    """A text, such as a command line, with every path in it replaced by its last part."""
    return _EMBEDDED_PATH.sub(_replaced, text)


_BUCKET_HOSTS = (
    r"amazonaws\.com|storage\.(?:googleapis|cloud\.google)\.com|core\.windows\.net|cloudflarestorage\.com|"
    r"digitaloceanspaces\.com|backblazeb2\.com|aliyuncs\.com"
)
_INTERNAL_HOSTS = r"[^.]*|[\d.]+|\[.*|(?:.*\.)?(?:local|localdomain|internal|intranet|lan|corp|home|private)"
_PRIVATE_HOST = re.compile(rf"(?:.*\.)?(?:{_BUCKET_HOSTS})|{_INTERNAL_HOSTS}", re.IGNORECASE)

_PART = r"[^/\\\s\"'<>|]"
_MORE_WORDS = r"(?:\ [^/\\\s\"'<>|=-][^/\\\s\"'<>|=]*){0,4}"  # a folder's name may hold spaces
_FOLDERS = rf"(?:{_PART}+{_MORE_WORDS}/)"
_DATA_FILE = r"(?:jsonl?|csv|tsv|parquet|arrow|txt|pt|safetensors|ya?ml|py|sh|npz?|png|pkl|bin|ckpt|gguf)"
_EMBEDDED_PATH = re.compile(
    rf"""\bhttps?://[^\s"'<>|]*
    | (?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]+:///*{_FOLDERS}*{_PART}*
    | (?P<quote>["'])(?P<quoted>(?:~[\w.-]*|\.{{1,2}}|[A-Za-z]:|\\)?[/\\][^"'\n]*)(?P=quote)
    | \bfile:/+{_FOLDERS}*{_PART}+
    | (?<![\w./\\-])[\w.-]+@[\w.-]+:/*{_FOLDERS}*{_PART}+ # user@server:path
    | (?<![\w./\\-])~?/(?!/){_FOLDERS}+{_PART}* # /at/least/two or ~/one
    | (?<![\w./\\-])(?:~[\w.-]*|\.{{1,2}})/{_FOLDERS}*{_PART}+
    | (?<!\w)(?:[A-Za-z]:|\.{{1,2}}|\\\\{_PART}+)\\(?:{_PART}+{_MORE_WORDS}\\)*{_PART}+ # C:\... and \\server\share
    | (?<![\w./\\:@+-])(?:(?=[\w.@+-]*[A-Za-z_])[\w.@+-]+/){{2,}}[\w.@+-]+ # three/parts/and more
    | (?<![\w./\\:@+-])(?:[\w.@+-]+/)+[\w.@+-]*\.{_DATA_FILE}\b""",
    re.VERBOSE,
)


def _replaced(match: re.Match[str]) -> str:
    if match["quoted"] is not None:
        return f"{match['quote']}{last_part(match['quoted'])}{match['quote']}"
    path = match.group()
    return path if "://" in path and not _is_private_address(path) else last_part(path)


def _is_private_address(url: str) -> bool:
    """Whether a URL leads to files of someone's own: a bucket, or a server that only some can reach."""
    scheme, _, rest = without_login(url).partition("://")
    if scheme.lower() not in ("http", "https"):
        return scheme.lower() != "hf"
    host, _, port = re.split(r"[/?#]", rest)[0].partition(":")
    return bool(port) or _PRIVATE_HOST.fullmatch(host) is not None
