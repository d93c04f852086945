"""Pre-tokenization by the names of GGUF's `tokenizer.ggml.pre`: the regular expressions, each
applied to what those before it left, of the models' own `tokenizer.json`.
Source: the names in llama.cpp's src/llama-vocab.cpp."""

from llmjax.text.ranks import LLAMA3_PATTERN, O200K_PATTERN, QWEN_PATTERN

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# DeepSeek-LLM's letters: those that have a case, but not of all scripts.
_CASED = (
  r"(?:(?![\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C88}\x{2D00}-\x{2D2D}\x{A790}-\x{A7FA}"
  r"\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7CB}\x{1DF00}-\x{1DF1E}])"
  r"[\p{Lu}\p{Ll}\p{Lt}])"
)
_MARKS = r"!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}"
_EASTERN = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}]+"
_BLOOM = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+"

# Names that stand for the same expressions, and those.
_GROUPS = (
  (
    "gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe "
    "gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4",
    [_GPT2],
  ),
  ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", [r"\p{N}", _GPT2]),
  (
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe "
    "glm4 chatglm-bpe",
    [LLAMA3_PATTERN],
  ),
  (
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    [QWEN_PATTERN],
  ),
  (
    "qwen35",
    [QWEN_PATTERN.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")],
  ),
  ("minicpm5", [r"\p{N}{1,3}", LLAMA3_PATTERN]),
  ("gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m", [O200K_PATTERN]),
  ("tiny_aya cohere2moe", [r"\d{1,3}(?=(?:\d{3})*\b)", O200K_PATTERN]),
  ("tekken", [O200K_PATTERN.replace(f"{_SHORT}?", "").replace(r"\p{N}{1,3}", r"\p{N}")]),
  ("bailingmoe bailingmoe2 llada-moe", [QWEN_PATTERN.replace(r"\s*[\r\n]+", r"\s*[\r\n]")]),
  ("seed-coder", [QWEN_PATTERN.replace(r"\p{N}]+[\r\n]*", r"\p{N}\r\n]+")]),
  ("falcon", [r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"]),
  ("default", [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
  ("poro-chat bloom gpt3-finnish", [_BLOOM]),
  ("viking", [_BLOOM, r"\p{N}"]),
  ("deepseek-coder", [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EASTERN, r"\p{N}"]),
  ("deepseek-llm", [r"[\r\n]", rf"\s?{_CASED}+", rf"\s?[{_MARKS}]+", r"\s+$", _EASTERN, r"\p{N}+"]),
  (
    "deepseek-v3 hunyuan-dense joyai-llm",
    [
      r"\p{N}{1,3}",
      r"[\x{3040}-\x{30FF}\x{4E00}-\x{9FA5}]+",
      r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
      r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
  ),
)
# Name → the expressions that cut text.
PATTERNS = {name: patterns for names, patterns in _GROUPS for name in names.split()}
# Llama 3's own tokenizer takes a whole word that is a token before it merges anything; a prompt
# begins with BOS.
WITH_BOS = frozenset(_GROUPS[2][0].split()[:9]) | {"tekken"}
WHOLE_WORDS = WITH_BOS | {"minicpm5", "granite-embed-multi-97m"}
