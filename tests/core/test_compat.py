"""compat: its options do their work on the installed jax, and no other file asks for a version."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core.compat import same_bits_options

PACKAGE = Path(__file__).parents[2] / "llmjax"


@pytest.mark.parametrize(
  "function",
  [
    jnp.exp,
    lambda x: jnp.log(x + 2),
    jax.lax.erf_inv,
    lambda x: jnp.polyval(jnp.arange(9.0) + 0.3, x),
  ],
  ids=["exp", "log", "erf_inv", "polynomial"],
)
def test_a_shard_alone_has_the_bits_it_has_in_the_whole(function):
  """What each of four devices computes of [l, d, k, h], against one device computing all of it."""
  options = same_bits_options(jax.default_backend())
  compiled = jax.jit(lambda x: function(x), compiler_options=options)
  x_ldkh = jax.random.uniform(jax.random.key(7), (2, 32, 8, 4), minval=-0.95, maxval=0.95)
  want = np.asarray(compiled(x_ldkh))
  for d, k in ((0, 0), (0, 4), (16, 0), (16, 4)):
    part = np.s_[:, d : d + 16, k : k + 4]
    np.testing.assert_array_equal(compiled(x_ldkh[part]), want[part])


def test_options_are_for_cpu_alone_and_stricter_on_new_releases():
  assert same_bits_options("cpu", "0.10.2") == {"xla_backend_optimization_level": 1}
  for newer in ("0.11.0", "0.12.0.1", "1.0", "0.13.0.dev20270101"):
    assert same_bits_options("cpu", newer) == {"xla_backend_optimization_level": 0}
  assert same_bits_options("tpu", "0.12.0.1") == {}


def test_no_other_file_asks_for_a_version():
  for path in PACKAGE.rglob("*.py"):
    if path == PACKAGE / "core" / "compat.py":
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
      modules = [node.module] if isinstance(node, ast.ImportFrom) else []
      asks = name in ("__version__", "version_info") or "importlib.metadata" in modules
      assert not asks, f"{path}:{node.lineno} asks for a version; core/compat.py is the place"
