"""What all training stages do before and after their own part: the model in, the result out."""

import json
import logging
import resource
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from finetune_api.defaults import (
    PROMPTED,
    resolve_added,
    resolve_lora,
    resolve_qat,
    resolve_quantization,
    resolve_training,
)
from finetune_api.pipeline import ModelRef, find, kind, model_before
from finetune_api.types import BASE, Bottleneck, Method, Model, Reward, TrainingBlock
from finetune_jobs.data.encode import Dropped, load_tokenizer
from finetune_jobs.data.rows import Row
from finetune_jobs.merging.files import set_chat_template
from finetune_jobs.merging.merge import merge
from finetune_jobs.merging.weights import Weights
from finetune_jobs.run.context import Context, Outcome
from finetune_jobs.run.environment import record
from finetune_jobs.run.errors import ConfigurationError, DataError
from finetune_jobs.training import bottleneck, distributed, memory, unsloth, weights
from finetune_jobs.training.adapters import INITIAL
from finetune_jobs.training.limits import disk_errors
from finetune_jobs.training.model import Backend, Policy, compute_type, count, device_of, load
from finetune_jobs.training.qat import Rounding
from finetune_jobs.training.sharding import choose
from finetune_jobs.training.trainer import Settings, Trainer

_log = logging.getLogger("finetune.training")
_SHARD_BYTES = 4 << 30
T = TypeVar("T")
E = TypeVar("E")


@dataclass
class Session:
    """A stage that has what it reads, but for the weights."""

    ctx: Context
    block: TrainingBlock
    settings: Settings
    before: ModelRef
    source: Path
    """The incoming 16-bit model."""
    adapter: Path | None
    """The incoming adapter."""
    peers: distributed.Peers
    tokenizer: PreTrainedTokenizerBase
    folded: bool = False
    """The adapter that came in is part of ``source``, which belongs to the result."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Examples left out, by reason."""
    fallback: str | None = None
    """Why not the backend trains that was asked for."""

    def examples(
        self, role: str, encode: Callable[[list[Row]], Iterable[T | Dropped]], make: Callable[[T], E]
    ) -> list[E]:
        """The rows of a role as examples; those that are dropped are counted."""
        rows = self.peers.share(lambda: self.ctx.rows(role))
        made = []
        for encoded in encode(rows):
            self.ctx.stop.check()
            if isinstance(encoded, Dropped):
                self.dropped[encoded.reason] += 1
            else:
                made.append(make(encoded))
        return made


def path_of(ctx: Context) -> str:
    """The stage's block as the user finds it: ``spec.pipeline[1].sft``."""
    name = ctx.run.stage
    return f"spec.pipeline[{ctx.spec.pipeline.index(find(ctx.spec, name))}].{kind(ctx.spec, name)}"


def begin(ctx: Context, block: TrainingBlock) -> Session:
    """Meet the peers and fetch the incoming model. Raises ConfigurationError for what cannot start from it."""
    before = model_before(ctx.spec, ctx.run.stage)
    path = path_of(ctx)
    folds = block.start == "merge" and before.adapter is not None
    if block.method is Method.FULL and before.adapter is not None and not folds:
        raise ConfigurationError(
            f"{path}.method: full trains whole weights, but {before.adapter} left an adapter; "
            "put a merge stage between them"
        )
    _quieten_libraries()
    settings = Settings(path, resolve_training(block), block.checkpoint, block.validation, ctx.spec.seed)
    peers = distributed.connect()
    source = peers.share_on_node(lambda: ctx.model_dir(before.weights))
    incoming = before.adapter
    adapter = peers.share_on_node(lambda: ctx.adapter_dir(incoming)) if incoming is not None else None
    if folds and adapter is not None:
        base, change = source, adapter
        source, adapter = peers.share_on_node(lambda: _fold(ctx, base, change)), None
    if adapter is not None:
        _check_continues(block, adapter, before, path)
    model = ctx.spec.model
    tokenizer = load_tokenizer(source, model.chat_template, trust_remote_code=model.trust_remote_code)
    return Session(ctx, block, settings, before, source, adapter, peers, tokenizer, folded=folds)


def _fold(ctx: Context, base: Path, adapter: Path) -> Path:
    """The model that came in with its adapter in the weights, in the base's own precision."""
    directory = ctx.workspace / "folded"
    directory.mkdir()
    dtype = next(spec.dtype for spec in Weights(base).specs.values() if spec.dtype.is_floating_point)
    merge(base, adapter, directory, dtype, _SHARD_BYTES, lambda done, total: ctx.stop.check())
    if ctx.spec.model.chat_template:
        set_chat_template(directory, ctx.spec.model.chat_template)
    return directory


