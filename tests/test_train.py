"""`sota-train` as its users meet it: its files, its exit code and what it says, by a process where
signals matter, else within this one."""

import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import sota_course.training.recipe_runs
import sota_course.training.runs
import sota_course.training.command
import sota_course.training.session
from sota_course.training.command import Signals, main
from sota_course.training.options import OPTION_RULES, read_options
from sota_course.training.recipes import RULES, Recipe, from_toml, preset

SOTA_TRAIN = [sys.executable, "-c", "from sota_course.training.command import main; main()"]


@pytest.fixture(scope="module")
def small():
    "A drawn set that trains in seconds."
    from sota_course.data import get_data

    return get_data("drawn", n_train=200, n_val=50, progress=False)


def sota_train(*args):
    return subprocess.run(
        [*SOTA_TRAIN, *map(str, args)], capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def command(monkeypatch, capsys):
    """The command within this process, since a new one spends its time on importing: exit code,
    output, what it says of errors."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["sota-train", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return stopped.value.code, said.out, said.err

    before = {o: signal.getsignal(o) for o in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.unraisablehook
    yield call
    sys.unraisablehook = hook
    for o, handler in before.items():
        signal.signal(o, handler)


@pytest.fixture
def refused(command):
    "What the command says when it refuses: one sentence, and 2."

    def call(*args):
        code, _, said = command(*args)
        assert code == 2 and said.startswith("sota-train: ") and len(said.splitlines()) == 1, said
        return said

    return call


def flags(**kwargs):
    "The command's arguments: data=folder gives --data folder."
    return [o for k, v in kwargs.items() for o in (f"--{k.replace('_', '-')}", v)]


def options(data, out, epochs=2):
    return flags(data=data, size=32, arch="xresnet10", epochs=epochs, bs=20, out=out, name="try")


def stop_when(cmd, word, signum):
    """Run `cmd`, send it `signum` once a line that starts with `word` was printed, and wait for its
    end."""
    args, pipe = [*SOTA_TRAIN, *map(str, cmd)], subprocess.PIPE
    process = subprocess.Popen(args, stdout=pipe, stderr=pipe, text=True, bufsize=1)
    guard = threading.Timer(240, process.kill)
    guard.start()
    try:
        for line in process.stdout:
            if line.strip().strip("[").startswith(word):
                break
        process.send_signal(signum)
        _, err = process.communicate()
    finally:
        guard.cancel()
    return process.returncode, err


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    "What an undisturbed run of three epochs printed, and the folder it filled."
    out = tmp_path_factory.mktemp("whole")
    return sota_train(*options(small, out, epochs=3)), out


def scores(folder):
    res = json.loads((folder / "try-seed0.json").read_text())
    losses = [(o["train_loss"], o["valid_loss"]) for o in res["history"]]
    return [res[o] for o in ("accuracy", "nll", "ece")], losses


def test_it_says_where_the_result_and_the_picture_are(whole):
    done, out = whole
    assert done.returncode == 0, done.stderr
    assert str(out / "try-seed0.json") in done.stdout and str(out / "try-seed0.png") in done.stdout
    assert "accuracy" in done.stdout and (out / "try-seed0.png").read_bytes().startswith(b"\x89PNG")
    left = ["try-seed0-model", "try-seed0.json", "try-seed0.png", "try-seed0.toml"]
    assert sorted(o.name for o in out.iterdir()) == left


def test_output_that_is_no_terminal_has_a_table_with_a_header(whole):
    done, out = whole
    lines = [o.split() for o in done.stdout.splitlines()]
    header = "epoch train_loss valid_loss accuracy time"
    assert lines[0] == header.split(), "before anything else"
    assert [o[0] for o in lines[1:4]] == ["0", "1", "2"] and {len(o) for o in lines[:4]} == {5}
    stored = json.loads((out / "try-seed0.json").read_text())
    assert float(lines[3][3]) == pytest.approx(stored["accuracy"], abs=1e-5)


def test_it_says_how_to_use_the_model_and_that_works(whole, small):
    done, out = whole
    said = [o.strip() for o in done.stdout.splitlines()[-2:]]
    image = next((small / "val").rglob("*.JPEG"))
    names = {}
    exec(said[0], names)
    predicted = eval(said[1].replace("'image.jpg'", repr(str(image))), names)
    assert len(predicted) == 10 and sum(predicted.values()) == pytest.approx(1)
    stored = json.loads((out / "try-seed0.json").read_text())
    assert accuracy(out / "try-seed0-model", small) == stored["accuracy"]


def accuracy(folder, data):
    "The share of the validation images that a saved model names rightly."
    from sota_course.data import class_name
    from sota_course.training.models import load_model

    model, files = load_model(folder), sorted((data / "val").rglob("*.JPEG"))
    best = model.probabilities(files).argmax(1).tolist()
    return sum(model.classes[i] == class_name(o) for i, o in zip(best, files)) / len(files)


def test_the_fastai_pipeline_leaves_a_model_too(small, tmp_path, command):
    more = flags(pipeline="fastai", presize=64, workers=0)
    code, out, _ = command(*options(small, tmp_path, 1), *more)
    assert code == 0 and "load_model" in out
    stored = json.loads((tmp_path / "try-seed0.json").read_text())
    found = accuracy(tmp_path / "try-seed0-model", small)
    assert found == pytest.approx(stored["accuracy"], abs=0.021)


def test_a_model_that_cannot_be_described_is_a_sentence(small, tmp_path, command, monkeypatch):
    def refuse(learn, folder):
        raise ValueError("a card can't describe it")

    monkeypatch.setattr("sota_course.training.session.save_model", refuse)
    code, out, _ = command(*options(small, tmp_path, 1))
    assert code == 0
    assert "No model was saved: a card can't describe it." in out
    assert "load_model" not in out


def test_the_result_names_its_circumstances_and_no_folder_of_this_machine(whole, small):
    text = (whole[1] / "try-seed0.json").read_text()
    res = json.loads(text)
    command = (
        f"sota-train --data {small.name} --size 32 --bs 20 --arch xresnet10 --epochs 3 --seed 0"
    )
    assert res["command"] == command
    assert str(small.parent) not in text and str(whole[1]) not in text
    assert str(small.parent) not in (whole[1] / "try-seed0.toml").read_text()
    assert {"cpu", "cores", "torch", "fastai", "sota_course", "python"} <= set(res["environment"])
    assert (res["config"]["n_train"], res["config"]["n_valid"], len(res["history"])) == (200, 50, 3)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed_ends_as_if_undisturbed(
    small, tmp_path, whole, command, signum, code
):
    status, err = stop_when(options(small, tmp_path, epochs=3), "0", signum)
    assert status == code and "Traceback" not in err, err
    # The checkpoint, and nothing half-written.
    assert [o.name for o in tmp_path.iterdir()] == ["try-seed0.pt"]
    again = err.strip().splitlines()[-1].strip()
    assert again.startswith("sota-train") and again.endswith("--resume")
    assert command(*shlex.split(again)[1:])[0] == 0
    assert scores(tmp_path) == scores(whole[1])


# Everything at once that carries something from one step, epoch or stage to the next
RICH = dict(
    size=32,
    stages="2x16 2x24 2x32x40",
    bs=20,
    arch="whitened_resnet24",
    opt="muon",
    lr=0.05,
    wd=0.0,
    schedule="triangular",
    aug="crops",
    flip="alternate",
    mixup=0.4,
    cutmix=1.0,
    mix_until=0.7,
    smoothing=0.1,
    ema=0.9,
    accumulate=2,
    clip=10.0,
    views="flip",
    name="try",
)
KILLED = """
import os, signal
from sota_course.training.command import main
from sota_course.training.stopping import Stopper

def after_batch(self):
    if self.training and (self.epoch, self.iter) == {place}:
        os.kill(os.getpid(), signal.SIGKILL)

Stopper.after_batch = after_batch
main()
"""


def killed_in(place, args):
    "Run the command in a process that is killed after a batch: `place` is its epoch and number."
    script = [sys.executable, "-c", KILLED.format(place=place), *map(str, args)]
    return subprocess.run(script, capture_output=True, text=True, timeout=240)


def test_killed_in_the_middle_of_each_stage_it_ends_with_the_same_weights(small, tmp_path, command):
    out, calm = tmp_path / "out", tmp_path / "calm"
    args = flags(data=small, out=out, **RICH)
    epochs = [(0, 4), (3, 7), (5, 2)]  # of the first, second and third stage
    for i, place in enumerate(epochs):
        done = killed_in(place, [*args, *(["--resume"] if i else [])])
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [o.name for o in out.iterdir()] == ["try-seed0.pt"]
    assert command(*args, "--resume")[0] == 0
    assert command(*flags(data=small, out=calm, **RICH))[0] == 0
    assert numbers(out) == numbers(calm)
    for o in ("card.json", "model.safetensors"):
        ours, theirs = (folder / "try-seed0-model" / o for folder in (out, calm))
        assert ours.read_bytes() == theirs.read_bytes(), o


def test_nothing_that_was_trained_is_overwritten_unasked(small, whole, refused):
    _, out = whole
    before = (out / "try-seed0.json").read_bytes()
    assert "--overwrite" in refused(*options(small, out, epochs=3))
    assert (out / "try-seed0.json").read_bytes() == before


def test_resuming_with_other_settings_says_which_differ(
    small, tmp_path, command, refused, monkeypatch
):
    half(small, tmp_path, command, monkeypatch)
    assert "epochs was 2 and is now 4" in refused(*options(small, tmp_path, epochs=4), "--resume")
    assert (tmp_path / "try-seed0.pt").exists()


NONE = ("", " ")
NUMBERS = ("nan", "inf", "-inf", "-1", "two", "", "1e400")
WHOLE = (*NUMBERS, "1.5", "1000000000000")
SHARES = (*NUMBERS, "1.1")
WRONG = dict(
    data=NONE,
    size=(*WHOLE, "0", "7", "3277", "6.5"),
    bs=(*WHOLE, "0", "1"),
    presize=(*WHOLE, "0", "31", "4097"),
    method=(*NONE, "stretch"),
    valid_pct=(*SHARES, "0", "1", "20"),
    per_class=(*WHOLE, "0"),
    pipeline=(*NONE, "torch"),
    stats=(*NONE, "cifar"),
    arch=(*NONE, "resnet-51", "XResNet18"),
    epochs=(*WHOLE, "0"),
    first_size=(*WHOLE, "7", "33"),
    stages=(*NONE, "2x4", "32", "2x", "0x32", "2x32x1", "2x64", "x32", "2x32 1"),
    opt=(*NONE, "lamb"),
    lr=(*NUMBERS, "0", "-0.0"),
    wd=NUMBERS,
    schedule=(*NONE, "cosine"),
    peak=(*SHARES, "0", "1"),
    accumulate=(*WHOLE, "0"),
    clip=(*NUMBERS, "0"),
    aug=(*NONE, "rand"),
    min_scale=(*SHARES, "0", "1e-9"),
    flip=(*NONE, "both"),
    mixup=NUMBERS,
    cutmix=NUMBERS,
    mix_until=(*SHARES, "0.5"),  # of what isn't mixed
    smoothing=(*SHARES, "1"),
    ema=(*SHARES, "1"),
    lookahead=WHOLE,
    precision=(*NONE, "int8"),
    channels_last=("yes",),
    compile=("yes",),
    views=(*NONE, "dense"),
    seed=(*WHOLE, 2**32),
    preset=("", "slow", "Fast"),
    recipe=("", "no/such/file.toml"),
    workers=(*WHOLE, "100000"),
    runs=(*WHOLE, "0", "1001"),
    name=("", "a/b", "..", "/", "../x", "a\\b", ".hidden", "a\nb", "x" * 101),
    out=NONE,
)


@pytest.mark.parametrize("option", sorted(WRONG))
def test_a_wrong_value_is_refused_before_anything_is_imported_or_made(
    option, tmp_path, monkeypatch, refused
):
    monkeypatch.setitem(sys.modules, "sota_course.training.session", None)  # an import would fail
    monkeypatch.chdir(tmp_path)
    flag = f"--{option.replace('_', '-')}"
    for value in WRONG[option]:
        assert flag in refused("--size", 32, f"{flag}={value}"), value
        assert not list(tmp_path.iterdir()), value


def test_every_option_is_held_against_wrong_values():
    ruled = {o for rules in RULES.values() for o in rules} | set(OPTION_RULES)
    assert set(WRONG) == ruled | {"preset", "recipe"}, "WRONG needs an entry for each option"


@pytest.mark.parametrize(
    "args, word",
    [
        (["--nosuch"], "--nosuch"),
        (["--lr"], "--lr"),
        (["drawn"], "drawn"),
        (["--resume=yes"], "--resume"),
        (["--epoch", "2"], "--epoch"),
        (["--resume", "--overwrite"], "choose one"),
        (["--stages", "1x32 1x64", "--epochs", "3"], "--epochs"),
        (["--stages", "1x32", "--first-size", "32"], "--first-size"),
        (["--ema", "0.9", "--lookahead", "5"], "--ema"),
        (["--pipeline", "fastai", "--flip", "alternate"], "--flip"),
        (["--seed", 2**32 - 1, "--runs", "2"], "--runs"),
        (["--data", "/", "--name", ""], "--name"),
    ],
)
def test_what_is_no_option_is_refused_too(args, word, refused):
    assert word in refused(*args)


TYPED = st.one_of(
    st.floats(),
    st.integers(),
    st.text(max_size=20),
    st.sampled_from(["1e-3", "nan", "inf", "-0", "cached", "0.5", "32"]),
)
LEGAL = dict(
    lr=lambda o: math.isfinite(float(o)) and float(o) > 0,
    clip=lambda o: o == "none" or float(o) > 0,
    min_scale=lambda o: 0 < float(o) <= 1,
    valid_pct=lambda o: o == "none" or 0 < float(o) < 1,
    size=lambda o: int(o) > 0,
    epochs=lambda o: int(o) > 0,
    bs=lambda o: int(o) > 1,
    workers=lambda o: o == "none" or int(o) >= 0,
    runs=lambda o: 0 < int(o) <= 1000,
    seed=lambda o: int(o) >= 0,
    name=lambda o: str(o) and Path(str(o)).name == str(o),
    arch=lambda o: o.startswith(("small", "whitened", "xresnet", "timm:")),
)
FREE = {"channels_last", "compile"}  # they take no value


@given(TYPED)
def test_property_whatever_is_typed_is_refused_in_a_sentence_or_legal(value):
    for option in WRONG.keys() - FREE:
        seen, said = [], []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["sota-train", f"--{option.replace('_', '-')}={value}"])
            patch.setattr(sota_course.training.command, "_start", lambda: seen.append)
            patch.setattr("builtins.print", lambda *o, file=None: said.append(str(o[0])))
            code = sota_course.training.command._code(Signals())
        if code:
            assert code == 2 and not seen and len(said) == 1
        else:
            assert len(seen) == 1 and LEGAL.get(option, bool)(str(value)), option


# A preset, a file, and what is typed


def test_what_is_typed_counts_more_than_the_file_and_this_more_than_the_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('lr = 0.5\nsmoothing = 0.3\narch = "xresnet10"\n')
    typed = ["--preset", "fast", "--recipe", str(file), "--lr", "0.1", "--out", str(tmp_path)]
    options = read_options(typed)
    assert options.recipe == preset("fast", lr=0.1, smoothing=0.3, arch="xresnet10")


def test_a_recipe_file_that_cannot_be_meant_is_named(tmp_path, refused):
    file = tmp_path / "mine.toml"
    wrong = {
        "epochs 3": "TOML",
        "epochs = 0": "epochs must be",
        "lr = nan": "lr must be",
        "epoch = 3": "did you mean epochs",
        'preset = "slow"': "preset must be one of",
        "preset = [1, 2]": "preset must be one of",
        "[data]\nx = 1": "data must be",
        'lr = "fast"': "lr must be",
    }
    for text, word in wrong.items():
        file.write_text(text)
        said = refused("--recipe", file, "--out", tmp_path)
        assert f"--recipe {file}" in said and word in said, text
    file.write_bytes(b"\xff\xfe")
    assert "--recipe" in refused("--recipe", file)
    assert "directory" in refused("--recipe", tmp_path).lower()


def test_a_typed_value_is_named_by_its_option_beside_a_file_too(tmp_path, refused):
    file = tmp_path / "mine.toml"
    file.write_text("lr = 0.1\n")
    said = refused("--recipe", file, "--lr", "nan")
    assert said.startswith("sota-train: --lr must be")


def test_the_recipe_of_a_run_gives_the_same_run(whole, small, tmp_path, command):
    _, out = whole
    recipe = out / "try-seed0.toml"
    assert from_toml(recipe) == Recipe(data=small.name, size=32, arch="xresnet10", epochs=3, bs=20)
    args = flags(recipe=recipe, data=small, out=tmp_path, name="try")
    code, _, err = command(*args)
    assert code == 0, err
    assert scores(tmp_path) == scores(out)


TINY = dict(size=32, arch="small_resnet", epochs=1, bs=20)


def test_several_seeds_end_with_mean_and_interval_and_go_on(small, tmp_path, command, refused):
    args = flags(data=small, out=tmp_path, name="try", views="flip", **TINY)
    code, out, err = command(*args, "--runs", 2)
    assert code == 0, err
    ends = ("-model", ".json", ".png", ".toml")
    expected = [f"try-seed{i}{o}" for i in (0, 1) for o in ends]
    assert sorted(o.name for o in tmp_path.iterdir()) == sorted(expected)
    table = [o.split() for o in out.splitlines()]
    assert any(o[:2] == ["try", "2"] and o[3] == "±" for o in table), out
    assert any(o[:3] == ["try,", "flip", "2"] for o in table), out
    stored = [json.loads((tmp_path / f"try-seed{i}.json").read_text()) for i in (0, 1)]
    assert [o["command"][-8:] for o in stored] == ["--seed 0", "--seed 1"]
    assert [from_toml(tmp_path / f"try-seed{i}.toml").seed for i in (0, 1)] == [0, 1]
    # What is there isn't trained again, and no seed is overwritten unasked.
    before = contents(tmp_path)
    assert "--overwrite" in refused(*args, "--runs", 3)
    code, out, _ = command(*args, "--runs", 3, "--resume")
    assert code == 0 and out.count("finished before") == 2
    after = contents(tmp_path)
    assert {k: after[k] for k in before} == before and "try-seed2.json" in after
    # The seeds are runs of their own: the second is what --seed 1 gives.
    alone = tmp_path / "alone"
    assert command(*flags(data=small, out=alone, name="try", seed=1, **TINY))[0] == 0
    one = json.loads((alone / "try-seed1.json").read_text())
    assert one["nll"] == stored[1]["nll"] != stored[0]["nll"]


@pytest.mark.parametrize(
    "args, word",
    [
        (["--data", "imagenete"], "did you mean"),
        (["--data", "nosuch"], "nosuch"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--resume"], "nothing to resume"),
        (["--valid-pct", "0.0001"], "0 validation images"),
        (["--bs", "1000"], "smaller bs"),
    ],
)
def test_what_only_the_data_can_tell_is_a_sentence_too(small, tmp_path, refused, args, word):
    said = refused("--data", small, "--size", 32, "--arch", "xresnet10", "--out", tmp_path, *args)
    assert word in said
    assert not list(tmp_path.iterdir())


def drawn(folder, *classes):
    "A data set with some of the drawn classes."
    from sota_course.data import get_data

    data = get_data("drawn", n_train=200, n_val=50, progress=False)
    for split in ("train", "val"):
        for o in classes:
            shutil.copytree(data / split / o, folder / split / o)
    return folder


def test_a_single_class_is_refused(tmp_path, refused):
    data = drawn(tmp_path / "data", "n03028079")
    for pipeline in ("cached", "fastai"):
        args = flags(data=data, size=32, bs=4, out=tmp_path / "out", pipeline=pipeline)
        said = refused(*args)
        assert "the single class 'n03028079'" in said and not (tmp_path / "out").exists()


def test_data_named_by_a_dot_gives_its_name(tmp_path, monkeypatch, command):
    data = drawn(tmp_path / "two", "n03028079", "n03888257")
    monkeypatch.chdir(data)
    args = flags(data=".", size=32, arch="xresnet10", bs=8, epochs=1, out=tmp_path / "out")
    code, _, said = command(*args)
    assert code == 0, said
    text = (tmp_path / "out" / "two-xresnet10-32px-seed0.json").read_text()
    assert json.loads(text)["command"].startswith("sota-train --data two ")
    assert str(tmp_path) not in text


def bad_outs(folder):
    (folder / "file").touch()
    outs = [folder / "file", folder / "file" / "below", folder / ("x" * 300)]
    if sys.platform == "linux":
        outs.append(Path("/proc/nothing/here"))  # which takes no files, not even from root
    return outs


def test_an_out_that_takes_no_files_is_named(tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "sota_course.training.session", None)
    for out in bad_outs(tmp_path):
        said = refused("--out", out)
        assert f"--out {out}" in said
    assert [o.name for o in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_out_without_permission_is_named(tmp_path, refused):
    tmp_path.chmod(0o500)
    try:
        assert "--out" in refused("--out", tmp_path / "new")
    finally:
        tmp_path.chmod(0o700)


def test_a_bad_image_stops_it_before_the_first_epoch_by_name(tmp_path, command):
    from sota_course.data import get_data

    whole = get_data("drawn", n_train=40, n_val=20, progress=False)
    data = shutil.copytree(whole, tmp_path / "data")
    victim = next((data / "train").rglob("*.JPEG"))
    victim.write_bytes(victim.read_bytes()[:200])
    for pipeline in ("cached", "fastai"):
        out = tmp_path / "out"
        args = flags(data=data, size=32, arch="xresnet10", bs=20, out=out, pipeline=pipeline)
        code, _, said = command(*args)
        assert code == 2 and victim.name in said and not out.exists()


def test_a_training_that_diverges_is_no_result(small, tmp_path, command):
    code, out, said = command(*options(small, tmp_path), "--lr", "1e6")
    assert code == 1
    assert "diverged: in epoch 0, batch " in said and " of 10, the loss is " in said
    assert "lower --lr" in said
    assert len(said.strip().splitlines()) == 1
    # No result, no picture, no model.
    assert [o.name for o in tmp_path.iterdir()] == ["try-seed0.pt"]
    code, _, said = command(*options(small, tmp_path, 1), "--overwrite")
    assert code == 0, said


def test_a_refusal_costs_nothing_of_what_overwrite_would_replace(
    small, whole, tmp_path, refused, command
):
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / "try-seed0-model" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    refused(*options(small, tmp_path, 3), "--overwrite", "--bs", 1000)
    refused(*options("nosuch", tmp_path, 3), "--overwrite")
    assert contents(tmp_path) == before
    code, _, said = command(*options(small, tmp_path, 1), "--overwrite", "--seed", 0)
    assert code == 0, said
    after = contents(tmp_path)
    assert after.keys() == before.keys() and after["try-seed0-model/notes.txt"] == b"mine"
    assert not [o for o in before if before[o] == after[o] and "notes" not in o]


def contents(folder):
    return {
        o.relative_to(folder).as_posix(): o.read_bytes() for o in folder.rglob("*") if o.is_file()
    }


def test_too_little_memory_is_a_sentence(small, tmp_path, refused, monkeypatch):
    def out_of_memory(*args):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        )

    monkeypatch.setattr("sota_course.training.session.recipe_learner", out_of_memory)
    assert "try --bs 10" in refused(*options(small, tmp_path))
    assert "try --bs 8" in refused(*options(small, tmp_path), "--bs", 16)


# Looking ahead


def test_a_dry_run_shows_the_plan_and_its_cost_and_leaves_nothing(small, tmp_path, command):
    args = flags(data=small, out=tmp_path, stages="1x16 2x32", **TINY | dict(epochs=3))
    code, out, err = command(*args, "--dry-run", "--profile", "--overwrite")
    assert code == 0, err
    assert 'stages = "1x16 2x32"' in out and "bs = 20" in out
    rows = [o.split() for o in out.splitlines()]
    assert any(o[:3] == ["16", "20", "1"] for o in rows), out
    assert any(o[:3] == ["32", "20", "2"] for o in rows), out
    assert "MiB" in out and "fp32" in out
    assert {"data", "augmentation", "backward", "optimizer"} <= {o[0] for o in rows if o}
    assert not list(tmp_path.iterdir())


def test_a_precision_that_the_device_lacks_is_refused(small, tmp_path, refused):
    said = refused(*options(small, tmp_path), "--precision", "fp16")
    assert "precision must be one of fp32" in said


def test_event_files_are_asked_for_where_nothing_writes_them(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    said = refused("--tensorboard", "--out", tmp_path)
    assert "pip install tensorboard" in said


def test_event_files_hold_what_the_result_says(small, tmp_path, command):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    code, out, err = command(*options(small, tmp_path, 2), "--tensorboard")
    assert code == 0 and "tensorboard --logdir" in out, err
    events = accumulator.EventAccumulator(str(tmp_path / "try-seed0-events"))
    events.Reload()
    stored = json.loads((tmp_path / "try-seed0.json").read_text())
    found = events.Scalars("epoch/accuracy")
    assert [o.step for o in found] == [200, 400], "images seen"
    expected = [o["accuracy"] for o in stored["history"]]
    assert [o.value for o in found] == pytest.approx(expected, abs=1e-6)
    assert len(events.Scalars("batch/loss")) == 20


# Stopped at any moment


class Killed(BaseException):
    "Nothing catches it, as nothing catches a kill."


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    "The folder of a run that was killed when its epochs were over and nothing else was done."
    out = tmp_path_factory.mktemp("trained")
    args = [*options(small, out, 1), "--views", "five"]
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, "_save", "before", args)
    assert [o.name for o in out.iterdir()] == ["try-seed0.pt"]
    return out


STEPS = ("score_views", "_save", "_draw", "_write_recipe", "save", "unlink")


def numbers(folder):
    views = json.loads((folder / "try-seed0.json").read_text())["extra"]["views"]
    return scores(folder), views | dict(seconds=0)


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    "The numbers of the same run when nobody kills it."
    out = tmp_path_factory.mktemp("undisturbed")
    words = [*options(small, out, 1), "--views", "five"]
    sota_course.training.session.run_training(read_options(list(map(str, words))))
    return numbers(out)


def killed_at(patch, step, when, args):
    "Run the command, and kill it before the step or after it."
    owner = {
        "score_views": sota_course.training.recipe_runs.RecipeRun,
        "save": sota_course.training.runs.Result,
        "unlink": Path,
    }.get(step, sota_course.training.session)
    real = getattr(owner, step)

    def wrapped(*args, **kwargs):
        if step == "unlink" and args[0].suffix != ".pt":
            return real(*args, **kwargs)
        if when == "after":
            real(*args, **kwargs)
        raise Killed

    with patch.context() as inner:
        inner.setattr(owner, step, wrapped)
        inner.setattr(sys, "argv", ["sota-train", *map(str, args)])
        before = {o: signal.getsignal(o) for o in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(Killed):
                main()
        finally:
            for o, handler in before.items():
                signal.signal(o, handler)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_between_two_steps_of_its_end_it_is_completed(
    small, trained, undisturbed, tmp_path, monkeypatch, command, step, when
):
    out = shutil.copytree(trained, tmp_path / "out")
    args = [*options(small, out, 1), "--views", "five", "--resume"]
    killed_at(monkeypatch, step, when, args)
    code, said, err = command(*args)
    assert code == 0, err
    left = "-model/card.json", "-model/model.safetensors", ".json", ".png", ".toml"
    assert sorted(contents(out)) == [f"try-seed0{o}" for o in left]
    assert "load_model" in said and "try, five" in said and "try-seed0.png" in said
    assert numbers(out) == undisturbed


def test_what_a_kill_left_half_written_goes(small, trained, tmp_path, command):
    out = shutil.copytree(trained, tmp_path / "out")
    (out / "try-seed0-model").mkdir()
    for o in (".png", ".json", ".pt", "-model/card.json", "-model/model.safetensors"):
        (out / f"try-seed0{o}.999999999.part").touch()  # no process has this number
    code, _, err = command(*options(small, out, 1), "--resume")
    assert code == 0, err
    assert not list(out.rglob("*.part"))


@pytest.fixture
def finished(whole, tmp_path):
    "A finished run of three epochs without views."
    return shutil.copytree(whole[1], tmp_path / "finished")


def test_views_are_added_to_a_finished_run(small, finished, command):
    before = json.loads((finished / "try-seed0.json").read_text())
    code, out, err = command(*options(small, finished, 3), "--resume", "--views", "ten")
    assert code == 0 and "finished before" in out and "try, ten" in out, err
    after = json.loads((finished / "try-seed0.json").read_text())
    views = after["extra"].pop("views")
    assert views["name"] == "ten" and 0 < views["accuracy"] < 1
    assert after["command"] == before["command"].replace("--seed", "--views ten --seed")
    assert from_toml(finished / "try-seed0.toml").views == "ten"
    assert after | dict(command="") == before | dict(command=""), "nothing else has changed"


def test_a_picture_that_is_gone_is_drawn_again(small, finished, command):
    (finished / "try-seed0.png").unlink()
    code, out, err = command(*options(small, finished, 3), "--resume")
    assert code == 0 and "try-seed0.png" in out, err
    assert (finished / "try-seed0.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_that_lacks_nothing_is_left_as_it_is(small, finished, command):
    before = contents(finished)
    (finished / "try-seed0.pt").write_bytes(b"left by a kill between the result and the end")
    code, out, _ = command(*options(small, finished, 3), "--resume")
    assert code == 0 and "finished before" in out and contents(finished) == before


def test_what_cannot_be_had_any_more_is_said(small, finished, command, refused):
    shutil.rmtree(finished / "try-seed0-model")
    before = contents(finished)
    said = refused(*options(small, finished, 3), "--resume", "--views", "flip")
    assert "views can't be had" in said and "--overwrite" in said and contents(finished) == before
    code, out, _ = command(*options(small, finished, 3), "--resume")
    assert code == 0 and "model can't be had" in out and "--overwrite" in out


def test_another_run_s_model_is_not_taken_for_this_one_s(
    small, finished, trained, tmp_path, command, refused
):
    other = shutil.copytree(trained, tmp_path / "other")
    assert command(*options(small, other, 1), "--resume")[0] == 0
    shutil.rmtree(finished / "try-seed0-model")
    shutil.copytree(other / "try-seed0-model", finished / "try-seed0-model")
    said = refused(*options(small, finished, 3), "--resume", "--views", "flip")
    assert "isn't the model of this result" in said
    assert "views" not in (finished / "try-seed0.json").read_text()


def test_a_checkpoint_beside_a_result_still_gives_the_model(small, trained, tmp_path, command):
    "What a run leaves that was killed after its result, by a version that wrote no model."
    out = shutil.copytree(trained, tmp_path / "out")
    checkpoint = (out / "try-seed0.pt").read_bytes()
    assert command(*options(small, out, 1), "--resume")[0] == 0
    before = scores(out)
    shutil.rmtree(out / "try-seed0-model")
    (out / "try-seed0.pt").write_bytes(checkpoint)
    assert command(*options(small, out, 1), "--resume", "--views", "five")[0] == 0
    assert (out / "try-seed0-model" / "card.json").exists() and scores(out) == before


# Signals


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", ["get_data", "recipe_dls", "_save", "_draw", "compare"])
def test_a_signal_at_any_moment_ends_it_with_a_sentence(
    small, trained, tmp_path, monkeypatch, command, where, signum, code
):
    out = shutil.copytree(trained, tmp_path / "out")

    def stop(*args, **kwargs):
        signal.raise_signal(signum)

    with monkeypatch.context() as patch:
        patch.setattr(f"sota_course.training.session.{where}", stop)
        found, _, said = command(*options(small, out, 1), "--views", "five", "--resume")
    assert found == code
    assert said.strip().startswith("Stopped.")
    assert "--resume" in said
    assert len(said.strip().splitlines()) == 2
    again = shlex.split(said.strip().splitlines()[-1])
    assert command(*again[1:])[0] == 0, "what it says works"


def test_a_signal_before_there_is_anything_says_that_too(small, tmp_path, monkeypatch, command):
    def stop(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("sota_course.training.session.get_data", stop)
    code, _, said = command(*options(small, tmp_path))
    assert code == 130 and "nothing was lost" in said and len(said.strip().splitlines()) == 1


def with_training(body):
    """A process of the command with another module in place of what trains, so that no torch is
    imported: exit code and what it says."""
    finder = f"""
import signal, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "sota_course.training.session":
            import importlib.util
            return importlib.util.spec_from_loader(name, Finder)
    def create_module(spec):
        return None
    def exec_module(module):
        exec({body!r}, module.__dict__)
sys.meta_path.insert(0, Finder)
from sota_course.training.command import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", finder], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


RAISE = """
import signal, sys
def send(*signals):
    for o in signals:
        signal.raise_signal(o)
"""


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("swallow", [False, True])
def test_a_signal_while_modules_are_imported(signum, code, swallow):
    "Also in one that tries something and takes whatever happens for a failure."
    body = f"send({int(signum)})"
    if swallow:
        body = f"try: {body}\nexcept BaseException: pass"
    found, said = with_training(f"{RAISE}{body}\ndef run_training(options): pass\n")
    assert found == code
    assert said.strip().startswith("Stopped.")
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("while_", ["except", "finally", "report", "exit", "destructor"])
def test_a_second_signal_needs_no_patience(first, second, code, while_):
    "It comes where the first is being answered, or where nothing can catch it."

    one, two = f"send({int(first)})", f"send({int(second)})"
    slow = "class Slow:", f"  def write(self, text): {two}", "  def flush(self): pass"
    bodies = {
        "except": [f"try: {one}", f"except BaseException: {two}; raise"],
        "finally": [f"try: {one}", f"finally: {two}"],
        "report": [*slow, "sys.stderr = Slow()", one],
        "exit": ["import atexit", f"atexit.register(lambda: {two})", one],
        "destructor": ["class Gone:", f"  def __del__(self): {two}", "Gone()"],
    }
    body = "\n".join(" " + o for o in bodies[while_])
    found, said = with_training(f"{RAISE}def run_training(args):\n{body}\n")
    # Once the first was answered, a second one changes nothing any more.
    assert found == (128 + first if while_ == "exit" else code)
    assert said.strip().startswith("Stopped.") and said.count("Stopped.") == 1


def test_a_signal_after_the_end_leaves_the_exit_code():
    body = "import atexit\natexit.register(lambda: send(2, 15))\ndef run_training(options): pass\n"
    found, said = with_training(RAISE + body)
    assert (found, said) == (0, "")


# A full disk


@pytest.fixture
def no_room():
    """Within `with no_room(n)`, no file of this process can have more than `n` bytes, as on a disk
    that is full."""

    class Limit:
        def __init__(self, n):
            self.n = n

        def __enter__(self):
            self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.n, self.old[1]))

        def __exit__(self, *error):
            resource.setrlimit(resource.RLIMIT_FSIZE, self.old)

    return Limit


