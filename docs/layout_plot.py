"""Draws docs/layouts.png, which block of each array every device of a mesh holds.

    python -m docs.layout_plot
"""

import itertools
import math
from pathlib import Path

import numpy as np

from llmjax.parallel.rules import ACTIVATIONS, REPLICATED, WEIGHTS, axes_of

DEVICES = ("#3b78b0", "#d9731a", "#3f8f4a", "#a05195")
ALL = "#dddddd"
CELLS = 4  # blocks drawn along each dimension, a multiple of every number of shards
STREAM = ACTIVATIONS | {"t": ("context", "tensor")}  # as `stream_spec` has it
# Title, mesh, sharding rules of the weights.
MESHES = (
  ("data 4", {"data": 4}, WEIGHTS),
  ("fsdp 4, ZeRO 1 and 2", {"fsdp": 4}, REPLICATED),
  ("fsdp 4, ZeRO 3", {"fsdp": 4}, WEIGHTS),
  ("tensor 4", {"tensor": 4}, WEIGHTS),
  ("context 4", {"context": 4}, WEIGHTS),
  ("stage 4", {"stage": 4}, WEIGHTS),
  ("expert 4", {"expert": 4}, WEIGHTS),
  ("fsdp 2 × tensor 2", {"fsdp": 2, "tensor": 2}, WEIGHTS),
)
ARRAYS = (
  ("residual stream\nb × t", "bt", STREAM),
  ("feed-forward hidden\nt × f", "tf", ACTIVATIONS),
  ("feed-forward weights\nl × d", "ld", None),
  ("feed-forward weights\nd × f", "df", None),
  ("experts' weights\ne × d", "ed", None),
)


def owners(letters: str, table: dict, mesh: dict[str, int]) -> np.ndarray:
  """Computes which devices hold each block of a two-dimensional array.

  Args:
    letters: of the two dimensions.
    table: sharding rules, from letters to mesh axes.
    mesh: size of each axis; devices are numbered with the last axis fastest.
  Returns:
    Booleans [CELLS, CELLS, device].
  """
  held = np.zeros((CELLS, CELLS, math.prod(mesh.values())), bool)
  for device, coordinates in enumerate(itertools.product(*map(range, mesh.values()))):
    at = dict(zip(mesh, coordinates, strict=True))
    block = []
    for letter in letters:
      axes = [axis for axis in axes_of(letter, table) if axis in mesh]
      shards, index = math.prod(mesh[axis] for axis in axes), 0
      for axis in axes:
        index = index * mesh[axis] + at[axis]
      block.append(slice(index * CELLS // shards, (index + 1) * CELLS // shards))
    held[(*block, device)] = True
  return held


def draw_layouts(path: str | Path):
  """Writes the picture, a row for each mesh, in the format of the file's suffix."""
  from matplotlib.figure import Figure
  from matplotlib.patches import Patch

  size = (1.75 * len(ARRAYS) + 1.6, 1.25 * len(MESHES) + 1)
  figure = Figure(size)
  axes = figure.subplots(len(MESHES), len(ARRAYS))
  for axis, (name, _, _) in zip(axes[0], ARRAYS, strict=True):
    axis.set_title(name, fontsize=9)
  for row, (title, mesh, weights) in zip(axes, MESHES, strict=True):
    row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
    for axis, (_, letters, table) in zip(row, ARRAYS, strict=True):
      _draw(axis, owners(letters, table or weights, mesh))
  names = [*(f"device {number}" for number in range(4)), "every device"]
  patches = [Patch(color=color) for color in (*DEVICES, ALL)]
  figure.legend(patches, names, ncols=5, loc="lower center", frameon=False)
  figure.tight_layout(rect=(0, 0.03, 1, 1))
  figure.savefig(path, dpi=80)


def _draw(axis, held: np.ndarray):
  for i, j in np.ndindex(CELLS, CELLS):
    who = np.flatnonzero(held[i, j])
    colors = [ALL] if len(who) == held.shape[2] else [DEVICES[device] for device in who]
    width = 1 / len(colors)  # blocks that several devices hold are striped
    lefts = j + width * np.arange(len(colors))
    axis.barh(i, width, 1, lefts, align="edge", color=colors, lw=0)
  axis.set(xlim=(0, CELLS), ylim=(CELLS, 0), xticks=[], yticks=[], aspect="equal")
  axis.spines[:].set_color("white")


if __name__ == "__main__":
  draw_layouts(Path(__file__).with_name("layouts.png"))
