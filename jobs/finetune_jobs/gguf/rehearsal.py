"""Can there be a GGUF of this model? Found out before anything is trained, by those who decide.

llama.cpp's converter is run on the model's settings and tokenizer, which needs no weights, and llama.cpp reads what it
wrote. Of the weights their headers are enough for the converter to name and turn every tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune_jobs import anatomy
from finetune_jobs.data.encode import prompt_text, stop_ids
from finetune_jobs.data.rows import Row
from finetune_jobs.data.tokenizer import tokenize as model_ids
from finetune_jobs.gguf import metadata
from finetune_jobs.gguf.convert import check_tensors, convert_vocabulary
from finetune_jobs.gguf.library import api, loaded, tokenize
from finetune_jobs.gguf.tokenizer import PROBES, disagreement
from finetune_jobs.headers import write_hollow
from finetune_jobs.merging.files import copy_all_but_weights
from finetune_jobs.run.errors import ConfigurationError, DataError, InputMissingError

_MEND = "leave the stage out, or choose another model"
_NORMAL = 1
"""``gguf.TokenType``: neither control nor byte nor added."""
_STRANGE = 0.01
"""The converters of the tested families write every normal token as it is."""


@dataclass(frozen=True)
class Rehearsal:
    """What shows before anything is trained."""

    refusals: list[str]
    """Why the model can become no GGUF that answers as it does."""
    window: int | None = None
    """Tokens that layers of the model look back, where llama.cpp looks back to the beginning; None where both do alike.
    """


def rehearse(
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    added: Sequence[str] = (),
    headers: Mapping[str, bytes] | None = None,
) -> Rehearsal:
    """Convert the model of a directory without its weights, and read the result.

    ``added``: tokens of the job's own, read like the other texts. ``headers``: of the files that hold its weights.
    ``scratch`` must not exist; a few megabytes are written there.
    """
    bare, vocabulary = scratch / "model", scratch / "vocabulary.gguf"
    bare.mkdir(parents=True)
    copy_all_but_weights(model, bare)
    try:
        convert_vocabulary(bare, vocabulary)
        fields = metadata.read(vocabulary).fields
        if words := _foreign(fields, tokenizer):
            return Rehearsal([words])
        with loaded(vocabulary, vocab_only=True) as read:
            refusals = list(_differences(api.llama_model_get_vocab(read), tokenizer, added))
        if headers:
            write_hollow(headers, bare)
            check_tensors(bare)
    except (ConfigurationError, InputMissingError) as error:
        return Rehearsal([f"{error}; {_MEND}"])
    return Rehearsal(refusals, _ignored_window(anatomy.read_config(model), fields))


def _foreign(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """What is wrong where the converter has read another tokenizer's file; empty if it has not.

    llama.cpp must not be given such a vocabulary: a token that it counts on and does not find ends the whole process.
    """
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    plain = [number for number, kind in enumerate(kinds) if kind == _NORMAL]
    own = tokenizer.convert_ids_to_tokens(plain)
    others = [number for number, token in zip(plain, own, strict=True) if token != tokens[number]]
    if len(others) <= _STRANGE * len(plain):
        return ""
    first = others[0]
    return (
        f"the tokenizer.model of {anatomy.FIELD} is another model's: {len(others)} of its {len(plain)} tokens are not "
        f"those of tokenizer.json (number {first} is {tokens[first]!r}, there "
        f"{tokenizer.convert_ids_to_tokens(first)!r}); copy both files from the same model"
    )


def _ignored_window(config: Mapping[str, Any], fields: Mapping[str, Any]) -> int | None:
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kind = fields["general.architecture"]
    known = f"{kind}.attention.sliding_window" in fields and kind != "phi3"  # llama.cpp reads Phi-3's, and drops it
    return window if isinstance(window, int) and not known else None


def _differences(vocabulary: object, tokenizer: PreTrainedTokenizerBase, added: Sequence[str]) -> Iterator[str]:
    texts = [*_conversation(tokenizer), *PROBES, *(f"a {token}b {token}" for token in added)]
    for text, wanted in zip(texts, model_ids(tokenizer, texts), strict=True):
        if (found := tokenize(vocabulary, text)) != wanted:
            words = disagreement(text, found, wanted)
            yield f"llama.cpp reads text otherwise than the model's tokenizer: {words}; {_MEND}"
            return  # one is as good as many
    stop = stop_ids(tokenizer)[:1]
    if stop and not api.llama_vocab_is_eog(vocabulary, stop[0]):
        token = tokenizer.convert_ids_to_tokens(stop[0])
        yield (
            f"llama.cpp does not end an answer at {token!r}, with which this model's are closed; let "
            f"spec.model.chatTemplate close them with {tokenizer.eos_token!r}"
        )


def _conversation(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A prompt with every turn's marks; none where the template is missing, or refuses it as it may refuse the rows."""
    turns = [("user", "Hello there"), ("assistant", "Yes?\nI am here."), ("user", "How are you?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    row: Row = {"id": "probe", "source": "built in", "line": 1, "messages": messages}  # type: ignore[typeddict-item]
    try:
        return [prompt_text(row, tokenizer)] if tokenizer.chat_template else []
    except DataError:
        return []
