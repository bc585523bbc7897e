"""Residual ∇-DB on the emoji model that ships with the package, towards faces that look more positive.

    python -m nabla_gfn_jax.train --config=configs/emoji.py

Hardware: 2 CPU cores with AVX-512, 7.7 minutes (462 s), peak 3.6 GB. The first updates come after 58 s if everything is
compiled, and after 28 s with a warm cache. Without AVX-512 (EPYC, 2.4 GHz), an epoch takes 27 s instead of 10.
Expected result: the mean log R rises from .22 ± .01 to .41-.45 in seeds 0 to 3, and the faces still differ
(docs/results.md). The loss stays at about .01, because the spread of the credit dominates it.

Differences from the paper's settings (`paper.py`), with reasons:

- `credit = "adjoint"`: in two dimensions it comes close to the exact target, where the lookahead stops short. It has no
  correction network to train (docs/exact_target.md).
- `credit_clip = 0.2`: the adjoint has heavy tails. Because each transition is clipped, the whole gradient needs no
  clip, so `clip = 1e6`.
- `beta = 80`: the largest value tried. Earlier runs at 10 and 40 reached less (.26 and .33 at best) but had other
  clips, rates and lengths, so this is not a controlled comparison. Because of the clip and the length of 40 epochs, the
  run stops short of β = 80: it reaches the reward of the base model tilted with an exponent of 7 to 8. The run does not
  sample from that tilted model, however: it spends seven times the nats (docs/results.md).
- `updates_per_epoch = 4`: sampling is two thirds of the cost, so each epoch's trajectories are used four times.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """All fields of a run; override a field with --config.FIELD=VALUE."""
    c = ConfigDict()
    c.seed = 0
    c.model = "emoji"  # a shipped model, a diffusers folder, a file of weights, or OWNER/NAME on the hub
    c.model_dtype = "float32"
    c.carry_change = False  # for bfloat16, see docs/performance.md
    c.reward = "valence"
    c.prompts = "a_face"

    c.sampling = ConfigDict()
    c.sampling.sampler = "ddpm"
    c.sampling.num_steps = 50
    c.sampling.guidance = 2.0
    c.sampling.lora_until_step = None  # the last step with the LoRA; None: the last step

    c.algorithm = ConfigDict()
    c.algorithm.name = "residual_nabla_db"
    c.algorithm.beta = 80.0
    c.algorithm.output_regularisation = 0.0
    c.algorithm.prior_strength = 1.0
    c.algorithm.credit = "adjoint"
    c.algorithm.gamma = "alpha_bar"
    c.algorithm.variance_weighted = True
    c.algorithm.credit_clip = 0.2
    c.algorithm.transition_fraction = 0.1
    c.algorithm.uneven_bins = False

    c.lora = ConfigDict()
    c.lora.rank = 8
    c.lora.layers = "attention"  # or all, or up_blocks
    c.lora.start_from = ""

    c.correction = ConfigDict()
    c.correction.block_out_channels = (32, 64)
    c.correction.layers_per_block = 1
    c.correction.attention_head_dim = 2
    c.correction.norm_num_groups = 8

    c.training = ConfigDict()
    c.training.num_epochs = 40
    c.training.trajectories = 32
    c.training.micro_batches = 2
    c.training.updates_per_epoch = 4
    c.training.learning_rate = 1e-3
    c.training.decline = "constant"  # of the learning rate; or "cosine", "linear"
    c.training.adam_epsilon = 1e-8
    c.training.average = 0.0  # decay of a running mean of the LoRA, which is saved instead of it; 0: off
    c.training.weight_decay_lora = 1e-4
    c.training.weight_decay_correction = 1e-2
    c.training.remat = False
    c.training.images_at_once = 0  # most images decoded and scored together on a device; 0: a whole micro-batch
    c.training.clip = 1e6

    c.logging = _logging()
    c.evaluation = _evaluation()
    return c


def _logging() -> ConfigDict:
    c = ConfigDict()
    c.samples_every = 20
    c.checkpoint_every = 5
    c.keep_checkpoints = 2  # how many of the newest
    c.keep_every = 0  # epochs between checkpoints that are kept for ever; 0: none
    c.keep_loras = 0  # how many of the newest LoRA files to keep; 0: all
    c.tensorboard = False
    c.wandb = False
    c.trackio = False
    return c


def _evaluation() -> ConfigDict:
    c = ConfigDict()
    c.images = 0  # images of each held-out prompt to measure the policy in nats (docs/nats.md); 0: none
    c.every_updates = 0  # interval between measurements; 0: every saved LoRA
    c.cross_rewards = ()  # other rewards to measure, such as ("jpeg",)
    c.metrics = ()  # metrics that need a network, such as ("clip",)
    c.best = ""  # figure by which lora/best is chosen; none: gap, or log_reward without a β
    c.stop_on_alarm = False
    return c
