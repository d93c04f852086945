"""A train step compiled ahead: written by `llmjax plan --keep-executable`, loaded by the run. The
first line of the file is JSON that says which config, source, devices and jax it was compiled for.
The rest is a pickle, which runs whatever it holds: load your own files only."""

import hashlib
import importlib.metadata
import json
import pickle
from pathlib import Path

from jax.experimental import serialize_executable
from jax.sharding import Mesh

from llmjax.core.config import flat
from llmjax.core.errors import UserError
from llmjax.training.config import Config
from llmjax.training.step import compile_step

# Keys that the step does not depend on, except for the number of rows.
_OTHER = ("init.", "tokenizer.", "data.", "checkpoint.", "eval.", "sample.", "train.log_every")
_ROWS = "data.batch_size"


def save(path: str | Path, compiled, config: Config, mesh: Mesh):
  """Writes a compiled step to a file.

  Args:
    compiled: of `compile_step(config, mesh).lower(…).compile()`; on a CPU not from jax's cache
      (`no_cache` in `llmjax/parallel/hlo_arrays.py`).
  """
  head = json.dumps(_depends_on(config, mesh)).encode()
  body = pickle.dumps(serialize_executable.serialize(compiled))
  Path(path).write_bytes(head + b"\n" + body)


def make_step(config: Config, mesh: Mesh):
  """The run's step: that of `train.executable`, or one that is compiled at its first call.

  Returns:
    `(state, batch) -> (state, metrics)`, as `compile_step` gives it.
  Raises:
    UserError: no such file, or a program for another experiment, other devices or another jax.
  """
  path = config.train.executable
  if not path:
    return compile_step(config, mesh)
  try:
    head, _, body = Path(path).read_bytes().partition(b"\n")
    found = json.loads(head)
  except (OSError, ValueError) as error:
    raise UserError(f"train.executable {path!r} is not what llmjax plan keeps: {error}") from error
  for name, here in json.loads(json.dumps(_depends_on(config, mesh))).items():
    if found.get(name) != here:
      raise UserError(
        f"train.executable {path!r} was made for {name} {found.get(name)}, this run has {here}"
      )
  devices = list(mesh.devices.flat)
  return serialize_executable.deserialize_and_load(
    *pickle.loads(body), backend=devices[0].client, execution_devices=devices
  )


def _depends_on(config: Config, mesh: Mesh) -> dict:
  devices = list(mesh.devices.flat)
  libraries = ("jax", "jaxlib", *(["libtpu"] if devices[0].platform == "tpu" else []))
  values = {
    key: value for key, value in flat(config).items()
    if key == _ROWS or not key.startswith((*_OTHER, "train.executable"))
  }
  return values | {
    "devices": f"{len(devices)} × {devices[0].device_kind}",
    "device numbers": [device.id for device in devices],
    **{name: importlib.metadata.version(name) for name in libraries}, "llmjax": source_hash(),
  }


def source_hash() -> str:
  """Hashes the source of llmjax: 16 hex digits."""
  digest = hashlib.sha256()
  for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]
