"""Draws what each axis cuts: who of four devices holds which part of activations and weights."""

import itertools
import math
from pathlib import Path

import numpy as np

from llmjax.parallel.rules import ACTIVATIONS, REPLICATED, WEIGHTS, axes_of

DEVICES = ("#3b78b0", "#d9731a", "#3f8f4a", "#a05195")
ALL = "#dddddd"
STREAM = ACTIVATIONS | {"t": ("context", "tensor")}  # as `stream_spec` has it
# Title, mesh, table of the weights.
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


def owners(letters: str, table: dict, mesh: dict[str, int], cells: int = 4) -> np.ndarray:
  """Says which devices hold which part of an array of two dimensions.

  Args:
    letters: the dimensions'.
    table: from letters to axes.
    mesh: sizes of axes; devices are counted with the last axis fastest.
    cells: parts drawn along each dimension, a multiple of what cuts it.
  Returns:
    Booleans [cells, cells, device].
  """
  held = np.zeros((cells, cells, math.prod(mesh.values())), bool)
  for device, place in enumerate(itertools.product(*map(range, mesh.values()))):
    at = dict(zip(mesh, place, strict=True))
    parts = []
    for letter in letters:
      axes = [axis for axis in axes_of(letter, table) if axis in mesh]
      ways, number = math.prod(mesh[axis] for axis in axes), 0
      for axis in axes:
        number = number * mesh[axis] + at[axis]
      parts.append(slice(number * cells // ways, (number + 1) * cells // ways))
    held[(*parts, device)] = True
  return held


def draw_layouts(path: str | Path):
  """Writes the picture, a row for each mesh; the file's ending says the format."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  size = (1.75 * len(ARRAYS) + 1.6, 1.25 * len(MESHES) + 1)
  figure, axes = plt.subplots(len(MESHES), len(ARRAYS), figsize=size)
  for axis, (name, _, _) in zip(axes[0], ARRAYS, strict=True):
    axis.set_title(name, fontsize=9)
  for row, (title, mesh, weights) in zip(axes, MESHES, strict=True):
    row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
    for axis, (_, letters, table) in zip(row, ARRAYS, strict=True):
      _draw(axis, owners(letters, table or weights, mesh))
  names = [*(f"device {number}" for number in range(4)), "every device"]
  patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (*DEVICES, ALL)]
  figure.legend(patches, names, ncols=5, loc="lower center", frameon=False)
  figure.tight_layout(rect=(0, 0.03, 1, 1))
  figure.savefig(path, dpi=80)


def _draw(axis, held: np.ndarray):
  from matplotlib.patches import Rectangle

  for i, j in itertools.product(*map(range, held.shape[:2])):
    who = np.flatnonzero(held[i, j])
    colors = [ALL] if len(who) == held.shape[2] else [DEVICES[device] for device in who]
    for part, color in enumerate(colors):  # shared cells are striped
      width = 1 / len(colors)
      axis.add_patch(Rectangle((j + part * width, i), width, 1, color=color, lw=0))
  axis.set(xlim=(0, held.shape[1]), ylim=(held.shape[0], 0), xticks=[], yticks=[], aspect="equal")
  axis.spines[:].set_color("white")
