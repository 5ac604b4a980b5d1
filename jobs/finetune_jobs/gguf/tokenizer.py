"""The tokenizer that a GGUF carries, rebuilt for Hugging Face and held against llama.cpp's own.

A GGUF names its pre-tokenizer (``tokenizer.ggml.pre``) instead of carrying it; the rules behind a name are in
llama.cpp's ``src/llama-vocab.cpp``. Only names whose rules stand here are read, and the result is compared with
llama.cpp token by token.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from finetune_jobs.data.encode import load_tokenizer
from finetune_jobs.gguf.library import token_ids_of
from finetune_jobs.gguf.metadata import GGUFFile
from finetune_jobs.run.errors import ConfigurationError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # gguf.TokenType

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3, "dbrx": _LLAMA3}
_SPLITS |= {"qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "stablelm2": _QWEN2, "tekken": _TEKKEN}
_DIGITS_THEN_GPT2 = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_GPT2 = {"gpt-2", "olmo", "phi-2", "mpt", "jais"}
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "tekken"}
"""A word that is in the vocabulary is that token, whatever the merges say; such a vocabulary also begins with BOS."""

PROBES = (
    "Hello, World!  How's it going? I'll say we've 3 33 333 4444 apples; 3.14 + 2,718 = ?",
    " leading and trailing spaces  ",
    "\n \n\n \t\tdef f(x):\n    return x ** 2\r\n\r\n# done\n",
    "Übergrößenträger, naïve café, Ærøskøbing, İstanbul, fiancée, Ελληνικά",
    "нещо на Български, Тест по-русски 2024 г.",  # noqa: RUF001 - that letters look alike is the point
    "我想在apple工作1314151天～ 东京の天気はどうですか？ 안녕하세요 세계",  # noqa: RUF001
    "مرحبا بالعالم ١٢٣, שלום עולם, हिन्दी में १२३, กำลังทดสอบ, កាន់តែពិសេសអាច",
    "🚀 (normal) 😶\u200d🌫️ (joined) ✅ 🦙🦙 ½ x² ① Ⅷ",
    "''''''```````\"\"\"\"......!!!!!!?????? ------======= <b> {\"key\": [1, 2.50, null]}",
)
"""Scripts, digits, contractions, white space and symbols: what pre-tokenizers disagree about. Nothing that looks like a
control token (``</s>``): llama.cpp takes such a text for one even in vocabularies where it is none."""


def disagreement(text: str, found: Sequence[int], expected: Sequence[int]) -> str:
    """In words, from where on llama.cpp reads a text otherwise than the model's tokenizer."""
    at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
    ours, theirs = list(found[at : at + 12]), list(expected[at : at + 12])
    return f"{text[:40]!r} is {ours} in the GGUF, {theirs} in the model" + (f", from token {at + 1} on" if at else "")


def unreadable(file: GGUFFile, words: str) -> ConfigurationError:
    """The refusal of a file that would not come back as the model that it is."""
    return ConfigurationError(f"spec.model.source: {file.path.name} {words}; use the model's Hugging Face files")


def probes(metadata: Mapping[str, Any]) -> list[str]:
    """Texts on which two tokenizers of one vocabulary should agree, its own control tokens among them."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL][:8]
    return [*PROBES, "".join(f"{token}a 7\n" for token in control)]


def write(file: GGUFFile, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Raises ConfigurationError where the kind of vocabulary or pre-tokenizer is unknown.
    """
    metadata = file.fields
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":  # SentencePiece could be read, but llama.cpp's converter would not write the same one back
        raise unreadable(file, f"has a tokenizer of kind {kind!r}; only byte-level BPE ('gpt2') can be read back")
    if (rules := _rules(pre)) is None:
        raise unreadable(file, f"has the pre-tokenizer {pre!r}, which is not known here")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(_vocabulary(metadata), merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    tokenizer.decoder = decoders.ByteLevel()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    added = [(t, k == _CONTROL) for t, k in zip(tokens, types, strict=False) if k in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=special) for text, special in added])
    bos = _special(metadata, "bos")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", pre in _WHOLE_WORDS_FIRST) and bos is not None
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])],
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(add_bos),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata['general.architecture']}.context_length", 2048),
        "bos_token": bos,
        "eos_token": _special(metadata, "eos"),
        "unk_token": _special(metadata, "unknown"),
        "pad_token": _special(metadata, "padding"),
    }
    text = json.dumps({k: v for k, v in config.items() if v is not None}, ensure_ascii=False, indent=2)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if template := metadata.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _special(metadata: Mapping[str, Any], name: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return None if token_id is None else str(metadata["tokenizer.ggml.tokens"][token_id])


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    used = len(tokens)
    while 0 < used <= len(types) and types[used - 1] == _UNUSED:  # padding up to the embedding's height
        used -= 1
    return {token: i for i, token in enumerate(tokens[:used])}


def _rules(pre: str) -> list[Any] | None:
    if pre in _SPLITS:
        return [
            pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    if pre in _DIGITS_THEN_GPT2:
        return [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return [pre_tokenizers.ByteLevel(add_prefix_space=False)] if pre in _GPT2 else None


def check(file: GGUFFile, directory: Path) -> None:
    """Raise ConfigurationError unless the tokenizer, as transformers loads it from there, gives llama.cpp's ids."""
    tokenizer = load_tokenizer(directory)
    texts = probes(file.fields)
    for text, expected in zip(texts, token_ids_of(file.path, texts), strict=True):
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        if found != expected:
            raise unreadable(
                file,
                f"has a tokenizer that is not understood: {text[:40]!r} gives {found[:8]}, {expected[:8]} in llama.cpp",
            )