def half(small, out, command, monkeypatch):
    "A run that was stopped after the first of two epochs."
    from sota_course.training.checkpoints import Checkpoint

    real = Checkpoint.write

    def write(self):
        real(self)
        if self.history.rows:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", write)
        code, _, said = command(*options(small, out, 2))
    assert code == 130, said
    return (out / "try-seed0.pt").read_bytes()


def test_no_room_for_a_checkpoint_is_a_sentence_and_keeps_the_last_one(
    small, tmp_path, command, no_room, monkeypatch
):
    before = half(small, tmp_path, command, monkeypatch)
    with no_room(200_000):
        code, _, said = command(*options(small, tmp_path, 2), "--resume")
    assert code == 2 and f"--out {tmp_path} can't be written to" in said, said
    assert "--resume" in said
    # The checkpoint as it was, and nothing half-written.
    assert contents(tmp_path) == {"try-seed0.pt": before}
    assert command(*options(small, tmp_path, 2), "--resume")[0] == 0


def test_no_room_for_what_comes_at_the_end_keeps_the_checkpoint(
    small, trained, tmp_path, command, no_room
):
    for n in (300, 50_000):  # for nothing; for the card
        out = shutil.copytree(trained, tmp_path / str(n))
        with no_room(n):
            code, _, said = command(*options(small, out, 1), "--resume", "--views", "five")
        assert code == 2 and f"--out {out} can't be written to" in said
        assert (out / "try-seed0.pt").exists()
        assert not (out / "try-seed0.json").exists()
        assert not list(out.rglob("*.part"))
        assert command(*options(small, out, 1), "--resume", "--views", "five")[0] == 0


