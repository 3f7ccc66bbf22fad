"""A run's metrics for TensorBoard: `tensorboard --logdir runs`."""

from pathlib import Path
from typing import TYPE_CHECKING

from tspipe.errors import RecipeError
from tspipe.training.arms import learner_name
from tspipe.training.run_folder import Row

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes event files below a folder, one TensorBoard run per learner.

    Raises RecipeError if TensorBoard is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RecipeError(
                "tensorboard=true needs a package that is not installed: pip install 'tspipe[tensorboard]'"
            ) from None
        self._writer_class, self._folder, self._writers = SummaryWriter, folder, dict[str, "SummaryWriter"]()

    def write(self, rows: list[Row]) -> None:
        """Add rows of metrics.csv; they hide what a killed run wrote for the same and later epochs."""
        for row in rows:
            name = learner_name(*(row[key] for key in ("student", "arm", "loss", "seed")))
            if name not in self._writers:
                self._writers[name] = self._writer_class(str(self._folder / name), purge_step=row["epoch"])
            for column, value in row.items():
                if isinstance(value, float):
                    self._writers[name].add_scalar(_tag(column), value, row["epoch"])
            self._writers[name].flush()

    def close(self) -> None:
        """Close all files."""
        for writer in self._writers.values():
            writer.close()


def _tag(column: str) -> str:
    """Return a column's tag: `accuracy/test`, `seconds/training`, `loss/mse`."""
    if column.startswith("seconds_"):
        return column.replace("_", "/", 1)
    split, _, metric = column.partition("_")
    return f"accuracy/{split}" if metric == "accuracy" else f"loss/{column}"
