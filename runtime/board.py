"""What a run's folder has, for those who look at TensorBoard: an optional extra (--tensorboard)."""

import numpy as np


class Board:
    """tensorboard/ in a run's folder: log.csv's rows as scalars, the sheets as images.

    done: the iterations that are done. What an earlier process wrote of later ones is hidden: they
    come again.
    """

    def __init__(self, folder, done):
        from torch.utils.tensorboard import SummaryWriter  # which takes the optional package

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1)

    def row(self, row):
        """Take a row of log.csv, {column: number or None}."""
        for name, value in row.items():
            if name != "iteration" and value is not None:
                self.writer.add_scalar(name, value, row["iteration"])

    def picture(self, tag, picture, iteration):
        """Take a sheet, a PIL image."""
        pixels = np.asarray(picture)  # (H, W, 3) uint8
        self.writer.add_image(tag, pixels, iteration, dataformats="HWC")

    def flush(self):
        """Write what is still in memory: with a checkpoint, so that no row before it is lost."""
        self.writer.flush()
