"""FineTuneJob v1alpha1: what a user writes under ``spec``.

Every field says what it means, its bound and its default. Attributes are snake_case here and camelCase in YAML.
Unknown fields are refused. Defaults of training fields that depend on the block or the method are ``None`` here and
resolved in ``defaults.py``, because a schema default inside a union member would make the member look written.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

API_VERSION = "finetune.dev/v1alpha1"
KIND = "FineTuneJob"
DERIVED_STAGES = ("prepare", "baseline", "evaluate", "report")
"""Stages that every job has without writing them."""
BASE = "base"
"""The name by which ``from`` refers to ``spec.model``."""


class Model(BaseModel):
    """Strict, camelCase, no unknown fields, described by docstrings: the same rules for every type of the API."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        frozen=True,
        use_attribute_docstrings=True,
    )


Uri = Annotated[str, Field(min_length=1, max_length=1024)]
Word = Annotated[str, Field(min_length=1, max_length=128)]
# `[a-z0-9]` at both ends and no lookaround: the pattern must be valid in Go's RE2 too.
StageName = Annotated[str, Field(min_length=1, max_length=32, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]
JobName = Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]


def listed_by(*fields: str) -> dict[str, Any]:
    """The schema of a list whose entries the API server tells apart by these fields."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(fields)}


class SecretRef(Model):
    """A Secret in the job's namespace. On one machine the environment variables of the same names take its place."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    """Name of the Secret."""


class ModelSource(Model):
    """The base model."""

    source: Uri
    """``hf://org/name[@revision]``, ``s3://bucket/prefix``, ``file:///dir-or-file.gguf`` or ``package://package/path``.
    The last two work without a cluster only; a relative ``file://`` path starts at the YAML's folder."""
    secret_ref: SecretRef | None = None
    """Key ``HF_TOKEN``; serves ``hf://`` data too."""
    trust_remote_code: bool = False
    """Run Python code that a model repository ships. Off: such a model is refused."""
    chat_template: Annotated[str, Field(max_length=65536)] = ""
    """Jinja. Empty: the tokenizer's own; chat data needs one of the two."""
    add_tokens: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=256)] = []
    """Texts that become tokens of their own, such as ``<part>``. Each begins as the mean of all tokens and is learned
    by the first stage that trains, with ``modulesToSave: [embed_tokens, lm_head]`` or ``method: full``."""


class DataFormat(StrEnum):
    """How a row is read."""

    AUTO = "auto"
    MESSAGES = "messages"
    PROMPT_COMPLETION = "promptCompletion"
    INSTRUCTION = "instruction"
    TEXT = "text"
    PREFERENCE = "preference"
    LABELS = "labels"


class DataSource(Model):
    """One file, folder or hub data set."""

    source: Uri
    """``s3://``, ``hf://datasets/org/name[@revision]``, ``configmap://name/key`` on a cluster, or ``file://`` without
    one: ``.jsonl``, ``.json``, ``.parquet``, ``.csv``, each also ``.gz``."""
    format: DataFormat = DataFormat.AUTO
    """``auto`` tells it from the columns of the first row."""
    columns: Annotated[dict[Word, Word], Field(max_length=16)] = {}
    """Standard column name to the file's own: ``{prompt: question, completion: answer}``."""
    split: Word = "train"
    """Split of a hub data set."""
    max_rows: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Take the first so many rows."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Share in a mix of several sources: 2.0 is seen twice as often per epoch as 1.0."""


Sources = Annotated[list[DataSource], Field(max_length=32)]


class Data(Model):
    """Data sets by role. Each role is a list, so that sets can be mixed."""

    train: Sources = []
    """Rows to train on."""
    eval: Sources = []
    """Rows for the evaluation loss during training. Left out: 5 % of train, at most 500 rows."""
    test: Sources = []
    """Locked before anything trains; scores are taken on it. Left out: 5 % of train, 20 to 200 rows, at most a fifth of
    train, at least 1."""
    preference: Sources = []
    """Pairs of a chosen and a rejected answer; for kto also single answers with a label."""
    prompts: Sources = []
    """Questions for rl, which answers them itself; with a ``reference`` where a reward compares with one."""
    general: Sources = []
    """Short checkable questions, asked before and after to see what was forgotten. Left out: 20 built-in ones."""
    refusals: Sources = []
    """Requests to refuse and harmless look-alikes. Left out: 20 built-in ones."""