def _quieten_libraries() -> None:
    """What they say at every start is no news: progress bars, kernels that are not installed, renamed attributes."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    for library in ("bitsandbytes", "liger_kernel"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast", category=UserWarning)


def load_policy(session: Session, *, scores: bool = False) -> Policy:
    """The incoming model with what is trained on it: the adapter that came in, a fresh one, or all of it.

    ``scores``: made a reward model.
    """
    session.peers.check(session.ctx.stop)
    device = device_of(session.peers)
    backend = _backend(session)
    policy = load(
        session.source,
        method=session.block.method,
        lora=resolve_lora(session.block),
        added=resolve_added(session.block),
        quantization=resolve_quantization(session.block),
        adapter=session.adapter,
        compute=compute_type(session.settings.training.precision, device),
        device=device,
        seed=session.settings.seed,
        sharding=choose(session.block, session.source, device, session.peers),
        trust_remote_code=session.ctx.spec.model.trust_remote_code,
        scores=scores,
        backend=backend,
    )
    kind = resolve_qat(session.block)
    if kind is not None:
        policy = replace(policy, rounding=Rounding(policy.base, kind, f"{session.settings.path}.qat"))
    session.peers.check(session.ctx.stop)
    return policy


def _backend(session: Session) -> Backend:
    if session.settings.training.backend != "unsloth":
        return "transformers"
    session.fallback = unsloth.refusal(session.source, session.settings.training)
    if session.fallback is None:
        return "unsloth"
    path = f"{session.settings.path}.training.backend"
    _log.warning("%s: transformers trains, for Unsloth cannot: %s", path, session.fallback)
    return "transformers"


def check_sets(session: Session, train: Sized, evaluation: Sized) -> None:
    """Raise what makes the sets unusable."""
    if not train:
        reasons = ", ".join(f"{n} {reason}" for reason, n in session.dropped.items()) or "there are no rows"
        raise DataError(
            f"no example is left to train on ({reasons}): "
            f"raise {session.settings.path}.training.maxLength or give more rows"
        )
    if session.settings.validation.early_stopping is not None and not evaluation:
        raise ConfigurationError(
            f"{session.settings.path}.validation.earlyStopping: "
            "there are no rows to evaluate on; give some, or remove it"
        )


def _check_continues(block: TrainingBlock, adapter: Path, before: ModelRef, path: str) -> None:
    """An adapter that is trained on keeps its shape: another one that is asked for would be silently ignored."""
    has = json.loads((adapter / "adapter_config.json").read_text())
    kinds = {Method.LORA: "LORA", Method.QLORA: "LORA", Method.IA3: "IA3", Method.BOTTLENECK: bottleneck.TYPE}
    wanted = kinds.get(block.method)
    if has["peft_type"] != wanted:
        raise ConfigurationError(
            f"{path}.method: {block.method} cannot train on what {before.adapter} left, which is {has['peft_type']}; "
            "start from another stage with `from`"
        )
    if block.bottleneck is not None and block.bottleneck != bottleneck.read_settings(adapter):
        raise ConfigurationError(
            f"{path}.bottleneck: the adapters of {before.adapter} are trained on as they are; remove the block"
        )
    if has.get("bias", "none") != "none":
        raise ConfigurationError(
            f"{path}.start: the adapter of {before.adapter} has trained biases, which cannot be trained on; "
            "put a merge stage between them"
        )
    asked = resolve_lora(block) if block.lora is not None else None
    if asked is None:
        return
    if (asked.r, asked.alpha) != (has["r"], has["lora_alpha"]):
        raise ConfigurationError(
            f"{path}.lora: the adapter of {before.adapter} is trained on, and it has r {has['r']} "
            f"and alpha {has['lora_alpha']:g}; remove the block, or merge first to start a new adapter"
        )


def finish(session: Session, loop: Trainer, plan: memory.Plan, facts: Mapping[str, Any] | None = None) -> Outcome:
    """Write the trained adapter or model and the log of the training, with ``facts``. Only rank 0's is committed."""
    ctx, policy, state = session.ctx, loop.policy, loop.state
    directory, gathered = ctx.workspace / "result", ctx.workspace / "gathered"
    if session.block.method is Method.FULL and (session.peers.first or policy.divided):
        with disk_errors("writing the result", gathered):
            weights.gather(policy, gathered if session.peers.first else None)
    session.peers.leave()
    if not session.peers.first:
        return Outcome(directory, {})
    directory.mkdir()
    log = {**_training_log(session, loop, plan), **(facts or {})}
    with disk_errors("writing the result", directory):
        made = _write_weights(session, policy, directory, gathered)
        (directory / "training.json").write_text(json.dumps(log, indent=1, allow_nan=False) + "\n")
    figures: dict[str, float | int | str] = {
        "loss": state.curve[-1]["loss"],
        **({"evalLoss": log["evalLoss"]} if log["evalLoss"] is not None else {}),
        "steps": state.step,
        "trainableParameters": log["parameters"]["trainable"],
        "tokensPerSecond": log["tokensPerSecond"],
    }
    outputs = {made: made, "log": "training.json"}
    if session.folded and made != "model":
        session.source.rename(directory / "model")
        outputs["model"] = "model"
    return Outcome(directory, outputs, figures=figures)


