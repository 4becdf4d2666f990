"`train_simple.py`: a short file that trains, says what is wrong, and computes as the package does."

import ast
import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest

import sota_course  # noqa: F401 (before torch: see its `__init__`)
import torch
from PIL import Image

from links import ROOT
from sota_course.data import get_data
from sota_course.training.muon import Muon, orthogonalize
from sota_course.training.whitening import patch_eigen, whitening_filters

FILE = ROOT / "train_simple.py"
SHORT = dict(epochs=2, size=32, bs=20, width=16)


@pytest.fixture(scope="module")
def simple():
    spec = importlib.util.spec_from_file_location("train_simple", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn():
    return get_data("drawn", n_train=300, n_val=100, progress=False)


@pytest.fixture
def command(simple, monkeypatch, capsys, tmp_path):
    "Calls it as a command: its exit code, what it says, and of errors."

    def call(data, **kwargs):
        given = dict(data=data, cache=tmp_path / "cache") | kwargs
        args = [f"--{k}={v}" for k, v in given.items()]
        monkeypatch.setattr(sys, "argv", ["train_simple.py", *args])
        code = 0
        try:
            simple.main()
        except SystemExit as e:
            # Python itself prints a sentence that is given to sys.exit, with the code 1.
            code = e.code if isinstance(e.code, int) else 1
            if code == 1:
                print(e.code, file=sys.stderr)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_one_short_file():
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    imports = [o for o in ast.walk(ast.parse(text)) if isinstance(o, (ast.Import, ast.ImportFrom))]
    names = {n.name if isinstance(o, ast.Import) else o.module for o in imports for n in o.names}
    others = {o.split(".")[0] for o in names} - sys.stdlib_module_names
    assert others <= {"numpy", "PIL", "torch", "torchvision"}


def test_it_learns(command, drawn, tmp_path):
    code, out, _ = command(drawn, **SHORT | dict(epochs=6, out=tmp_path / "out"))
    assert code == 0
    sizes = [line.split(": ")[1].split(" px")[0] for line in out.splitlines() if "epoch" in line]
    assert sizes == ["16", "24", "24", "32", "32", "32"]
    (file,) = (tmp_path / "out").iterdir()
    result = json.loads(file.read_text())
    assert result["accuracy"] > 0.3 and result["mirrored"] > 0.3  # by chance: 0.1
    assert result["nll"] < 2.2 and result["seconds"] > 0
    assert f"accuracy {result['accuracy']:.4f}" in out


def test_stages_of_the_default(simple, command, drawn, monkeypatch):
    "A fifth, two fifths and the rest, whatever the training itself does."
    monkeypatch.setattr(simple, "muon", lambda means, lr: None)
    for epochs, wanted in {1: "32", 2: "24 32", 3: "16 24 32", 5: "16 24 24 32 32"}.items():
        out = command(drawn, **SHORT | dict(epochs=epochs, bs=150))[1]
        assert [o.split()[0] for o in out.split(": ")[1 : epochs + 1]] == wanted.split()


def test_seeds(command, drawn, tmp_path):
    "Same seed, same numbers; of several, mean and standard deviation."
    out = command(drawn, **SHORT, runs=2, seed=3, out=tmp_path / "a")[1]
    command(drawn, **SHORT, seed=4, out=tmp_path / "b")
    first, second = (json.loads(o.read_text()) for o in sorted((tmp_path / "a").iterdir()))
    (again,) = (json.loads(o.read_text()) for o in (tmp_path / "b").iterdir())
    numbers = "accuracy", "mirrored", "nll"
    assert [second[k] for k in numbers] == [again[k] for k in numbers]
    assert first["nll"] != second["nll"]
    nll = [first["nll"], second["nll"]]
    assert f"nll: mean {np.mean(nll):.4f}, sd {np.std(nll, ddof=1):.4f}, n 2" in out
    assert first["command"].endswith("--seed 3") and "--width 16" in first["command"]


@pytest.mark.parametrize(
    "option",
    ["epochs=0", "epochs=1.5", "size=8", "bs=1", "lr=nan", "lr=-1", "smoothing=1", "min_area=0"]
    + ["peak=1", "seed=-1", "runs=0", "width=x", "colour=red"],
)
def test_wrong_options(command, drawn, option):
    name, value = option.split("=")
    code, _, err = command(drawn, **{name: value})
    assert code == 2 and f"--{name}" in err and "Traceback" not in err


def test_wrong_data(command, drawn, tmp_path):
    code, _, err = command(tmp_path / "nowhere")
    assert code == 2 and "nowhere must hold train/<class>/ and val/<class>/" in err
    data = shutil.copytree(drawn, tmp_path / "data")
    shutil.rmtree(next((data / "val").iterdir()))
    code, _, err = command(data)
    assert code == 2 and "with the same classes" in err


def test_cache(command, simple, drawn, tmp_path, monkeypatch):
    "What was decoded is read again, until a file changes; a broken file is named."
    data = shutil.copytree(drawn, tmp_path / "data")
    short = SHORT | dict(epochs=1)
    assert command(data, **short)[0] == 0
    with monkeypatch.context() as m:
        m.setattr(simple.Image, "open", None)  # nothing is decoded now
        assert command(data, **short)[0] == 0
    file = next(o for o in (data / "train").rglob("*") if o.is_file())
    file.write_bytes(file.read_bytes()[:200])
    code, _, err = command(data, **short)
    assert code == 1 and f"{file} can't be read as an image" in err


def test_load(simple, tmp_path):
    "Pixels and classes in the order of their names, cut to squares."
    for name, colour in (("b/1.png", (255, 0, 0)), ("a/2.png", (0, 255, 0))):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (30, 20), colour).save(tmp_path / name)
    (tmp_path / "a" / ".hidden").write_text("no image")
    options = simple.argparse.Namespace(cache=tmp_path / "c", classes=["a", "b"], device="cpu")
    images, classes = simple.load(tmp_path, 16, options)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    assert classes.tolist() == [0, 1]
    assert images.float().mean((2, 3)).tolist() == [[0, 255, 0], [255, 0, 0]]


