"""tspipe: run a teacher once, cache its features, train many students against the file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tspipe.cache import open_cache
    from tspipe.data.cached_targets import CachedTargets
    from tspipe.data.decode import load_image
    from tspipe.data.preprocess import Preprocess
    from tspipe.deploy.student import load_student
    from tspipe.errors import (
        CacheBusy,
        CacheDamaged,
        CacheError,
        CacheIncomplete,
        CacheMismatch,
        DatasetError,
        NetworkError,
        NotACache,
        OtherProcessFailed,
        OutOfMemory,
        RecipeError,
        ReportError,
        TrainingError,
        TspipeError,
    )
    from tspipe.losses.kd import kd_loss
    from tspipe.losses.ts import ts_loss
    from tspipe.losses.vid import vid_loss
    from tspipe.models.feature_net import FeatureNet, student_of

__all__ = [
    "CacheBusy",
    "CacheDamaged",
    "CacheError",
    "CacheIncomplete",
    "CacheMismatch",
    "CachedTargets",
    "DatasetError",
    "FeatureNet",
    "NetworkError",
    "NotACache",
    "OtherProcessFailed",
    "OutOfMemory",
    "Preprocess",
    "RecipeError",
    "ReportError",
    "TrainingError",
    "TspipeError",
    "kd_loss",
    "load_image",
    "load_student",
    "open_cache",
    "student_of",
    "ts_loss",
    "vid_loss",
]
_MODULES = {
    "CachedTargets": "tspipe.data.cached_targets",
    "FeatureNet": "tspipe.models.feature_net",
    "Preprocess": "tspipe.data.preprocess",
    "kd_loss": "tspipe.losses.kd",
    "load_image": "tspipe.data.decode",
    "load_student": "tspipe.deploy.student",
    "open_cache": "tspipe.cache",
    "student_of": "tspipe.models.feature_net",
    "ts_loss": "tspipe.losses.ts",
    "vid_loss": "tspipe.losses.vid",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: `import tspipe` is fast, and reading a cache needs no torch."""
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, "tspipe.errors")), name)
    raise AttributeError(f"module 'tspipe' has no attribute {name!r}")
