"""Several processes on this machine make the run that one process makes, and end together.

Every run here is a command line of its own, compiled without most optimizations; whatever belongs
to one process alone is in `tests/test_run.py`. Launching costs seconds, so tests share runs.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.watch import GRACE_S, STOP_S
from llmjax.cli import main
from llmjax.parallel.join import HEARTBEAT_S
from llmjax.training.metrics import read_metrics
from llmjax.training.stored import load_model, read_meta
from tests.conftest import ROOT
from tests.runs import write_text

STEPS = 8
CONFIG = """
from pathlib import Path
from tests.runs import tiny_values

def get_config():
  config = tiny_values(Path({sources!r}), steps={steps})
  config.model.layers = 1
  config.checkpoint.every = 2
  config.checkpoint.keep = 2
  config.eval.every = 4
  config.sample.prompts = ("ka",)
  return config
"""
CHILD = {
  "JAX_PLATFORMS": "cpu",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # no process but the first has a compilation cache
  "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}
# Processes add up a batch's loss and gradients in another order than one does: fp32's 6e-8 a sum,
# grown over eight steps of Adam.
REL = 1e-5


def start(verb, config, workdir, *more) -> subprocess.Popen:
  """Starts a command line in a process of its own."""
  argv = [sys.executable, "-m", "llmjax", verb, f"--config={config}", f"--workdir={workdir}", *more]
  pipe = subprocess.PIPE
  return subprocess.Popen(
    argv, env={**os.environ, **CHILD}, cwd=ROOT, stdout=pipe, stderr=pipe, text=True
  )


def run(*args) -> tuple[int, str, str]:
  """Runs a command line: (exit status, standard output, standard error)."""
  process = start(*args)
  out, err = process.communicate(timeout=240)
  return process.returncode, out, err


def kill_one(process: subprocess.Popen, number: int, workdir: Path, step: int) -> int:
  """Kills the launcher's process `number` once a step is saved; returns its process id."""
  until_s = time.monotonic() + 240
  while not (workdir / "checkpoints" / str(step)).is_dir():
    assert process.poll() is None and time.monotonic() < until_s, process.stderr.read()
    time.sleep(0.01)
  pid = started_by(process)[number]
  os.kill(pid, signal.SIGKILL)
  return pid


def started_by(launcher: subprocess.Popen) -> dict[int, int]:
  """The launcher's processes that still run: number → process id."""
  found = {}
  for path in Path("/proc").glob("[0-9]*/environ"):
    with contextlib.suppress(OSError):
      variables = path.read_text(errors="replace").split("\0")
      if f"LLMJAX_LAUNCHER={launcher.pid}" in variables:
        number = next(v for v in variables if v.startswith("LLMJAX_PROCESS="))
        found[int(number.partition("=")[2])] = int(path.parent.name)
  return found


def values(workdir: Path) -> dict:
  """Every step's loss, gradient norm and held-out loss."""
  names = ("loss", "grad_norm", "nats_per_token")
  lines = [(line["step"], name, line[name]) for line in read_metrics(workdir) for name in names
           if name in line]
  assert len(lines) == len({line[:2] for line in lines}), "two lines for one step"
  return {line[:2]: line[2] for line in lines}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("launch")
  path = folder / "config.py"
  path.write_text(CONFIG.format(sources=str(write_text(folder / "text")), steps=STEPS))
  return path


@pytest.fixture(scope="module")
def alone(config) -> Path:
  """The workdir of the run in one process."""
  workdir = config.parent / "alone"
  status, _, err = run("train", config, workdir)
  assert status == 0, err
  return workdir


