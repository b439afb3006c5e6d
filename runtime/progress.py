"""How far a run is, on stderr: a bar on a terminal, elsewhere a line now and then."""

import sys
import time

from tqdm import tqdm

# Columns of log.csv, those of them that a run has.
FIGURES = (
    "loss_generator",
    "loss_discriminator",
    "loss_fake",
    "loss_mse",
    "d_accuracy",
    "dmd_loss",
    "x0_std",
    "skipped",
)


class Progress:
    """Of a run of cfg.iterations, of which `first` are done already.

    On a terminal a bar with the last iteration's figures; elsewhere, in a cluster's log, a line
    every cfg.log_every iterations and after the last, with the time, the rate since the line
    before, how long it will take at that rate, and the figures' means since then. main: whether
    this rank says anything.
    """

    def __init__(self, cfg, first, main):
        terminal = sys.stderr.isatty()
        self.cfg = cfg
        self.says_lines = main and not terminal and cfg.log_every > 0
        how = {"initial": first, "desc": cfg.loss, "dynamic_ncols": True}
        self.bar = tqdm(total=cfg.iterations, disable=not (main and terminal), **how)
        self.rows = []  # since the last line
        self.began = time.perf_counter()

    def show(self, row):
        """Take a row of log.csv, {column: number or None}."""
        self.bar.set_postfix(figures([row]), refresh=False)
        self.bar.update()
        if not self.says_lines:
            return
        self.rows.append(row)
        done = row["iteration"]
        if done % self.cfg.log_every == 0 or done == self.cfg.iterations:
            print(self.line(done), file=sys.stderr, flush=True)
            self.rows = []
            self.began = time.perf_counter()

    def line(self, done):
        """What stands on stderr after iteration `done`."""
        each = (time.perf_counter() - self.began) / len(self.rows)  # seconds
        rate = f"{each:.3g} s/it" if each > 1 else f"{1 / each:.3g} it/s"
        left = tqdm.format_interval((self.cfg.iterations - done) * each)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        head = f"{now}  {self.cfg.loss} {done}/{self.cfg.iterations}  {rate}  ETA {left}"
        return "  ".join([head, *(f"{name} {x}" for name, x in figures(self.rows).items())])

    def close(self):
        self.bar.close()


def figures(rows):
    """{name: text} of the main columns: means over these rows of what is given; skipped updates."""
    shown = {}
    for name in FIGURES:
        values = [row[name] for row in rows if row.get(name) is not None]
        total = sum(values)
        if name == "skipped":
            if total:
                shown[name] = str(total)
        elif values:
            shown[name] = f"{total / len(values):.3g}"
    return shown
