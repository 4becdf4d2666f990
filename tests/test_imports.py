"Imports point one way, in pyproject.toml's order; a technique brings nothing but torch and numpy."

import ast
import importlib.util
import subprocess
import sys

import pytest

from links import ROOT, page_name, pyproject

PACKAGE = "sota_course"
PATHS = {
    ".".join(o.relative_to(ROOT).with_suffix("").parts): o
    for o in sorted((ROOT / PACKAGE).rglob("*.py"))
    if not o.name.startswith("_")
}
CONTRACTS = {o["id"]: o for o in pyproject()["tool"]["importlinter"]["contracts"]}
PURE = [o.removeprefix(f"{PACKAGE}.") for o in CONTRACTS["pure"]["source_modules"]]
HEAVY = CONTRACTS["pure"]["forbidden_modules"]
# Chapters that are about images as files, or about training, and need fastai for it
NEED_FASTAI = {"data", "baseline"}

# What a module may import inside a function, and why it isn't at the top.
LATE = {
    "course.exercises": {"sota_course.course.answers"},  # it imports this module, and all chapters
    "course.figures": {"ipywidgets"},  # sliders only
    "images.check": {"fastprogress"},  # so are the next two: a bar, where one is asked for
    "images.drawn": {"fastprogress"},
    "images.fetch": {"fastprogress", "fastdownload", "fastai"},  # fastai: its addresses and folders
    "training.command": {"sota_course.training.session"},  # a quick start
    "training.learner": {"timm"},  # whoever names a model of it needs it
    "training.metrics": {"matplotlib"},  # one diagram
    "training.options": {"fastcore"},  # a quick start
    "training.session": {"torch.utils.tensorboard"},  # whoever asks for event files needs it
    "training.steps": {"resource"},  # Windows has none
}


def test_the_contracts_are_kept():
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_its_layer():
    placed = [o.strip() for line in CONTRACTS["layers"]["layers"] for o in line.split("|")]
    assert len(placed) == len(set(placed)), "a module stands in two of pyproject.toml's layers"
    missing, gone = sorted(PATHS.keys() - set(placed)), sorted(set(placed) - PATHS.keys())
    assert not missing, f"give these a place among the layers in pyproject.toml: {missing}"
    assert not gone, f"pyproject.toml has layers of modules that are not there: {gone}"


def test_every_technique_is_held_to_tensors():
    "A chapter's module stands in the contract `pure`, or is named above as one that can't."
    chapters = {page_name(o.name) for o in (ROOT / "nbs").glob("[0-9]*.ipynb")}
    exported = {o for o in chapters if f"{PACKAGE}.{o}" in PATHS}
    assert exported - set(PURE) == NEED_FASTAI, "see the contract `pure` in pyproject.toml"


def imports(tree, module, package):
    "Of a syntax tree: each imported module in full, with the name that is taken from it, if any."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for o in node.names:
                yield o.name, ""
        elif isinstance(node, ast.ImportFrom):
            full = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for o in node.names:
                yield full, o.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.unparse(node.args[0]).strip("'\""), ""


@pytest.mark.parametrize("module", PATHS)
def test_no_private_name_of_another_module_is_imported(module):
    tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
    found = [
        f"{o}.{name}"
        for o, name in imports(tree, module, module.rpartition(".")[0])
        if o.startswith(PACKAGE) and name.startswith("_")
    ]
    assert not found


@pytest.mark.parametrize("module", PATHS)
def test_imports_inside_functions_are_those_that_are_listed(module):
    tree = ast.parse(PATHS[module].read_text(encoding="utf-8"))
    functions = [o for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef, ast.Lambda))]
    found = {o for f in functions for o, _ in imports(f, module, module.rpartition(".")[0])}
    allowed = LATE.get(module.partition(".")[2], set())
    assert not {o for o in found if not {o, o.partition(".")[0]} & allowed}


@pytest.mark.parametrize("name", PURE)
def test_a_technique_brings_no_library_but_torch(name):
    code = f"import sys, {PACKAGE}.{name}; print(*[o for o in {HEAVY} if o in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split()