def _write_weights(session: Session, policy: Policy, directory: Path, gathered: Path) -> str:
    """Write what was trained into a folder of that name: ``model``, ``adapter`` or ``reward``."""
    full, template = session.block.method is Method.FULL, session.ctx.spec.model.chat_template
    made = "reward" if isinstance(session.block, Reward) else "model" if full else "adapter"
    base, source = _base_name(session), session.source
    if made == "reward":
        weights.save_reward_model(policy, directory / made, gathered, base=base, source=source, chat_template=template)
    elif full:
        weights.save_model(policy, directory / made, gathered, source=source, chat_template=template)
    elif session.block.method is Method.BOTTLENECK:
        bottleneck.save(policy.model, _bottleneck(session), directory / made, base=base)
    elif session.block.method in PROMPTED:
        from finetune_jobs.training import prompts

        assert isinstance(policy.model, prompts.Prompted)
        prompts.save(policy.model, directory / made, base=base)
    else:
        weights.save_adapter(policy, directory / made, base=base)
    if not full:
        session.tokenizer.save_pretrained(str(directory / made))
    return made


def _training_log(session: Session, loop: Trainer, plan: memory.Plan) -> dict[str, Any]:
    block, policy, state = session.block, loop.policy, loop.state
    quantization = resolve_quantization(block)
    counts = count(policy.model)
    by_step = {int(e["step"]): e["evalLoss"] for e in state.evaluations}
    result_step = loop.result_step()
    return {
        "stage": session.ctx.run.stage,
        "kind": type(block).__name__.lower(),
        "method": str(block.method),
        "precision": str(policy.compute).removeprefix("torch."),
        "device": str(policy.device),
        "backend": policy.backend,
        "fallback": session.fallback,
        "liger": policy.liger,
        "parameters": {"trainable": counts.trainable, "total": counts.total, "held": policy.held},
        "training": session.settings.training.model_dump(mode="json", by_alias=True),
        "lora": _lora(policy) if resolve_lora(block) else None,
        **_added(session),
        "quantization": quantization.model_dump(mode="json", by_alias=True) if quantization else None,
        "qat": {"type": resolve_qat(block), "tensors": policy.rounding.types} if policy.rounding else None,
        "seed": session.settings.seed,
        "continues": None if session.folded else session.before.adapter,
        "folded": session.before.adapter if session.folded else None,
        "batch": {
            "packed": plan.layout.packed,
            "tokens": plan.layout.tokens,
            "examples": plan.layout.examples,
            "processes": session.peers.size,
            "shards": policy.shards,
            "gradientCheckpointing": plan.gradient_checkpointing,
        },
        "examples": {**loop.counts, "dropped": dict(session.dropped)},
        "steps": state.step,
        "totalSteps": loop.schedule.total_steps,
        "stoppedEarly": state.stopped_early,
        "resultStep": result_step,
        "evalLoss": by_step.get(result_step),
        "resumedFrom": state.resumed_from,
        "curve": state.curve,
        "evaluations": state.evaluations,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 3),
        "tokensPerSecond": round(state.tokens / state.seconds, 1) if state.seconds else 0.0,
        "optimizerBytes": loop.optimizer.size_bytes,
        "peakMemoryBytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peakGPUMemoryBytes": torch.cuda.max_memory_allocated() if policy.device.type == "cuda" else None,
        "environment": record(),
    }


def _lora(policy: Policy) -> dict[str, Any]:
    """As the adapter has it: one that came in keeps its shape, whatever the block's defaults are."""
    adapters: Any = policy.model.peft_config
    has = adapters["default"]
    return {
        "r": has.r,
        "alpha": has.lora_alpha,
        "dropout": has.lora_dropout,
        "targetModules": sorted(has.target_modules),
        "bias": has.bias,
        "variant": "pissa" if INITIAL in adapters else "dora" if has.use_dora else "lora",
        "rankStabilized": has.use_rslora,
        "modulesToSave": sorted(has.modules_to_save or []),
    }


def _added(session: Session) -> dict[str, Any]:
    """Settings of the method under its name, as what was trained has them."""
    match resolve_added(session.block):
        case None:
            return {}
        case Bottleneck():
            settings: Model = _bottleneck(session)
        case settings:
            pass
    return {str(session.block.method): settings.model_dump(mode="json", by_alias=True)}


def _bottleneck(session: Session) -> Bottleneck:
    """Adapters that came in keep their shape, whatever the block's defaults are."""
    if session.adapter is not None:
        return bottleneck.read_settings(session.adapter)
    return session.block.bottleneck or Bottleneck()


def _base_name(session: Session) -> str:
    """How the world calls the model that the adapter belongs to: the hub's name, else where it came from."""
    weights_of = session.ctx.run.stage if session.folded else session.before.weights
    if weights_of != BASE:
        return f"{session.ctx.run.job.name}/{weights_of}"
    source = session.ctx.spec.model.source
    return source.removeprefix("hf://").partition("@")[0] if source.startswith("hf://") else source
