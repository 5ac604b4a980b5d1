"""A model with an adapter on it, of whatever method, as it answers."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def tuned(model: PreTrainedModel, adapter: Path) -> Any:
    """The model as the stage that left ``adapter`` trained it; it is called like ``model`` itself."""
    match json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]:
        case "BOTTLENECK":
            from finetune_jobs.training import bottleneck

            bottleneck.load(model, adapter)
            return model
        case "PREFIX_TUNING" | "PROMPT_TUNING":
            from finetune_jobs.training import prompts

            return prompts.load(model, adapter)
        case _:
            from peft import PeftModel

            return PeftModel.from_pretrained(model, str(adapter))
