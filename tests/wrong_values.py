"""Wrong values for every field of a config and every flag of a command, listed by hand for `test_options`."""

import math

NUMBERS = (math.nan, math.inf, "many")
COUNT = (0, -1, 1.5, *NUMBERS)  # wrong for a whole number of 1 or more
NATURAL = (-1, 0.5, *NUMBERS)  # of 0 or more
SEED = (-1, 2**32, 2**40, 0.5, *NUMBERS)
POSITIVE = (0.0, -1.0, *NUMBERS)
POSITIVE_OR_INF = (0.0, -1.0, -math.inf, math.nan, "many")
NOT_NEGATIVE = (-1.0, -1e-9, *NUMBERS)
SWITCH = (1, "yes", "maybe")
TEXT = ("", 3)
PATH = (3, 1.5)
WIDTHS = ((), (0,), (8, -8), 8, ("eight",), (8.0,))

WRONG = {
    "seed": SEED,
    "model": TEXT,
    "model_dtype": ("float16", "", 32),
    "carry_change": SWITCH,
    "reward": ("", "beauty", "Valence", 1),
    "prompts": TEXT,
    "sampling.sampler": ("ddim", "DDPM", ""),
    "sampling.num_steps": (*COUNT, 1000),
    "sampling.lora_until_step": (*COUNT, 51),
    "sampling.guidance": (-1.0, 101.0, *NUMBERS),
    "algorithm.name": ("ppo", "", 1),
    "lora.rank": (*COUNT, 1025),
    "lora.layers": ("attn", ""),
    "lora.start_from": PATH,
    "correction.block_out_channels": WIDTHS,
    "correction.layers_per_block": COUNT,
    "correction.attention_head_dim": (*COUNT, 7),
    "correction.norm_num_groups": (*COUNT, 7),
    "training.num_epochs": (*NATURAL, 2**31),
    "training.trajectories": (*COUNT, 33),
    "training.micro_batches": (*COUNT, 5),
    "training.updates_per_epoch": COUNT,
    "training.learning_rate": POSITIVE,
    "training.decline": ("exponential", "Cosine", 1),
    "training.adam_epsilon": POSITIVE,
    "training.average": (-0.1, 1.0, *NUMBERS),
    "training.weight_decay_lora": NOT_NEGATIVE,
    "training.weight_decay_correction": NOT_NEGATIVE,
    "training.remat": SWITCH,
    "training.images_at_once": NATURAL,
    "training.clip": POSITIVE_OR_INF,
    "logging.samples_every": COUNT,
    "logging.checkpoint_every": COUNT,
    "logging.keep_loras": NATURAL,
    "logging.judged_images": NATURAL,
    "logging.tensorboard": SWITCH,
    "logging.wandb": SWITCH,
}
ADVANTAGES = {"advantage_clip": POSITIVE_OR_INF, "buffer_size": COUNT, "min_count": COUNT}
BALANCE = {
    "beta": (1e30, -1e30, *NUMBERS),
    "gamma": ("foo", "", 1),
    "transition_fraction": (0.0, -0.1, 1.1, 0.01, *NUMBERS),
    "uneven_bins": SWITCH,
    "output_regularisation": NOT_NEGATIVE,
}
WRONG_OF_ALGORITHM = {
    "residual_nabla_db": {
        "beta": (1e30, -1e30, *NUMBERS),
        "output_regularisation": NOT_NEGATIVE,
        "prior_strength": NOT_NEGATIVE,
        "credit": ("Lookahead", "", "adjoint "),
        "gamma": ("foo", "", 1),
        "variance_weighted": SWITCH,
        "correction_from_forward": SWITCH,
        "credit_clip": POSITIVE_OR_INF,
        "transition_fraction": (0.0, -0.1, 1.1, 0.01, *NUMBERS),
        "uneven_bins": SWITCH,
    },
    "plain_nabla_db": {
        "beta": (1e30, -1e30, *NUMBERS),
        "output_regularisation": NOT_NEGATIVE,
        "gamma": ("foo", "", 1),
        "variance_weighted": SWITCH,
        "transition_fraction": (0.0, -0.1, 1.1, 0.01, *NUMBERS),
        "uneven_bins": SWITCH,
    },
    "residual_db": BALANCE,
    "dag_db": BALANCE,
    "eam": {"beta": (1e30, -1e30, *NUMBERS), "noisings": COUNT, "output_regularisation": NOT_NEGATIVE},
    "ram": {
        "beta": (1e30, -1e30, *NUMBERS),
        "baseline": ("none", ""),
        **ADVANTAGES,
        "noisings": COUNT,
        "time_power": NOT_NEGATIVE,
        "output_regularisation": NOT_NEGATIVE,
    },
    "awm": {
        **ADVANTAGES,
        "advantage_clip": (math.inf, *POSITIVE_OR_INF),
        "noisings": COUNT,
        "ratio_clip": POSITIVE_OR_INF,
        "base_regularisation": NOT_NEGATIVE,
        "output_regularisation": NOT_NEGATIVE,
    },
    "nft": {
        **ADVANTAGES,
        "advantage_clip": (math.inf, *POSITIVE_OR_INF),
        "mixing": POSITIVE,
        "noisings": COUNT,
        "base_regularisation": NOT_NEGATIVE,
        "output_regularisation": NOT_NEGATIVE,
    },
    "ddpo": {**ADVANTAGES, "ratio_clip": POSITIVE_OR_INF, "output_regularisation": NOT_NEGATIVE},
    "refl": {
        "late_steps": (*COUNT, 51),
        "margin": (-math.inf, math.nan, "many"),
        "output_regularisation": NOT_NEGATIVE,
    },
    "path_regression": {
        "beta": (1e30, -1e30, *NUMBERS),
        "credit": ("guess", ""),
        "steps": (*COUNT, 51),
        "weight_clip": POSITIVE_OR_INF,
        "credit_clip": POSITIVE_OR_INF,
        "output_regularisation": NOT_NEGATIVE,
    },
    "draft": {"last_steps": (*COUNT, 51), "lv_samples": NATURAL, "output_regularisation": NOT_NEGATIVE},
    "kernel_value": {
        "beta": (1e30, -1e30, *NUMBERS),
        "steps": (*COUNT, 51),
        "memory": (1, *COUNT),
        "after": NATURAL,
        "components": COUNT,
        "features": COUNT,
        "length": POSITIVE,
        "ridge": POSITIVE,
        "weight_clip": POSITIVE,
        "output_regularisation": NOT_NEGATIVE,
    },
    "value_gradient": {
        "beta": (1e30, -1e30, *NUMBERS),
        "guess": SWITCH,
        "steps": (*COUNT, 51),
        "states": (*COUNT, 52),
        "weight_clip": POSITIVE_OR_INF,
        "output_regularisation": NOT_NEGATIVE,
    },
}
FIT = {"steps": COUNT, "batch": COUNT, "learning_rate": POSITIVE, "decay": (-0.1, 1.1, *NUMBERS)}
BLOCKS = {"block_out_channels": WIDTHS, "layers_per_block": COUNT, "norm_num_groups": (*COUNT, 7)}
WRONG_OF_PRETRAINING = {
    "seed": SEED,
    "max_tokens": (2, *COUNT),
    "vocab_size": (513, *COUNT),
    **{f"vae.{name}": wrong for name, wrong in (FIT | BLOCKS | {"latent_channels": COUNT}).items()},
    **{f"unet.{name}": wrong for name, wrong in (FIT | BLOCKS | {"attention_head_dim": (*COUNT, 7)}).items()},
    "text_encoder.hidden_size": (*COUNT, 30),
    "text_encoder.intermediate_size": COUNT,
    "text_encoder.num_hidden_layers": COUNT,
    "text_encoder.num_attention_heads": (*COUNT, 7),
}
SAMPLING = {
    "workdir": PATH,
    "model": (3,),
    "model_dtype": ("float16", 32),
    "sampler": ("ddim",),
    "steps": (*COUNT, 1000),
    "guidance": (-1.0, 101.0, *NUMBERS),
    "seed": SEED,
    "batch": NATURAL,
    "num": COUNT,
}
WRONG_FLAGS = {
    "train": {
        "config": TEXT,
        "workdir": PATH,
        "profile": SWITCH,
        "distributed": SWITCH,
        "coordinator": (3,),
        "num_processes": COUNT,
        "process_id": NATURAL,
    },
    "sample": SAMPLING
    | {
        "lora": ("file", (3,), ("",)),
        "lora_scale": ((), (101.0,), (1.0, math.nan), 0.5),
        **dict.fromkeys(("lora_from_step", "lora_until_step"), COUNT),
        "negative": (3,),
        **dict.fromkeys(("height", "width"), (7, 4097, 64.5, *NUMBERS)),
        "each": PATH,
        "prompt": ("a cat", (3,)),
        "eta": (-0.1, 1.1, *NUMBERS),
        "out": ("", *PATH),
    },
    "evaluate": SAMPLING
    | {
        "lora": ("file", (3,), ("",)),
        "lora_scale": ((), (101.0,), (1.0, math.nan), 0.5),
        "prompts": (3,),
        "num_prompts": NATURAL,
        "base_num": NATURAL,
        "reward": ("beauty", 1),
        "beta": (1e30, *NUMBERS),
        "out": PATH,
    },
    "plan": {
        "config": TEXT,
        "topology": TEXT,
        "phases": ((), ("sampling",), "rollout"),
        "fit": SWITCH,
        "full_effort": SWITCH,
    },
    "pretrain": {"config": TEXT, "workdir": PATH},
    "mixture2d": {
        "out": ("", *PATH),
        "updates": COUNT,
        "base": ("velocity", ""),
        "only": (3,),
        "seed": SEED,
    },
    "bench2d": {
        "out": ("", *PATH),
        "only": (3,),
        "settings": (("mild", "wild"), (), "mild"),
        "seeds": ((-1,), (), 0),
        "rates": ((), (0.0,), (1e-3, math.nan), 1e-3),
        "budget": POSITIVE,
    },
    "bank_fit": {
        "out": ("", *PATH),
        **dict.fromkeys(("model", "prompts"), TEXT),
        "reward": ("beauty", 1),
        "beta": (1e30, *NUMBERS),
        "guidance": (-1.0, 101.0, *NUMBERS),
        "num_steps": (9, 1000, *COUNT),
        **dict.fromkeys(("paths", "held_out"), (1, *COUNT)),
        **dict.fromkeys(("together", "rank", "updates", "batch"), COUNT),
        "clip_quantile": (0.0, 1.1, *NUMBERS),
        "layers": ((), ("linear",), "all"),
        "rates": ((), (0.0,), (1e-3, math.nan), 1e-3),
        "seed": SEED,
    },
    "fit": {"emoji": PATH},
    "benchmarks": {"benchmark": ((), ("speed",), "unet")},
    "accelerator": {
        "out": ("", *PATH),
        "seconds": POSITIVE,
        "only": (("speed",), ("environment", "Update"), "unet"),
        "small": SWITCH,
        "jobs": NATURAL,
    },
}
