"""Proves pipeline schedules: the papers' formulas, a checker that catches, tables that run.

Formulas are those of Huang et al. 2018, Narayanan et al. 2021 (§2.2) and Qi et al. 2023 (table 2).
The tables are proved by a small runtime that knows nothing but them and tracks what every value is.
"""

import dataclasses
import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from docs.schedule_plot import draw_schedules
from llmjax.core.errors import UserError
from llmjax.parallel.schedules import Action, make_schedule, tables


def F(microbatch, chunk=0):
  return Action("F", chunk, microbatch)


def B(microbatch, chunk=0):
  return Action("B", chunk, microbatch)


def W(microbatch, chunk=0):
  return Action("W", chunk, microbatch)


BUFFERS = ("saved", "activation", "gradient", "pending")
TIMES = [(1, 1, 1), (2, 3, 1), (10, 12, 8), (3, 2, 2)]  # forward, backward, weight ≤ backward
SMALL = [
  (kind, stages, microbatches, chunks)
  for stages, microbatches, chunks in product(range(1, 7), range(1, 13), range(1, 4))
  for kind in (("gpipe", "1f1b", "zb_h1") if chunks == 1 else ("interleaved",))
  if chunks == 1 or microbatches % stages == 0
]


def length(schedule, times):
  return max(line[-1][1] for line in schedule.timeline(*times))


