"""What processes share, in one: every function is plain. `tests/test_launch.py` has several.

The texts are what jax 0.10.2 wrote when a process was stopped or killed.
"""

import jax.numpy as jnp
import pytest

from llmjax.core.errors import UserError
from llmjax.parallel import multihost
from llmjax.parallel.join import join, leave, silent_process

UNHEARD = (
  "absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n"
  "The tasks have crashed.\n\nRPC: /xla.coordination.CoordinationService/PollForError"
)
BARRIER = (
  "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 12 heartbeat timeout. "
  "This indicates that the remote task has failed\n"
  "RPC: /xla.coordination.CoordinationService/Barrier"
)
COORDINATOR = "Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/Heartbeat"
GLOO = "UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:32466: Connection reset by peer"


@pytest.mark.parametrize(
  ("text", "number"), [(UNHEARD, "1"), (BARRIER, "12"), (COORDINATOR, "0"), (GLOO, ""), ("", "")]
)
def test_which_process_was_lost_is_read_from_the_runtime(text, number):
  assert silent_process(text) == number


def test_one_process_alone_decides_at_once(monkeypatch):
  for name in ("LLMJAX_COORDINATOR", "LLMJAX_PROCESS", "LLMJAX_PROCESSES"):
    monkeypatch.delenv(name, raising=False)
  join()
  assert multihost.is_writer()
  votes = multihost.Votes()
  assert [votes.add(flag) for flag in (False, True, False)] == [False, True, False]
  assert multihost.agree(True) and not multihost.agree(False)
  tree = {"a": jnp.ones(2)}
  assert multihost.to_writer(tree) is tree
  made = object()
  assert multihost.from_writer(lambda: made) is made
  multihost.barrier("nobody else")
  assert leave(2) == 2, "and goes on"


def test_the_writers_mistake_is_told():
  def make():
    raise UserError("no text")

  with pytest.raises(UserError, match="no text"):
    multihost.from_writer(make)