class ConfigMapKey(Model):
    """A key of a ConfigMap in the job's namespace."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    """Name of the ConfigMap."""
    key: Annotated[str, Field(min_length=1, max_length=253)]
    """Key in it."""


class CABundle(Model):
    """Certificates that a store's own is checked against. On one machine AWS_CA_BUNDLE takes its place."""

    config_map: ConfigMapKey
    """PEM."""


class Storage(Model):
    """S3-compatible object storage for checkpoints and artifacts."""

    bucket: Annotated[str, Field(min_length=3, max_length=63, pattern=r"^[a-z0-9][-.a-z0-9]*[a-z0-9]$")]
    """Bucket name; it must exist."""
    prefix: Annotated[str, Field(max_length=512)] = ""
    """Put before every key."""
    endpoint: Annotated[str, Field(max_length=1024, pattern=r"^(https?://.+)?$")] = ""
    """URL of the store. Empty: AWS on a cluster, the embedded store on one machine."""
    region: Annotated[str, Field(max_length=64)] = ""
    """Region, where the store wants one."""
    checksum: Literal["auto", "whenRequired", "whenSupported"] = "auto"
    """Checksum trailers on requests. ``auto``: for AWS when supported, for other stores when required."""
    secret_ref: SecretRef | None = None
    """Keys ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, optional ``AWS_SESSION_TOKEN``. Left out: the pod's own
    identity."""
    ca_bundle: CABundle | None = None
    """For a store whose certificate no public authority signed."""


class Metric(StrEnum):
    """A score of a model on locked rows."""

    LOSS = "loss"
    EXACT_MATCH = "exactMatch"
    CONTAINS_REFERENCE = "containsReference"
    TOKEN_F1 = "tokenF1"
    JSON_VALID = "jsonValid"


class Gates(Model):
    """What the finished model must reach."""

    min_score: Annotated[dict[Metric, Annotated[float, Field(ge=0, le=1)]], Field(max_length=8)] = {}
    """Lowest allowed score of every tuned target on the test rows, by metric."""
    max_regression: Annotated[float, Field(ge=0, le=1)] = 0.05
    """How far a tuned target may fall below the base model on ``general`` and ``refusals``."""
    max_gguf_divergence: Annotated[
        dict[Word, Annotated[float, Field(gt=0, le=100)]], Field(max_length=64, alias="maxGGUFDivergence")
    ] = {}
    """Highest mean KL divergence (nats) from the 16-bit model, by GGUF type; stricter than the built-in bounds."""
    fail_job: bool = False
    """A failed gate makes the job Failed instead of only setting GatePassed=False."""


