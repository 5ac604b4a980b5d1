"""Tiny checkpoints of the families that people fine-tune: each one's own configuration class, with what is special in
its attention, norms and layers switched on, and a tokenizer of its kind.

Their files are as on the hub, not as transformers would save them again. A width of 256 lets K types fit every row.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tests.tinymodel import TEXT
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_jobs.gguf.tokenizer import _LLAMA3, _QWEN2

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    config: Mapping[str, Any]
    """Over ``SHAPE``."""
    tokenizer: Callable[[Path], None]
    pre: str = ""
    """llama.cpp's name of the byte-level tokenizer's rules; empty for SentencePiece."""
    off: Mapping[str, Any] = field(default_factory=dict)
    """A configuration without what is special: the model must then say something else."""
    heads: tuple[str, ...] = ("embed_tokens", "lm_head")
    """Weights that lora leaves alone although they are matrices, by a part of their names."""
    experts: bool = False
    """Rounding may send a token elsewhere, and then all of its figures are others."""
    short: bool = False
    """llama.cpp does not know this family's window: its answers are compared where that does not matter."""


SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}


def write(family: Family, directory: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model of the family; norms and biases are random too."""
    directory.mkdir(parents=True)
    family.tokenizer(directory)
    known = json.loads((directory / "tokenizer.json").read_text())
    tokens = {**known["model"]["vocab"], **{t["content"]: t["id"] for t in known["added_tokens"]}}
    names = json.loads((directory / "tokenizer_config.json").read_text())
    ids = {f"{name}_token_id": tokens.get(names.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
    size = -(-len(tokens) // 32) * 32  # padded, as most are
    kind = str(dtype).removeprefix("torch.")
    settings = {**SHAPE, **ids, "dtype": kind, "vocab_size": size, **family.config}
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith("sinks"):
            centre = 1.0 if name.endswith("weight") and bool((parameter == 1).all()) else 0.0
            torch.nn.init.normal_(parameter, mean=centre, std=0.1)
        elif bool((parameter == 0).all()):
            torch.nn.init.normal_(parameter, std=0.05)
    model.to(dtype).save_pretrained(directory)
    return directory


def _byte_level(
    directory: Path,
    *,
    special: list[str],
    eos: str,
    template: str,
    rules: list[Any],
    kind: str = "PreTrainedTokenizerFast",
    bos: str | None = None,
    whole_words: bool = False,
    normalizer: Any = None,
) -> None:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(rules)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(TEXT, trainer)
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(learned["vocab"], merges, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if bos is not None:
        begin = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=begin)
    _save(tokenizer, directory, kind=kind, template=template, eos_token=eos, bos_token=bos)


def _save(tokenizer: Tokenizer, directory: Path, *, kind: str, template: str, **names: Any) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    added = json.loads(tokenizer.to_str())["added_tokens"]
    config = {
        "tokenizer_class": kind,
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        **{name: value for name, value in names.items() if value is not None},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(template)


def _split(regex: str) -> list[Any]:
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def _llama3(directory: Path) -> None:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    _byte_level(
        directory, special=special, eos="<|eot_id|>", bos=special[0], template=LLAMA3, rules=_split(_LLAMA3),
        whole_words=True,
    )  # fmt: skip


def _qwen(directory: Path) -> None:
    _byte_level(
        directory, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>", template=CHATML,
        rules=_split(_QWEN2), kind="Qwen2Tokenizer", normalizer=normalizers.NFC(),
    )  # fmt: skip


def _smollm(directory: Path) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    _byte_level(
        directory, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>", template=CHATML,
        rules=[digits, pre_tokenizers.ByteLevel(add_prefix_space=False)], kind="GPT2Tokenizer",
    )  # fmt: skip


def _gpt2(directory: Path) -> None:
    _byte_level(
        directory, special=["<|endoftext|>"], eos="<|endoftext|>", template=PLAIN,
        rules=[pre_tokenizers.ByteLevel(add_prefix_space=False)], kind="GPT2Tokenizer",
    )  # fmt: skip


def _sentencepiece(
    directory: Path, *, first: list[str], symbols: list[str], pads: bool
) -> tuple[Tokenizer, dict[str, int]]:
    """``tokenizer.model``, and the same for tokenizers. ``first``: its special pieces in the order of their ids."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=written, model_type="bpe", vocab_size=340, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=pads,
        user_defined_symbols=symbols, minloglevel=2,
        **{f"{name}_id": first.index(name) if name in first else -1 for name in ("unk", "bos", "eos", "pad")},
        **({"bos_piece": "<bos>", "eos_piece": "<eos>"} if "pad" in first else {}),
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(written.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    scores = {
        piece: pieces.get_score(i)
        for piece, i in vocabulary.items()
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i) or piece in symbols)
    }
    merges = sorted(
        (-score, piece[:i], piece[i:])
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    )
    model = models.BPE(vocabulary, [(a, b) for _, a, b in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if pads else spaces)
    ends: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*ends, decoders.Strip(" ", 1, 0)] if pads else ends)
    return tokenizer, vocabulary


