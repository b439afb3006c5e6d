"""Why ADM behaves as it does: Δt, damping and the weight in t, beside DMD: toy/WHY.md's figures.

    python toy/why.py run        # toy/results/why.json, 40 minutes; goes on where it was
    python toy/why.py picture    # toy/results/why.png
    python toy/why.py readme     # prints WHY.md's tables

ring8-rare, students of one and of four steps from the teacher's weights, 600 updates. Rates are
searched for each method, on seeds of their own.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import adm
import toy.run as toy
from models import accuracy
from ode import T
from runtime.files import aside, read_json, write_json
from runtime.script import in_one_line, plain_parser
from runtime.settings import require
from toy.claims import BETTER, RESULTS, SEARCH_SEEDS, best_rate, less, markdown
from toy.gmm import LINE, density_tv, mode_tv, modes_covered
from toy.plot import LOOK, legend_below
from toy.run import Config, Noise, World, pm

FILE = RESULTS / "why.json"

PARTS = (256, 128, 64, 32, 16, 8, 4, 2)  # Δt = T/256 to T/2
EVERYWHERE = [(steps, part) for steps in (1, 4) for part in PARTS]  # steps of the student
DMDS = [(1, 64), (4, 64)]  # which has no Δt
BOTH = [(1, 4), (4, 4)]
ONE_STEP = [(1, 4)]
METHODS = {"DMD": "dmd", "step": "step", "ADM": "adm-paper"}  # of toy/run.py
HEADS = {"head_width": 128, "lr_heads": 5e-3}  # four times as wide and five times as fast
CHANGES = {  # what may follow in a name, and what differs then from ADM as published
    "damping 0.1": {"damping": 0.1},
    "DMD's weight": {"gen_weight": "dmd"},
    "TTUR 4": {"ttur": 4},
    "heads at 5e-3": {"lr_heads": 5e-3},
    "strong heads": HEADS,
    "strong D": HEADS | {"ttur": 4},
    "β₁ 0": {"beta1": 0.0},
    "β₁ 0.5": {"beta1": 0.5},
}
PLACES = {  # {name: where it is run}
    "DMD": DMDS,
    "step": EVERYWHERE,
    "step, DMD's weight": EVERYWHERE,
    "ADM": EVERYWHERE,  # the paper's own
    "ADM, damping 0.1": EVERYWHERE,
    # What could make its D follow, or help, in four steps.
    "ADM, damping 0.1, TTUR 4": [(4, 4)],
    "ADM, damping 0.1, heads at 5e-3": [(4, 4)],
    "ADM, damping 0.1, DMD's weight": [(4, 4)],
    # A D as strong as can be, without damping; its parts, and TTUR 4 for those without a D.
    "ADM, strong D": [*BOTH, (1, 2), (4, 2)],
    "ADM, strong heads": ONE_STEP,
    "ADM, TTUR 4": ONE_STEP,
    "step, TTUR 4": ONE_STEP,
    "DMD, TTUR 4": DMDS,
    # Without momentum, and with less, of all that learns: what is chased moves on.
    "ADM, β₁ 0": BOTH,
    "ADM, damping 0.1, β₁ 0": BOTH,
    "ADM, damping 0.1, β₁ 0.5": ONE_STEP,
    "ADM, damping 0.1, β₁ 0, TTUR 4": ONE_STEP,
    "step, β₁ 0": ONE_STEP,
    "DMD, β₁ 0": [(1, 64)],
    "DMD, β₁ 0, TTUR 4": [(1, 64)],
}


def key(name, steps, part):
    """A run, as results and tables name it."""
    return f"{name}; {steps} step{'s' * (steps > 1)}; T/{part}"


RUNS = {key(name, *at): (name, *at) for name, places in PLACES.items() for at in places}
SEEDS = {"seeds": 5, "first_seed": 0}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of the student
# The closest race once more, at rates in between: both methods' best is taken on the same seeds.
FINER = (2e-4, 3e-4, 6e-4, 1e-3)
RACES = ("DMD; 4 steps; T/64", "step; 4 steps; T/2", "DMD; 1 step; T/64", "step; 1 step; T/4")
SAMPLES = 20_000  # of each student


# --- The runs -------------------------------------------------------------------------------------


def settings_of(name):
    """(method of toy/run.py, its settings but for Δt)."""
    first, *changes = name.split(", ")
    settings = toy.PUBLISHED
    for change in changes:
        settings = settings | CHANGES[change]
    return METHODS[first], settings


def trained(world, what, rate):
    """A run: (its Players, the settings)."""
    name, steps, part = RUNS[what]
    method, settings = settings_of(name)
    about = settings | {"student_steps": steps, "dt": 1 / part}
    cfg = Config(seeds=len(world.seeds), iterations=600, **about)
    net, _ = toy.trained(cfg, method, world, {method: rate})
    return net, cfg


def tv_of(world, what, rate):
    """TV of each seed."""
    net, _ = trained(world, what, rate)
    return measured(world, net.student, net.times)["mode_tv"]


def searched_at(what):
    """The run, at a small, middling or large Δt, whose search has the rate for this one."""
    name, steps, part = RUNS[what]
    if part >= 32:
        return key(name, steps, 64)
    return key(name, steps, 16 if part >= 8 else 4)


def searched(results, world, what):
    """The rate of least mean TV of a run, after trials in `results`, which grows."""
    trials = results.setdefault(what, {})  # {rate: TV of each seed}

    def trial(rate):
        print("search", what, rate, flush=True)
        return tv_of(world, what, rate)

    return best_rate(trials, RATES, 1e-3, trial)


HELD = ("search", "untrained", "runs", "finer")  # in results/why.json


def found():
    """What results/why.json holds. Raises BadInput where it lacks a run."""
    results = read_json(FILE, "results", *HELD)
    whole = RUNS.keys() <= results["runs"].keys() and set(RACES) <= results["finer"].keys()
    require(whole, f"{FILE} lacks runs: python toy/why.py run")
    return results


def run():
    """Searches and runs what results/why.json does not hold yet; the start is measured anew."""
    results = read_json(FILE, "results", *HELD) if FILE.exists() else {part: {} for part in HELD}
    world, of_search = (World(Config(**seeds)) for seeds in (SEEDS, SEARCH_SEEDS))
    for steps in (1, 4):
        results["untrained"][f"{steps}"] = measured(world, world.mlp, toy.times_of(steps))
    for what in [what for what in RUNS if what not in results["runs"]]:
        name, steps, part = RUNS[what]
        rate = searched(results["search"], of_search, searched_at(what))
        net, cfg = trained(world, what, rate)
        row = {"method": name, "steps": steps, "part": part, "rate": rate}
        row |= measured(world, net.student, net.times)
        if name.startswith("ADM"):
            row |= followed(net, cfg, world)
        if name == "DMD":
            row["weight"] = dmd_weight(net, cfg, world)
        results["runs"][what] = row
        write_json(FILE, results)
        print(row, flush=True)
    for what in [what for what in RACES if what not in results["finer"]]:
        results["finer"][what] = {f"{rate:g}": tv_of(world, what, rate) for rate in FINER}
        write_json(FILE, results)
        print("finer", what, results["finer"][what], flush=True)


def measured(world, student, times):
    """{metric: its value for each seed} of a student with steps at these times."""
    x = toy.drawn(world, student, times, SAMPLES)  # (S, SAMPLES, 2)
    values = {}
    for metric in (mode_tv, density_tv, modes_covered):
        values[metric.__name__] = [round(metric(world.mixture, of_seed), 4) for of_seed in x]
    return values


def followed(net, cfg, world):
    """How a trained D follows x_real − x_fake, "the gap", on 4,096 new samples of each seed.

    cosine   of ∇D with it, mean
    length   of ∇D in units of it: the factor by which it is nearest
    linear   share of logits within (−1, 1), where the hinge is linear
    accuracy d_accuracy
    """
    draw = Noise((11,), world.seeds, 4096)
    with torch.no_grad():
        x_0 = toy.emitted(net.student, net.times, draw)  # (n, 2)
    real, fake, slope, gap = toy.slope_and_gap(net, cfg, draw, x_0, {}, {})
    values = {
        "cosine": torch.cosine_similarity(slope, gap).mean(),
        "length": (slope * gap).sum() / gap.square().sum(),
        "linear": (torch.cat([real, fake]).abs() < 1).float().mean(),
        "accuracy": accuracy(real, fake),
    }
    return {name: float(f"{value:.4g}") for name, value in values.items()}


@torch.no_grad()
def dmd_weight(net, cfg, world):
    """[[t/T, mean 1/mean|x̂_0 − x0_real|], …]: at the middle of 24 even parts of [0.02, 0.98]."""
    draw = Noise((11,), world.seeds, 4096)
    x_0 = toy.emitted(net.student, net.times, draw)  # (n, 2)
    t = draw.uniform(cfg.t_min * T, cfg.t_max * T)  # (n,)
    x_t, out_real, _ = adm.both_scores(net, draw, {}, {}, x_0, t)  # (n, 2)
    x0_real, _ = LINE.to_x0_eps(x_t, out_real, t)  # (n, 2)
    weight = 1 / adm.mean_distance(x_0, x0_real)  # (n,)
    edges = torch.linspace(0.02, 0.98, 25)  # (25,)
    part = torch.bucketize(t / T, edges[1:-1])  # (n,)
    rows = []
    for i in range(24):
        middle = float(edges[i : i + 2].mean())
        rows.append([round(middle, 4), float(f"{weight[part == i].mean():.4g}")])
    return rows


# --- The picture and the tables -------------------------------------------------------------------

SHOWN = [(steps, part) for steps in (4, 1) for part in (64, 4, 2)]  # in the first table
FOLLOWERS = (  # in the last
    "ADM; 4 steps; T/64",
    "ADM, damping 0.1; 4 steps; T/64",
    "ADM; 4 steps; T/4",
    "ADM, damping 0.1; 4 steps; T/4",
    "ADM, damping 0.1, β₁ 0; 4 steps; T/4",
    "ADM, damping 0.1, TTUR 4; 4 steps; T/4",
    "ADM, damping 0.1, heads at 5e-3; 4 steps; T/4",
    "ADM, strong D; 4 steps; T/4",
    "ADM, strong D; 4 steps; T/2",
    "DMD, TTUR 4; 4 steps; T/64",
    "ADM, damping 0.1; 1 step; T/256",
    "ADM; 1 step; T/4",
    "ADM; 1 step; T/2",
    "ADM, damping 0.1, β₁ 0; 1 step; T/4",
    "ADM, damping 0.1, β₁ 0.5; 1 step; T/4",
    "ADM, damping 0.1, β₁ 0, TTUR 4; 1 step; T/4",
    "ADM, TTUR 4; 1 step; T/4",
    "ADM, strong heads; 1 step; T/4",
    "ADM, strong D; 1 step; T/4",
    "ADM, strong D; 1 step; T/2",
    "step, TTUR 4; 1 step; T/4",
    "DMD, β₁ 0; 1 step; T/64",
    "DMD, TTUR 4; 1 step; T/64",
)
LINES = {  # name: (colour, how far its points are moved aside)
    "step": (LOOK["step"][1], 0.94),
    "step, DMD's weight": ("tab:cyan", 0.98),
    "ADM": (LOOK["adm-paper"][1], 1.02),
    "ADM, damping 0.1": (LOOK["adm-recipe"][1], 1.06),
}


def picture():
    """results/why.png: TV against Δt in four steps and in one, and the weights that it implies."""
    results = found()
    matplotlib.rcParams["font.size"] = 13
    figure = Figure(figsize=(21, 6.4), layout="constrained")
    axes = figure.subplots(1, 3)
    of_tv(axes[0], results, 4)
    of_tv(axes[1], results, 1)
    of_weights(axes[2], results["runs"])
    for ax in axes:
        legend_below(ax)
    with aside(RESULTS / "why.png") as partial:
        figure.savefig(partial, format="png", dpi=80)


def of_tv(ax, results, steps):
    """Mean and standard deviation of TV over the seeds; DMD, which has no Δt, as a band."""
    dmd = results["runs"][key("DMD", steps, 64)]["mode_tv"]
    mean, sd = np.mean(dmd), np.std(dmd, ddof=1)
    title, colour = LOOK["dmd"]
    ax.axhspan(mean - sd, mean + sd, color=colour, alpha=0.25, lw=0, label=title)
    start = np.mean(results["untrained"][f"{steps}"]["mode_tv"])
    ax.axhline(start, color="black", ls=":", label="before training")
    dt = 1 / np.array(PARTS)  # (parts,)
    for name, (colour, beside) in LINES.items():
        tv = np.array([results["runs"][key(name, steps, part)]["mode_tv"] for part in PARTS])
        look = {"marker": "o", "capsize": 4, "lw": 2, "color": colour, "label": name}
        ax.errorbar(beside * dt, tv.mean(1), tv.std(1, ddof=1), **look)  # of (parts, seeds)
    ax.set_xscale("log")
    ax.set_xticks(dt, [f"T/{part}" for part in PARTS])
    ax.minorticks_off()
    ax.set(xlabel="Δt", ylabel="TV (0 is perfect)", ylim=(0, None))
    ax.set_title(f"{many(steps).capitalize()} from the teacher: mean ± sd of 5 seeds")


def of_weights(ax, runs):
    """Of the score difference in the student's gradient, each with mean 1 over its range of t."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0, 5))
    for part, shade in zip((256, 64, 16, 4, 2), shades, strict=True):
        t = np.linspace(0.02 + 1 / part, 0.98, 200)  # of T
        weight = line_weight(t, 1 / part)
        ax.plot(t, weight / weight.mean(), color=shade, lw=2.5, label=f"step, Δt = T/{part}")
    dmd = runs[key("DMD", 4, 64)]
    t, weight = np.array(dmd["weight"]).T  # (24,) each
    title, colour = LOOK["dmd"]
    look = {"color": colour, "ls": "--", "lw": 2.5, "label": f"{title}, measured"}
    ax.plot(t, weight / weight.mean(), **look)
    ax.set(yscale="log", xlim=(0, 1), xlabel="t / T, from data to noise", ylabel="weight, mean 1")
    ax.set_title("How much the score difference at t counts")


