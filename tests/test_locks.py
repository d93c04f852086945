"""The locks pin what pyproject.toml asks for, each package once, and agree where pip reads two."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = {
  "requirements.lock": ["3.11"],
  "requirements-py312.lock": ["3.12", "3.13", "3.14"],
}


def _pins(name: str, python: str) -> dict[str, str]:
  """Versions by package on Linux under one Python; two lines for a package would be an error."""
  platform = {"python_version": python, "python_full_version": f"{python}.0"}
  platform |= {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
  pins = {}
  for line in re.findall(r"^[a-zA-Z0-9].*", (ROOT / name).read_text(), re.M):
    pin = Requirement(line)
    if pin.marker is None or pin.marker.evaluate(platform):
      package = canonicalize_name(pin.name)
      assert package not in pins, f"{name} pins {package} twice for Python {python}"
      pins[package] = next(iter(pin.specifier)).version
  return pins


@pytest.mark.parametrize(
  ("name", "python"), [(name, python) for name, all in PYTHONS.items() for python in all]
)
def test_a_lock_pins_what_the_project_asks_for(name, python):
  pins = _pins(name, python)
  wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
  for requirement in map(Requirement, wanted):
    found = pins.get(canonicalize_name(requirement.name), "nothing")
    assert found != "nothing" and requirement.specifier.contains(found), (
      f"pyproject.toml wants {requirement}, {name} pins {found}: run `make lock`"
    )


def test_the_second_lock_is_not_behind_the_first():
  first, second = _pins("requirements.lock", "3.11"), _pins("requirements-py312.lock", "3.12")
  for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"):
    release = [tuple(map(int, pins[package].split("."))) for pins in (first, second)]
    assert release[0] <= release[1], package


@pytest.mark.parametrize("name", PYTHONS)
def test_the_oracle_lock_pins_nothing_twice(name):
  """pip is given both at once and refuses two versions of one package."""
  assert not _pins("requirements-oracle.lock", "3.11").keys() & _pins(name, PYTHONS[name][0]).keys()
