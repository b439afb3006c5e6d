"""The house: which room may import which, and that the algorithm is found where a reader looks."""

import ast
from pathlib import Path

from conftest import ROOT

# A file imports from rooms on floors below its own, or from its own room.
FLOORS = [
    ["ode"],
    ["runtime"],
    ["families"],
    ["models"],
    ["data", "sizing"],
    ["adp", "adm"],
    ["tools"],
    ["toy"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = [
    p
    for p in sorted(ROOT.rglob("*.py"))
    if p.relative_to(ROOT).parts[0].removesuffix(".py") in FLOOR
]


def name_of(path):
    """families/sdxl.py is the module families.sdxl, families/__init__.py is families."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


def imports(path):
    """The project's modules that a file imports, lazily inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & MODULES or {node.module}
    return found & MODULES - {name_of(path)}


def test_rooms_are_as_the_readme_says():
    top = {path.stem for path in ROOT.glob("*.py")}
    assert top == {"ode", "models", "data", "adp", "adm"}
    assert {name.split(".")[0] for name in MODULES} == set(FLOOR)


def test_imports_run_one_way():
    """No arrow goes up, and none across but within a room."""
    arrows = [(name_of(path), other) for path in FILES for other in imports(path)]
    assert len(arrows) > 50
    for here, there in arrows:
        room, other = here.split(".")[0], there.split(".")[0]
        assert room == other or FLOOR[other] < FLOOR[room], f"{here} imports {there}"


def test_there_is_no_circle():
    below = {name_of(path): imports(path) for path in FILES}
    while below:
        free = {name for name, others in below.items() if not others & below.keys()}
        assert free, f"a circle among {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in free}


def function(file, name):
    tree = ast.parse(Path(ROOT / file).read_text())
    return next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)


def test_the_algorithm_is_one_page_near_the_top():
    for file, name in (("adm.py", "adm_round"), ("adp.py", "adp_iteration")):
        found = function(file, name)
        assert found.end_lineno <= 150 and found.end_lineno - found.lineno < 60, (
            file,
            found.lineno,
        )
