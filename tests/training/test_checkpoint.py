"""Proves that a checkpoint is what was saved or told to be damaged; full disks are told too."""

import contextlib
import json
import random
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.core import tree
from llmjax.core.errors import RunFailed, UserError
from llmjax.core.files import report_full_disk
from llmjax.data.prepare import prepare
from llmjax.data.sources import Document
from llmjax.text.raw import Bytes
from llmjax.training.checkpoint import Checkpoints
from llmjax.training.checksum import checksums
from llmjax.training.metrics import MetricsWriter
from llmjax.training.parameters import TrainState


def state(step: int, size: int = 700) -> TrainState:
  """A state of noise, of several kinds of numbers."""
  rng = np.random.default_rng(step)
  model = {
    "up_df": jnp.asarray(rng.normal(size=(3, size)), jnp.float32),
    "half_d": jnp.asarray(rng.normal(size=99), jnp.bfloat16),
    "on_d": jnp.asarray(rng.integers(0, 2, 9), bool),
  }
  frozen = {"on_d": model.pop("on_d")}
  moments = {"mu": model["up_df"] / 7, "count": jnp.int32(step)}
  return TrainState(jnp.int32(step), model, frozen, moments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with checkpoints 1 and 2."""
  workdir = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(workdir, keep=2)
  for step in (1, 2):
    checkpoints.save(state(step), {"config": "x", "tokenizer": "y" * 50})
  checkpoints.close()
  return workdir


def restore(workdir):
  like = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0)
  )
  checkpoints = Checkpoints(workdir, keep=2)
  made = checkpoints.restore(like)
  checkpoints.close()
  return made


def same(a, b):
  for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(one, other)


def test_a_bit_flipped_anywhere_never_changes_what_is_read(saved, tmp_path, capsys):
  rng = random.Random(0)
  root = saved / "checkpoints/2"
  largest = max((p for p in root.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file() and p.stat().st_size)
  meta = restore(saved)[1]
  found = set()
  for number, path in enumerate([*files, *[largest.relative_to(root)] * 5]):
    workdir = tmp_path / str(number)
    shutil.copytree(saved, workdir)
    hit = workdir / "checkpoints/2" / path
    data = bytearray(hit.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    hit.write_bytes(data)
    made, read = restore(workdir)
    same(made, state(int(made.step)))
    assert read == meta or int(made.step) == 1
    err = capsys.readouterr().err
    if int(made.step) == 1:
      assert "checkpoints/2 cannot be read (" in err and "Traceback" not in err
      assert [p.name for p in (workdir / "damaged").iterdir()] == ["2-0"]
    found.add((path.parts[0], int(made.step)))
  assert {("meta", 1), ("model", 1), ("optimizer", 1)} <= found, "some of them do matter"


def test_a_key_of_meta_that_is_damaged_is_no_older_checkpoint(saved, tmp_path, capsys):
  for number, (change, step) in enumerate([(("checksums", "checksumt"), 1), (("yyy", "yyx"), 1)]):
    shutil.copytree(saved, tmp_path / str(number))
    path = tmp_path / str(number) / "checkpoints/2/meta/metadata"
    path.write_text(path.read_text().replace(*change))
    assert int(restore(tmp_path / str(number))[0].step) == step
  shutil.copytree(saved, tmp_path / "older")
  path = tmp_path / "older/checkpoints/2/meta/metadata"
  meta = json.loads(path.read_text())
  del meta["checksums"]
  path.write_text(json.dumps(meta))
  capsys.readouterr()
  made, _ = restore(tmp_path / "older")
  same(made, state(2))
  assert "has no checksums" in capsys.readouterr().err


def test_checksums_tell_arrays_apart_and_do_not_depend_on_their_layout():
  array = np.arange(24, dtype=np.float32).reshape(4, 6)
  mesh = jax.make_mesh((len(jax.devices()),), ("data",))
  cut = jax.device_put(array, NamedSharding(mesh, PartitionSpec()))
  swapped = array.copy()
  swapped[[0, 1]] = swapped[[1, 0]]
  flipped = array.copy()
  flipped.view(np.uint32)[3, 5] ^= 1 << 31
  arrays = {"a": array, "same": cut, "swapped": swapped, "flipped": flipped, "flat": array.ravel(),
            "half": array.astype(jnp.bfloat16), "negative": array * -1}
  sums, wrong = checksums({name: jnp.asarray(value) for name, value in arrays.items()})
  assert not wrong and sums["a"] == sums.pop("same")
  assert len(set(sums.values())) == len(sums)
  expected = 0
  for (row, column), bits in np.ndenumerate(array.view(np.uint32)):
    mixed = int(bits) ^ row * 0x9E3779B1 % 2**32 ^ column * 0x9E3779B1**2 % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
      mixed = (mixed ^ mixed >> shift) * factor % 2**32
    expected += mixed
  assert sums["a"] == expected % 2**32


@contextlib.contextmanager
def small_files(limit: int):
  """No file may grow beyond the limit, as on a disk that fills up."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_while_saving_is_one_line_and_the_one_before_stays(tmp_path, capfd):
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(state(1), {}, wait=True)
  large = state(2, 70_000)
  checksums(tree.flatten(large))  # compiled now: the compilation cache could not be written below
  with small_files(20_000):
    with pytest.raises(RunFailed, match=r"a checkpoint could not be written \(File too large\)"):
      checkpoints.save(large, {}, wait=True)
    assert checkpoints.standing() == "the checkpoint of step 1 stands"
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
  same(restore(tmp_path)[0], state(1))
  assert capfd.readouterr().err == ""


def test_a_disk_that_fills_up_elsewhere_is_told_as_well(tmp_path):
  documents = [Document("x", "a.txt", "ka lo mi " * 9000)]
  full = pytest.raises(RunFailed, match=r"could not be written: .*too large")
  with small_files(5000), full, report_full_disk():
    prepare(documents, Bytes(), tmp_path / "data")
  assert list((tmp_path / "data").iterdir()) == []
  writer = MetricsWriter(tmp_path, 0)
  writer.write(1, {"loss": 1.0})
  with small_files(30), pytest.raises(RunFailed, match="File too large"), report_full_disk():
    writer.write(2, {"loss": 1.0, "words": "x" * 100})
  with pytest.raises(UserError, match="as it is"), report_full_disk():
    raise UserError("as it is: No space left on device")
