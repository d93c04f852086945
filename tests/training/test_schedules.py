"""Proves every schedule against the reference at each of a run's updates."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from llmjax.core.errors import UserError
from llmjax.training.optim import OptimConfig
from llmjax.training.schedules import check_schedule, make_schedule
from tests.reference import optim as reference


@pytest.mark.parametrize(
  ("text", "name"),
  [
    ("cosine", "cosine"),
    ("cosine:cycles=3", "cosine 3"),
    ("linear", "linear"),
    ("linear:cycles=2", "linear 2"),
    ("constant", "constant"),
    ("inverse_sqrt", "inverse_sqrt"),
    ("wsd:decay=5", "wsd 5 sqrt"),
    ("wsd:decay=0.25,shape=linear", "wsd 5 linear"),
    ("wsd", "wsd 4 sqrt"),
  ],
)
@pytest.mark.parametrize("warmup", [0.0, 1.0, 4.0, 13.0])
def test_every_schedule_equals_the_reference_at_every_update(text, name, warmup):
  rate = make_schedule(OptimConfig(schedule=text, warmup=warmup, min_lr_ratio=0.25), 20, 2.0)
  found = jax.vmap(rate)(np.arange(20))
  expected = [reference.schedule(name, u, 2.0, warmup, 20, 0.25) for u in range(1, 21)]
  # √ near the start of a decay is as steep as 1 / √ of a rounding, 2^-12 of it at worst.
  assert_allclose(found, expected, rtol=2e-6)


def test_published_points_of_the_schedules():
  at = lambda text, done: float(  # noqa: E731
    make_schedule(OptimConfig(schedule=text, warmup=4.0, min_lr_ratio=0.0), 20, 2.0)(done)
  )
  for text in ("cosine", "linear", "constant", "inverse_sqrt", "wsd"):
    assert at(text, 0) == pytest.approx(0.5) and at(text, 3) == pytest.approx(2)
  for text in ("cosine", "cosine:cycles=4", "linear", "wsd", "wsd:shape=linear"):
    assert at(text, 19) == pytest.approx(0, abs=1e-6)
  assert at("inverse_sqrt", 15) == pytest.approx(1)  # four times as many updates, half the rate
  assert at("wsd:decay=4", 15) == pytest.approx(2) and at("wsd:decay=4", 16) == pytest.approx(1)
  assert at("cosine:cycles=4", 7) == pytest.approx(0, abs=1e-6)  # the last of the first cycle
  assert at("cosine:cycles=4", 8) == pytest.approx(at("cosine:cycles=4", 4))


@pytest.mark.parametrize(("warmup", "steps"), [(100, 10), (11, 10), (10, 10)])
def test_a_warmups_rates_do_not_depend_on_the_runs_length(warmup, steps):
  """As in transformers and Megatron; `check_schedule` refuses such runs, shrunk ones have them."""
  schedule = make_schedule(OptimConfig(warmup=float(warmup)), steps, 2.0)
  for number in range(1, steps + 1):
    assert schedule(number - 1) == pytest.approx(2.0 * number / warmup, rel=1e-6)


@pytest.mark.parametrize(
  ("text", "says"),
  [
    ("cosin", "optim.schedule 'cosin' is unknown; did you mean 'cosine'"),
    ("constant:cycles=2", "constant has no option 'cycles'; it has no options"),
    ("wsd:decy=2", "wsd has no option 'decy'; its options are decay, shape"),
    ("wsd:decay=0", "decay '0' is not a fraction of the steps or a number of steps"),
    ("wsd:decay=nan", "decay 'nan' is not a fraction"),
    ("wsd:decay=2.5", "decay '2.5' is not a fraction"),
    ("wsd:shape=sqr", "shape 'sqr' is unknown; did you mean 'sqrt'"),
    ("cosine:cycles=0.5", "cycles '0.5' is not a whole number"),
  ],
)
def test_a_schedule_that_is_not_understood_is_a_user_error(text, says):
  with pytest.raises(UserError, match=says):
    OptimConfig(schedule=text)


@pytest.mark.parametrize(
  ("text", "warmup", "done", "says"),
  [
    ("cosine", 20, 0, "optim.warmup 20 is not below train.steps 20"),
    ("wsd:decay=17", 4, 0, "a decay of 17 steps does not fit into the 16 steps of train.steps 20"),
    ("wsd:decay=0.01", 4, 0, "a decay of 0 steps"),
    ("wsd", 4, 17, "a decay of 4 steps does not fit into the 3 steps .* after step 17, where"),
    ("cosine:cycles=17", 4, 0, "17 cycles do not fit into the 16 steps"),
  ],
)
def test_a_schedule_longer_than_the_run_is_a_user_error(text, warmup, done, says):
  with pytest.raises(UserError, match=says):
    check_schedule(OptimConfig(schedule=text, warmup=float(warmup)), 20, done)
  check_schedule(OptimConfig(schedule="wsd:decay=16", warmup=4.0), 20)
  check_schedule(OptimConfig(schedule="wsd:decay=3", warmup=4.0), 20, done=17)


def test_a_warmup_below_one_is_a_fraction_of_the_run():
  part, whole = (make_schedule(OptimConfig(warmup=w), 20, 2.0) for w in (0.2, 4.0))
  assert [part(done) for done in range(20)] == [whole(done) for done in range(20)]
  with pytest.raises(UserError, match=r"optim.warmup 4.5 is neither a number of steps nor a frac"):
    OptimConfig(warmup=4.5)
