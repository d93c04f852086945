"""How a round is timed, the same for every peer: steps of training, and calls of decoding."""

import time

from llmjax.bench.sizes import NEW_TOKENS, Size, prompts


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
    tokens: predicted a step.
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

  def measure(request: dict) -> dict:
    rows = prompts(size, request["batch"])
    if request["batch"] not in warm:  # compiled, buffers made
      warm.add(request["batch"])
      run(rows, 1)
      run(rows, NEW_TOKENS)
    began_s = time.perf_counter()
    run(rows, 1)
    first_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    made = run(rows, NEW_TOKENS)
    whole_s = time.perf_counter() - began_s
    assert all(len(row) == NEW_TOKENS for row in made), "a row ended early"
    return {
      "tokens_per_s": len(rows) * NEW_TOKENS / whole_s,
      "decode_tokens_per_s": len(rows) * (NEW_TOKENS - 1) / (whole_s - first_s),
      "first_token_s": first_s,
      "ids": made[0],
    }

  run(prompts(size, 1), 1)
  return {}, measure
