"""A model with an adapter on it, of whatever method, as it answers."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def load_whole_modules(adapted: Any, adapter: Path) -> None:
    """Load anew, in float32, the modules and biases that an adapter has trained whole: PEFT puts them into copies of
    the model's own, or into these, and so rounds them to the type that the model is stored in. What hooks the copies
    took over is left out.
    """
    from peft.utils import ModulesToSaveWrapper, load_peft_weights, set_peft_model_state_dict

    wholes = [m.modules_to_save["default"] for m in adapted.modules() if isinstance(m, ModulesToSaveWrapper)]
    for module in (inner for whole in wholes for inner in whole.modules()):
        module.float()
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    saved = load_peft_weights(str(adapter), device="cpu")
    biases = [p for name, p in adapted.named_parameters() if name.endswith(".bias") and name in saved]
    for bias in biases:
        bias.data = bias.data.float()
    if wholes or biases:
        set_peft_model_state_dict(adapted, saved)


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
