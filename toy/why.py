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
from toy.claims import RESULTS, SEARCH_SEEDS, best_rate, header, paired, pm, row_of
from toy.gmm import LINE, density_tv, mode_tv, modes_covered
from toy.plot import LOOK, legend_below
from toy.run import Config, Noise, World

FILE = RESULTS / "why.json"

DAMPED = {"damping": 0.1}
METHODS = {  # name: (method of toy/run.py, what differs from ADM as published, but for Δt)
    "DMD": ("dmd", {}),
    "step": ("step", {}),
    "step, DMD's weight": ("step", {"gen_weight": "dmd"}),
    "ADM": ("adm-paper", {}),  # the paper's own
    "ADM, damping 0.1": ("adm-paper", DAMPED),
}
LEVERS = {  # of the last of them, in four steps at Δt = T/4: what could make D follow, or help
    "ADM, damping 0.1, TTUR 4": ("adm-paper", {**DAMPED, "ttur": 4}),
    "ADM, damping 0.1, heads at 5e-3": ("adm-paper", {**DAMPED, "lr_heads": 5e-3}),
    "ADM, damping 0.1, DMD's weight": ("adm-paper", {**DAMPED, "gen_weight": "dmd"}),
}
# A D as strong as can be: no damping, heads four times as wide and five times as fast, TTUR 4. Then
# its parts, and TTUR 4 for those without a D.
HEADS = {"head_width": 128, "lr_heads": 5e-3}
STRONG = {
    "ADM, strong D": ("adm-paper", {**HEADS, "ttur": 4}),
    "ADM, strong heads": ("adm-paper", HEADS),
    "ADM, TTUR 4": ("adm-paper", {"ttur": 4}),
    "step, TTUR 4": ("step", {"ttur": 4}),
    "DMD, TTUR 4": ("dmd", {"ttur": 4}),
}
# Without momentum, and with less, of all that learns: what is chased moves on.
CALM = {
    "ADM, β₁ 0": ("adm-paper", {"beta1": 0.0}),
    "ADM, damping 0.1, β₁ 0": ("adm-paper", {**DAMPED, "beta1": 0.0}),
    "ADM, damping 0.1, β₁ 0.5": ("adm-paper", {**DAMPED, "beta1": 0.5}),
    "ADM, damping 0.1, β₁ 0, TTUR 4": ("adm-paper", {**DAMPED, "beta1": 0.0, "ttur": 4}),
    "step, β₁ 0": ("step", {"beta1": 0.0}),
    "DMD, β₁ 0": ("dmd", {"beta1": 0.0}),
    "DMD, β₁ 0, TTUR 4": ("dmd", {"beta1": 0.0, "ttur": 4}),
}
EVERY = METHODS | LEVERS | STRONG | CALM
STRONG_AT = (  # (name, steps, part)
    *[("ADM, strong D", steps, part) for steps in (1, 4) for part in (4, 2)],
    *[(name, 1, 4) for name in ("ADM, strong heads", "ADM, TTUR 4", "step, TTUR 4")],
    *[("DMD, TTUR 4", steps, 64) for steps in (1, 4)],
)
CALM_AT = (
    *[(name, 1, 64 if name.startswith("DMD") else 4) for name in CALM],
    *[(name, 4, 4) for name in ("ADM, β₁ 0", "ADM, damping 0.1, β₁ 0")],
)
PARTS = (256, 128, 64, 32, 16, 8, 4, 2)  # Δt = T/256 to T/2
STEPS = (1, 4)  # of the student
SEEDS = {"seeds": 5, "first_seed": 0}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of the student
# The closest race once more, at rates in between: both methods' best is taken on the same seeds.
FINER = (2e-4, 3e-4, 6e-4, 1e-3)
RACES = (("DMD", 4, 64), ("step", 4, 2), ("DMD", 1, 64), ("step", 1, 4))  # (name, steps, part)
SAMPLES = 20_000  # of each student


# --- The runs -------------------------------------------------------------------------------------