def needs(action, stage, stages, chunks):
  """The (stage, action) pairs that must run before.

  With v a virtual stage and m a microbatch, F(v, m) needs F(v − 1, m); B(v, m) needs F(v, m) and
  B(v + 1, m); W(v, m) needs B(v, m).
  """
  v, m = action.chunk * stages + stage, action.microbatch
  wanted = {"F": [("F", v - 1)], "B": [("B", v + 1), ("F", v)], "W": [("B", v)]}[action.kind]
  inside = [(kind, n) for kind, n in wanted if 0 <= n < stages * chunks]
  return [(n % stages, Action(kind, n // stages, m)) for kind, n in inside]


def check(schedule):
  """Refuses a schedule unless every action runs exactly once, after those that it needs."""
  kinds = ("F", "B", "W") if schedule.kind == "zb_h1" else ("F", "B")
  counts = map(range, (schedule.microbatches, schedule.chunks, schedule.stages))
  expected = {(stage, Action(kind, c, m)): None for kind, m, c, stage in product(kinds, *counts)}
  ran = {}
  for tick, row in enumerate(schedule.table):
    for stage, action in enumerate(row):
      if action is None:
        continue
      where = f"tick {tick}, stage {stage}: {action}"
      assert (stage, action) in expected, f"{where} does not belong"
      assert (stage, action) not in ran, f"{where} has run before, at tick {ran[stage, action]}"
      for need in needs(action, stage, schedule.stages, schedule.chunks):
        assert ran.get(need, tick) < tick, f"{where} needs {need[1]} on stage {need[0]}"
      ran[stage, action] = tick
  for stage, action in expected:
    assert (stage, action) in ran, f"tick {len(schedule.table)}, stage {stage}: {action} never ran"


def drawn(schedule):
  """One line a stage: `F0` or, idle, `.`; chunk 0 only."""
  columns = zip(*schedule.table, strict=True)
  return [" ".join(f"{a.kind}{a.microbatch}" if a else "." for a in column) for column in columns]


def edited(schedule, changes):
  """The schedule with {(tick, stage): action} put in."""
  rows = [list(row) for row in schedule.table]
  for (tick, stage), action in changes.items():
    rows[tick][stage] = action
  return dataclasses.replace(schedule, table=tuple(map(tuple, rows)))


def swapped(schedule, stage, first, second):
  column = [row[stage] for row in schedule.table]
  places = {(column.index(first), stage): second, (column.index(second), stage): first}
  return edited(schedule, places)


def test_1f1b_is_the_table_drawn_by_hand():
  assert drawn(make_schedule("1f1b", 3, 4)) == [
    "F0 F1 F2 . . B0 F3 B1 . B2 . B3",
    ". F0 F1 . B0 F2 B1 F3 B2 . B3 .",
    ". . F0 B0 F1 B1 F2 B2 F3 B3 . .",
  ]


def test_zb_h1_is_the_table_drawn_by_hand():
  assert drawn(make_schedule("zb_h1", 3, 4)) == [
    "F0 F1 F2 . . B0 W0 F3 B1 W1 B2 W2 B3 W3",
    ". F0 F1 . B0 F2 B1 W0 F3 B2 W1 B3 W2 W3",
    ". . F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3",
  ]


@pytest.mark.parametrize("times", TIMES)
def test_bubbles_are_the_papers(times):
  """Up to float rounding, for which `approx` allows 1e-6."""
  for kind, p, m, v in SMALL:
    if kind != "zb_h1":
      schedule = make_schedule(kind, p, m, v)
      assert length(schedule, times) == (v * m + p - 1) * sum(times), (kind, p, m, v)
      fraction = (p - 1) / (v * m + p - 1)
      assert schedule.bubble_fraction(*times) == pytest.approx(fraction), (kind, p, m, v)


@pytest.mark.parametrize("times", TIMES)
def test_zb_h1_idles_as_long_as_the_paper_says(times):
  forward, backward, weight = times
  for p, m in product(range(1, 7), range(1, 13)):
    schedule = make_schedule("zb_h1", p, m)
    idle = length(schedule, times) - m * sum(times)
    if m >= p:  # the paper's case; with fewer there is not enough W to fill the bubble
      assert idle == (p - 1) * (forward + backward - weight)
    fraction = schedule.bubble_fraction(*times)
    assert fraction == pytest.approx(idle / (idle + m * sum(times)))
    fused = make_schedule("1f1b", p, m).bubble_fraction(*times)
    assert fraction < fused if p > 1 else fraction == fused == 0


def test_peak_activations_are_the_papers():
  for kind, p, m, v in SMALL:
    expected = {
      "gpipe": [m] * p,
      "1f1b": [min(m, p - s) for s in range(p)],
      # Megatron-LM's warm-up, and one forward before the first backward
      "interleaved": [min(m * v, 2 * (p - s - 1) + (v - 1) * p + 1) for s in range(p)],
      "zb_h1": [min(m, p)] * p,
    }
    slots = tables(make_schedule(kind, p, m, v)).saved.slots
    assert list(slots) == expected[kind], (kind, p, m, v)


def test_schedules_are_valid_and_have_no_more_ticks_than_the_formulas():
  for kind, p, m, v in SMALL:
    schedule = make_schedule(kind, p, m, v)
    check(schedule)
    if kind != "zb_h1":
      assert len(schedule.table) == 2 * (m * v + p - 1), (kind, p, m, v)
    elif m >= p:
      assert len(schedule.table) == 3 * m + p - 1, (p, m)


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_check_catches_an_action_dropped_or_repeated(data):
  schedule = make_schedule(*data.draw(st.sampled_from(SMALL)))
  table = schedule.table
  places = [(tick, stage) for tick, row in enumerate(table) for stage in range(len(row))]
  tick, stage = data.draw(st.sampled_from([(t, s) for t, s in places if table[t][s]]))
  action = table[tick][stage]
  fault = rf"tick \d+.*, stage \d+: (.* needs {action} on stage {stage}|{action} never ran)"
  with pytest.raises(AssertionError, match=fault):
    check(edited(schedule, {(tick, stage): None}))
  again = tuple(action if other == stage else None for other in range(schedule.stages))
  fault = f"stage {stage}: {action} has run before, at tick {tick}"
  with pytest.raises(AssertionError, match=fault):
    check(dataclasses.replace(schedule, table=(*table, again)))


@pytest.mark.parametrize(
  ("numbers", "stage", "first", "second", "message"),
  [
    (("gpipe", 2, 3), 1, F(0), B(0), "tick 1, stage 1: B .* 0 needs F .* 0 on stage 1"),
    (("gpipe", 2, 3), 1, F(0), F(2), "tick 1, stage 1: F .* 2 needs F .* 2 on stage 0"),
    (("1f1b", 3, 4), 0, B(0), B(1), "tick 5, stage 0: B .* 1 needs B .* 1 on stage 1"),
    (("interleaved", 2, 2, 2), 0, F(0), F(0, 1), "tick 0, stage 0: F .* 1, .* 0 needs F .* 0, "),
    (("interleaved", 2, 2, 2), 1, B(0), B(0, 1), r"tick \d+, stage 1: B .* 0, .* needs B .* 1, "),
    (("zb_h1", 2, 2), 0, B(1), W(1), r"tick \d+, stage 0: W .* 1 needs B .* 1 on stage 0"),
  ],
)
def test_check_catches_two_actions_swapped(numbers, stage, first, second, message):
  with pytest.raises(AssertionError, match=message):
    check(swapped(make_schedule(*numbers), stage, first, second))


def test_check_catches_what_runs_in_the_tick_of_what_it_needs():
  schedule = edited(make_schedule("gpipe", 2, 1), {(0, 1): F(0), (1, 1): None})
  with pytest.raises(AssertionError, match=r"tick 0, stage 1: F .* 0 needs F .* 0 on stage 0"):
    check(schedule)


@pytest.mark.parametrize("action", [W(0), F(3), F(0, 1), Action("X", 0, 0)])
def test_check_catches_what_does_not_belong(action):
  schedule = make_schedule("1f1b", 2, 3)
  with pytest.raises(AssertionError, match=f"tick 0, stage 1: {action} does not belong"):
    check(edited(schedule, {(0, 1): action}))


def test_an_order_that_deadlocks_has_no_timeline():
  schedule = swapped(make_schedule("1f1b", 2, 2), 1, F(0), B(0))
  with pytest.raises(UserError, match="stage 0 waits for ever at B of chunk 0, microbatch 0"):
    schedule.timeline()


class Store:
  """One buffer of one stage: refuses slots that are not there, and counts what is alive in it."""

  def __init__(self, slots):
    self.values, self.slots, self.alive, self.peak = {}, slots, 0, 0

  def write(self, slot, value):
    assert 0 <= slot < self.slots
    self.values[slot] = value
    self.alive += 1
    self.peak = max(self.peak, self.alive)

  def read(self, slot, value, last):
    assert 0 <= slot < self.slots
    assert self.values[slot] == value
    self.alive -= last


class Runtime:
  """Executes tables and nothing else; a value is its name, (sort, virtual stage, microbatch)."""

  def __init__(self, t, stages, chunks, splits):
    self.t, self.stages, self.end, self.splits = t, stages, stages * chunks - 1, splits
    self.buffers = {name: getattr(t, name) for name in BUFFERS}
    self.stores = {name: [Store(n) for n in each.slots] for name, each in self.buffers.items()}
    self.ran = []

  def run(self):
    for tick in range(len(self.t.kind)):
      self.tick = tick
      self.used, self.sent = set(), []
      for stage in range(self.stages):
        self.act(stage)
      for name, stage, value in self.sent:  # after every stage has read and written its own
        self.write(name, stage, value)
      for name, side, stage in product(BUFFERS, ("write", "read"), range(self.stages)):
        slot = getattr(self.buffers[name], side)[self.tick, stage]
        assert slot >= 0 if (name, side, stage) in self.used else slot == -1

  def write(self, name, stage, value):
    assert (name, "write", stage) not in self.used
    self.used.add((name, "write", stage))
    self.stores[name][stage].write(self.buffers[name].write[self.tick, stage], value)

  def read(self, name, stage, value, last=True):
    self.used.add((name, "read", stage))
    self.stores[name][stage].read(self.buffers[name].read[self.tick, stage], value, last)

  def act(self, stage):
    t, place = self.t, (self.tick, stage)
    code, microbatch = "-FBW"[t.kind[place]], int(t.microbatch[place])
    virtual = int(t.chunk[place]) * self.stages + stage
    x, dy = ("x", virtual, microbatch), ("dy", virtual, microbatch)
    if code == "-":
      assert t.chunk[place] == t.microbatch[place] == 0
      return
    self.ran.append((code, virtual, microbatch))
    if code == "F":
      if virtual > 0:
        self.read("activation", stage, x)
      self.write("saved", stage, x)
      if virtual < self.end:
        self.send("activation", stage + 1, ("x", virtual + 1, microbatch))
    if code == "B":
      if virtual < self.end:
        self.read("gradient", stage, dy)
      self.read("saved", stage, x, last=not self.splits)
      if self.splits:
        self.write("pending", stage, dy)
      if virtual > 0:
        self.send("gradient", stage - 1, ("dy", virtual - 1, microbatch))
    if code == "W":
      self.read("saved", stage, x)
      self.read("pending", stage, dy)

  def send(self, name, stage, value):
    self.sent.append((name, stage % self.stages, value))


def replay(kind, p, m, v):
  schedule = make_schedule(kind, p, m, v)
  t = tables(schedule)
  runtime = Runtime(t, p, v, splits=kind == "zb_h1")
  runtime.run()
  kinds = "BFW" if kind == "zb_h1" else "BF"
  assert sorted(runtime.ran) == list(product(kinds, range(p * v), range(m)))
  for name, stores in runtime.stores.items():
    # Whatever is written is read, and no buffer is larger than the most that is alive in it.
    assert [store.alive for store in stores] == [0] * p, name
    assert [store.peak for store in stores] == list(getattr(t, name).slots), name
  arrays = [t.kind, t.chunk, t.microbatch]
  arrays += [side for name in BUFFERS for side in (getattr(t, name).write, getattr(t, name).read)]
  assert all(a.dtype == np.int32 and a.shape == (len(schedule.table), p) for a in arrays)


def test_tables_give_every_action_the_right_values():
  for numbers in SMALL:
    replay(*numbers)


@given(
  kind=st.sampled_from(["gpipe", "1f1b", "interleaved", "zb_h1"]),
  stages=st.integers(1, 10),
  microbatches=st.integers(1, 40),
  chunks=st.integers(2, 5),
)
@settings(deadline=None, max_examples=40)
def test_larger_tables_do_too(kind, stages, microbatches, chunks):
  if kind == "interleaved":
    replay(kind, stages, stages * (microbatches % 4 + 1), chunks)
  else:
    replay(kind, stages, microbatches, 1)


@pytest.mark.parametrize(
  ("numbers", "message"),
  [
    (("1f1bb", 2, 2), "no pipeline schedule '1f1bb'; did you mean '1f1b'?"),
    (("gpipe", 0, 2), "at least one stage, not 0"),
    (("zb_h1", 2, 0), "at least one microbatch, not 0"),
    (("gpipe", 2, 2, -1), "at least one chunk, not -1"),
    (("1f1b", 2, 4, 2), "schedule '1f1b' has one chunk a stage, not 2"),
    (("zb_h1", 2, 4, 3), "schedule 'zb_h1' has one chunk a stage, not 3"),
    (("interleaved", 2, 4), "schedule 'interleaved' has two chunks a stage or more, not 1"),
    (("interleaved", 4, 6, 2), "6 microbatches are not a multiple of 4 stages"),
  ],
)
def test_numbers_that_do_not_work_are_named(numbers, message):
  with pytest.raises(UserError, match=re.escape(message)):
    make_schedule(*numbers)


def test_the_picture_shows_each_schedule_with_its_bubble(tmp_path):
  draw_schedules(tmp_path / "schedules.svg", stages=2, microbatches=4, chunks=2)
  texts = re.findall(r"<!-- (.*?) -->", (tmp_path / "schedules.svg").read_text())  # matplotlib's
  titles = [text for text in texts if "bubble" in text]
  assert titles == [
    "gpipe: bubble 20.0%, peak activations 4, 4",
    "1f1b: bubble 20.0%, peak activations 2, 1",
    "interleaved, 2 chunks per stage: bubble 11.1%, peak activations 5, 3 (each of 1/2 stage)",
    "zb_h1: bubble 7.7%, peak activations 2, 2",
  ]
  cells = 2 * (2 + 2 + 4 + 3)  # of microbatch 3: on 2 stages, F B, F B, 2 chunks of F B, F B W
  assert texts.count("3") == cells