def line_weight(t, dt):
    """α_s κ on the straight line, times in units of T, s = t − Δt: (1 − s) Δt / t."""
    return (1 - (t - dt)) * dt / t


def tv(results):
    """Rows: TV by method at some Δt, in four steps and in one; the picture has all."""
    yield "TV", *(f"{many(steps)}, T/{part}" for steps, part in SHOWN)
    four, one = [pm(results["untrained"][steps]["mode_tv"]) for steps in ("4", "1")]
    yield "before training", four, "", "", one, "", ""
    for name in ("DMD", *LINES):
        runs = [results["runs"].get(key(name, *at)) for at in SHOWN]  # DMD has no Δt but T/64
        yield name, *(pm(run["mode_tv"]) if run else "" for run in runs)


def races(finer):
    """Rows: TV at rates in between, and the paired verdict of best against best."""
    yield "TV by rate", *(f"{rate:g}" for rate in FINER), "best against DMD's best"
    for what in RACES:
        name, steps, part = RUNS[what]
        label = name if name == "DMD" else f"{name}, T/{part}"
        verdict = against(best_of(finer[what]), best_of(finer[key("DMD", steps, 64)]))
        yield f"{label}; {many(steps)}", *map(pm, finer[what].values()), verdict


def best_of(tvs):
    """Of {rate: TV of each seed} the TVs of least mean."""
    return min(tvs.values(), key=np.mean)


