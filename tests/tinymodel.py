"""Tokenizers and models that are made in milliseconds and behave like the real ones."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEXT = [
    "What is the capital of France? Paris is the capital of France.",
    "user assistant system 1 2 3 Hello world\n\n",
] * 4


def byte_tokenizer(template: str | None = CHATML, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, Llama 3, SmolLM2; ``bos``: it begins every text with ``<|bos|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=alphabet,
        special_tokens=[AddedToken(s, special=True) for s in special],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    names: dict[str, Any] = {"eos_token": "<|im_end|>" if template == CHATML else "<|endoftext|>"}
    if bos:
        names["bos_token"] = "<|bos|>"
        begin = [("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=begin)
    return _wrapped(tokenizer, template, names)


def padding_tokenizer(template: str | None = LLAMA2) -> PreTrainedTokenizerFast:
    """As in Llama 2: a space is put before every text, and ``<s>`` before that."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator(TEXT, trainer)
    learned = json.loads(trained.to_str())["model"]
    # Bytes are ordinary tokens: were they special, the text would be normalized anew after each.
    fallback = {f"<0x{i:02X}>": len(learned["vocab"]) + i for i in range(256)}
    merges = [tuple(m) for m in learned["merges"]]
    tokenizer = Tokenizer(models.BPE({**learned["vocab"], **fallback}, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    begin = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    return _wrapped(tokenizer, template, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def _wrapped(tokenizer: Tokenizer, template: str | None, names: dict[str, Any]) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    return wrapped


def tiny_model(directory: Path, *, tokenizer: PreTrainedTokenizerFast | None = None, **changed: Any) -> Path:
    """A random Llama of two layers in ``directory``, with tokenizer; ``changed`` goes into its config."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = tokenizer or byte_tokenizer()
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        **changed,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**settings)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
