"The wheel, as a stranger gets it: it installs, imports, and runs a notebook by itself."

import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest

from conftest import copy_checkout
from links import ROOT, files
from notebooks import execute

MODULES = sorted(
    ".".join(o.relative_to(ROOT).with_suffix("").parts)
    for o in (ROOT / "sota_course").rglob("*.py")
    if not o.stem.startswith("_")
)
# What pip and commands must not see of the environment that the tests run in
OURS = ("PYTHONPATH", "VIRTUAL_ENV", "XDG_CACHE_HOME")


def run(*cmd, cwd=None, **env):
    env = {k: v for k, v in os.environ.items() if k not in OURS} | env
    done = subprocess.run([str(o) for o in cmd], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{cmd}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def build(folder, out, *options):
    "A wheel of the committed files, and of nothing that lies beside them."
    run(sys.executable, "-m", "build", *options, "--outdir", out, copy_checkout(folder))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "Built by way of the source archive, as a release is."
    out = tmp_path_factory.mktemp("dist")
    build(tmp_path_factory.mktemp("source"), out)
    return next(out.glob("*.whl"))


def member(wheel, end):
    "The text of the wheel's file whose name ends with `end`."
    with zipfile.ZipFile(wheel) as z:
        name = next(o for o in z.namelist() if o.endswith(end))
        return z.read(name).decode()


def metadata(wheel):
    return message_from_string(member(wheel, "METADATA"))


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """The Python of a new environment with the wheel and what it requires; torch is the build that
    the Makefile names."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run(getattr(sys, "_base_executable", sys.executable), "-m", "venv", folder)
    python = folder / "bin" / "python"
    named = re.search(r"^TORCH \?= (.+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    torch = (os.environ.get("TORCH") or named).split()
    quiet = "install -q --no-compile --no-input --disable-pip-version-check".split()
    # ipykernel stands for the notebook that Colab would bring.
    run(python, "-m", "pip", *quiet, wheel, "ipykernel", *torch, cwd=folder)
    run(python, ROOT / "scripts" / "torchvision_cpu.py", cwd=folder)
    return python


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = [o for o in z.namelist() if ".dist-info/" not in o]
    ours = [o.relative_to(ROOT).as_posix() for o in files()]
    results = [f"sota_course/{o}" for o in ours if re.fullmatch(r"results/([^/]+/)?[^/]+\.json", o)]
    modules = [o for o in ours if o.startswith("sota_course/")]
    assert results and sorted(names) == sorted(modules + results)


def test_metadata(wheel):
    meta = metadata(wheel)
    pythons = {o.split(" :: ")[-1] for o in meta.get_all("Classifier") if "Python :: 3." in o}
    assert pythons == {"3.10", "3.11", "3.12", "3.13"}
    assert meta["Requires-Python"] == ">=3.10" and meta["License-Expression"] == "Apache-2.0"
    assert set(meta.get_all("Provides-Extra")) == {"dev", "bench"}
    requires = [o for o in meta.get_all("Requires-Dist")]
    assert not [o for o in requires if re.search(r"[<~!]|==", o.split(";")[0])], "lower bounds only"
    bench = [o for o in requires if "bench" in o]
    for peer in ("timm", "kornia", "ttach"):
        assert any(o.startswith(peer) for o in bench), peer


def test_a_requirement_in_settings_reaches_the_wheel(tmp_path):
    folder = tmp_path / "source"
    build(folder, tmp_path / "one", "--wheel")
    settings = folder / "settings.ini"
    newer = "matplotlib>=3.9\n    some-new-thing>=7"
    changed = settings.read_text().replace("matplotlib>=3.8", newer)
    command = r"\1    sota-new=sota_course.recipe:new\n"
    settings.write_text(re.sub(r"(?m)^(console_scripts =\n)", command, changed))
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "two", folder)
    wheels = [next((tmp_path / o).glob("*.whl")) for o in ("one", "two")]
    one, two = (set(metadata(o).get_all("Requires-Dist")) for o in wheels)
    assert two - one == {"matplotlib>=3.9", "some-new-thing>=7"}
    assert one - two == {"matplotlib>=3.8"}
    assert "sota-new = sota_course.recipe:new" in member(wheels[1], "entry_points.txt")


def test_every_module_imports(clean, tmp_path):
    code = f"import importlib, sota_course; [importlib.import_module(o) for o in {MODULES}]; "
    code += "print(sota_course.__file__)"
    shown = run(clean, "-c", code, cwd=tmp_path).strip()
    assert Path(shown).is_relative_to(clean.parent.parent)


def test_commands(clean, tmp_path):
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    for line in config["DEFAULT"]["console_scripts"].split():
        name = line.split("=")[0]
        assert "usage" in run(clean.parent / name, "--help", cwd=tmp_path).lower(), name


def test_a_notebook_alone(clean, tmp_path):
    "What Colab does: one notebook in an empty folder, the package from pip, no repository near."
    shutil.copy(ROOT / "nbs" / "00_data.ipynb", tmp_path)
    nb, _ = execute(tmp_path / "00_data.ipynb", python=clean, paths=())
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert any(o.output_type != "stream" for o in outputs)


def test_the_measured_runs_come_along(clean, tmp_path):
    code = "from sota_course.training.runs import load_results as f; print(*f('imagenette-64'))"
    assert "cached" in run(clean, "-c", code, cwd=tmp_path).split()
