"""What can go wrong, as one tree.

TspipeError
├── CacheError
│   ├── NotACache         not a tspipe cache, or not one that is safe to read
│   ├── CacheDamaged      bytes differ from what was written
│   ├── CacheIncomplete   the writer has not finished
│   ├── CacheMismatch     a sound cache, but not of this data, preprocess or teacher
│   ├── CacheBusy         another process is writing it
│   └── RemoteError       the place of a remote one cannot be asked (defined in cache/remote.py)
├── DatasetError          images or labels missing, unreadable, or not as published
├── NetworkError          an architecture or its weights
├── OutOfMemory           a batch that does not fit, and one that does
├── OtherProcessFailed    of the same job; it says why itself
├── RecipeError           a recipe, a flag or an override
├── ReportError           a run that cannot be reported
└── TrainingError         a loss that is not finite

Every message says what is wrong, where, and what to do about it, in a sentence
or two; the command line prints it as it is.
"""


class TspipeError(Exception):
    """Base of everything tspipe raises on purpose."""


class CacheError(TspipeError):
    """A feature cache cannot be used."""


class NotACache(CacheError):
    """The file is not a tspipe cache, or breaks a rule of the format."""


class CacheDamaged(CacheError):
    """The file is not what was written."""


class CacheIncomplete(CacheError):
    """The file's writer has not finished."""


class CacheMismatch(CacheError):
    """The cache is sound, but belongs to other data, preprocess, teacher or plan."""


class CacheBusy(CacheError):
    """Another process is writing this cache."""


class DatasetError(TspipeError):
    """A dataset is missing, unreadable, or not as published."""


class NetworkError(TspipeError):
    """A network cannot be built, split or loaded."""


class OutOfMemory(TspipeError):
    """The teacher does not fit into memory with batches of `batch_size` images; with `fits` it does, 0: with none."""

    def __init__(self, batch_size: int, fits: int):
        self.batch_size, self.fits = batch_size, fits
        super().__init__(
            f"The teacher runs out of memory with batches of {batch_size:,} images; batches of {fits:,} fit."
            if fits
            else "The teacher runs out of memory even with one image at a time. It needs a machine with more."
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch or Python ran out of memory; PyTorch raises a plain RuntimeError on the CPU."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, by name: nothing here imports torch
        or (isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text))
    )


class OtherProcessFailed(TspipeError):
    """Another process of the same job has ended, or cannot be reached; saying why is left to that one."""


class RecipeError(TspipeError):
    """A recipe, a flag or an override does not make sense."""


class ReportError(TspipeError):
    """A run folder is not one that can be reported, or what draws its figures is missing."""


class TrainingError(TspipeError):
    """Training cannot go on."""
