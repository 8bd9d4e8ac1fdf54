"""Import cost, import discipline, and the arrows between the rooms (DESIGN.md §3)."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ncmethods

PACKAGE = Path(ncmethods.__file__).parent

HEAVY = ("torchvision", "timm", "wandb", "matplotlib", "sklearn", "scipy", "tqdm", "tyro")

# Arrows: what the modules of a room may import, beside _core and their own room.
BELOW = {"frames", "stats"}
ALLOWED = {
    "__init__": set(),
    "_config": set(),
    "_core": set(),
    "_frozen": {"stats"},  # for its type
    "_linalg": set(),
    "frames": set(),
    "stats": set(),
    "features": BELOW,
    "heads": BELOW | {"features"},
    "losses": BELOW | {"features"},
    "metrics": BELOW | {"features"},
    "ood": BELOW | {"features"},
    "models": BELOW | {"features"},
    "transfer": BELOW | {"features", "metrics"},
    "ufm": BELOW | {"features", "losses", "metrics"},
    "incremental": BELOW | {"features", "heads", "losses", "metrics", "data"},
    "data": BELOW,
    "tracking": BELOW,
    "viz": BELOW,
    # Losses reach the loop as arguments, bound by name.
    "training": BELOW | {"features", "heads", "metrics", "models", "tracking", "data"},
}
EVERYWHERE = {"_config", "_core", "_frozen", "_linalg"}
FREE = {"testing", "integrations", "cli", "__main__", "recipes"}  # these may import anything,
NOBODY = {"testing", "integrations", "cli", "recipes"}  # and nobody else imports these


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if not any(part.startswith(".") or part == "_files" for part in path.parts)
)


def imported_rooms(path, tree):
    """Rooms of ncmethods that a module imports, anywhere in it (also under TYPE_CHECKING)."""
    package = ("ncmethods", *path.relative_to(PACKAGE).parent.parts)
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package[: len(package) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            names += [f"{base}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    # `from ncmethods import __version__` names no room.
    return {p[1] for p in parts if p[0] == "ncmethods" and len(p) > 1} - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_run_one_way(path):
    room = room_of(path)
    if room in FREE:
        return
    assert room in ALLOWED, f"a room that DESIGN.md §3 does not know: {room}"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = imported_rooms(path, tree) - {room} - EVERYWHERE
    wrong = found - ALLOWED[room]
    assert not wrong, f"{room} may import {sorted(ALLOWED[room])}, not {sorted(wrong)}"


def test_the_arrows_are_checked():
    """The parser sees every form of import."""
    source = (
        "import ncmethods.heads.etf\nfrom ncmethods import losses, __version__\n"
        "from ncmethods.ood.neco import NECO\nfrom ..transfer import h_score\nfrom .. import ufm\n"
        "from . import sibling\nfrom .nc1 import x\nimport torch\n"
        "def f():\n    import ncmethods.viz as v\n"
    )
    found = imported_rooms(PACKAGE / "metrics" / "nc2.py", ast.parse(source))
    assert found == {"heads", "losses", "ood", "transfer", "ufm", "metrics", "viz"}
    for allowed in ALLOWED.values():
        assert not allowed & NOBODY


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_inside_functions(path):
    """At the top of a module only torch and light packages stand (TYPE_CHECKING is free)."""
    if room_of(path) in ("cli", "integrations"):  # an adapter is imported on first use
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        assert not {name.split(".")[0] for name in names} & set(HEAVY)


def fresh(code):
    """Run ``code`` in a new interpreter and return the JSON that it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_brings_only_torch():
    code = (
        "import sys, torch, json\n"
        "before = {m.split('.')[0] for m in sys.modules}\n"
        "import ncmethods\n"
        "rooms = sorted(m for m in sys.modules if m.startswith('ncmethods.'))\n"
        f"heavy = sorted(({{m.split('.')[0] for m in sys.modules}} - before) & set({HEAVY}))\n"
        "print(json.dumps([rooms, heavy]))"
    )
    rooms, heavy = fresh(code)
    assert rooms == []  # every room is lazy
    assert heavy == []


def test_rooms_bring_only_torch():
    """All rooms in one interpreter; then each is there as an attribute without an import."""
    code = (
        "import sys, torch, json\n"
        "before = {m.split('.')[0] for m in sys.modules}\n"
        "import ncmethods, importlib.util\n"
        "there = [r for r in ncmethods._ROOMS if importlib.util.find_spec('ncmethods.' + r)]\n"
        "for room in there: getattr(ncmethods, room)\n"
        f"heavy = sorted(({{m.split('.')[0] for m in sys.modules}} - before) & set({HEAVY}))\n"
        "print(json.dumps([there, heavy]))"
    )
    there, heavy = fresh(code)
    assert {"frames", "stats"} <= set(there)
    assert heavy == []


def test_lazy_rooms():
    assert set(ncmethods._ROOMS) <= set(dir(ncmethods))
    assert ncmethods.frames.simplex_etf(3, 2).shape == (3, 2)
    with pytest.raises(AttributeError, match=r"no attribute .frame.; rooms: .*frames"):
        ncmethods.frame  # noqa: B018


def test_import_costs_at_most_a_tenth_of_a_second():
    code = (
        "import torch, time\nstart = time.perf_counter()\nimport ncmethods\n"
        "print(time.perf_counter() - start)"
    )
    assert min(fresh(code) for _ in range(3)) <= 0.1
