"""Telling paths from other text by how they look, and what of a path may be shown: its last part.

Where something lies on a machine or in a bucket says who made it and for whom. The last part still says what was used.
"""

import itertools
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from sae_lens_matryoshka.hub.secret_text import decoded, without_login


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
    return re.match(r"(?:file|dbfs):|(?:\.{1,2}|~[^/\\]*)(?:[/\\]|$)|" + _REMOTE + r"\S", value) is not None


def last_part(path: str) -> str:
    """The last part of a path, or ``local`` where that would tell who someone is."""
    scheme, separator, rest = without_login(path).partition("://")
    is_bucket = bool(separator) and scheme.lower() != "file"
    if is_bucket:
        path = re.split(r"[?#]", rest.lstrip("/"))[0].partition("/")[2]  # without the bucket or server
    else:
        path = rest if separator else scheme
        if re.fullmatch(rf"{_REMOTE}[^/\\]*", path):  # a port, a password or a folder
            return "local"
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    if parts:
        parts[-1] = re.sub(rf"^(?:{_REMOTE})+", "", parts[-1]) or "~"
    if not parts or parts[-1].startswith("~") or parts[-1].endswith(":"):
        return "local"
    return "local" if _is_persons(parts, path) else parts[-1]


def _is_persons(parts: list[str], path: str) -> bool:
    """Whether the last part of a path is the name of a person, whose folder it is."""
    name = parts[-1].strip(".,;:()")
    if name == Path.home().name:
        return True
    people = {person for above, person in itertools.pairwise(parts[:-1]) if _HOMES.fullmatch(above)}
    if name in people:
        return True
    if len(parts) < 2 or re.search(rf"\.{_DATA_FILE}$", name):
        return False
    is_on_shelf = parts[-2].lower() == name[:1].lower()  # /afs/cern.ch/user/j/jane
    is_whole_disk = len(parts) == 2 and path.startswith(("/", "\\"))
    is_shared = is_whole_disk and (path.startswith("\\\\") or _DISKS.fullmatch(parts[0]) is not None)
    return is_on_shelf or is_shared or _HOMES.fullmatch(parts[-2]) is not None


def without_encoded_paths(text: str, clean: Callable[[str], str]) -> str:
    """A text in which what is written as in URLs (``%2Fhome%2Falice``) and is not to be shown is replaced.

    Args:
        text: The text; nothing else of it is changed.
        clean: Takes from decoded text what is not to be shown.
    """

    def replaced(match: re.Match[str]) -> str:
        if not _ENCODED.search(match.group()):
            return match.group()
        plain = decoded(match.group())
        cleaned = last_part(plain) if is_path(plain) else clean(plain)
        return match.group() if cleaned == plain else cleaned

    return _WORD.sub(replaced, text)


def without_paths(text: str) -> str:
    """A text, such as a command line, with every path in it replaced by its last part."""
    return _EMBEDDED_PATH.sub(_replaced, text)


_REMOTE = r"[\w.+-]+@(?!sha\d+:)[\w.-]+:"
_HOMES = re.compile(r"[a-z]*(?:homes?|users?|scratch)[\d_$-]*|documents and settings", re.IGNORECASE)
"""Folders that hold one folder a person, wherever they lie."""

_DISKS = re.compile(
    r"(?:u|data|work|workspace|nfs|nas|gpfs|lustre|beegfs|storage|export|mnt|media|volumes|cluster)\d*", re.IGNORECASE
)
"""The same for folders at the root of a machine."""

_WORD = re.compile(r"[\w.~+@:%-]+")
_ENCODED = re.compile(r"%(?:25)*(?:2F|5C|40|3A|7E)", re.IGNORECASE)
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
    | (?<![\w./\\+-]){_REMOTE}/*{_FOLDERS}*{_PART}+ # user@server:path
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