def same_run(workdir: Path, alone: Path):
  """Asserts that two workdirs hold the same run."""
  assert values(workdir) == pytest.approx(values(alone), rel=REL)
  assert len(values(workdir)) == 2 * STEPS + 1
  # Another batch, or the rows of one in another process twice, would be seen: losses of different
  # batches are far apart.
  losses = sorted(value for (_, name), value in values(alone).items() if name == "loss")
  assert min(b - a for a, b in itertools.pairwise(losses)) > 10 * REL * losses[-1]
  ours, theirs = (json.loads((path / "result.json").read_text()) for path in (workdir, alone))
  assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], rel=REL)
  for name in ("tokens", "bytes", "steps", "parameters", "config_hash"):
    assert ours[name] == theirs[name], name
  assert (workdir / "loss.png").stat().st_size > 1000
  assert (workdir / "samples.txt").read_text().count("--- prompt:") == 1
  metas = [read_meta(path / "checkpoints" / str(STEPS)) for path in (workdir, alone)]
  for name in ("data_key", "tokenizer", "config"):
    assert metas[0][name] == metas[1][name], name


def test_two_processes_make_the_run_of_one(config, alone, tmp_path):
  status, out, err = run("launch", config, tmp_path / "run", "--on=local:2", "--json")
  assert status == 0, err
  same_run(tmp_path / "run", alone)
  result = json.loads(out.splitlines()[-1])
  assert result == json.loads((tmp_path / "run/result.json").read_text())
  for text in (out, err):
    assert "Gloo" not in text and "Traceback" not in text
  assert err.count("evaluating on held-out text") == 1 and out.count("bits per byte") == 1
  # One writer: one tensorboard file, one store a text, and each array once in a checkpoint.
  assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
  assert len(list((tmp_path / "run/data").iterdir())) == 2
  sizes = [
    sum(file.stat().st_size for file in (path / "checkpoints" / str(STEPS)).rglob("*"))
    for path in (tmp_path / "run", alone)
  ]
  assert sizes[0] < 1.2 * sizes[1]
  assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["6", "8"]
  assert load_model(tmp_path / "run")[1]["step"] == STEPS


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_killed_process_stops_the_others_and_one_alone_goes_on(config, alone, tmp_path):
  workdir = tmp_path / "run"
  # A save that was cut off before, as SIGKILL in the middle of the first one leaves it.
  (workdir / "checkpoints/2.orbax-checkpoint-tmp/model").mkdir(parents=True)
  launcher = start("launch", config, workdir, "--on=local:2")
  pid = kill_one(launcher, 1, workdir, 2)
  began_s = time.monotonic()
  err = launcher.communicate(timeout=60)[1]
  took_s = time.monotonic() - began_s
  assert launcher.returncode == 1
  assert took_s < STOP_S, "the stated time, a promise rather than a matter of speed"
  assert HEARTBEAT_S + GRACE_S < STOP_S, "where nobody sees the process end, too"
  said = [line for line in err.splitlines() if line.startswith("llmjax:")]
  assert len(said) == 1 and err.splitlines()[-1] == said[0] and "Traceback" not in err
  assert f"process 1 of 2 (pid {pid}) was killed by SIGKILL" in said[0]
  assert not (workdir / "result.json").exists()
  assert not started_by(launcher)
  status, _, err = run("train", config, workdir)
  assert status == 0 and "going on from step" in err, err
  same_run(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("--config.mesh.fsdp=4", "--config.mesh.data=2")])
def test_four_processes_make_the_run_of_one(mesh, config, alone, tmp_path):
  more = (f"--devices={2 if mesh else 1}", *mesh)
  status, _, err = run("launch", config, tmp_path / "run", "--on=local:4", *more)
  assert status == 0, err
  values_here = values(tmp_path / "run")
  assert values_here == pytest.approx(values(alone), rel=REL)


