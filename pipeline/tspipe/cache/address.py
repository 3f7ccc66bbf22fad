"""Addresses of remote files: what is one, how it is shown without secrets, and the local name for its file."""

import re
from pathlib import Path
from urllib.parse import unquote

CACHE_SUFFIX = ".h5"
SUFFIXES = (CACHE_SUFFIX, ".safetensors", ".onnx", ".pt2", ".pte", ".py")  # of files that are transferred

_ADDRESS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?:[^/?#]*@)?"  # user and password
    r"(?P<host>[^/?#@:]*|\[[0-9A-Fa-f:.%]+\])(?P<port>:\d*)?(?P<path>(?:/[^?#]*)?)(?:[?#].*)?",
    re.DOTALL,
)
# What a user meant as an address: a known scheme with wrong slashes, or a user and a password before an @. A single
# letter before a colon and a slash is a Windows drive.
_MEANT = re.compile(
    r"\s*(https?|s3a?|gs|gcs|hf|file|memory)(:|/[/\\]|\\)"
    r"|\s*((/+|https?/)[^/\\@:\s]*|[^/\\@:\s]{2,}|[^/\\@:\s](?!:[/\\])):[^@]*@",
    re.IGNORECASE,
)
_WEB = ("http", "https")
_WITHOUT_HOST = ("file", "memory")


def is_url(text: str) -> bool:
    """Return whether this is an address (`s3://…`), perhaps a malformed one, and not a path."""
    return "://" in text or _MEANT.match(text) is not None


def is_well_formed(url: str) -> bool:
    """Return whether an address has a scheme, a host and a path, so that its secrets are known to be secrets."""
    match = _ADDRESS.fullmatch(url)
    if match is None or not (match["host"] or match["scheme"].lower() in _WITHOUT_HOST):
        return False
    return not (match["port"] and "@" in match["path"])


def without_secrets(url: str) -> str:
    """Return an address without user, password, parameters, query and fragment; of a malformed one, no part.

    >>> without_secrets("https://me:secret@host/digits.h5?token=1")
    'https://host/digits.h5'
    """
    if not is_url(url):
        return url
    match = _ADDRESS.fullmatch(url)
    if match is None or not is_well_formed(url):
        return "the given address"
    path = re.sub(";[^/]*", "", match["path"]) if match["scheme"].lower() in _WEB else match["path"]
    return f"{match['scheme']}://{match['host']}{match['port'] or ''}{path}"


def file_name(url: str) -> str:
    """Return the local name for the file at an address: never a path, and `.h5` if it ends in none of `SUFFIXES`.

    >>> file_name("https://host/a%2F..%2Fmy%20pets.h5?token=1")
    'my_pets.h5'
    """
    last = unquote(without_secrets(url)).replace("\\", "/").rstrip("/").rpartition("/")[2]
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", last).lstrip(".+-")
    suffix = next((suffix for suffix in SUFFIXES if plain.endswith(suffix)), CACHE_SUFFIX)
    return f"{plain.removesuffix(suffix)[:150] or 'unnamed'}{suffix}"


def beside(url: str, suffix: str) -> str:
    """Return the address or path of the file beside another, whose name differs in its suffix alone.

    An address whose name has no suffix is returned as it is.

    >>> beside("https://host/net.safetensors?token=1", ".py")
    'https://host/net.py?token=1'
    """
    old = Path(without_secrets(url)).suffix
    if not old:
        return url
    head = re.split("[?#]", url, maxsplit=1)[0] if is_url(url) else url  # the suffix may occur in the query, too
    before, _, after = head.rpartition(old)
    return f"{before}{suffix}{after}{url[len(head) :]}"
