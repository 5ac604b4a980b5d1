"""Parameters, memory and disk from a model's ``config.json`` alone: pure arithmetic, nothing is loaded.

``finetune plan`` shows it before anything is downloaded, ``prepare`` compares it with what there is.
"""

from finetune_jobs.estimate.architecture import (
    Architecture,
    adapter_parameters,
    lora_parameters,
    read,
    saved_parameters,
    scaled_modules,
    trained_parameters,
)
from finetune_jobs.estimate.disk import (
    Disk,
    bitsandbytes_bytes,
    disk,
    embedding_type,
    gguf_bytes,
    head_type,
    linear_type,
    unfit,
)
from finetune_jobs.estimate.memory import Memory, training_memory

__all__ = [
    "Architecture",
    "Disk",
    "Memory",
    "adapter_parameters",
    "bitsandbytes_bytes",
    "disk",
    "embedding_type",
    "gguf_bytes",
    "head_type",
    "linear_type",
    "lora_parameters",
    "read",
    "saved_parameters",
    "scaled_modules",
    "trained_parameters",
    "training_memory",
    "unfit",
]