def trained(world, seeds, name, steps, part, rate):
    """(Players after training, samples (S, SAMPLES, 2), the settings)."""
    method, changes = EVERY[name]
    settings = toy.PUBLISHED | changes | {"dt": 1 / part}
    cfg = Config(**seeds, iterations=600, student_steps=steps, **settings)
    net, _, _ = toy.trained(cfg, method, world, {method: rate})
    return net, drawn(world, net.student, net.times), cfg


def searched_at(name, part):
    """The Δt, T/part, at which the rate for this one was searched: small, middling or large."""
    if name.startswith("DMD") or part >= 32:
        return 64
    return 16 if part >= 8 else 4


def searched(results, world, name, steps, part):
    """The rate of least mean TV, after trials in `results`, which grows."""
    trials = results.setdefault(key(name, steps, part), {})  # {rate: TV of each seed}

    def trial(rate):
        _, x, _ = trained(world, SEARCH_SEEDS, name, steps, part, rate)
        print("search", key(name, steps, part), rate, flush=True)
        return measured(world, x)["mode_tv"]

    return best_rate(trials, RATES, 1e-3, trial)


def key(name, steps, part):
    return f"{name}; {steps} step{'s' * (steps > 1)}; T/{part}"


def wanted():
    """(method, steps, part) of every run."""
    for steps in STEPS:
        for name in METHODS:
            for part in PARTS if name != "DMD" else (64,):
                yield name, steps, part
    for name in LEVERS:
        yield name, 4, 4
    yield from STRONG_AT
    yield from CALM_AT


HELD = ("search", "untrained", "runs", "finer")  # in results/why.json


def missing(results):
    """(the runs, the runs at finer rates) that results lack: lists of (method, steps, part)."""
    runs = [what for what in wanted() if key(*what) not in results["runs"]]
    return runs, [what for what in RACES if key(*what) not in results["finer"]]


def found():
    """What results/why.json holds. Raises BadInput where it lacks a run."""
    results = read_json(FILE, "results", *HELD)
    require(not any(missing(results)), f"{FILE} lacks runs: python toy/why.py run")
    return results


def run():
    """Searches and runs what results/why.json does not hold yet."""
    results = read_json(FILE, "results", *HELD) if FILE.exists() else {part: {} for part in HELD}
    runs, races = missing(results)
    world, of_search = (World(Config(**seeds)) for seeds in (SEEDS, SEARCH_SEEDS))
    for name, steps, part in runs:
        if f"{steps}" not in results["untrained"]:
            start = drawn(world, world.mlp, toy.times_of(steps))  # (S, SAMPLES, 2)
            results["untrained"][f"{steps}"] = measured(world, start)
        rate = searched(results["search"], of_search, name, steps, searched_at(name, part))
        net, x, cfg = trained(world, SEEDS, name, steps, part, rate)
        row = {"method": name, "steps": steps, "part": part, "rate": rate, **measured(world, x)}
        if name.startswith("ADM"):
            row |= followed(net, cfg, world)
        if name == "DMD":
            row["weight"] = dmd_weight(net, cfg, world)
        results["runs"][key(name, steps, part)] = row
        write_json(FILE, results)
        print(row, flush=True)
    for what in races:
        tvs = {}  # {rate: TV of each seed}
        for rate in FINER:
            _, x, _ = trained(world, SEEDS, *what, rate)
            tvs[f"{rate:g}"] = measured(world, x)["mode_tv"]
        results["finer"][key(*what)] = tvs
        write_json(FILE, results)
        print("finer", key(*what), tvs, flush=True)


def measured(world, x):
    """{metric: its value for each seed} of samples x (S, SAMPLES, 2)."""
    values = {}
    for metric in (mode_tv, density_tv, modes_covered):
        values[metric.__name__] = [round(metric(world.mixture, of_seed), 4) for of_seed in x]
    return values


