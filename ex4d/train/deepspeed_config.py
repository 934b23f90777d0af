"""Derive DeepSpeed's configuration from the run's settings."""

from __future__ import annotations

from typing import Any

from ex4d.errors import ConfigError
from ex4d.train.config import BatchPlan, TrainConfig

# Elements that are reduced at once; DeepSpeed's default of 5e8 takes 2 GB, more than any adapter's gradients.
BUCKET = 50_000_000
# DeepSpeed keys, besides those that deepspeed_config writes, that would change dtypes or the optimizer.
OWNED = frozenset({"bf16", "fp16", "amp", "torch_autocast", "optimizer", "scheduler"})


def deepspeed_config(config: TrainConfig, plan: BatchPlan) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run, including the additional keys of `train.deepspeed`.

    Raises:
        ConfigError: a key of `train.deepspeed` is determined by other settings.
    """
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": BUCKET}
    if config.cpu_offload and config.zero_stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    ours = {
        "train_batch_size": plan.global_size,
        "train_micro_batch_size_per_gpu": plan.micro_size,
        "gradient_accumulation_steps": plan.accum_steps,
        "gradient_clipping": config.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    theirs = dict(config.deepspeed)
    more = theirs.pop("zero_optimization", None) or {}
    owned = [key for key in theirs if key in ours or key in OWNED]
    owned += [f"zero_optimization.{key}" for key in more if key in ("stage", "offload_optimizer", "offload_param")]
    if owned:
        allowed = "must be left out: other settings of `train` determine it"
        raise ConfigError(f"train.deepspeed.{owned[0]}", config.deepspeed, allowed)
    return ours | theirs | {"zero_optimization": zero | more}
