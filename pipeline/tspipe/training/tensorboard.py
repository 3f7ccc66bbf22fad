"""A run's metrics for TensorBoard: `tensorboard --logdir runs`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tspipe.errors import RecipeError
from tspipe.training.arms import learner_name
from tspipe.training.run_folder import Row

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Board:
    """Event files below a folder, one run of TensorBoard's for each learner.

    Raises RecipeError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RecipeError(
                "tensorboard=true needs a package that is not here: pip install 'tspipe[tensorboard]'"
            ) from None
        self._new, self._folder, self._writers = SummaryWriter, folder, dict[str, "SummaryWriter"]()

    def write(self, rows: list[Row]) -> None:
        """Add rows of metrics.csv; what a killed run wrote of the same epochs and later ones is no longer shown."""
        for row in rows:
            name = learner_name(*(row[key] for key in ("student", "arm", "loss", "seed")))
            if name not in self._writers:
                self._writers[name] = self._new(str(self._folder / name), purge_step=row["epoch"])
            for key, value in row.items():
                if isinstance(value, float):
                    self._writers[name].add_scalar(_tag(key), value, row["epoch"])
            self._writers[name].flush()

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()


def _tag(column: str) -> str:
    """A column's place on the board: `accuracy/test`, `seconds/training`, `loss/mse`."""
    if column.startswith("seconds_"):
        return column.replace("_", "/", 1)
    kind, _, accuracy = column.partition("_")
    return f"accuracy/{kind}" if accuracy == "accuracy" else f"loss/{column}"


@contextlib.contextmanager
def board(folder: Path, wanted: bool) -> Iterator[Board | None]:
    """A board in this folder while it is wanted, else None."""
    found = Board(folder) if wanted else None
    try:
        yield found
    finally:
        if found:
            found.close()
