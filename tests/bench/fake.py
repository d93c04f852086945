"""A peer that computes nothing, for the tests of the protocol."""

import os
import sys


def prepare(spec):
  """Notes who was asked what."""
  print("chatter of a library")
  order = []

  def measure(request):
    order.append(request["number"])
    return {
      "tokens_per_s": float(request["number"]),
      "order": order,
      "size": spec.size,
      "threads": os.environ["OMP_NUM_THREADS"],
      "given": os.environ.get("GIVEN"),
      "jax": "jax" in sys.modules,
    }

  return {"first_loss": 1.0, "pid": os.getpid()}, measure


def fails(spec):
  """Dies while it prepares."""
  raise ValueError("no such thing as " + spec.size)


def dies(spec):
  """Dies in its first round."""

  def measure(request):
    print("out of patience", file=sys.stderr)
    os._exit(3)

  return {}, measure
