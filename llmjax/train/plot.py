"""The picture of a run: its loss curve."""

from pathlib import Path

from llmjax.train.metrics import read_metrics


def plot_loss(workdir: Path, path: Path, levels: dict[str, float]):
  """Draws training loss (faint: every step; bold: running mean), held-out loss, and levels.

  Args:
    workdir: folder with a `metrics.jsonl`.
    path: PNG to write.
    levels: name → nats a token, drawn as horizontal lines to compare with.
  """
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  import numpy as np

  lines = read_metrics(workdir)
  points = np.array([(m["step"], m["loss"]) for m in lines if "loss" in m])
  held_out = np.array([(m["step"], m["nats_per_token"]) for m in lines if "nats_per_token" in m])
  width = max(1, len(points) // 50)
  kernel = np.ones(width) / width
  figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
  axes.plot(*points.T, color="tab:blue", alpha=0.25, linewidth=0.8)
  smooth = np.convolve(points[:, 1], kernel, mode="valid")
  axes.plot(points[width - 1 :, 0], smooth, color="tab:blue", label="training")
  if len(held_out):
    axes.plot(*held_out.T, "o-", color="tab:orange", label="held out")
  for color, (name, nats) in zip(plt.cm.tab10.colors[1:], levels.items(), strict=False):
    axes.axhline(nats, color=color, linestyle="--", linewidth=1, label=name)
  axes.set_xlabel("step")
  axes.set_ylabel("loss, nats a token")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)