@pytest.mark.slow
def test_a_stop_is_agreed_on_and_fewer_or_more_processes_go_on(config, alone, tmp_path):
  workdir = tmp_path / "run"
  launcher = start("launch", config, workdir, "--on=local:4")
  while not (workdir / "checkpoints/2").is_dir() and launcher.poll() is None:
    time.sleep(0.01)
  launcher.send_signal(signal.SIGINT)
  err = launcher.communicate(timeout=120)[1]
  assert launcher.returncode == 1 and "Traceback" not in err
  line = err.splitlines()[-1]
  assert line.startswith("llmjax: stopped after step") and line.endswith("resume")
  step = int(line.split("step ")[1].split()[0])
  assert (workdir / "checkpoints" / str(step)).is_dir()
  status, _, err = run("launch", config, workdir, "--on=local:2")
  assert status == 0 and f"going on from step {step}" in err
  same_run(workdir, alone)


def test_wrong_input_that_only_the_processes_find_is_one_line(config, tmp_path):
  argv = ("--on=local:2", "--config.data.sources=/no/where")
  status, out, err = run("launch", config, tmp_path / "run", *argv)
  lines = [line for line in err.splitlines() if "error" in line]
  assert status == 2 and out == "" and len(lines) == 1, err
  assert lines[0].startswith("llmjax: error: ") and "/no/where" in lines[0]
  assert "Traceback" not in err


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (("--on=lokal:2",), "unknown kind of machine 'lokal'; did you mean 'local'?"),
    (("--on=tpu:v5e",), "unknown kind of machine 'tpu'"),
    (("--on=local",), "'' is not a number of processes"),
    (("--on=local:0",), "'0' is not a number of processes, 1 or more"),
    (("--on=local:-1",), "'-1' is not a number of processes"),
    (("--on=local:two",), "'two' is not a number of processes"),
    (("--on=local:2", "--devices=0"), "--devices=0 is less than 1"),
    (("--on=local:2", "--devices=x"), "invalid int value: 'x'"),
    (("--on=local:2", "--config.model.layrs=2"), "unknown config key 'model.layrs'"),
    (("--on=local:2", "--config.optim.beta1=2.0"), "optim.beta1 2.0 is not in"),
    (("--on=local:2", "--config.data.batch_size=7"), "'micro-batch' has 7 batch ('b'), which mesh"),
    ((), "the following arguments are required: --on"),
  ],
)
def test_bad_input_starts_nothing(changes, message, config, tmp_path, capsys):
  argv = ["launch", f"--config={config}", f"--workdir={tmp_path / 'run'}", *changes]
  assert message in _fails(capsys, argv)
  assert not (tmp_path / "run").exists()


def test_config_and_workdir_are_wanted(config, capsys):
  on = "--on=local:2"
  assert "--workdir" in _fails(capsys, ["launch", f"--config={config}", on])
  assert "--config" in _fails(capsys, ["launch", "--workdir=x", on])
  line = _fails(capsys, ["launch", "--config=/no/where.py", "--workdir=x", on])
  assert "config file '/no/where.py' does not exist" in line


@pytest.mark.parametrize(
  ("variables", "message"),
  [
    (("127.0.0.1:1", "0", ""), "expected are host:port and two numbers"),
    (("", "0", "2"), "expected are host:port and two numbers"),
    (("127.0.0.1:1", "x", "2"), "LLMJAX_PROCESS=x"),
    (("127.0.0.1:1", "2", "2"), "LLMJAX_PROCESS=2 is not below LLMJAX_PROCESSES=2"),
  ],
)
def test_a_half_set_environment_is_told(variables, message, config, tmp_path, capsys, monkeypatch):
  names = ("LLMJAX_COORDINATOR", "LLMJAX_PROCESS", "LLMJAX_PROCESSES")
  for name, value in zip(names, variables, strict=True):
    monkeypatch.setenv(name, value)
  argv = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  assert message in _fails(capsys, argv)


def _fails(capsys, argv) -> str:
  capsys.readouterr()
  assert main(argv) == 2
  captured = capsys.readouterr()
  assert captured.out == "" and captured.err.startswith("llmjax: error: ")
  assert captured.err.count("\n") == 1
  return captured.err
