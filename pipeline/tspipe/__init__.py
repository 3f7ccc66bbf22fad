"""tspipe: run a teacher once, cache its features, train many students against the file."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tspipe.cache import open_cache

__all__ = ["open_cache"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that `import tspipe` is quick."""
    if name == "open_cache":
        from tspipe.cache import open_cache

        return open_cache
    raise AttributeError(f"module 'tspipe' has no attribute {name!r}")
