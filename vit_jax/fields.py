"""The fields of a recipe as other libraries call them, for the error about a field that does not exist."""

from collections.abc import Iterable

from vit_jax.errors import UserError, did_you_mean, unknown

SYNONYMS = {
    "base_lr": ("lr", "lr0", "learning_rate", "max_lr", "peak_lr", "init_lr"),
    "total_steps": ("epochs", "num_epochs", "num_train_epochs", "max_epochs", "max_steps", "num_steps", "train_steps", "steps"),
    "batch": ("batch_size", "train_batch_size", "per_device_train_batch_size", "bs"),
    "batch_eval": ("eval_batch_size", "test_batch_size", "val_batch_size", "per_device_eval_batch_size"),
    "accum_steps": ("gradient_accumulation_steps", "grad_accum", "grad_accum_steps", "accumulate_grad_batches"),
    "weight_decay": ("wd", "l2"),
    "warmup_steps": ("warmup", "warmup_epochs", "num_warmup_steps", "warmup_ratio"),
    "optimizer": ("opt", "optim", "optimizer_name"),
    "optimizer_options": ("momentum", "betas", "beta1", "beta2", "b1", "b2", "opt_betas", "opt_eps"),
    "decay_type": ("sched", "scheduler", "schedule", "lr_scheduler", "lr_scheduler_type", "lr_schedule"),
    "grad_norm_clip": ("clip", "clip_grad", "grad_clip", "clip_grad_norm", "max_grad_norm", "gradient_clip_val"),
    "layer_decay": ("llrd", "layerwise_lr_decay"),
    "ema_decay": ("ema", "model_ema", "model_ema_decay"),
    "label_smoothing": ("smoothing", "label_smoothing_factor"),
    "dtype": ("precision", "mixed_precision", "fp16", "bf16", "half", "amp", "half_precision"),
    "remat": ("grad_checkpointing", "gradient_checkpointing", "checkpoint_activations"),
    "dataset": ("data", "data_dir", "data_path", "dataset_name", "train_dir", "train_data"),
    "pretrained": ("resume", "finetune", "init_from", "init_checkpoint", "weights", "model_init", "model_name_or_path"),
    "model": ("arch", "architecture", "backbone"),
    "seed": ("random_seed", "manual_seed"),
    "progress_every": ("log_every", "logging_steps", "log_interval", "log_training_steps", "print_freq"),
    "eval_every": ("eval_steps", "eval_interval", "val_interval"),
    "checkpoint_every": ("save_steps", "save_every", "save_interval", "ckpt_steps"),
    "keep": ("save_total_limit", "max_to_keep"),
    "pp.crop": ("image_size", "img_size", "input_size", "resolution", "imgsz"),
    "augment.mixup": ("mixup", "mixup_alpha"),
    "augment.cutmix": ("cutmix", "cutmix_alpha"),
    "augment.randaug": ("randaug", "randaugment", "auto_augment", "aa"),
    "augment.erasing": ("reprob", "erasing", "random_erasing"),
    "augment.color_jitter": ("color_jitter", "jitter"),
    "model.transformer.stochastic_depth": ("drop_path", "drop_path_rate", "stochastic_depth", "stoch_depth"),
    "model.transformer.dropout_rate": ("dropout", "dropout_rate", "drop_rate"),
}
_OURS = {theirs: ours for ours, names in SYNONYMS.items() for theirs in names}


def unknown_field(where: str, name: str, allowed: Iterable[str]) -> UserError:
    """The error for a field that `where` (such as `config.pp`) has not: what others call so, else the near names."""
    allowed = set(allowed)
    meant = _OURS.get(name.lower(), "")
    for path in (meant, meant.rpartition(".")[2]):  # pp.crop within config, crop within config.pp
        if path.partition(".")[0] in allowed:
            epochs = (
                " It counts steps: an epoch is as many as the examples divided by batch." if "epoch" in name.lower() else ""
            )
            return UserError(f"unknown field of {where} {name!r}: {did_you_mean([path])}{epochs}")
    return unknown(f"field of {where}", name, allowed)
