"""The pictures of a run: its loss curve, and how its experts share the work."""

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


def plot_experts(workdir: Path, path: Path):
  """Draws each layer's largest load over the steps, and the load of every expert at the end.

  Args:
    workdir: folder with a `metrics.jsonl` that has `moe_load`.
    path: PNG to write.
  """
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  import numpy as np

  lines = [line for line in read_metrics(workdir) if "moe_load" in line]
  steps = [line["step"] for line in lines]
  load_sle = np.array([line["moe_load"] for line in lines])
  last_le = load_sle[-max(1, len(lines) // 5) :].mean(0)
  figure, (over_time, at_end) = plt.subplots(1, 2, figsize=(11, 4), dpi=100)
  for layer, most in enumerate(load_sle.max(-1).T):
    over_time.plot(steps, most, lw=0.8, label=f"layer {layer}")
  over_time.axhline(1, color="grey", lw=0.8, ls="--")
  over_time.set(xlabel="step", ylabel="largest load / mean load", ylim=(0.9, None))
  over_time.legend(fontsize=7)
  shown = at_end.imshow(last_le, cmap="coolwarm", vmin=0, vmax=2, aspect="auto")
  at_end.set(xlabel="expert", ylabel="layer", title="load / mean load, last fifth of the steps")
  figure.colorbar(shown, ax=at_end)
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)
