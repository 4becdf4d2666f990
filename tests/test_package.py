"The wheel, as someone gets it who has never seen this repository: it installs, imports, and runs a notebook by itself."

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
    for path in files():
        (new := folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, new)
    run(sys.executable, "-m", "build", *options, "--outdir", out, folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "Built by way of the source archive, as a release is."
    out = tmp_path_factory.mktemp("dist")
    build(tmp_path_factory.mktemp("source"), out)
    return next(out.glob("*.whl"))


def metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        return message_from_string(
            z.read(next(o for o in z.namelist() if o.endswith("METADATA"))).decode()
        )


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    "The Python of a new environment with the wheel and what it requires; torch is the build that the Makefile names."
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run(getattr(sys, "_base_executable", sys.executable), "-m", "venv", folder)
    python = folder / "bin" / "python"
    torch = (
        os.environ.get("TORCH")
        or re.search(r"^TORCH \?= (.+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    ).split()
    # ipykernel stands for the notebook that Colab would bring.
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "--no-input",
        "--disable-pip-version-check",
        wheel,
        "ipykernel",
        *torch,
        cwd=folder,
    )
    run(python, ROOT / "scripts" / "torchvision_cpu.py", cwd=folder)
    return python


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = [o for o in z.namelist() if ".dist-info/" not in o]
    ours = [o.relative_to(ROOT).as_posix() for o in files()]
    results = [f"sota_course/{o}" for o in ours if re.fullmatch(r"results/([^/]+/)?[^/]+\.json", o)]
    assert results and sorted(names) == sorted(
        [o for o in ours if o.startswith("sota_course/")] + results
    )


def test_metadata(wheel):
    meta = metadata(wheel)
    pythons = {o.split(" :: ")[-1] for o in meta.get_all("Classifier") if "Python :: 3." in o}
    assert pythons == {"3.10", "3.11", "3.12", "3.13"}
    assert meta["Requires-Python"] == ">=3.10" and meta["License-Expression"] == "Apache-2.0"
    assert set(meta.get_all("Provides-Extra")) == {"dev", "bench"}
    requires = [o for o in meta.get_all("Requires-Dist")]
    assert not [o for o in requires if re.search(r"[<~!]|==", o.split(";")[0])], "lower bounds only"
    assert all(
        any(o.startswith(peer) and "bench" in o for o in requires)
        for peer in ("timm", "kornia", "ttach")
    )


def test_a_requirement_in_settings_reaches_the_wheel(tmp_path):
    folder = tmp_path / "source"
    build(folder, tmp_path / "one", "--wheel")
    settings = folder / "settings.ini"
    changed = settings.read_text().replace(
        "matplotlib>=3.8", "matplotlib>=3.9\n    some-new-thing>=7"
    )
    changed = re.sub(
        r"(?m)^(console_scripts =\n)", r"\1    sota-new=sota_course.recipe:new\n", changed
    )
    settings.write_text(changed)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "two", folder)
    one, two = [
        set(metadata(next((tmp_path / o).glob("*.whl"))).get_all("Requires-Dist"))
        for o in ("one", "two")
    ]
    assert two - one == {"matplotlib>=3.9", "some-new-thing>=7"} and one - two == {
        "matplotlib>=3.8"
    }
    with zipfile.ZipFile(next((tmp_path / "two").glob("*.whl"))) as z:
        assert (
            "sota-new = sota_course.recipe:new"
            in z.read(next(o for o in z.namelist() if o.endswith("entry_points.txt"))).decode()
        )


def test_every_module_imports(clean, tmp_path):
    code = f"import importlib, sota_course; [importlib.import_module(o) for o in {MODULES}]; print(sota_course.__file__)"
    shown = run(clean, "-c", code, cwd=tmp_path).strip()
    assert Path(shown).is_relative_to(clean.parent.parent)


def test_commands(clean, tmp_path):
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    for line in config["DEFAULT"]["console_scripts"].split():
        name = line.split("=")[0]
        assert "usage" in run(clean.parent / name, "--help", cwd=tmp_path).lower(), name


def test_a_notebook_alone(clean, tmp_path):
    "What Colab does: one notebook in an empty folder, with the package from pip and no repository near."
    shutil.copy(ROOT / "nbs" / "00_data.ipynb", tmp_path)
    nb, _ = execute(tmp_path / "00_data.ipynb", python=clean, paths=())
    assert any(
        o.output_type != "stream" for c in nb.cells if c.cell_type == "code" for o in c.outputs
    )


def test_the_measured_runs_come_along(clean, tmp_path):
    code = (
        "from sota_course.training.runs import load_results; print(*load_results('imagenette-64'))"
    )
    assert "cached" in run(clean, "-c", code, cwd=tmp_path).split()
