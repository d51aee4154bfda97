"""What other tools call our keys: data for the one line that a wrong word gets.

A key's own last part needs no entry (lr is found as optimizer.lr). What is on the left is a key, a group, or a whole
setting where the word says its value too; one that a command does not have is passed over.
"""

_DEVICES = "gpus gpu num_gpus n_gpus ngpus nproc nproc_per_node num_processes num_devices world_size ranks"
_PRECISION = {
    "precision": "amp mixed_precision dtype half",
    "precision=fp16": "fp16 float16",
    "precision=bf16": "bf16 bfloat16",
    "precision=tf32": "tf32 allow_tf32",
}
_BOTH = {
    "batch_size": "batch bs batchsize batches global_batch_size train_batch_size eval_batch_size",
    "compile": "torch_compile compiled",
    "devices": _DEVICES,
    "guidance": "cfg cfg_scale guidance_scale",
    "seed": "seeds random_seed manual_seed",
    **_PRECISION,
}

TRAIN = {
    **_BOTH,
    "backbone": "model network net arch architecture unet",
    "budget": "epochs num_epochs max_epochs kimg nimg duration",
    "dataset": "data",
    "dataset.conditional": "cond class_cond class_conditional",
    "dataset.hflip": "flip mirror random_flip horizontal_flip",
    "dataset.image_size": "size resolution res img_size image_resolution",
    "dataset.root": "data data_dir dataset_dir data_path data_root image_dir train_dir train_data_dir path folder",
    "ema.decay": "ema_decay ema_rate ema_beta",
    "init": "pretrained pretrained_path init_from from_pretrained",
    "keep": "keep_last save_total_limit checkpoints_total_limit max_checkpoints",
    "log_every": "log_interval log_freq logging_steps",
    "max_hours": "max_time time_limit timeout hours",
    "micro_batch": "micro_batch_size microbatch batch_gpu per_device_batch_size per_device_train_batch_size "
    "gradient_accumulation_steps accumulate_grad_batches grad_accum",
    "mode": "method algorithm algo training_mode",
    "name": "run_name exp_name experiment_name",
    "optimizer": "optim opt",
    "optimizer.clip_norm": "clip clip_grad grad_clip max_grad_norm gradient_clip_val",
    "optimizer.lr": "learning_rate base_lr max_lr",
    "optimizer.warmup_steps": "warmup lr_warmup lr_warmup_steps num_warmup_steps",
    "plan": "dry_run dryrun",
    "preview_every": "sample_every sample_interval validation_steps",
    "run_dir": "outdir out_dir output output_dir logdir log_dir logging_dir save_dir work_dir workdir",
    "save_every": "save_interval save_freq save_steps checkpoint_every ckpt_every checkpointing_steps",
    "steps": "iters iterations max_iters num_iterations max_steps num_steps total_steps train_steps max_train_steps "
    "epochs num_epochs max_epochs kimg nimg",
    "teacher": "teacher_path teacher_ckpt teacher_model teacher_model_path",
    "tracking": "logger report_to",
    "tracking.project": "wandb_project",
    "tracking=tensorboard": "tensorboard",
    "tracking=wandb": "wandb use_wandb",
}

SAMPLE = {
    **_BOTH,
    "ckpt": "checkpoint model model_path network network_pkl path run run_dir",
    "format=npz": "npz",
    "format=png": "png",
    "labels": "class label classes class_idx cond",
    "num": "n num_images num_samples n_samples count samples",
    "out": "output outdir out_dir output_dir save_dir folder",
    "seed": "random_seed manual_seed",
    "sigmas": "ts timesteps noise_levels",
    "steps": "num_steps nfe num_inference_steps sampling_steps ddim_steps",
    "weights": "ema ema_decay",
}

EVAL = {
    **{key: words for key, words in SAMPLE.items() if not key.startswith("format")},
    "features": "detector extractor feature_extractor backbone",
    "metrics": "metric fid kid",
    "reference": "ref ref_path reference_path dataset data real ref_batch",
    "samples": "images generated fake sample_batch",
}

CONVERT = {
    "src": "source file input path checkpoint ckpt network network_pkl model model_path",
    "out": "output outdir out_dir output_dir save_dir folder dest dump_path",
    "image_size": "resolution res size img_resolution",
    "num_head_channels": "head_channels channels_per_head",
    "preconditioning": "kind type prediction training_mode",
}

# What no key is for.
HINTS = dict.fromkeys(
    ["resume", "resume_from", "resume_from_checkpoint", "continue"], "drop it: the same command again goes on"
)
