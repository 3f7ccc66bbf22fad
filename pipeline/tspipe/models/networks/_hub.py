"""Networks of torch.hub, `hub:OWNER/REPO@COMMIT:NAME`: code from GitHub, which runs only if it is trusted."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tspipe.errors import NetworkError

PREFIX = "hub:"
_NAME = re.compile(r"hub:(\w[\w.-]{0,99}/\w[\w.-]{0,99})(?:@([0-9a-f]{40}))?:(\w{1,100})", re.ASCII)
_trusted = False


def trust_remote_code() -> None:
    """Let this process fetch and run the code of networks `hub:OWNER/REPO@COMMIT:NAME`, also of those in files."""
    global _trusted
    _trusted = True


def trusts_remote_code() -> bool:
    """Return whether this process may run such code. A child process does not inherit it."""
    return _trusted


def build(name: str, num_classes: int, options: Mapping[str, Any]) -> Any:
    """Return what the entry point NAME of the repository's hubconf.py returns for these classes and options.

    torch.hub fetches the code once. It refuses a commit that is not the head of a branch or a tag, because it cannot
    tell whether that is the repository's or a fork's. Raises NetworkError without `trust_remote_code`.
    """
    if not (match := _NAME.fullmatch(name)):
        raise NetworkError(f"{name} is not a network of torch.hub. Write it as hub:OWNER/REPO@COMMIT:NAME")
    repository, commit, entry = match.groups()
    address = f"https://github.com/{repository}"
    if commit is None:
        raise NetworkError(
            f"{name} names no commit, so its code may change. Write hub:{repository}@COMMIT:{entry} with the 40 digits "
            f"that this command prints: git ls-remote {address} HEAD"
        )
    if not _trusted:
        raise NetworkError(
            f"{name} runs the code of {address}/tree/{commit} on this machine. If you trust it: --trust-remote-code"
        )
    try:
        # All of torch.hub's own arguments are given, so that an option, which may come from a file, cannot be one.
        fixed = {"source": "github", "trust_repo": True, "force_reload": False, "skip_validation": False}
        return torch.hub.load(
            f"{repository}:{commit}", entry, verbose=False, num_classes=num_classes, **fixed, **options
        )
    except Exception as problem:  # the repository's code can raise anything
        reason = (str(problem).splitlines() or [type(problem).__name__])[0].rstrip(".")
        folder = Path(torch.hub.get_dir()) / f"{repository.replace('/', '_')}_{commit}"
        remedy = "Its entry point must take num_classes and the network's options."
        if not folder.exists():
            remedy = f"Put its code there: git clone {address} {folder} && git -C {folder} checkout {commit}"
        raise NetworkError(f"{name} cannot be built: {reason}. {remedy}") from problem