Quantity = Annotated[str, Field(min_length=1, max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
"""As in Kubernetes: ``500m``, ``4``, ``16Gi``."""


class Workspace(Model):
    """The scratch disk of a stage: inputs, checkpoints before they are stored, results before they are."""

    size: Quantity | None = None
    """Left out: by the model's size."""
    storage_class_name: Annotated[str, Field(max_length=253)] = ""
    """A volume of this class that lives as long as the pod. Empty: the node's own disk."""


class Resources(Model):
    """What a stage runs on. On one machine only ``gpus`` is read."""

    gpus: Annotated[int, Field(ge=0, le=16)] = 0
    """GPUs of a node; one training process for each."""
    nodes: Annotated[int, Field(ge=1, le=64)] = 1
    """How many nodes train together, each with these resources; for stages that train. One of them lost ends the
    attempt, and the next goes on from the checkpoint with all."""
    gpu_resource_name: Annotated[str, Field(min_length=1, max_length=128)] = "nvidia.com/gpu"
    """What the nodes call them."""
    cpu: Quantity | None = None
    """Requested cores. Left out: 2, and 4 for each GPU."""
    memory: Quantity | None = None
    """Requested and at most used. Left out: by the model's size."""
    workspace: Workspace = Workspace()
    """The scratch disk."""


class Evaluation(Model):
    """Scores before and after training."""

    metrics: Annotated[list[Metric], Field(min_length=1, max_length=8)] = list(Metric)
    """Which scores."""
    max_rows: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Score on the first so many locked test rows."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    """Longest answer, in tokens."""
    gates: Gates = Gates()
    """What the finished model must reach."""
    resources: Resources | None = None
    """Left out: what the pipeline's largest stage has of one node. ``nodes`` is 1."""
    skip: bool = False
    """Leave out ``baseline``, ``evaluate`` and ``report``."""


class Method(StrEnum):
    """Which parameters are trained."""

    LORA = "lora"
    QLORA = "qlora"
    FULL = "full"
    PREFIX_TUNING = "prefixTuning"
    PROMPT_TUNING = "promptTuning"
    IA3 = "ia3"
    BOTTLENECK = "bottleneck"


class Lora(Model):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0, le=8192)] | None = None
    """Scale: the update is ``alpha / r * B A``. Left out: ``2 * r``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before A."""
    target_modules: Annotated[list[Word], Field(min_length=1, max_length=64)] = ["all-linear"]
    """Module names, or ``[all-linear]``: every linear layer but the output head."""
    bias: Literal["none", "all", "loraOnly"] = "none"
    """Which of the model's own biases are trained too: all, or those of the adapted layers."""
    variant: Literal["lora", "dora", "pissa"] = "lora"
    """``dora``: lengths and directions of the weights' rows apart (arXiv:2402.09353). ``pissa``: begin with the
    weights' principal components (arXiv:2404.02948); saved as a lora of twice the rank that fits the untouched base."""
    rank_stabilized: bool = False
    """The update is ``alpha / sqrt(r) * B A`` (arXiv:2312.03732): high ranks learn as fast as low ones."""
    modules_to_save: Annotated[list[Word], Field(max_length=64)] = []
    """Modules that are trained whole and saved with the adapter: ``[embed_tokens, lm_head]`` for new words. Where the
    two are one matrix they stay one."""


VirtualTokens = Annotated[int, Field(ge=1, le=1024)]


class PrefixTuning(Model):
    """Learned keys and values before every text, in all layers (Li and Liang 2021, arXiv:2101.00190)."""

    virtual_tokens: VirtualTokens = 20
    """So many places are put before every text, and count in the model's context."""
    projection: bool = False
    """Compute them with a small network while training, which is left out of the result: steadier, and larger."""


class PromptTuning(Model):
    """Learned embeddings before every text (Lester et al. 2021, arXiv:2104.08691)."""

    virtual_tokens: VirtualTokens = 20
    """So many places are put before every text, and count in the model's context."""
    init_text: Annotated[str, Field(max_length=4096)] = ""
    """They begin as the words of this text, repeated or cut to fit: say what the task is. Empty: as random words."""


class IA3(Model):
    """A learned factor for every key, value and inner number of the MLP (Liu et al. 2022, arXiv:2205.05638)."""

    target_modules: Annotated[list[Word], Field(max_length=64)] = []
    """Linear layers that are scaled. Empty: by architecture, those that make keys and values, and the MLP's last."""
    feedforward_modules: Annotated[list[Word], Field(max_length=64)] = []
    """Those of them whose inputs are scaled, not their outputs. Empty: the MLP's last."""


class Bottleneck(Model):
    """A small network behind attention and MLP (Houlsby et al. 2019, arXiv:1902.00751)."""

    reduction_factor: Annotated[int, Field(ge=1, le=65536)] = 16
    """The model's width divided by the network's own."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Between its two layers."""
    placement: Annotated[list[Literal["attention", "mlp"]], Field(min_length=1, max_length=2)] = ["attention", "mlp"]
    """Behind which parts of every layer; ``[mlp]`` is Pfeiffer et al. 2020 (arXiv:2005.00247)."""


class Quantization(Model):
    """How qlora stores the frozen base (Dettmers et al. 2023, arXiv:2305.14314)."""

    type: Literal["nf4", "fp4", "int8"] = "nf4"
    """``nf4``: 4 bits, at the quantiles of a normal distribution; ``fp4``: 4-bit floating point; ``int8``: 8 bits
    (arXiv:2208.07339)."""
    double_quant: bool = True
    """Of nf4 and fp4: quantize the scales too, 0.37 bits a weight less."""


Auto = Literal["auto"]


