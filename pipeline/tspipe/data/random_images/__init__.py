"""Random images: generated, not photographed, and labelled by the teacher (arXiv 2005.00393, section 3).

How they are generated is their *kind*, one file each. The paper's is `uniform`. Every kind turns a fixed number of
draws per image into pixels, so an image follows from the seed, the purpose and its number alone. They are drawn anew
for every batch, or once: stage one labels a pool of them, and the cache stores the targets and what draws the same
pixels again.
"""

from tspipe.data.random_images.base import KINDS, Generator, Kind, KindName, Photos, make

__all__ = ["KINDS", "Generator", "Kind", "KindName", "Photos", "make"]
