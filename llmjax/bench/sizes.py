"""What is measured and how it is timed, the same for every peer: sizes, tokens, rounds.

All sizes are Llama-type decoders with a head of their own. Tokens are functions of a fixed seed,
and all peers read one folder of weights, so first losses and greedy tokens can be compared. A
peer's process imports this file, so it imports no jax.
"""

import dataclasses
import time

import numpy as np

ROPE_THETA = 10_000.0
NORM_EPS = 1e-5
PROMPT_TOKENS = 128
NEW_TOKENS = 128
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}  # torch's names


@dataclasses.dataclass(frozen=True)
class Size:
  """An architecture and the batch it is trained on.

  Attributes:
    vocab_size: tokens (v).
    width: residual width (d).
    layers: blocks (l).
    heads: query heads and as many key/value heads (n).
    mlp_width: feed-forward width (f).
    batch_size: rows of a training batch.
    length: positions of a row.
    experts: per layer, two per token, each `mlp_width` wide; 0: dense layers.
  """

  vocab_size: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  batch_size: int
  length: int
  experts: int = 0


SIZES = {
  "L": Size(8192, 512, 8, 8, 1536, 8, 256),
  "S": Size(2048, 256, 4, 4, 768, 16, 128),
  "tiny": Size(64, 16, 2, 2, 32, 2, 8),
}
# As many active FLOPs in experts: two of eight, half as wide.
SIZES |= {
  f"{name}-moe": dataclasses.replace(size, mlp_width=size.mlp_width // 2, experts=8)
  for name, size in SIZES.items()
}


def token_batches(size: Size, count: int = 4) -> np.ndarray:
  """Draws uniform token ids: int32 [count, b, t + 1], the same in every process."""
  rng = np.random.default_rng(1)
  shape = (count, size.batch_size, size.length + 1)
  return rng.integers(size.vocab_size, size=shape, dtype=np.int32)


def prompts(size: Size, batch: int) -> list[list[int]]:
  """Draws the prompts of a decoding batch, `PROMPT_TOKENS` each."""
  rng = np.random.default_rng(2)
  return rng.integers(size.vocab_size, size=(batch, PROMPT_TOKENS)).tolist()


def prepare_steps(size: Size, run_step):
  """Makes a peer out of a function that does one step of training and returns its loss.

  Returns:
    (facts, measure), as `Peer.where` wants them; `measure({"seconds": s})`.
  """
  tokens = size.batch_size * size.length
  facts = {"first_loss": run_step()}
  return facts, lambda request: timed_steps(run_step, tokens, request["seconds"])


def timed_steps(run_step, tokens: int, seconds: float) -> dict:
  """Runs whole steps until `seconds` have passed.

  Args:
    run_step: does one step and returns its loss, if it has one.
    tokens: processed in a step.
  Returns:
    `tokens`, `seconds`, `tokens_per_s` and the `losses`.
  """
  losses = []
  began_s = time.perf_counter()
  while time.perf_counter() < began_s + seconds:
    losses.append(run_step())
  spent_s = time.perf_counter() - began_s
  done = tokens * len(losses)
  return {"tokens": done, "seconds": spent_s, "tokens_per_s": done / spent_s, "losses": losses}


def prepare_decode(size: Size, run):
  """Makes a peer out of a function that continues prompts.

  Args:
    run: `(rows of ids, new tokens) -> new ids of each row`, greedy, EOS ignored.
  Returns:
    As `prepare_steps`; `measure({"batch": n})`.
  """
  warm = set()

  def timed(rows, new_tokens: int):
    began_s = time.perf_counter()
    new_ids = run(rows, new_tokens)
    return new_ids, time.perf_counter() - began_s

  def measure(request: dict) -> dict:
    rows = prompts(size, request["batch"])
    if request["batch"] not in warm:  # compiles, allocates buffers
      warm.add(request["batch"])
      run(rows, 1)
      run(rows, NEW_TOKENS)
    _, first_s = timed(rows, 1)
    new_ids, total_s = timed(rows, NEW_TOKENS)
    assert all(len(row) == NEW_TOKENS for row in new_ids), "a row ended early"
    return {
      "tokens_per_s": len(rows) * NEW_TOKENS / total_s,
      "decode_tokens_per_s": len(rows) * (NEW_TOKENS - 1) / (total_s - first_s),
      "first_token_s": first_s,
      "ids": new_ids[0],
    }

  run(prompts(size, 1), 1)
  return {}, measure
