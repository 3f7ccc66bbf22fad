"""tspipe: run a teacher once, cache its features, train many students against the file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tspipe.cache import open_cache
    from tspipe.data.cached_targets import CachedTargets

__all__ = ["CachedTargets", "open_cache"]
_HOMES = {"CachedTargets": "tspipe.data.cached_targets", "open_cache": "tspipe.cache"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import tspipe` is quick, and reading a cache needs no torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tspipe' has no attribute {name!r}")