def followers(runs, finer):
    """Rows: how D follows, and what could make it: by method, steps and Δt.

    The rival is DMD with as many updates of its fake score; at TTUR 1 at its best of FINER.
    """
    columns = ("TV", "modes", "cosine", "length", "linear", "rate", "against DMD at its TTUR")
    yield "run", *columns
    for what in FOLLOWERS:
        name, steps, _ = RUNS[what]
        row = runs[what]
        rival = best_of(finer[key("DMD", steps, 64)])  # TV of each seed
        _, settings = settings_of(name)
        if settings["ttur"] == 4:
            rival = runs[key("DMD, TTUR 4", steps, 64)]["mode_tv"]
        modes = ", ".join(f"{n}" for n in row["modes_covered"])
        seen = ["", "", ""]
        if "cosine" in row:
            seen = [f"{row['cosine']:.2f}", f"{row['length']:.2g}", f"{row['linear']:.2f}"]
        verdict = against(row["mode_tv"], rival)
        yield what, pm(row["mode_tv"]), modes, *seen, f"{row['rate']:g}", verdict


def many(steps):
    return "one step" if steps == 1 else "four steps"


def against(values, others):
    """The verdict on TVs paired by seed, a t test at 95%."""
    if values == others:
        return ""
    return BETTER[less(np.array(values), np.array(others))]


def readme():
    """Prints toy/WHY.md's tables."""
    results = found()
    runs, finer = results["runs"], results["finer"]
    tables = tv(results), races(finer), followers(runs, finer)
    print("\n\n".join(map(markdown, tables)))


COMMANDS = {f.__name__: f for f in (run, picture, readme)}


def main():
    parser = plain_parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    with in_one_line("why.py"):
        COMMANDS[parser.parse_args().command]()


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices are small: more threads only wait for each other
    main()