class Training(Model):
    """Hyper-parameters. Names as in TRL and transformers."""

    epochs: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Passes over the data. Default 3 for sft, 1 for the others."""
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Stop after so many optimizer steps; overrides ``epochs``."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak. Default by method: ia3 5e-3, prefixTuning 1e-2, promptTuning 3e-2, bottleneck 1e-4; for the others by
    block: sft 2e-4 (full 1e-5), dpo and ipo 1e-5 (full 5e-7), kto and simpo 1e-5 (full 1e-6), orpo 5e-5 (full 5e-6),
    reward 1e-4 (full 1e-5), rl 1e-5 (full 1e-6)."""
    scheduler: Literal["cosine", "linear", "constant", "constantWithWarmup"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Gradients are clipped to this norm."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    """Examples an optimizer step sees, over all GPUs (pairs for preference and reward, answers for kto,
    prompts for rl)."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)] | Auto = "auto"
    """Examples one GPU holds at a time. Changes memory and speed, never what is learned."""
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Longest example in tokens, prompt and answer together."""
    packing: bool | Auto = "auto"
    """Lay the same examples of a step into fewer rows. Changes speed, never what is learned. Not with prefixTuning and
    promptTuning, where each needs a row of its own."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to a longer example; either way it is counted in the data card."""
    loss_on: Literal["auto", "completion", "assistant", "all"] = "auto"
    """Tokens that are learned. ``auto``: the answers (every assistant turn of a conversation, the completion of a
    prompt), all of a text."""
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=100)] | None = None
    """NEFTune noise on the embeddings (arXiv:2310.05914)."""
    gradient_checkpointing: bool | Auto = "auto"
    """Compute activations twice to save memory. ``auto``: when the estimate says memory is short. Not with
    prefixTuning, whose prefix is kept where they would be."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """``auto``: bf16 where the hardware has it, fp16 on older GPUs, fp32 on other CPUs. Adapters are always fp32."""
    optimizer: Literal["auto", "adamw", "adamw8bit", "pagedAdamw8bit"] = "auto"
    """``auto``: paged 8-bit AdamW for qlora, AdamW otherwise."""
    distributed: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several GPUs hold the model: each all of it (``ddp``), or each a share of it (``fsdp``, for lora and full),
    with full also of gradients and optimizer. ``auto``: ``fsdp`` where one GPU's memory is too small."""
    backend: Literal["auto", "transformers", "unsloth"] = "auto"
    """Whose kernels compute the model; all else is the same. ``unsloth``: for sft and preference by lora or qlora on
    one GPU, in an image of its own; where it cannot be used, transformers is, with a warning.
    ``auto``: transformers."""
    logging_steps: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Steps between two points of the loss curve."""


class Checkpoint(Model):
    """What is saved while training."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = "auto"
    """Steps between checkpoints and evaluations. ``auto``: a tenth of the run, at most 200."""
    minutes: Annotated[float, Field(gt=0, le=10_080)] = 30
    """A checkpoint at least so often."""
    keep: Annotated[int, Field(ge=1, le=100)] = 3
    """How many stay. The newest and the best are never removed."""
    best: bool = True
    """Leave the checkpoint with the lowest evaluation loss as the result, else the last."""
    resume_from: Annotated[int, Field(ge=1, le=10_000_000)] | Literal["auto", "none"] = "auto"
    """``auto``: the newest checkpoint that verifies; ``none``: from the start; a number: that step."""


class EarlyStopping(Model):
    """Stop when the evaluation loss no longer falls."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations without progress before the run stops."""
    threshold: Annotated[float, Field(ge=0, le=100)] = 0.0
    """A smaller fall is no progress."""


class Validation(Model):
    """Evaluation during training, at every checkpoint."""

    early_stopping: EarlyStopping | None = None
    """Off unless written."""


class TrainingBlock(Model):
    """What the training stages share."""

    method: Method = Method.LORA
    """Which parameters are trained."""
    lora: Lora | None = None
    """For lora and qlora only."""
    quantization: Quantization | None = None
    """For qlora only."""
    prefix_tuning: PrefixTuning | None = None
    """For prefixTuning only."""
    prompt_tuning: PromptTuning | None = None
    """For promptTuning only."""
    ia3: IA3 | None = None
    """For ia3 only."""
    bottleneck: Bottleneck | None = None
    """For bottleneck only."""
    start: Literal["continue", "merge"] = "continue"
    """What becomes of an incoming adapter: it is trained on, or folded into the weights before a new one is begun. The
    folded model is kept with the result, whose adapter belongs to it."""
    training: Training = Training()
    """Hyper-parameters."""
    checkpoint: Checkpoint = Checkpoint()
    """What is saved while training."""
    validation: Validation = Validation()
    """Evaluation during training."""