@pytest.fixture
def tiny_disk(tmp_path):
    "A folder with room for a megabyte."
    folder = tmp_path / "disk"
    folder.mkdir()
    root = os.name == "posix" and os.geteuid() == 0
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if not root or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk, and not everywhere")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_a_sentence(small, tiny_disk, command):
    code, _, said = command(*options(small, tiny_disk, 1))
    assert code == 2 and f"--out {tiny_disk} can't be written to" in said
    assert not list(tiny_disk.iterdir())


# Quick, and quiet

HEAVY = ("torch", "fastai", "matplotlib", "numpy", "pandas", "torchvision")


@pytest.mark.parametrize(
    "args, code",
    [
        (["--help"], 0),
        (["--epochs", "two"], 2),
        (["--nosuch"], 2),
        (["--lr", "nan"], 2),
        (["--preset", "slow"], 2),
        (["--recipe", "none.toml"], 2),
        (["--out", "/proc/no"], 2),
    ],
)
def test_what_needs_no_training_imports_nothing_heavy(args, code):
    script = f"""
import sys
from sota_course.training.command import main
sys.argv[1:] = {args}
try:
    main()
finally:
    print("loaded:", *set({HEAVY}) & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "loaded:", done.stdout


def test_help_speaks_of_the_model(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "load_model" in out
    assert all(f"--{o.replace('_', '-')} " in out for o in WRONG.keys() - FREE)
    assert "--no-compile" in out and "best   a long training" in out


def test_torch_s_complaint_about_fastai_is_not_passed_on():
    """torch 2.14 warns of `torch.jit.script`, in the name of its own module, when fastai is
    imported. No other warning is kept back."""
    warn = "warnings.warn_explicit({!r}, FutureWarning, 'x.py', 1, module={!r})"
    deprecated = (
        "`torch.jit.script` is deprecated. Please switch to `torch.compile` or `torch.export`."
    )
    kept_back = [
        (deprecated, "torch.jit._script"),
        ("`torch.jit.script` is not supported in Python 3.14+ and may break.", "torch.jit._script"),
    ]
    shown = [
        ("`torch.jit.trace` is deprecated.", "torch.jit._script"),
        ("`torch.jit.script` is deprecated.", "mine"),
        ("weights_only", "torch.serialization"),
    ]
    warnings = [warn.format(*o) for o in kept_back + shown]
    script = "\n".join(["import sota_course, warnings", *warnings])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    said = [o.partition("FutureWarning: ")[2] for o in done.stderr.splitlines()]
    assert said == [o for o, _ in shown]


@pytest.mark.real
def test_real_photos_train(photos, tmp_path):
    data = photos / "imagenette2-160sq"
    done = sota_train(*flags(data=data, size=32, arch="xresnet10", epochs=1, out=tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["accuracy"] > 0.3


def test_a_network_of_timm(command, refused, small, tmp_path):
    "It is trained, saved and loaded by its name; one that timm doesn't have is refused."
    from sota_course.training.models import load_model

    def args(arch):
        return flags(data=small, size=32, arch=arch, epochs=1, bs=20, out=tmp_path)

    code, _, err = command(*args("timm:resnet10t"))
    assert code == 0, err
    (card,) = tmp_path.glob("*timm-resnet10t*/card.json")
    assert load_model(card.parent).card["arch"]["name"] == "timm:resnet10t"
    assert "timm has no model 'resnet10x': did you mean timm:" in refused(*args("timm:resnet10x"))
