"""When does ADM beat DMD? Claims, registered before their runs, and judged: toy/CLAIMS.md.

    python toy/claims.py run                     # all regimes, goes on where it was
    python toy/claims.py run headline small      # these alone
    python toy/claims.py judge                   # toy/CLAIMS.md, from results that are there
    python toy/claims.py readme                  # prints the README's table
    python toy/claims.py run headline --mixture mine.json --results out/mine
    python toy/claims.py judge --mixture mine.json --results out/mine     # prints it

A regime is a file of --results: the rates tried for each method on seeds of their own, and the runs
at the best of them. With another mixture the rates are those that are committed.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import toy.run as toy
from runtime.files import aside, read_json
from runtime.script import in_one_line, plain_parser
from runtime.settings import require
from toy.gmm import load_mixture
from toy.run import COLUMNS, Config, World, by, metrics_of, pm

RESULTS = Path(__file__).resolve().parent / "results"
MIXTURE = "ring8-rare"

# --- The regimes ----------------------------------------------------------------------------------

SEEDS = {"seeds": 5, "first_seed": 20}  # fresh: no earlier run of this project has had them
SEARCH_SEEDS = {"seeds": 2, "first_seed": 100}
# A factor of about three apart. A search starts in the middle and goes on as long as it gets
# better, so that its choice lies inside, unless the best is hardly to train at all.
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
START = 3e-4

FROM_TEACHER = ("dmd", "step", "adm-paper", "adm-recipe")
FROM_ADP = tuple(f"adp+{method}" for method in FROM_TEACHER)
ONE_STEP = ("mse", "adp", *FROM_TEACHER, *FROM_ADP)


CHANGES = {  # what may follow a method in a run's name, and what differs then
    "": {},
    "uniform": {"schedule": "uniform"},
    "TTUR 4": {"ttur": 4},
    "TTUR 8": {"ttur": 8},
}


@dataclass
class Regime:
    """What differs from toy/run.py's defaults, and the methods that are compared in it.

    rates: the regime whose rates it takes over; "" searches its own.
    runs: with a change of CHANGES, beside the methods as they are.
    """

    about: str
    settings: dict = field(default_factory=dict)
    methods: tuple = ONE_STEP
    rates: str = ""
    runs: tuple = ()


REGIMES = {
    "headline": Regime(
        "one step, 1,000 updates, the mixture as it is",
        methods=(*ONE_STEP, "dmd2"),
        runs=(
            "adp, uniform",
            "adp+adm-paper, TTUR 4",
            "adp+adm-paper, TTUR 8",
            "adm-recipe, TTUR 4",
            "adp+adm-recipe, TTUR 4",
        ),
    ),
    **{
        f"separation-{n}": Regime(
            f"one step, modes {n}σ from the centre", {"separation": f"{n}"}, rates="headline"
        )
        for n in (5, 10, 20, 40)
    },
    "four-steps": Regime(
        "four steps from the teacher",
        {"student_steps": 4},
        FROM_TEACHER,
        runs=("adm-recipe, TTUR 4",),
    ),
    "two-steps": Regime("two steps from the teacher", {"student_steps": 2}, FROM_TEACHER),
    **{
        f"pairs-{n}": Regime(
            f"16 dimensions, {n:,} ODE pairs",
            {"dim": 16, "pairs": n},
            ("mse", "adp", *FROM_ADP),
            runs=("adp+adm-recipe, TTUR 4",),
        )
        for n in (128, 1024)
    },
    "missing": Regime(
        "no ODE pairs of modes 2 and 7",
        {"missing": "2,7"},
        ("mse", "adp", *FROM_ADP),
    ),
    "small": Regime("a student of width 16", {"student_width": 16}),
    "long": Regime(
        "one step, ten times the headline's updates",
        {"iterations": 10_000},
        ("mse", "adp", *FROM_ADP, *FROM_TEACHER),
        rates="headline",
    ),
}


def run(names, mixture, folder):
    """Searches and runs what the regimes' files do not hold yet.

    Raises BadInput, before anything runs, where a regime has no meaning for the mixture.
    """
    settings = {}
    for name in names:
        settings[name] = Config(mixture=mixture, **SEEDS, **REGIMES[name].settings)
        toy.check(settings[name])
    for name, cfg in settings.items():
        regime = REGIMES[name]
        path = folder / f"{name}.json"
        results = opened(folder, name)
        own = mixture == MIXTURE
        if own and not regime.rates:
            search(results, regime, cfg, path)
        else:
            held = opened(folder if own else RESULTS, regime.rates or name)
            results["rates"] = held["rates"]
        there = by(results["runs"], "name")
        missing = [label for label in (*regime.methods, *regime.runs) if label not in there]
        searched = all(label.partition(", ")[0] in results["rates"] for label in missing)
        require(searched, f"{name}: no rates yet: run {regime.rates or name} first")
        world = World(cfg) if missing else None
        for label in missing:
            method, _, change = label.partition(", ")
            rows = toy.train(replace(cfg, **CHANGES[change]), method, world, results["rates"])
            for row in rows:
                if name != "headline":  # points and curves are drawn of it alone
                    del row["history"], row["points"]
                results["runs"].append({"name": label, **row})
            results["config"] = vars(cfg)
            write(path, results)
            print(name, label, [round(row["tv"], 3) for row in rows], flush=True)


def opened(folder, name):
    """A regime's file, or an empty one."""
    path = folder / f"{name}.json"
    empty = {"search": {}, "rates": {}, "runs": []}
    return empty | read_json(path, "regime", "runs") if path.exists() else empty