@torch.no_grad()
def drawn(world, student, times):
    """(S, SAMPLES, 2): what the student makes of noise."""
    x = toy.emitted(student, times, Noise((10, 0), world.seeds, SAMPLES))  # (S·SAMPLES, 2)
    return x.unflatten(0, (len(world.seeds), -1))


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
PAPER, WITH_DAMPING = "ADM", "ADM, damping 0.1"
FOLLOWERS = (  # in the last: (name, steps, part)
    *[(name, 4, part) for part in (64, 4) for name in (PAPER, WITH_DAMPING)],
    ("ADM, damping 0.1, β₁ 0", 4, 4),
    ("ADM, damping 0.1, TTUR 4", 4, 4),
    ("ADM, damping 0.1, heads at 5e-3", 4, 4),
    *[("ADM, strong D", 4, part) for part in (4, 2)],
    ("DMD, TTUR 4", 4, 64),
    (WITH_DAMPING, 1, 256),
    *[(PAPER, 1, part) for part in (4, 2)],
    *[(f"ADM, damping 0.1, {calm}", 1, 4) for calm in ("β₁ 0", "β₁ 0.5", "β₁ 0, TTUR 4")],
    ("ADM, TTUR 4", 1, 4),
    ("ADM, strong heads", 1, 4),
    *[("ADM, strong D", 1, part) for part in (4, 2)],
    ("step, TTUR 4", 1, 4),
    ("DMD, β₁ 0", 1, 64),
    ("DMD, TTUR 4", 1, 64),
)

LINES = {  # name: (colour, how far its points are moved aside)
    "step": (LOOK["step"][1], 0.94),
    "step, DMD's weight": ("tab:cyan", 0.98),
    "ADM": (LOOK["adm-paper"][1], 1.02),
    "ADM, damping 0.1": (LOOK["adm-recipe"][1], 1.06),
}


def picture():
    """results/why.png: TV against Δt in four steps and in one, and the weights that it implies."""
    matplotlib.rcParams["font.size"] = 13
    figure = Figure(figsize=(21, 6.4), layout="constrained")
    axes = figure.subplots(1, 3)
    of_tv(axes[0], 4)
    of_tv(axes[1], 1)
    of_weights(axes[2])
    for ax in axes:
        legend_below(ax)
    with aside(RESULTS / "why.png") as partial:
        figure.savefig(partial, format="png", dpi=80)


def of_tv(ax, steps):
    """Mean and standard deviation of TV over the seeds; DMD, which has no Δt, as a band."""
    results = found()
    dmd = results["runs"][key("DMD", steps, 64)]["mode_tv"]
    mean, sd = np.mean(dmd), np.std(dmd, ddof=1)
    title, colour = LOOK["dmd"]
    ax.axhspan(mean - sd, mean + sd, color=colour, alpha=0.25, lw=0, label=title)
    start = np.mean(results["untrained"][f"{steps}"]["mode_tv"])
    ax.axhline(start, color="black", ls=":", label="before training")
    for name, (colour, beside) in LINES.items():
        tvs = [results["runs"][key(name, steps, part)]["mode_tv"] for part in PARTS]
        dts = [beside / part for part in PARTS]
        means = [np.mean(tv) for tv in tvs]
        sds = [np.std(tv, ddof=1) for tv in tvs]
        ax.errorbar(dts, means, sds, marker="o", capsize=4, lw=2, color=colour, label=name)
    ticks = [1 / part for part in PARTS]
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"T/{part}" for part in PARTS])
    ax.minorticks_off()
    ax.set(xlabel="Δt", ylabel="TV (0 is perfect)", ylim=(0, None))
    ax.set_title(f"{many(steps).capitalize()} from the teacher: mean ± sd of 5 seeds")


