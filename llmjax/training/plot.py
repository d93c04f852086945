"""The pictures of a run: its loss curve, and how its experts share the work."""

import math
from pathlib import Path

import numpy as np

from llmjax.training.metrics import read_metrics


def plot_loss(workdir: Path, path: Path, levels: dict[str, float]):
  """Draws training loss (faint: every step; bold: running mean), held-out loss, and levels.

  Args:
    levels: name → nats a token, drawn as horizontal lines to compare with.
  """
  from matplotlib.figure import Figure

  lines = read_metrics(workdir)
  points = np.array([(m["step"], m["loss"]) for m in lines if "loss" in m])
  held_out = np.array([(m["step"], m["nats_per_token"]) for m in lines if "nats_per_token" in m])
  width = max(1, len(points) // 50)
  figure = Figure(figsize=(7, 4), dpi=120, layout="tight")
  axes = figure.subplots()
  axes.plot(*points.T, color="tab:blue", alpha=0.25, linewidth=0.8)
  smooth = np.convolve(points[:, 1], np.ones(width) / width, mode="valid")
  axes.plot(points[width - 1 :, 0], smooth, color="tab:blue", label="training")
  if len(held_out):
    axes.plot(*held_out.T, "o-", color="tab:orange", label="held out")
  for number, (name, nats) in enumerate(levels.items(), 1):
    axes.axhline(nats, color=f"C{number}", linestyle="--", linewidth=1, label=name)
  axes.set(xlabel="step", ylabel="loss, nats a token")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(path)


def levels(result: dict) -> dict[str, float]:
  """The held-out scores in nats per token, so that one plot shows model and compressors."""
  if "bits_per_byte" not in result:
    return {}
  nats = math.log(2) * result["bytes"] / result["tokens"]
  names = {"gzip -9": "gzip_bits_per_byte", "xz -9": "xz_bits_per_byte", "model": "bits_per_byte"}
  return {
    f"{name} on held-out text: {result[key]:.3f} bits per byte": result[key] * nats
    for name, key in names.items()
  }


def plot_experts(workdir: Path, path: Path):
  """Draws each layer's largest load over the steps, and the load of every expert at the end."""
  from matplotlib.figure import Figure

  lines = [line for line in read_metrics(workdir) if "moe_load" in line]
  steps = [line["step"] for line in lines]
  load_sle = np.array([line["moe_load"] for line in lines])
  last_le = load_sle[-max(1, len(lines) // 5) :].mean(0)
  figure = Figure(figsize=(11, 4), dpi=100, layout="tight")
  over_time, at_end = figure.subplots(1, 2)
  for layer, most in enumerate(load_sle.max(-1).T):
    over_time.plot(steps, most, lw=0.8, label=f"layer {layer}")
  over_time.axhline(1, color="grey", lw=0.8, ls="--")
  over_time.set(xlabel="step", ylabel="largest load / mean load", ylim=(0.9, None))
  over_time.legend(fontsize=7)
  shown = at_end.imshow(last_le, cmap="coolwarm", vmin=0, vmax=2, aspect="auto")
  at_end.set(xlabel="expert", ylabel="layer", title="load / mean load, last fifth of the steps")
  at_end.locator_params(integer=True)
  figure.colorbar(shown, ax=at_end)
  figure.savefig(path)