def test_augment(simple, monkeypatch):
    "From the middle of all that is drawn: the whole image, mirrored where that is asked for."
    x = torch.rand(2, 3, 12, 12)
    monkeypatch.setattr(torch, "rand", lambda *n, device=None: torch.full(n, 0.5))
    y = simple.augment(x, 12, 1.0, torch.tensor([False, True]))
    torch.testing.assert_close(y, torch.stack([x[0], x[1].flip(2)]))
    part = simple.augment(x, 6, 0.0, torch.tensor([False, False]))  # half the area: a share of 0.71
    assert part.std() < x.std() * 1.1 and part.shape == (2, 3, 6, 6)


def test_whitening_is_the_packages(simple):
    x = torch.rand(40, 3, 24, 24).cumsum(3) / 24
    weight, bias = simple.whitening_filters(x)
    wanted, wanted_bias = whitening_filters(*patch_eigen(x, 4), 24, 4e-5)
    sign = (weight.double() * wanted).sum((1, 2, 3)).sign()  # an axis has two directions
    signed = weight * sign[:, None, None, None]
    torch.testing.assert_close(signed.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.double() * sign, wanted_bias, rtol=1e-4, atol=1e-4)


def test_muon_is_the_packages(simple):
    torch.manual_seed(0)
    mine = [torch.randn(o).requires_grad_() for o in ((8, 4, 3, 3), (6, 8, 3, 3))]
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    means, optimizer = {p: torch.zeros_like(p) for p in mine}, Muon(theirs, lr=0.1)
    for _ in range(3):
        for p, q in zip(mine, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        simple.muon(means, 0.1)
        optimizer.step()
    for p, q in zip(mine, theirs):
        torch.testing.assert_close(p, q)
    step = orthogonalize(torch.randn(4, 36))
    assert (torch.linalg.svdvals(step) - 1).abs().max() < 0.4


def test_mirrored_view(simple):
    "A network sees an image and its mirror image, and the two together know more than one."
    x = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4))
    with torch.no_grad():
        plain = net(x / 255).softmax(1)
        classes = (plain + net(x.flip(3) / 255).softmax(1)).argmax(1)
    found = simple.test(net, x, classes, 32)
    assert found["mirrored"] == 1 and found["accuracy"] < 1
    nll = -plain[torch.arange(60), classes].log().mean().item()
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
