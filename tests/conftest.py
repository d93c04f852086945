"""Shared by all tests: CPU, a persistent compilation cache, a tiny model, the real data's place."""

import contextlib
import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Commands that tests start inherit these, and so compile nothing a second time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# What runs once costs more to optimize than to run; `optimized` is for tests that read programs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
# The older emitters compile in half the time; newer versions know no flag for them.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
  FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"

import jax
import pytest

SHARED_DATA = ROOT.parent / "shared" / "data"



@pytest.fixture(scope="session")
def shared_data() -> Path:
  """The folder of real texts and weights; tests that use it skip where it is absent."""
  if not SHARED_DATA.is_dir():
    pytest.skip(f"{SHARED_DATA} is not here (it is on the developers' machines and in CI)")
  return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_config():
  """A decoder with grouped heads, two layers and fp32 arithmetic."""
  from llmjax.models.config import ModelConfig

  return ModelConfig(
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    mlp_width=64,
    vocab_size=96,
    max_seq_len=16,
    dtype="float32",
  )


@pytest.fixture(scope="session")
def tiny_decoder(tiny_config):
  """The decoder of `tiny_config`, random weights."""
  from llmjax.models.build import build

  return jax.jit(lambda: build(jax.random.key(0), tiny_config))()


@pytest.fixture
def quick_compile():
  """Compiles without most optimizations, for what runs once and is compared with an oracle."""
  with _quickly():
    yield


@pytest.fixture(scope="module")
def quick_module():
  """As `quick_compile`, for all of a file, what its fixtures run included."""
  with _quickly():
    yield


@contextlib.contextmanager
def _quickly():
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
