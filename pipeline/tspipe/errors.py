"""The exceptions of tspipe.

Every message says what is wrong, where, and what to do about it, in a sentence or two. The command line prints it
unchanged. `RemoteError`, a CacheError, is in cache/remote.py.
"""


class TspipeError(Exception):
    """The base class of all exceptions that tspipe raises."""


class CacheError(TspipeError):
    """A feature cache cannot be used."""


class NotACache(CacheError):
    """The file is not a tspipe cache, or breaks a rule of the format."""


class CacheDamaged(CacheError):
    """The file's bytes differ from those written."""


class CacheIncomplete(CacheError):
    """The file is not finished."""


class CacheMismatch(CacheError):
    """The cache is valid, but belongs to other data, preprocessing, teacher or plan."""


class CacheBusy(CacheError):
    """Another process is writing this cache."""


class DatasetError(TspipeError):
    """A dataset is missing, unreadable, or not as published."""


class NetworkError(TspipeError):
    """A network cannot be built, split or loaded."""


class OutOfMemory(TspipeError):
    """The teacher runs out of memory with batches of `batch_size` images, but not of `fits`; 0 if no batch fits."""

    def __init__(self, batch_size: int, fits: int):
        self.batch_size, self.fits = batch_size, fits
        super().__init__(
            f"The teacher runs out of memory with batches of {batch_size:,} images; batches of {fits:,} fit."
            if fits
            else "The teacher runs out of memory even with one image at a time. Use a machine with more memory."
        )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether PyTorch or Python ran out of memory; on the CPU, PyTorch raises a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )


class OtherProcessFailed(TspipeError):
    """Another process of the job has ended or cannot be reached; it reports its own error."""


class RecipeError(TspipeError):
    """A recipe, a flag or an override is invalid."""


class ReportError(TspipeError):
    """A run folder cannot be reported, or matplotlib is missing."""


class TrainingError(TspipeError):
    """Training cannot continue."""