QATType = Literal[
    "Q8_0",
    "Q6_K",
    "Q5_1",
    "Q5_K_M",
    "Q5_K_S",
    "Q5_0",
    "Q4_1",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_0",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
]


class QAT(Model):
    """Quantization-aware training (Jacob et al. 2017, arXiv:1712.05877): learn with the weights that a GGUF will
    have."""

    type: QATType
    """The type of the GGUF. Each tensor is trained for what llama.cpp would make of it there without an importance
    matrix: a file is a mixture of types."""


class Sft(TrainingBlock):
    """Supervised fine-tuning: learn to give the answers of the training rows."""

    qat: QAT | None = None
    """Train for a GGUF of low precision, which then loses less. For method lora, without variant, dropout and
    modulesToSave, and for full."""


class SimPO(Model):
    """Simple preference optimization (Meng et al. 2024, arXiv:2405.14734)."""

    gamma: Annotated[float, Field(ge=0, le=100)] = 1.0
    """By how much the chosen answer's reward is to be above the rejected one's; in units of reward, not of beta."""


Weight = Annotated[float, Field(gt=0, le=1000)]


class KTO(Model):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306)."""

    desirable_weight: Weight = 1.0
    """Of desirable answers. Raise it where they are few: weight times number should come to 1 to 1.33 times that of the
    undesirable ones."""
    undesirable_weight: Weight = 1.0
    """Of undesirable answers."""


class Preference(TrainingBlock):
    """Learn to prefer the chosen answers.

    The reference of dpo, ipo and kto is always the model as it came in: dpo's first loss is ln 2.
    """

    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = "dpo"
    """``dpo``: arXiv:2305.18290; ``ipo``, which stops at a margin: arXiv:2310.12036; ``kto``, for single answers with a
    label too: arXiv:2402.01306; ``orpo``, which needs no sft stage before it: arXiv:2403.07691; ``simpo``:
    arXiv:2405.14734. The last two have no reference."""
    beta: Annotated[float, Field(gt=0, le=100)] | None = None
    """dpo, ipo (its tau), kto: how strongly the reference holds the model back, higher stays closer. orpo: weight of
    the odds ratio. simpo: scale of the rewards. Default 0.1, simpo 2.0."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """For dpo only: the share of pairs that are labelled the wrong way round."""
    simpo: SimPO | None = None
    """For loss simpo only."""
    kto: KTO | None = None
    """For loss kto only."""


class Reward(TrainingBlock):
    """A reward model: learn to give chosen answers more than rejected ones (Bradley and Terry 1952, as in
    arXiv:2203.02155).

    A branch of the pipeline: ``rl`` reads it, no stage starts from it.
    """

    center_rewards_coefficient: Annotated[float, Field(ge=0, le=100)] = 0.01
    """Pulls the sum of a pair's two rewards towards 0 (arXiv:2312.09244), for only their difference is learned."""


class BuiltinReward(StrEnum):
    """A reward that a simple program computes, from 0 to 1."""

    EXACT_MATCH = "exactMatch"
    JSON_VALID = "jsonValid"
    LENGTH = "length"


class RewardSource(Model):
    """One reward of an answer: a reward stage's, or a built-in one."""

    stage: Annotated[str, Field(min_length=1, max_length=32)] | None = None
    """An earlier reward stage."""
    builtin: BuiltinReward | None = None
    """``exactMatch``: 1 for the prompt's ``reference``, but for white space at both ends. ``jsonValid``: 1 for one JSON
    value. ``length``: the answer's tokens as a share of ``maxNewTokens``; a negative weight rewards short answers."""
    weight: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    """In the sum of all rewards."""


class KL(Model):
    """What it costs to leave the incoming model."""

    coefficient: Annotated[float, Field(ge=0, le=100)] | None = None
    """Price of a nat. Default by algorithm: 0.05, grpo 0.04."""
    target: Annotated[float, Field(gt=0, le=10_000)] | None = None
    """Nats an answer: for ppo, the coefficient is raised or lowered by a little each step to come near it (Ziegler et
    al. 2019, arXiv:1909.08593). Left out: it stays."""


