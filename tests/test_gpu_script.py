"The script that measures on a GPU packs photos, trains in time, and does nothing twice."

import importlib.util
import shutil
import sys
from unittest import mock

import pytest
from links import ROOT
from sota_course.data import get_data


@pytest.fixture(scope="module")
def script():
    "Calls the script within this process; what it ends with, if that isn't the end."
    path = ROOT / "bench/measure_gpu.py"
    spec = importlib.util.spec_from_file_location("measure_gpu", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):
        spec.loader.exec_module(module)

    def call(*args):
        with mock.patch.object(sys, "argv", [str(path), *map(str, args)]):
            try:
                module.main()
            except SystemExit as e:
                return str(e)

    return call


@pytest.fixture(scope="module")
def packed(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    drawn = get_data("drawn", n_train=100, n_val=50, progress=False)
    shutil.copytree(drawn, folder / "imagenette2-160sq")
    args = "--data", folder, "--file", folder / "photos.tar", "--megabytes", 2
    assert script("pack", *args) is None
    return folder / "photos.tar"


def test_the_file_is_as_small_as_asked_for(script, packed, tmp_path):
    assert packed.stat().st_size <= 2e6
    args = "--data", packed.parent, "--file", tmp_path / "a", "--megabytes", 0.1
    assert "allow more --megabytes" in script("pack", *args)
    assert not (tmp_path / "a").exists()


def test_it_trains_everything_once(script, packed, tmp_path):
    args = "run", "--file", packed, "--out", tmp_path, "--tiny"
    assert script(*args) is None
    files = sorted(tmp_path.glob("gpu/*.json"))
    names = ["book-1-seed0", "fast-1-seed0", "fast-1-seed1"]
    assert [o.stem for o in files] == names
    before = [o.read_bytes() for o in files]
    assert script(*args) is None
    assert [o.read_bytes() for o in files] == before


def test_a_run_without_time_isnt_begun(script, packed, tmp_path, capsys):
    assert script("run", "--file", packed, "--out", tmp_path, "--tiny", "--minutes", 0) is None
    assert capsys.readouterr().out.count("no time left") == 3
    assert not list(tmp_path.glob("gpu/*"))
