"""The feature cache: one HDF5 file between the two stages. numpy and h5py only; importing it loads no torch."""

from tspipe.cache.column import Column
from tspipe.cache.layout import SPLITS, Dimensions
from tspipe.cache.manifest import Manifest
from tspipe.cache.read import Cache, Pool, Split, open_cache
from tspipe.cache.write import CacheWriter

__all__ = ["SPLITS", "Cache", "CacheWriter", "Column", "Dimensions", "Manifest", "Pool", "Split", "open_cache"]
