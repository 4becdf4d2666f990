"""Two processes on the CPU train as one does; one of them writes, and all end together.

torchrun starts them once. Later pairs are forked from a process that has imported everything, which
saves most of the time."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distributed_script as script
from links import ROOT
from sota_course.data import get_data
from sota_course.training.checkpoints import load_checkpoint
from sota_course.training.distributed import _LOST
from sota_course.training.runs import Result

PROCESSES = 2


@pytest.fixture(scope="module")
def data():
    # 99 images for validation: the last batch and others can't be halved.
    return get_data("drawn", n_train=300, n_val=99, progress=False)


def torchrun(case, data, out):
    "What was printed."
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", PROCESSES, Path(script.__file__), case, data, out]
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    run = subprocess.run(
        [str(o) for o in command], capture_output=True, text=True, env=env, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def fork():
    "Two processes by fork: a function that gives their exit codes and what they said."
    with pytest.MonkeyPatch.context() as patch:
        # Python's own way to tell the process that imports where to look came with 3.13.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(script.__file__).parent)]))
        yield _fork


def _fork(case, data, out):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_script"])
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    args = [(o, PROCESSES, port, case, str(data), str(out)) for o in range(PROCESSES)]
    started = [context.Process(target=script.join, args=o) for o in args]
    for o in started:
        o.start()
    for o in started:
        o.join(240)
        o.kill()  # one that still waits
    said = [(out / f"said-{o}.txt").read_text() for o in range(PROCESSES)]
    return [o.exitcode for o in started], "".join(said).splitlines()


def of_processes(out, name):
    files = [out / f"{name}-{o}.pt" for o in range(PROCESSES)]
    return [torch.load(o, weights_only=False) for o in files]


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    "What one process finds."
    return script.train(data, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    "The folder, what was printed, and what each of two processes found."
    out = tmp_path_factory.mktemp("two")
    printed = torchrun("together", data, out)
    return out, printed, of_processes(out, "process")


def assert_same(a, b):
    "Bit for bit, whatever it is."
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_without_batchnorm_two_processes_train_as_one_with_the_whole_batch(one, two):
    "With mixing, EMA, Muon, alternating flips and two stages; far below what one step changes."
    torch.manual_seed(0)
    for name in ("plain", "small"):
        ours, theirs = two[2][0][name], one[name]
        torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=0, atol=1e-5)
    ours, theirs = two[2][0]["plain"], one["plain"]
    torch.testing.assert_close(ours["history"], theirs["history"], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours["logp"], theirs["logp"], rtol=0, atol=1e-5)
    losses = theirs["history"]["train_loss"]
    assert losses[0] - losses[-1] > 0.02  # something was learned
    assert ours["config"] == theirs["config"]
    assert (ours["extra"], theirs["extra"]) == (dict(processes=2), {})


def test_with_batchnorm_they_come_near(one, two):
    "Each normalizes by its share: halves of a batch of 50 or 60."
    ours, theirs = two[2][0]["norm"]["history"], one["norm"]["history"]
    for k in ("train_loss", "valid_loss"):
        torch.testing.assert_close(ours[k], theirs[k], rtol=0.01, atol=0)
    assert ours["train_loss"] != theirs["train_loss"]


def test_all_processes_have_the_same_model_and_the_same_numbers(two):
    first, second = two[2]
    assert_same(first["plain"], second["plain"])
    assert_same(first["norm"], second["norm"])
    assert_same(first["small"], second["small"])


def test_an_odd_number_of_validation_images_is_counted_exactly(one, two):
    ours, theirs = two[2][0]["small"], one["small"]
    assert_same(ours["targets"], theirs["targets"])
    assert len(ours["preds"]) == len(ours["targets"]) == 27
    torch.testing.assert_close(ours["preds"], theirs["preds"], rtol=0, atol=1e-6)
    right = (ours["preds"].argmax(1) == ours["targets"]).double().mean().item()
    assert ours["values"][-1][-1] == pytest.approx(right, abs=1e-7)
    torch.testing.assert_close(ours["values"], theirs["values"], rtol=1e-5, atol=0)
    accuracies = two[2][0]["plain"]["history"]["accuracy"]
    for o in accuracies:
        assert o * 99 == pytest.approx(round(o * 99), abs=1e-4)


def test_one_process_writes_and_speaks(two):
    out, printed, _ = two
    assert printed.count("said once") == 1
    own = {f"process-{o}.pt" for o in range(PROCESSES)}
    names = {str(o.relative_to(out)) for o in out.rglob("*") if o.is_file()} - own
    assert names == {"plain/images-seed3.json", "norm/images-seed3.json"}
    assert Result.load(out / "plain" / "images-seed3.json").extra == dict(processes=2)


def test_what_cant_work_together_is_refused_by_all(two):
    first, second = two[2]
    other_batches, inside = first["said"]
    assert first["said"] == second["said"]
    assert "process 1 and process 0 differ: they have other batches" in other_batches
    assert "ManifoldMixup mixes inside the network" in inside


def test_a_killed_group_goes_on_as_if_nothing_had_happened(data, two, one, fork, tmp_path):
    codes, said = fork("killed", data, tmp_path)
    checkpoint = tmp_path / "plain" / "images-seed3.pt"
    assert codes == [-signal.SIGKILL] * 2 and not said
    assert len(load_checkpoint(checkpoint)["history"]) == 2
    shutil.copytree(tmp_path / "plain", tmp_path / "alone" / "plain")

    codes, said = fork("resumed", data, tmp_path)
    # Afterwards, all of them raise the same error, and one of them speaks.
    assert sorted(codes) == [1, 2]
    assert said == ["script: all processes have the same to complain about"]
    for o in of_processes(tmp_path, "resumed"):
        assert_same(o, two[2][0]["plain"])
    assert not checkpoint.exists()

    # Or with another number of processes: here with one.
    alone = script.image_run(data, tmp_path / "alone" / "plain")
    torch.testing.assert_close(alone["weights"], one["plain"]["weights"], rtol=0, atol=1e-5)


def test_where_one_process_is_killed_the_others_end_and_one_says_so(data, fork, tmp_path):
    codes, said = fork("lost", data, tmp_path)
    assert codes == [2, -signal.SIGKILL]
    assert said == [f"script: {_LOST}"]
