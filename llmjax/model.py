"""`Model` as Python users hold it: what `llmjax.load` returns, with the functions of this package
that take one model as methods."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core.errors import UserError
from llmjax.data.batch import Batch
from llmjax.models import model as values
from llmjax.models.inputs import Rows, is_chat, is_single
from llmjax.serve.embed import embed
from llmjax.serve.generate import Completion, generate
from llmjax.serve.sample import Sampling
from llmjax.training.objective import token_logprobs


class Model(values.Model):
  """A config, its parameters and a tokenizer. Methods take text, token ids or chat messages, one
  or a list of them; see `models.model.Model` for `logits`, `hidden` and `attention`."""

  def logprobs(self, inputs):
    """Computes log p(token | all tokens before it), of every token but the first.

    Args:
      inputs: text, token ids or chat messages, or a list of these.
    Returns:
      fp32 nats [b, t - 1], NaN after the end of shorter rows; of one input [t - 1]. Entry i is of
      id i + 1 of `encode(inputs)`.
    Raises:
      UserError: not a decoder, or a row without a token to predict.
    """
    if self.config.kind != "decoder" or not self.config.causal:
      raise UserError("only a causal decoder predicts each token from those before it")
    rows, batch = self._batch(inputs, "logprobs")
    for number, ids in enumerate(rows.ids):
      if len(ids) == 1:
        raise UserError(f"input {number} has one token, so there is none to predict")
    predicted = Rows([ids[1:] for ids in rows.ids], rows.single, rows.texts)
    return predicted.unpad(_next_logprobs(self.parameters, batch), 1)

  def loss(self, inputs):
    """Computes the cross-entropy of inputs, in nats per predicted token.

    Returns:
      A float for one input, fp32 [b] for several.
    Raises:
      UserError: as `logprobs`.
    """
    losses = -np.nanmean(np.asarray(self.logprobs(inputs)), axis=-1)
    return float(losses) if losses.ndim == 0 else losses

  def generate(self, prompts, sampling: Sampling | None = None, **options):
    """Continues prompts: `llmjax.generate`, with options of `Sampling` by name.

    Returns:
      A `Completion` for one prompt, a list of them for several.
    """
    return generate(self, prompts, _sampling(sampling, options))

  def chat(self, messages, sampling: Sampling | None = None, **options) -> Completion:
    """Answers the last of a conversation's messages.

    Args:
      messages: [{"role": "user", "content": "…"}, …], or the user's first message as text.
      sampling: by default `Sampling()`; its options may be given by name.
    Returns:
      The answer; `.message` is what to append to `messages` before the next turn.
    Raises:
      UserError: no chat template, or one that refuses the messages.
    """
    if isinstance(messages, str):
      messages = [{"role": "user", "content": messages}]
    if not is_single(messages) or not is_chat(messages):
      raise UserError('chat takes a list of messages, such as [{"role": "user", "content": "Hi"}]')
    return generate(self, messages, _sampling(sampling, options))

  def embed(self, texts: str | Sequence[str], **options) -> np.ndarray:
    """Turns texts into vectors: `llmjax.embed`, with its options."""
    return embed(self, texts, **options)


def _sampling(sampling: Sampling | None, options: dict) -> Sampling:
  if sampling is not None and options:
    raise UserError(f"give {', '.join(options)} inside of Sampling(…), or without it")
  try:
    return sampling or Sampling(**options)
  except TypeError:
    known = ", ".join(Sampling.__dataclass_fields__)
    wrong = ", ".join(name for name in options if name not in Sampling.__dataclass_fields__)
    raise UserError(f"there is no option {wrong} of sampling; there are {known}") from None


@jax.jit
def _next_logprobs(model, batch: Batch):
  targets_bt = jnp.roll(jnp.asarray(batch.tokens_bt), -1, axis=1)
  return token_logprobs(model, Batch(
    tokens_bt=batch.tokens_bt, targets_bt=targets_bt, segments_bt=batch.segments_bt
  ))