class PPO(Model):
    """Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347)."""

    clip_range: Annotated[float, Field(gt=0, le=1)] = 0.2
    """How far the probability of a token may move before its gradient ends."""
    value_clip_range: Annotated[float, Field(gt=0, le=1000)] = 0.2
    """How far a value may move before its gradient ends."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of later rewards."""
    lambda_: Annotated[float, Field(ge=0, le=1)] = Field(default=0.95, alias="lambda")
    """Of generalized advantage estimation (arXiv:1506.02438): lower trusts the values more."""
    epochs: Annotated[int, Field(ge=1, le=100)] = 4
    """Updates on the answers of one step."""
    reward_clip: Annotated[float, Field(gt=0, le=1_000_000)] = 10.0
    """An answer's reward is cut to this size, either way."""


class Generation(Model):
    """How the model answers while it learns."""

    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 128
    """Longest answer."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Of sampling."""
    per_prompt: Annotated[int, Field(ge=1, le=256)] | None = None
    """Answers to each prompt of a step. Default by algorithm: ppo 1, grpo 8, rloo 4."""


class Rl(TrainingBlock):
    """Reinforcement learning: answer prompts, be rewarded, and answer so more or less often.

    The reference of the KL penalty is always the model as it came in.
    """

    algorithm: Literal["ppo", "grpo", "rloo"] = "ppo"
    """``ppo``: arXiv:1707.06347 as in arXiv:2203.02155; ``grpo``: arXiv:2402.03300; ``rloo``: arXiv:2402.14740."""
    rewards: Annotated[list[RewardSource], Field(min_length=1, max_length=8)]
    """What an answer is worth: their weighted sum."""
    kl: KL = KL()
    """What it costs to leave the incoming model."""
    ppo: PPO | None = None
    """For ppo only."""
    generation: Generation = Generation()
    """How the model answers while it learns."""


class AdapterSource(Model):
    """One of the adapters that a merge folds in: a stage's, or one that another job made of the same base."""

    stage: Annotated[str, Field(min_length=1, max_length=32)] | None = None
    """An earlier stage that leaves an adapter."""
    uri: Uri | None = None
    """``s3://bucket/.../stage/digest``: the folder of a stage's result, with its ``manifest.json``. Without a cluster
    also ``file://``, a folder as PEFT writes it; a relative path starts at the YAML's folder."""
    weight: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """What the adapter adds to the weights is multiplied by it. Less than 0 takes away what was learned; not 0."""
    checkpoint: Annotated[int, Field(ge=1, le=10_000_000)] | Literal["best", "last"] | None = None
    """The adapter as a checkpoint of its training has it: of the lowest evaluation loss, the last one, or of that step.
    Left out: the stage's result."""


class Merge(Model):
    """Fold the adapter, or several of one base, into the 16-bit base."""

    adapters: Annotated[list[AdapterSource], Field(min_length=1, max_length=8)] | None = None
    """Which ones. Left out: the one that comes before."""
    combination: Literal["linear", "ties", "dareTies", "svd"] = "linear"
    """How what ``adapters`` add to the weights, times their weights, becomes one. ``linear``: the sum
    (arXiv:2212.04089). ``ties``: of each the largest, where most agree on the sign, their mean (arXiv:2306.01708).
    ``dareTies``: the same of a random share of each, scaled up (arXiv:2311.03099). ``svd``: the change of the lowest
    rank that comes nearest to the sum, left as an adapter too."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """For ties and dareTies: the share of each tensor's numbers that is kept. Default 0.2."""
    rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    """For svd: of the result. Default: the highest of the adapters."""
    base: Literal["auto", "original", "dequantized"] = "auto"
    """After qlora: fold into the 16-bit weights, or into them as training saw them, quantized and raised again.
    ``auto`` does both and keeps the one with the lower loss on eval rows. Without qlora there is only the original."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the merged weights."""
    max_shard_size: Annotated[str, Field(max_length=16, pattern=r"^[1-9][0-9]*(Mi|Gi)$")] = "4Gi"
    """Largest safetensors file."""