def _begin(tokenizer: Tokenizer, bos: str) -> None:
    begin = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=begin)


def _mistral(directory: Path) -> None:
    tokenizer, _ = _sentencepiece(directory, first=["unk", "bos", "eos"], symbols=[], pads=True)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    _begin(tokenizer, "<s>")
    _save(
        tokenizer, directory, kind="LlamaTokenizer", template=MISTRAL, bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", add_bos_token=True, add_eos_token=False,
    )  # fmt: skip


def _gemma(directory: Path) -> None:
    turns = ["<mask>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer, _ = _sentencepiece(directory, first=["pad", "eos", "bos", "unk"], symbols=turns, pads=False)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *turns]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    _begin(tokenizer, "<bos>")
    _save(
        tokenizer, directory, kind="GemmaTokenizer", template=GEMMA, bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>", pad_token="<pad>", add_bos_token=True, add_eos_token=False,
    )  # fmt: skip


def _phi3(directory: Path) -> None:
    """Its turns' tokens swallow the white space behind them."""
    tokenizer, _ = _sentencepiece(directory, first=["unk", "bos", "eos"], symbols=[], pads=True)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    turns = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True, rstrip=t != "<|endoftext|>") for t in turns]
    )
    _save(
        tokenizer, directory, kind="LlamaTokenizer", template=PHI3, bos_token="<s>", eos_token="<|endoftext|>",
        pad_token="<|endoftext|>", unk_token="<unk>", add_bos_token=False, add_eos_token=False,
    )  # fmt: skip


_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_WINDOWS = ["sliding_attention", "full_attention"]

FAMILIES = {
    "llama3": Family(
        {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False},
        _llama3,
        "llama-bpe",
        off={"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "smollm": Family({"model_type": "llama", "tie_word_embeddings": True}, _smollm, "smollm"),
    "qwen2": Family(
        {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}, _qwen, "qwen2"
    ),
    "qwen3": Family({"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 128}, _qwen, "qwen2"),
    "mistral": Family(
        {"model_type": "mistral", "sliding_window": 48, "tie_word_embeddings": False},
        _mistral,
        off={"sliding_window": None},
        short=True,
    ),
    "gemma2": Family(
        {
            "model_type": "gemma2",
            "sliding_window": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
            "query_pre_attn_scalar": 64,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        _gemma,
        off={"attn_logit_softcapping": 50.0},
    ),
    "gemma3": Family(
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "sliding_window": 16,
            "query_pre_attn_scalar": 64,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        _gemma,
        off={"sliding_window": 512},
    ),
    "phi3": Family(
        {
            "model_type": "phi3",
            "sliding_window": 48,
            "tie_word_embeddings": False,
            "original_max_position_embeddings": 512,
        },
        _phi3,
        off={"sliding_window": None},
        short=True,
    ),
    "qwen3moe": Family(
        {
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
        _qwen,
        "qwen2",
        off={"num_experts_per_tok": 1},
        heads=("embed_tokens", "lm_head", "mlp."),
        experts=True,
    ),
    "mixtral": Family(
        {
            "model_type": "mixtral",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        _mistral,
        off={"num_experts_per_tok": 1},
        heads=("embed_tokens", "lm_head", "block_sparse_moe", "mlp."),
        experts=True,
    ),
    "gpt2": Family(
        {"model_type": "gpt2", "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_ctx": 512},
        _gpt2,
        "gpt-2",
        heads=("wte", "wpe", "lm_head"),
    ),
}
