"""Draws docs/schedules.png, pipeline schedules as in the papers: a row of microbatches per stage.

    python -m docs.schedule_plot
"""

from pathlib import Path

from llmjax.parallel.schedules import KINDS, Schedule, make_schedule, tables

FILLS = {"F": ("#a6cbe8", "#3b78b0"), "B": ("#b4dfae", "#3f8f4a"), "W": ("#fbcf9a", "#d9731a")}
IDLE = "#eeeeee"


def draw_schedules(path: str | Path, stages: int = 4, microbatches: int = 8, chunks: int = 2):
  """Writes a picture of the four schedules on one time scale.

  F, B and W of a whole stage each take 1, and an undivided backward pass takes 2. A chunk of the
  interleaved schedule takes proportionally less, and chunks after the first are drawn darker.

  Args:
    path: file to write, in the format of its suffix.
    microbatches: a multiple of `stages`.
    chunks: number of chunks per stage of the interleaved schedule.
  """
  from matplotlib.figure import Figure
  from matplotlib.patches import Patch

  schedules = [
    make_schedule(kind, stages, microbatches, chunks if kind == "interleaved" else 1)
    for kind in KINDS
  ]
  length = 3 * (microbatches + stages - 1)  # of gpipe, the longest
  size = (0.42 * length + 1.2, len(schedules) * (0.36 * stages + 0.75) + 0.6)
  figure = Figure(size)
  axes = figure.subplots(len(schedules), sharex=True)
  for axis, schedule in zip(axes, schedules, strict=True):
    _draw(axis, schedule)
  axes[-1].set(xlim=(-0.1, length + 0.1), xlabel="time, in forward passes of a whole stage")
  legend = {
    "F: forward": FILLS["F"][0],
    "B: backward (only for the input where W is separate)": FILLS["B"][0],
    "W: backward for the weights": FILLS["W"][0],
    "F of a later chunk": FILLS["F"][1],
    "B of a later chunk": FILLS["B"][1],
    "idle": IDLE,
  }
  patches = [Patch(color=color) for color in legend.values()]
  figure.legend(patches, legend, ncols=len(legend), loc="upper right", frameon=False)
  figure.tight_layout(rect=(0, 0, 1, 0.97))
  figure.savefig(path, dpi=100)


def _draw(axis, schedule: Schedule):
  unit = 1 / schedule.chunks
  for stage, line in enumerate(lines := schedule.timeline(unit, unit, unit)):
    axis.barh(stage, max(line[-1][1] for line in lines), height=0.94, color=IDLE)
    for start, end, (kind, chunk, microbatch) in line:
      fill, ink = FILLS[kind][chunk > 0], "white" if chunk else "black"
      axis.barh(stage, end - start, left=start, height=0.94, color=fill, ec="white", lw=0.8)
      axis.text((start + end) / 2, stage, microbatch, ha="center", va="center", color=ink, size=8)
  kind, of = schedule.kind, ""
  if schedule.chunks > 1:
    kind = f"{kind}, {schedule.chunks} chunks per stage"
    of = f" (each of 1/{schedule.chunks} stage)"
  peaks = ", ".join(map(str, tables(schedule).saved.slots))
  title = f"{kind}: bubble {schedule.bubble_fraction():.1%}, peak activations {peaks}{of}"
  axis.set_title(title, loc="left", fontsize=10)
  stages = range(schedule.stages)
  axis.set(yticks=stages, yticklabels=[f"stage {stage}" for stage in stages])
  axis.invert_yaxis()
  axis.spines[:].set_visible(False)
  axis.tick_params(length=0)


if __name__ == "__main__":
  draw_schedules(Path(__file__).with_name("schedules.png"))