class GGUFType(StrEnum):
    """llama.cpp's names, all that its quantizer offers; larger files first."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_1 = "Q5_1"
    Q5_K_M = "Q5_K_M"
    Q5_K_S = "Q5_K_S"
    Q5_0 = "Q5_0"
    Q4_1 = "Q4_1"
    Q4_K_M = "Q4_K_M"
    Q4_K_S = "Q4_K_S"
    Q4_0 = "Q4_0"
    IQ4_NL = "IQ4_NL"
    IQ4_XS = "IQ4_XS"
    MXFP4_MOE = "MXFP4_MOE"
    Q3_K_L = "Q3_K_L"
    Q3_K_M = "Q3_K_M"
    IQ3_M = "IQ3_M"
    IQ3_S = "IQ3_S"
    Q3_K_S = "Q3_K_S"
    IQ3_XS = "IQ3_XS"
    IQ3_XXS = "IQ3_XXS"
    Q2_K = "Q2_K"
    Q2_K_S = "Q2_K_S"
    IQ2_M = "IQ2_M"
    IQ2_S = "IQ2_S"
    IQ2_XS = "IQ2_XS"
    IQ2_XXS = "IQ2_XXS"
    Q2_0 = "Q2_0"
    TQ2_0 = "TQ2_0"
    IQ1_M = "IQ1_M"
    TQ1_0 = "TQ1_0"
    IQ1_S = "IQ1_S"
    Q1_0 = "Q1_0"


IMATRIX_TYPES = frozenset(
    {
        *(GGUFType.IQ3_XS, GGUFType.IQ3_XXS, GGUFType.Q2_K_S, GGUFType.IQ2_M, GGUFType.IQ2_S, GGUFType.IQ2_XS),
        *(GGUFType.IQ2_XXS, GGUFType.IQ1_M, GGUFType.IQ1_S),
    }
)
"""Types that llama.cpp makes with an importance matrix only."""


class Imatrix(Model):
    """An importance matrix: how much each column of a weight matters, by the activations that meet it."""

    rows: Annotated[int, Field(ge=1, le=100_000)] = 200
    """How many of the train rows the model reads, evenly spread."""


class Quantize(Model):
    """GGUF files of the merged model, each checked against it; also what transformers loads in 4 or 8 bits."""

    gguf: Annotated[list[GGUFType], Field(max_length=40)] = []
    """Which types. May be left out where ``bitsandbytes`` is given."""
    imatrix: Imatrix | None = None
    """For every type that is not of 16 or 32 bits. Left out: only for those that llama.cpp makes with one alone, the
    IQ1, IQ2 and small IQ3 types and Q2_K_S."""
    lora_gguf: Annotated[bool, Field(alias="loraGGUF")] = False
    """Write the adapter that was merged as a GGUF too, to be laid over a GGUF of its base model: a few megabytes for
    each task. For LoRA without ``dora``, ``bias`` and ``modulesToSave``."""
    bitsandbytes: Annotated[list[Literal["int8", "nf4"]], Field(max_length=2)] = []
    """The model for transformers too, its linear layers but the head in so many bits (arXiv:2208.07339,
    arXiv:2305.14314); each is scored as the GGUFs are."""


class KeyRef(Model):
    """A key of a Secret or a ConfigMap in the job's namespace."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    """Name of the Secret or ConfigMap."""
    key: Annotated[str, Field(min_length=1, max_length=253)]
    """Key in it."""
    optional: bool = False
    """Start without the variable where there is no such key."""


class EnvSource(Model):
    """Where a variable's value comes from: one of the two."""

    secret_key_ref: KeyRef | None = None
    config_map_key_ref: KeyRef | None = None


class EnvVar(Model):
    """An environment variable of the stage's container."""

    name: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """Letters, digits and ``_``."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """The value itself; or ``valueFrom``."""
    value_from: EnvSource | None = None
    """Where the value stands; or ``value``."""


class Toleration(Model):
    """As in a pod."""

    key: Annotated[str, Field(max_length=253)] = ""
    """Key of the taint. Empty with ``Exists``: every taint."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """``Exists`` looks at the key alone."""
    value: Annotated[str, Field(max_length=253)] = ""
    """Value of the taint."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Empty: every effect."""
    toleration_seconds: Annotated[int, Field(ge=0, le=31_536_000)] | None = None
    """How long ``NoExecute`` is borne. Left out: for ever."""


Labels = Annotated[
    dict[Annotated[str, Field(max_length=317)], Annotated[str, Field(max_length=4096)]], Field(max_length=64)
]


