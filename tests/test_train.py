"`sota-train` from outside, as its users run it: a process, its files, its exit code and what it says."
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sota_course.train import main

SOTA_TRAIN = [sys.executable, "-c", "from sota_course.train import main; main()"]


@pytest.fixture(scope="module")
def small():
    "A drawn set that trains in seconds."
    from sota_course.data import get_data
    return get_data("drawn", n_train=200, n_val=50, progress=False)


def sota_train(*args): return subprocess.run([*SOTA_TRAIN, *map(str, args)], capture_output=True, text=True, timeout=300)


@pytest.fixture
def refused(monkeypatch, capsys):
    "What the command says when it refuses to train. Within this process, since a new one spends its time on importing."
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["sota-train", *map(str, args)])
        with pytest.raises(SystemExit) as stopped: main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and "Traceback" not in said
        return said
    return call


def options(data, out, epochs=2): return ["--data", data, "--size", 32, "--arch", "xresnet10", "--epochs", epochs, "--bs", 20, "--out", out, "--name", "try"]


def stop_when(cmd, word, signum):
    "Run `cmd`, send it `signum` once a line that starts with `word` was printed, and wait for its end."
    process = subprocess.Popen([*SOTA_TRAIN, *map(str, cmd)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"})
    guard = threading.Timer(240, process.kill)
    guard.start()
    try:
        for line in process.stdout:
            if line.strip().strip("[").startswith(word): break
        process.send_signal(signum)
        _, err = process.communicate()
    finally: guard.cancel()
    return process.returncode, err


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    "What an undisturbed run of three epochs printed, and the folder it filled."
    out = tmp_path_factory.mktemp("whole")
    return sota_train(*options(small, out, epochs=3)), out


def scores(folder):
    res = json.loads((folder/"try-seed0.json").read_text())
    return [res[o] for o in ("accuracy", "nll", "ece")], [(o["train_loss"], o["valid_loss"]) for o in res["history"]]


def test_it_says_where_the_result_and_the_picture_are(whole):
    done, out = whole
    assert done.returncode == 0, done.stderr
    assert str(out/"try-seed0.json") in done.stdout and str(out/"try-seed0.png") in done.stdout
    assert "accuracy" in done.stdout and (out/"try-seed0.png").read_bytes().startswith(b"\x89PNG")
    assert not (out/"try-seed0.pt").exists(), "the checkpoint of a finished run is of no more use"


def test_the_result_names_its_circumstances_and_no_folder_of_this_machine(whole, small):
    text = (whole[1]/"try-seed0.json").read_text()
    res = json.loads(text)
    assert res["command"] == f"sota-train --data {small.name} --size 32 --arch xresnet10 --epochs 3 --seed 0 --bs 20"
    assert str(small.parent) not in text and str(whole[1]) not in text
    assert {"cpu", "cores", "torch", "fastai", "sota_course", "python"} <= set(res["environment"])
    assert (res["config"]["n_train"], res["config"]["n_valid"], len(res["history"])) == (200, 50, 3)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed_ends_as_if_undisturbed(small, tmp_path, whole, signum, code):
    status, err = stop_when(options(small, tmp_path, epochs=3), "0", signum)
    assert status == code and "Traceback" not in err, err
    assert [o.name for o in tmp_path.iterdir()] == ["try-seed0.pt"], "the checkpoint, and nothing half-written"
    again = err.strip().splitlines()[-1].strip()
    assert again.startswith("sota-train") and again.endswith("--resume")
    done = sota_train(*shlex.split(again)[1:])
    assert done.returncode == 0, done.stderr
    assert scores(tmp_path) == scores(whole[1])


def test_a_kill_leaves_a_checkpoint_too(small, tmp_path, whole):
    status, _ = stop_when(options(small, tmp_path, epochs=3), "0", signal.SIGKILL)
    assert status == -signal.SIGKILL
    done = sota_train(*options(small, tmp_path, epochs=3), "--resume")
    assert done.returncode == 0, done.stderr
    assert scores(tmp_path) == scores(whole[1])


def test_nothing_that_was_trained_is_overwritten_unasked(small, whole, refused):
    _, out = whole
    before = (out/"try-seed0.json").read_bytes()
    assert "--overwrite" in refused(*options(small, out, epochs=3))
    assert (out/"try-seed0.json").read_bytes() == before


def test_resuming_with_other_settings_says_which_differ(small, tmp_path, refused):
    stop_when(options(small, tmp_path, epochs=3), "0", signal.SIGTERM)
    assert "epochs was 3 and is now 4" in refused(*options(small, tmp_path, epochs=4), "--resume")
    assert (tmp_path/"try-seed0.pt").exists()


@pytest.mark.parametrize("args, word", [
    (["--arch", "resnet-51"], "xresnet50"),
    (["--data", "imagenete"], "did you mean"),
    (["--resume"], "nothing to resume"),
    (["--stats", "cifar"], "--stats"),
    (["--method", "stretch"], "squish"),
    (["--valid-pct", "20"], "between 0 and 1"),
    (["--epochs", "0"], "at least one epoch"),
    (["--bs", "0"], "at least one image"),
    (["--bs", "1000"], "lower bs"),
])
def test_a_wrong_option_is_answered_with_a_sentence(small, tmp_path, refused, args, word):
    said = refused("--data", small, "--size", 32, "--arch", "xresnet10", "--out", tmp_path, *args)
    assert word in said and len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_bad_image_stops_it_before_the_first_epoch_by_name(tmp_path, refused):
    from sota_course.data import get_data
    import shutil
    data = shutil.copytree(get_data("drawn", n_train=40, n_val=20, progress=False), tmp_path/"data")
    victim = next((data/"train").rglob("*.JPEG"))
    victim.write_bytes(victim.read_bytes()[:200])
    for pipeline in ("cached", "fastai"):
        assert victim.name in refused("--data", data, "--size", 32, "--arch", "xresnet10", "--out", tmp_path/"out", "--pipeline", pipeline)


@pytest.mark.real
def test_real_photos_train(photos, tmp_path):
    done = sota_train("--data", photos/"imagenette2-160sq", "--size", 32, "--arch", "xresnet10", "--epochs", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["accuracy"] > 0.3
