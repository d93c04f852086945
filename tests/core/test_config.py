"""Proves that configs are strict: unknown keys, wrong types and broken files are user errors."""

import dataclasses
import json

import pytest

from llmjax.core import config as configs
from llmjax.core.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.nn.norm import NormConfig
from llmjax.serve.sample import Sampling
from llmjax.training.config import Config
from llmjax.training.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 0.5
  names: tuple = ("a",)
  on: bool = True


@dataclasses.dataclass(frozen=True)
class Outer:
  steps: int = 3
  word: str = "w"
  inner: Inner = Inner()


FILE = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict({"steps": 7, "word": "w", "inner": {"rate": 0.25, "names": ("a",), "on": True}})
"""


@pytest.fixture
def path(tmp_path):
  file = tmp_path / "experiment.py"
  file.write_text(FILE)
  return str(file)


def write(tmp_path, text):
  file = tmp_path / "broken.py"
  file.write_text(text)
  return str(file)


def test_defaults_are_the_dataclasses_own():
  tree = configs.defaults(Outer)
  assert tree.inner.rate == 0.5
  assert configs.freeze(tree.to_dict(), Outer) == Outer()


def test_defaults_refuse_a_key_nobody_declared():
  tree = configs.defaults(Outer)
  with pytest.raises((AttributeError, KeyError)):
    tree.inner.rat = 1.0


def test_the_real_config_survives_defaults_freeze_and_json():
  made = configs.freeze(configs.defaults(Config).to_dict(), Config)
  assert made == Config()
  assert configs.freeze(json.loads(json.dumps(dataclasses.asdict(made))), Config) == made


def test_a_file_is_read_and_overridden(path):
  made = configs.load(path, ["--config.inner.rate=2", "--config.inner.names=('x', 'y')"], Outer)
  assert made == Outer(steps=7, inner=Inner(rate=2.0, names=("x", "y")))
  assert isinstance(made.inner.rate, float)


def test_a_frozen_config_is_overridden():
  made = configs.override(Outer(), ["--config.inner.on=false", "--config.steps=9"])
  assert made == Outer(steps=9, inner=Inner(on=False))


WRONG_ARGUMENTS = pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--config.inner.rte=2", r"unknown config key 'inner.rte'; did you mean 'inner.rate'"),
    ("--config.inner=2", r"unknown config key 'inner'"),
    ("--config.steps", r"'steps' has no value"),
    ("--config.steps=many", r"steps"),
    ("--config.steps=1.5", r"steps"),
    ("--config.inner.on=perhaps", r"inner.on"),
    ("--config.inner.rate=fast", r"inner.rate"),
  ],
)


@WRONG_ARGUMENTS
def test_a_wrong_argument_on_a_file_is_a_user_error_that_names_the_key(path, argument, words):
  with pytest.raises(UserError, match=words):
    configs.load(path, [argument], Outer)


@WRONG_ARGUMENTS
def test_a_wrong_argument_on_a_config_is_a_user_error_that_names_the_key(argument, words):
  with pytest.raises(UserError, match=words):
    configs.override(Outer(), [argument])


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("x = 1\n", r"no get_config"),
    ("def get_config():\n  return {}\n", r"must return an ml_collections.ConfigDict"),
    ("def get_config(:\n", r"broken.py:1: "),
    ("def get_config():\n  return missing\n", r"broken.py:2: NameError"),
    ("\nimport no_such_module\n", r"broken.py:2: ModuleNotFoundError"),
  ],
)
def test_a_broken_file_is_a_user_error_that_names_the_line(tmp_path, text, words):
  with pytest.raises(UserError, match=words):
    configs.load(write(tmp_path, text), [], Outer)


def test_a_missing_file_is_a_user_error():
  with pytest.raises(UserError, match=r"'nowhere.py' does not exist"):
    configs.load("nowhere.py", [], Outer)


def test_an_unknown_key_in_a_file_is_a_user_error(tmp_path):
  text = FILE.replace('"rate"', '"rat"')
  with pytest.raises(UserError, match=r"'inner.rat'; did you mean 'inner.rate'"):
    configs.load(write(tmp_path, text), [], Outer)


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"steps": 1.0}, r"'steps' must be int, not 1.0 \(float\)"),
    ({"steps": True}, r"'steps' must be int, not True"),
    ({"word": 3}, r"'word' must be str"),
    ({"inner": 3}, r"'inner' is a section"),
    ({"inner": {"on": 1}}, r"'inner.on' must be bool"),
    ({"inner": {"names": "a"}}, r"'inner.names' must be tuple"),
    ({"inner": {"raet": 1.0}}, r"'inner.raet'; did you mean 'inner.rate'"),
  ],
)
def test_freeze_refuses_wrong_values(values, words):
  with pytest.raises(UserError, match=words):
    configs.freeze(values, Outer)


def test_freeze_fills_what_is_missing_and_mends_what_json_changed():
  made = configs.freeze({"inner": {"rate": 1, "names": ["p", "q"]}}, Outer)
  assert made == Outer(inner=Inner(rate=1.0, names=("p", "q")))


@pytest.mark.parametrize(
  ("section", "values", "words"),
  [
    ("model", {"dtype": "float61"}, "model.dtype 'float61'.*did you mean"),
    ("model", {"remat": "half"}, "model.remat 'half'.*known: attention, dots, full"),
    ("model", {"layers": 0}, "model.layers 0"),
    ("model", {"heads": 4, "kv_heads": 3}, "model.heads 4 .* model.kv_heads 3"),
    ("model", {"width": 30, "heads": 4}, "model.width 30 .* model.heads 4"),
    ("model", {"head_dim": 7}, "7 is odd"),
    ("data", {"held_out": 1.0}, "held_out 1.0"),
    ("data", {"batch_size": 0}, "data.batch_size 0"),
    ("optim", {"learning_rate": 0.0}, "learning_rate 0.0"),
    ("optim", {"clip_norm": -1.0}, "clip_norm -1.0"),
    ("train", {"steps": 0}, "train.steps 0"),
    ("checkpoint", {"keep": 1}, "keep 1"),
  ],
)
def test_values_that_make_no_run_are_user_errors(section, values, words):
  with pytest.raises(UserError, match=words):
    configs.freeze({section: values}, Config)


def test_flat_lists_every_value_by_dotted_key():
  assert configs.flat(Outer()) == {
    "steps": 3,
    "word": "w",
    "inner.rate": 0.5,
    "inner.names": ("a",),
    "inner.on": True,
  }


def test_the_hash_changes_with_every_value_and_is_pinned():
  assert configs.config_hash(Outer()) == configs.config_hash(Outer())
  changed = [
    Outer(steps=4),
    Outer(word="v"),
    Outer(inner=Inner(rate=0.51)),
    Outer(inner=Inner(names=("b",))),
    Outer(inner=Inner(on=False)),
  ]
  assert len({configs.config_hash(made) for made in [Outer(), *changed]}) == 6
  assert configs.config_hash(Outer()) == "82667b33827839a8"


def test_overriding_leaves_the_config_it_came_from_alone():
  before = Outer()
  assert configs.override(before, ["--config.steps=8"]).steps == 8
  assert before == Outer()


NOT_FINITE = pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])


@NOT_FINITE
@pytest.mark.parametrize("key", ["optim.learning_rate", "optim.beta1", "model.norm.eps"])
def test_a_number_that_is_not_finite_is_refused_wherever_a_config_is_read(key, number):
  with pytest.raises(UserError, match=rf"{key} (nan|-?inf) is not a finite number"):
    configs.override(Config(), [f"--config.{key}={number}"])
  section, *middle, last = key.split(".")
  values = dataclasses.asdict(Config())
  inner = values[section]
  for name in middle:
    inner = inner[name]
  inner[last] = float(number)  # as a checkpoint's JSON may hold it
  with pytest.raises(UserError, match="is not a finite number"):
    configs.freeze(values, Config)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_where_dataclasses_are_made_in_python(number):
  with pytest.raises(UserError, match=f"optim.weight_decay {number} is not a finite number"):
    Config(optim=OptimConfig(weight_decay=number))
  with pytest.raises(UserError, match=f"model.norm.eps {number} is not a finite number"):
    ModelConfig(norm=NormConfig(eps=number))
  for name in ("temperature", "top_p"):
    with pytest.raises(UserError, match=f"{name} {number} is not a finite number"):
      Sampling(**{name: number})


def test_an_old_key_answers_with_its_new_name(tmp_path):
  """On the command line and in a config file alike."""
  path = tmp_path / "config.py"
  head = "import llmjax\ndef get_config():\n  config = llmjax.defaults(llmjax.Config)\n"
  path.write_text(head + "  return config\n")
  with pytest.raises(UserError, match=r"'train.accumulation' is now called 'train.grad_accum"):
    configs.load(str(path), ["--config.train.accumulation=2"], Config)
  path.write_text(head + "  config.task.hidden = 0.2\n  return config\n")
  with pytest.raises(UserError, match=r"config.py:4: no config key 'hidden' .* task.mask_prob"):
    configs.load(str(path), [], Config)
  path.write_text(head + "  config.task.mask_prop = 0.2\n  return config\n")
  with pytest.raises(UserError, match=r"no config key 'mask_prop' there; did you mean 'mask_prob'"):
    configs.load(str(path), [], Config)


def test_a_stored_config_of_old_keys_is_read_as_one_of_today():
  """Values too where the meaning changed: patterns without decay are rows of groups."""
  stored = json.loads(json.dumps(dataclasses.asdict(Config())))
  today = json.loads(json.dumps(stored))
  for old, new in configs.RENAMED.items():
    (*sections, name), (*_, new_name) = old.split("."), new.split(".")
    section = stored
    for each in sections:
      section = section[each]
    section[name] = section.pop(new_name)
  stored["optim"]["no_decay"] = ["*/up_df"]
  stored["model"]["context"] = 77
  assert configs.with_new_names(today) == today
  found = configs.freeze(configs.with_new_names(stored), Config)
  assert found.model.max_seq_len == 77
  groups = OptimConfig(groups=(("*/up_df", {"decay": 0.0}), ("*", {}))).groups
  assert found.optim == dataclasses.replace(Config().optim, groups=groups)
  assert found.task == Config().task and found.train == Config().train
  with pytest.raises(UserError, match=r"'model.contxt': 'model.context' is now called"):
    raise configs.unknown_key("model.contxt", configs.flat(Config()))