def of_weights(ax):
    """Of the score difference in the student's gradient, each with mean 1 over its range of t."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0.9, 0, 5))
    for part, shade in zip((256, 64, 16, 4, 2), shades, strict=True):
        t = np.linspace(0.02 + 1 / part, 0.98, 200)  # of T
        weight = line_weight(t, 1 / part)
        ax.plot(t, weight / weight.mean(), color=shade, lw=2.5, label=f"step, Δt = T/{part}")
    dmd = found()["runs"][key("DMD", 4, 64)]
    t, weight = np.array(dmd["weight"]).T  # (24,) each
    title, colour = LOOK["dmd"]
    look = {"color": colour, "ls": "--", "lw": 2.5, "label": f"{title}, measured"}
    ax.plot(t, weight / weight.mean(), **look)
    ax.set(yscale="log", xlim=(0, 1), xlabel="t / T, from data to noise", ylabel="weight, mean 1")
    ax.set_title("How much the score difference at t counts")


def line_weight(t, dt):
    """α_s κ on the straight line, times in units of T, s = t − Δt: (1 − s) Δt / t."""
    return (1 - (t - dt)) * dt / t


def tv():
    """TV by method at some Δt, in four steps and in one; the picture has all."""
    lines = header("TV", *(f"{many(steps)}, T/{part}" for steps, part in SHOWN))
    results = found()
    cells = [pm(results["untrained"][f"{steps}"]["mode_tv"]) for steps in (4, 1)]
    blank = [""] * (len(SHOWN) // 2 - 1)
    lines.append(row_of(("before training", cells[0], *blank, cells[1], *blank)))
    for name in METHODS:
        rows = [results["runs"].get(key(name, *at)) for at in SHOWN]  # DMD has no Δt but T/64
        cells = [pm(row["mode_tv"]) if row else "" for row in rows]
        lines.append(row_of((name, *cells)))
    return lines


def races():
    """TV at rates in between, and the paired verdict of best against best."""
    finer = found()["finer"]
    lines = header("TV by rate", *(f"{rate:g}" for rate in FINER), "best against DMD's best")
    for name, steps, part in RACES:
        tvs = finer[key(name, steps, part)].values()  # by rate
        best = min(tvs, key=np.mean)
        what = f"{name}, T/{part}"
        if name == "DMD":  # the first of a race
            what, dmds = name, best
        cells = [pm(values) for values in tvs]
        lines.append(row_of((f"{what}; {many(steps)}", *cells, against(best, dmds))))
    return lines


def followers():
    """How D follows, and what could make it: by method, steps and Δt.

    The rival is DMD with as many updates of its fake score; at TTUR 1 at its best of FINER.
    """
    columns = ("TV", "modes", "cosine", "length", "linear", "rate", "against DMD at its TTUR")
    lines = header("of which D", *columns)
    runs, finer = found()["runs"], found()["finer"]
    for name, steps, part in FOLLOWERS:
        what = key(name, steps, part)
        row = runs[what]
        _, changes = EVERY[name]
        rival = min(finer[key("DMD", steps, 64)].values(), key=np.mean)  # TV of each seed
        if "ttur" in changes:
            rival = runs[key("DMD, TTUR 4", steps, 64)]["mode_tv"]
        modes = ", ".join(f"{n}" for n in row["modes_covered"])
        seen = ["", "", ""]
        if "cosine" in row:
            seen = [f"{row['cosine']:.2f}", f"{row['length']:.2g}", f"{row['linear']:.2f}"]
        verdict = against(row["mode_tv"], rival)
        cells = (what, pm(row["mode_tv"]), modes, *seen, f"{row['rate']:g}", verdict)
        lines.append(row_of(cells))
    return lines


def many(steps):
    return "one step" if steps == 1 else "four steps"


def against(values, others):
    """The verdict on TVs paired by seed, a t test at 95%."""
    if values == others:
        return ""
    verdict = paired(np.array(values), np.array(others))
    return {"holds": "less", "does not hold": "more", "tie": "a tie"}[verdict]


def readme():
    """Prints toy/WHY.md's tables."""
    print("\n\n".join("\n".join(lines) for lines in (tv(), races(), followers())))


COMMANDS = {f.__name__: f for f in (run, picture, readme)}


def main(argv):
    parser = plain_parser(__doc__)
    parser.add_argument("command", choices=COMMANDS)
    with in_one_line("why.py"):
        COMMANDS[parser.parse_args(argv).command]()


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices are small: more threads only wait for each other
    main(sys.argv[1:])