def write(path, results):
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as partial:
        partial.write_text(json.dumps(results) + "\n")


def search(results, regime, cfg, path):
    """Fills results["rates"]: each method's rate of least mean TV, on seeds that no claim uses.

    Regression comes first, then ADP, for what begins with ADP takes their rates.
    """
    cfg = replace(cfg, **SEARCH_SEEDS)
    missing = [method for method in regime.methods if method not in results["rates"]]
    world = World(cfg) if missing else None
    for method in missing:
        trials = results["search"].setdefault(method, {})  # {rate: TV of each seed}

        def trial(rate, method=method):
            write(path, results)  # what has been tried
            rows = toy.train(cfg, method, world, results["rates"] | {method: rate})
            tvs = [round(row["tv"], 4) for row in rows]
            print("search", path.stem, method, f"{rate:g}", tvs, flush=True)
            return tvs

        results["rates"][method] = best_rate(trials, RATES, START, trial)
        write(path, results)


def best_rate(trials, rates, start, trial):
    """The rate of least mean, searched among `rates` from `start` on, down or else up.

    trials {rate: a value a seed}: what trial(rate) has returned; it grows.
    """

    def mean(i):
        name = f"{rates[i]:g}"
        if name not in trials:
            trials[name] = trial(rates[i])
        return np.mean(trials[name])

    best = rates.index(start)
    for way in (-1, 1):
        while 0 <= best + way < len(rates) and mean(best + way) < mean(best):
            best += way
    return rates[best]


# --- What is measured, and when a claim holds -----------------------------------------------------

T_CRITICAL = {2: 4.303, 4: 2.776}  # two-sided 95% of Student's t, by degrees of freedom


# Verdicts on what was measured, (seeds,) each; the docstring is the threshold as the page has it.
# "Paired": a t test on the differences, seed by seed.


def less(first, second):
    """first < second, paired"""
    d = second - first
    sd = d.std(ddof=1) / len(d) ** 0.5
    if abs(d.mean()) <= T_CRITICAL[len(d) - 1] * sd or not d.any():
        return "tie"
    return yes(d.mean() > 0)


def more(first, second):
    """first > second, paired"""
    return less(-first, -second)


def alike(first, *others):
    """means within 0.02 of the first"""
    return yes(all(abs(x.mean() - first.mean()) <= 0.02 for x in others))


def half(share):
    """at least 1/2 in every seed"""
    return yes((share >= 0.5).all())


# What `less` says, of a distance.
BETTER = {"holds": "better", "does not hold": "worse", "tie": "a tie"}


