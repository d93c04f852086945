"""Draws docs/layers.svg, the layers of the library and the imports between its packages.

    python -m docs.layer_plot
"""

from pathlib import Path

from tests.test_layers import LEVEL, package_imports

# Every package, top to bottom, and what it holds.
PACKAGES = {
  "cli": "parses the command line, prints",
  "bench": "ratios against peers and limits",
  "__init__": "the public names",
  "convert": "models to other formats",
  "data_show": "documents of a step's rows",
  "run": "train, load, evaluate",
  "model": "what load returns",
  "planning": "memory, time and cost before a run",
  "eval": "held-out loss, bits per byte",
  "serve": "sampling, generation, text vectors",
  "training": "objective, optimizers, step, loop",
  "formats": "Hugging Face, GGUF, presets",
  "models": "config, block, stack, kinds of models",
  "nn": "layers: attention, experts, cache, …",
  "data": "sources, packing, loader, tasks",
  "text": "tokenizers and chat templates",
  "parallel": "mesh, sharding rules, pipelines",
  "core": "letters, weights, dot, config, errors",
}
CELL, LEFT, TOP = 24, 390, 92
STYLE = """
    .page { fill: #ffffff; stroke: #c8ccd2; }
    .band { fill: #eef2f8; }
    .self { fill: #cfd6e0; }
    .dot { fill: #3b78b0; }
    text { fill: #1c2430; font: 13px ui-sans-serif, system-ui, "DejaVu Sans", sans-serif; }
    .name { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-weight: 600; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #12161c; stroke: #3a4250; }
      .band { fill: #1e2734; }
      .self { fill: #3a4658; }
      .dot { fill: #7fb4e6; }
      text { fill: #e6eaf0; }
    }
"""


def draw_layers() -> str:
  """Returns the picture as SVG: a row for each package, a dot in the column of what it imports."""
  names = list(PACKAGES)
  assert names == sorted(names, key=LEVEL.get) and {*LEVEL} - {*names} == {"__main__"}
  side = CELL * len(names)
  width, height = LEFT + side + 16, TOP + side + 16
  label = "Layers of llmjax: every package imports only packages below it"
  lines = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
    f'height="{height}" role="img" aria-label="{label}">',
    f"  <style>{STYLE}  </style>",
    f'  <rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
  ]
  for row, (name, text) in enumerate(PACKAGES.items()):
    y, shown = TOP + row * CELL, "llmjax" if name == "__init__" else name
    if row % 2 == 0:
      lines.append(f'  <rect class="band" x="8" y="{y}" width="{width - 16}" height="{CELL}"/>')
    lines += [
      f'  <text class="name" x="18" y="{y + 17}">{shown}</text>',
      f'  <text x="112" y="{y + 17}">{text}</text>',
      f'  <text class="name" transform="translate({LEFT + row * CELL + 17} {TOP - 8}) '
      f'rotate(-90)">{shown}</text>',
      f'  <rect class="self" x="{LEFT + row * CELL}" y="{y}" width="{CELL}" height="{CELL}"/>',
    ]
  for upper, lower in sorted(package_imports()):
    if upper in PACKAGES and lower in PACKAGES and upper != lower:
      x, y = (at * CELL + CELL // 2 for at in (names.index(lower), names.index(upper)))
      lines.append(f'  <circle class="dot" cx="{LEFT + x}" cy="{TOP + y}" r="6"/>')
  return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
  Path(__file__).with_name("layers.svg").write_text(draw_layers())
