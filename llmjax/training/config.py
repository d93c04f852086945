"""`Config`: one experiment, all of it. Sections live beside what they configure."""

import dataclasses

from llmjax.core.choices import check_fields, check_finite
from llmjax.core.errors import UserError
from llmjax.data.loader import DataConfig
from llmjax.data.tasks import Task, TaskConfig, marks_of
from llmjax.models.config import ModelConfig
from llmjax.models.upcycle import InitConfig
from llmjax.parallel.mesh import MeshConfig
from llmjax.parallel.rules import ZERO
from llmjax.text.tokenizer import Tokenizer, TokenizerConfig, start_id
from llmjax.training.losses import LossConfig
from llmjax.training.optim import OptimConfig
from llmjax.training.pipelined import PipelineConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop.

  Attributes:
    steps: optimizer steps of the run.
    grad_accum_steps: micro-batches a step.
    log_every: steps between lines of metrics.
    zero_stage: what mesh axis `fsdp` shards: 1 optimizer state; 2 gradients too; 3 weights too.
    grad_reduce_dtype: float32, or bfloat16, which sends half as much: in which gradients are summed
      over `fsdp` in stage 3. Latent attention's down projections keep float32.
    vmem_mib: VMEM of a TPU that one fusion may use, in MiB: more makes large products faster and
      compilation slower. 0 means 20, on a v4 XLA's own limit.
    executable: file of a step compiled by `llmjax plan --keep-executable`; "" compiles here.
  """

  steps: int = 1000
  grad_accum_steps: int = 1
  log_every: int = 1
  zero_stage: int = 3
  grad_reduce_dtype: str = "float32"
  vmem_mib: int = 0
  executable: str = ""

  def __post_init__(self):
    check_fields(
      "train", self, steps=1, grad_accum_steps=1, log_every=1, vmem_mib=0, zero_stage=ZERO,
      grad_reduce_dtype=("float32", "bfloat16"),
    )
    if self.grad_reduce_dtype != "float32" and self.zero_stage != 3:
      raise UserError(
        f"train.grad_reduce_dtype={self.grad_reduce_dtype} changes nothing with train.zero_stage "
        "below 3"
      )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Checkpoints.

  Attributes:
    every: steps between checkpoints; the last step is always kept.
    keep: newest checkpoints that stay on disk; at least 2, in case one is damaged.
  """

  every: int = 500
  keep: int = 2

  def __post_init__(self):
    check_fields("checkpoint", self, every=1, keep=2)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Held-out evaluation.

  Attributes:
    every: steps between evaluations during training; 0 evaluates only at the end.
    batch_size: most rows of a batch.
    stride: predictions of each overlapping row after a document's first; 0 means half of
      `model.max_seq_len`.
  """

  every: int = 0
  batch_size: int = 16
  stride: int = 0

  def __post_init__(self):
    check_fields("eval", self, every=0, batch_size=1, stride=0)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """Samples written at the end of training.

  Attributes:
    prompts: one sample each.
    max_tokens: most new tokens.
    temperature: 0 is greedy.
    top_p: nucleus.
  """

  prompts: tuple = ("",)
  max_tokens: int = 128
  temperature: float = 0.8
  top_p: float = 0.95

  def __post_init__(self):
    check_fields("sample", self, max_tokens=1, temperature=0, top_p="(0, 1]")
    for prompt in self.prompts:
      if not isinstance(prompt, str):
        raise UserError(f"sample.prompts holds {prompt!r}, which is not a string")


# Tasks of each kind of model; the first is what `task.name=auto` means.
SUITABLE = {
  "decoder": ("language_model", "prefix_lm"), "encoder": ("masked_lm",),
  "encoder_decoder": ("span_corruption",), "vision": (),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole experiment; a run is a function of (config, seed, step)."""

  seed: int = 0
  model: ModelConfig = ModelConfig()
  init: InitConfig = InitConfig()
  tokenizer: TokenizerConfig = TokenizerConfig()
  data: DataConfig = DataConfig()
  task: TaskConfig = TaskConfig()
  loss: LossConfig = LossConfig()
  optim: OptimConfig = OptimConfig()
  train: TrainConfig = TrainConfig()
  mesh: MeshConfig = MeshConfig()
  pipeline: PipelineConfig = PipelineConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  eval: EvalConfig = EvalConfig()
  sample: SampleConfig = SampleConfig()

  def __post_init__(self):
    check_finite("", self)
    check_fields("", self, seed=0)
    if self.eval.stride > self.model.max_seq_len:
      raise UserError(
        f"eval.stride {self.eval.stride} is more than the {self.model.max_seq_len} positions of a "
        "row (model.max_seq_len); 0 takes half of them"
      )
    name, suits = self.task.name, SUITABLE[self.model.kind]
    if name not in ("auto", *suits):
      raise UserError(
        f"task.name={name} does not suit model.kind={self.model.kind}, which learns "
        f"{' or '.join(suits) or 'from Python alone'}"
      )
    if name == "prefix_lm" and self.model.attention.mask != "prefix":
      raise UserError("task.name=prefix_lm needs model.attention.mask=prefix")
    moe = self.model.moe
    if moe.experts and moe.top_k == 1 and moe.renormalize and moe.router in ("softmax", "sigmoid"):
      raise UserError(
        "model.moe.renormalize makes the weight of a token's only expert 1, so that the loss does "
        "not reach the router: set it to False, or model.moe.top_k above 1"
      )

  @property
  def task_name(self) -> str:
    """Name of the task, with `auto` resolved; "" for a kind that does not learn from text."""
    if self.task.name != "auto":
      return self.task.name
    prefix = self.model.attention.mask == "prefix"
    return "prefix_lm" if prefix else (*SUITABLE[self.model.kind], "")[0]

  def known_task(self) -> TaskConfig:
    """The task's config, with `auto` resolved.

    Raises:
      UserError: `llmjax train` has no task for this kind of model.
    """
    if not self.task_name:
      raise UserError(
        f"llmjax train reads text, which model.kind={self.model.kind} does not; "
        "train it from Python with llmjax.training.step on batches of patches"
      )
    if self.model.source_vocab_size:
      raise UserError(
        "llmjax train has one tokenizer, and model.source_vocab_size is for two; train from Python "
        "with llmjax.training.step on batches of source and target"
      )
    return dataclasses.replace(self.task, name=self.task_name)

  def task_of(self, tokenizer: Tokenizer) -> Task:
    """The run's task, for a tokenizer."""
    start = self.model.embed.start_token
    start = start_id(tokenizer) if start < 0 else start
    task = self.known_task()
    return Task(task, tokenizer.vocab_size, start, marks_of(task.name, tokenizer))


# Keys that may change when a run resumes: they do not decide what is learned.
_FREE = (
  "mesh.", "pipeline.", "train.zero_stage", "train.executable", "train.vmem_mib",
  "model.attention.context_parallel", "checkpoint.", "eval.", "sample.", "data.cache", "train.log_",
)


def binding(values: dict) -> dict:
  """Selects the values of a flat config that may not change when a run resumes."""
  return {key: value for key, value in values.items() if not key.startswith(_FREE)}