def yes(condition):
    return "holds" if condition else "does not hold"


def thirds(row):
    """Mean DMD loss in the first and in the last third of stage 2, which alone has one."""
    losses = [point["dmd_loss"] for point in row["history"] if "dmd_loss" in point]
    third = max(1, len(losses) // 3)
    return np.mean(losses[:third]), np.mean(losses[-third:])


def least_share(row):
    """The least share of a mode over its weight; 1 is perfect."""
    weights = load_mixture(row["mixture"]).weights.numpy()  # (K,)
    return (np.array(row["shares"][:-1]) / weights).min()


MEASURES = {  # what a claim is about: of a run's row
    **{said: itemgetter(name) for said, name in COLUMNS.items()},
    "least share": least_share,
    "DMD loss, first third": lambda row: thirds(row)[0],
    "DMD loss, last third": lambda row: thirds(row)[1],
    **{name: itemgetter(name) for name in ("fd", "fd_named", "fd_any", "fd_real", "coverage")},
}

# --- The claims -----------------------------------------------------------------------------------


@dataclass
class Claim:
    """A row of the table. `runs` are named as in the regime's file, or "regime/run" of another.

    holds: of the measures of each run, (seeds,) each; its docstring is the threshold.
    """

    said: str
    regime: str
    runs: tuple
    measures: tuple = ("TV",)
    holds: callable = less


DMDX = "adp+adm-paper"
RIVALS = {"adm-paper": "ADM as published", "adm-recipe": "ADM by our recipe", "step": "step (ours)"}


def beats(regime, first="", measure="TV", steps=""):
    """Three claims: that each of RIVALS does better than DMD.

    first: "adp+" for after ADP. steps: ", four steps" of runs that are named so.
    """
    start = "After ADP, " if first else ""
    end = steps.replace(",", " in").replace(" --beta1 0.5", ", β₁ 0.5")
    better = more if measure == "coverage" else less
    for rival, name in RIVALS.items():
        runs = f"{first}{rival}{steps}", f"{first}dmd{steps}"
        yield Claim(f"{start}{name} beats DMD{end}", regime, runs, (measure,), better)


def beyond_adp(regime):
    """Two claims: stage 2 is worth its while."""
    yield Claim("DMDX beats regression alone", regime, (DMDX, "mse"))
    yield Claim("DMDX beats ADP alone", regime, (DMDX, "adp"))


def seen(*claims):
    """These, of results that had been seen."""
    return [replace(claim, said=f"(seen before) {claim.said}") for claim in claims]


PHASE = ("separation-5", "separation-10", "separation-20", "headline", "separation-40")
KEEPS = "DMDX keeps modes that DMD from the teacher loses"
LOSES = "ADM as published loses modes that DMD keeps"
HELPS = "TTUR 4 helps ADM by our recipe"
FALLS = "ADM, which never optimises the DMD loss, makes it fall"


def registered():
    """All claims, by the letters of the regimes: their order in the table."""
    # (a) One step from the teacher, and the modes' distance.
    for regime in PHASE:
        yield from beats(regime)
        yield Claim(KEEPS, regime, (DMDX, "dmd"), ("modes covered",), more)
    # (b) Several steps from the teacher: the paper's setting for SD3 and CogVideoX.
    for regime in ("four-steps", "two-steps"):
        yield from beats(regime)
        yield Claim(LOSES, regime, ("adm-paper", "dmd"), ("modes covered",))
    yield Claim(HELPS, "four-steps", ("adm-recipe, TTUR 4", "adm-recipe"))
    # (c) Few pairs in 16 dimensions.
    for regime in ("pairs-128", "pairs-1024"):
        yield from beyond_adp(regime)
        yield from beats(regime, "adp+")
        yield Claim(HELPS, regime, ("adp+adm-recipe, TTUR 4", "adp+adm-recipe"))
    # (d) Modes that the pairs lack.
    yield from beyond_adp("missing")
    yield from beats("missing", "adp+")
    found = "DMDX finds modes that ADP lacks"
    yield Claim(found, "missing", (DMDX, "adp"), ("modes covered",), more)
    # (e) A student too small for the map.
    yield from beyond_adp("small")
    yield from beats("small")
    yield from beats("small", "adp+")
    # (f) After ADP, in the headline.
    yield from beyond_adp("headline")
    yield from beats("headline", "adp+")
    yield from beats("headline", "adp+", "density TV")
    # (g) The digits: three seeds. Their one step had been seen when this was registered.
    yield from seen(*beats("digits", "adp+", "fd"), *beats("digits", "adp+", "fd_any"))
    _, *of_one_step = beats("digits", measure="fd")  # ADM as published was not run
    yield from seen(*of_one_step)
    yield from beats("digits", "", "fd", ", four steps")
    for measure in ("fd_named", "fd_any", "fd_real", "coverage"):
        yield from seen(*beats("digits", "", measure, ", four steps"))
    # With less momentum, registered after the search for rates and before these runs.
    for measure in ("fd", "fd_real", "coverage"):
        _, *with_beta1 = beats("digits-levers", "", measure, ", four steps --beta1 0.5")
        yield from with_beta1
    # (h) Ten times longer.
    yield from beyond_adp("long")
    yield from beats("long")
    yield from beats("long", "adp+")
    yield from beats("long", "adp+", "density TV")
    narrows = "DMD narrows the modes as training goes on"
    yield Claim(narrows, "long", ("adp+dmd", "headline/adp+dmd"), ("density TV",), more)
    # (i) The paper's other claims.
    last_and_first = ("DMD loss, last third", "DMD loss, first third")
    for method in ("adm-paper", "adm-recipe", DMDX, "adp+adm-recipe"):
        yield Claim(FALLS, "headline", (method,), last_and_first)
    control = "DMD, which optimises it, makes the DMD loss fall (a control, seen before)"
    for method in ("dmd", "adp+dmd"):
        yield Claim(control, "headline", (method,), last_and_first)
    hardly = "After ADP, TTUR hardly matters (1, 4, 8)"
    yield Claim(hardly, "headline", (DMDX, f"{DMDX}, TTUR 4", f"{DMDX}, TTUR 8"), holds=alike)
    yield Claim(HELPS, "headline", ("adm-recipe, TTUR 4", "adm-recipe"))
    cubic = "ADP's cubic schedule keeps rare modes better than a uniform one"
    yield Claim(cubic, "headline", ("adp", "adp, uniform"), ("least share",), more)
    yield Claim("Rare modes survive under DMDX", "headline", (DMDX,), ("least share",), half)


CLAIMS = list(registered())


def judged(claim, runs):
    """(means ± sd, verdict) of a claim. runs: as `runs_in` returns them."""
    values = []
    for name in claim.runs:
        regime, _, label = name.rpartition("/")
        for measure in claim.measures:
            values.append(measured(runs, regime or claim.regime, label, measure))
    if not all(len(x) for x in values):
        return "", "not run"
    return " · ".join(map(pm, values)), claim.holds(*values)


def measured(runs, regime, label, measure="TV"):
    """A measure of each seed of a run, (seeds,); of none where there is no such run."""
    rows = runs.get((regime, label), [])
    return np.array([MEASURES[measure](row) for row in rows])


what_of = itemgetter("method", "flags", "change")  # of a row of the digits' results


def runs_in(folder):
    """{(regime, run): its rows, in the order of their seeds} of all files that are there."""
    runs = {}
    for regime in (*REGIMES, "digits", "digits-levers"):
        for row in sorted(opened(folder, regime)["runs"], key=itemgetter("seed")):
            label = row.get("name") or " ".join(filter(None, what_of(row)))
            runs.setdefault((regime, label), []).append(row)
    return runs


# --- The page -------------------------------------------------------------------------------------


def table_of_claims(runs):
    """Rows: claim · regime · methods · measured · threshold · verdict."""
    yield "claim", "regime", "methods", "measured", "mean ± sd", "threshold", "verdict"
    for claim in CLAIMS:
        about = (" · ".join(claim.runs), " · ".join(claim.measures))
        values, verdict = judged(claim, runs)
        yield claim.said, claim.regime, *about, values, claim.holds.__doc__, verdict


def matrix(runs):
    """Rows: TV in each regime, and whether it is better than DMD's by a paired test."""
    yield "TV", "start", "DMD", *RIVALS.values()
    for regime in REGIMES:
        for start, first in (("the teacher", ""), ("after ADP", "adp+")):
            dmd = measured(runs, regime, f"{first}dmd")
            if not len(dmd):
                continue
            cells = [pm(dmd)]
            for rival in RIVALS:
                tv = measured(runs, regime, f"{first}{rival}")
                cells.append(f"{pm(tv)}: {BETTER[less(tv, dmd)]}" if len(tv) else "not run")
            yield REGIMES[regime].about, start, *cells


def table_of_runs(results, regime):
    """Rows: every metric of each run of a regime's file, and the rate of its student."""
    yield "run", *COLUMNS, "rate", "rates tried"
    for label, rows in by(results["runs"], "name").items():
        method = rows[0]["method"]
        tried = sorted(results["search"].get(method, {}), key=float)
        rates = ", ".join(tried) or REGIMES[regime].rates
        yield label, *metrics_of(rows), f"{results['rates'][method]:g}", rates


def markdown(rows):
    """Text: a table of rows of cells, the first of which is its header."""
    first, *others = rows
    rows = [first, ["---"] * len(first), *others]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def page(folder):
    """CLAIMS.md below its first words, as text."""
    runs = runs_in(folder)
    parts = {"Against DMD": matrix(runs), "The claims": table_of_claims(runs)}
    for name, regime in REGIMES.items():
        results = opened(folder, name)
        if results["runs"]:
            parts[f"{name}: {regime.about}"] = table_of_runs(results, name)
    return "\n\n".join(f"## {title}\n\n{markdown(rows)}" for title, rows in parts.items())


PAGE = Path(__file__).parent / "CLAIMS.md"
TABLES = "## Against DMD\n"  # where the page's tables begin, below what is written by hand


def judge(folder):
    """The tables of toy/CLAIMS.md anew; of other results, printed."""
    if folder != RESULTS:
        print(page(folder))
        return
    words, _, _ = PAGE.read_text().partition(TABLES)
    PAGE.write_text(words + page(folder) + "\n")


def readme(folder):
    """Prints the README's table, of the headline's methods that have been run."""
    runs = runs_in(folder)
    rows = [("method", *COLUMNS)]
    for method in REGIMES["headline"].methods:
        if ("headline", method) in runs:
            rows.append((method, *metrics_of(runs["headline", method])))
    print(markdown(rows))


def main(argv=None):
    parser = plain_parser(__doc__)
    parser.add_argument("command", choices=("run", "judge", "readme"))
    parser.add_argument("regimes", nargs="*", help=f"of {', '.join(REGIMES)}; default: all")
    parser.add_argument("--mixture", default=MIXTURE, help="as of toy/run.py")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the regimes' files"
    )
    with in_one_line("claims.py"):
        args = parser.parse_intermixed_args(argv)
        folder = args.results.resolve()
        unknown = ", ".join(name for name in args.regimes if name not in REGIMES)
        require(not unknown, f"unknown regime {unknown}; there are {', '.join(REGIMES)}")
        own = args.mixture == MIXTURE
        require(own or folder != RESULTS, "--mixture: give it --results of its own, too")
        held = {row["mixture"] for name in REGIMES for row in opened(folder, name)["runs"]}
        others = ", ".join(held - {args.mixture})
        require(not others, f"--results {folder}: runs of {others}, not of {args.mixture}")
        if args.command == "run":
            run(args.regimes or list(REGIMES), args.mixture, folder)
            return
        require(held, f"--results {folder}: no runs there")
        require(not args.regimes, f"{args.command}: it takes no regimes")
        command = judge if args.command == "judge" else readme
        command(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices are small: more threads only wait for each other
    main()