class Template(Model):
    """What a user may say about the stages' pods. On one machine it is not read.

    A field that is left out is the operator's: image by stage, the namespace's ``default`` service account.
    """

    image: Annotated[str, Field(max_length=1024)] | None = None
    """Left out: the operator's trainer image for stages that train or have GPUs, its gguf image for the others."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the node fetches the image. Left out: Kubernetes' own choice, by the image's tag."""
    image_pull_secrets: Annotated[list[SecretRef], Field(max_length=16)] | None = None
    """Secrets with the registry's credentials."""
    service_account_name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """The cloud's identity of the pods hangs on it. No token of it is mounted."""
    labels: Labels | None = None
    """Of the pods, beside the operator's own."""
    annotations: Labels | None = None
    """Of the pods, beside the operator's own."""
    env: Annotated[list[EnvVar], Field(max_length=64)] | None = None
    """Of the stages' containers."""
    node_selector: Labels | None = None
    """Labels that a node must have."""
    tolerations: Annotated[list[Toleration], Field(max_length=64)] | None = None
    """Taints of nodes that do not keep the pods away."""
    affinity: dict[str, Any] | None = None
    """As in a pod."""
    priority_class_name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """A PriorityClass, which must exist."""
    runtime_class_name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """A RuntimeClass, such as ``nvidia``."""
    termination_grace_period_seconds: Annotated[int, Field(ge=1, le=86_400)] | None = None
    """Between SIGTERM and SIGKILL: time to save and upload a checkpoint. Left out: 120."""


class Stage(Model):
    """One step of the pipeline: a name and exactly one block."""

    name: StageName
    """Unique in the pipeline; not prepare, baseline, evaluate, report or base."""
    from_: Annotated[str, Field(min_length=1, max_length=32)] | None = Field(default=None, alias="from")
    """The model this stage starts from: ``base`` or a stage's name. Default: the stage before, reward models apart."""
    data: Data = Data()
    """Overrides ``spec.data`` role by role."""
    resources: Resources = Resources()
    """What the stage runs on."""
    template: Template = Template()
    """Over ``spec.template``, field by field."""
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    """Attempts after a failure of the stage's own; being preempted or suspended never counts."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """Longest running time, summed over attempts."""
    sft: Sft | None = None
    """Supervised fine-tuning: learn to give the answers of the training rows."""
    preference: Preference | None = None
    """Learn to prefer the chosen answers."""
    reward: Reward | None = None
    """A reward model from pairs, for rl."""
    rl: Rl | None = None
    """Reinforcement learning: answer prompts, be rewarded, and answer so more or less often."""
    merge: Merge | None = None
    """Fold the adapter into the 16-bit base."""
    quantize: Quantize | None = None
    """GGUF files of the merged model, each checked against it."""


class FineTuneJobSpec(Model):
    """A pipeline from a base model and data to tested artifacts."""

    model: ModelSource
    """The base model."""
    data: Data
    """Data sets by role."""
    storage: Storage
    """S3-compatible object storage for checkpoints and artifacts."""
    seed: Annotated[int, Field(ge=0, le=4_294_967_295)] = 42
    """Of every random choice: split, order, initial adapter, dropout."""
    evaluation: Evaluation = Evaluation()
    pipeline: Annotated[
        list[Stage],
        Field(min_length=1, max_length=32, json_schema_extra=listed_by("name")),
    ]
    """Stages, in order of writing; the order of running follows ``from``, ``rewards`` and ``adapters``."""
    template: Template = Template()
    """What the stages' pods are like."""
    suspend: bool = False
    """Stop the running stage at a checkpoint; false goes on from there."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=315_360_000)] | None = None
    """The record of a finished job is deleted after so long; its objects stay. Left out: it stays too."""
    pending_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    """Give up when a stage finds no place to run for so long; waiting in a queue does not count."""


class Metadata(Model):
    """The parts of Kubernetes metadata that the pipeline reads; the others pass unread."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    name: JobName
    namespace: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")] = (
        "default"
    )
    uid: Annotated[str, Field(max_length=64)] = ""
    generation: int = 1


class FineTuneJob(Model):
    """The custom resource, without its status."""

    # `status` and other server-side fields may stand in what kubectl prints; they are not the user's words.
    api_version: Literal["finetune.dev/v1alpha1"]
    kind: Literal["FineTuneJob"]
    metadata: Metadata
    spec: FineTuneJobSpec
