"""The common settings of the paper's experiments on Stable Diffusion 1.5 (arXiv 2412.07775, appendix).

This config is not an experiment. `hps.py`, `aesthetic.py` and `image_reward.py` add a reward, its prompts, β and λ.
Each of them has two cheaper variants:

- `--config=hps:forward_only`: no correction network g_φ and no reverse term (w_B = 0), so the credit is the guess G
  alone. An update costs about half as much.
- `--config=hps:fast`: in addition, SDE-DPM-Solver++ in 20 steps instead of DDPM in 50, with 8 + 1 transitions per
  trajectory.
"""

import math

from ml_collections import ConfigDict

from nabla_gfn_jax.errors import UserError

VARIANTS = ("", "forward_only", "fast")


def get_config(variant: str = "") -> ConfigDict:
    """All fields of a run. `reward` and `prompts` are "" here, and β and λ are 0."""
    if variant not in VARIANTS:
        raise UserError(f"there is no variant {variant!r}; use none, or one of {', '.join(VARIANTS[1:])}")
    c = ConfigDict()
    c.seed = 0  # the paper has three seeds
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.model_dtype = "bfloat16"
    c.carry_change = False  # True: precise ε_θ − ε_#, but both networks' activations in memory (docs/performance.md)
    c.reward = ""
    c.prompts = ""

    c.sampling = ConfigDict()
    c.sampling.sampler = "ddpm"
    c.sampling.num_steps = 50
    c.sampling.guidance = 5.0
    c.sampling.lora_until_step = None  # the last step with the LoRA; None: the last step

    c.algorithm = ConfigDict()
    c.algorithm.name = "residual_nabla_db"
    c.algorithm.beta = 0.0
    c.algorithm.output_regularisation = 0.0
    c.algorithm.prior_strength = 1.0
    c.algorithm.credit = "lookahead"
    c.algorithm.gamma = "alpha_bar"
    c.algorithm.variance_weighted = False
    c.algorithm.credit_clip = math.inf
    c.algorithm.transition_fraction = 0.1
    c.algorithm.uneven_bins = False

    c.lora = ConfigDict()
    c.lora.rank = 8
    c.lora.layers = "attention"
    c.lora.start_from = ""

    c.correction = ConfigDict()
    c.correction.block_out_channels = (64, 128, 256, 256)
    c.correction.layers_per_block = 1
    c.correction.attention_head_dim = 8
    c.correction.norm_num_groups = 32

    c.training = _training()
    c.logging = _logging()
    c.evaluation = _evaluation()
    _make_cheaper(c, variant)
    return c


def _make_cheaper(c: ConfigDict, variant: str) -> None:
    if variant in ("forward_only", "fast"):
        c.algorithm.credit = "guess"
    if variant == "fast":
        c.sampling.sampler = "sde_dpm_solver"
        c.sampling.num_steps = 20
        c.algorithm.transition_fraction = 0.4
        c.algorithm.uneven_bins = True


def _training() -> ConfigDict:
    c = ConfigDict()
    c.num_epochs = 200  # one update each
    c.trajectories = 64
    c.micro_batches = 4
    c.updates_per_epoch = 1
    c.learning_rate = 1e-3
    c.decline = "constant"  # of the learning rate; or "cosine", "linear"
    c.adam_epsilon = 1e-8
    c.average = 0.0  # decay of a running mean of the LoRA, which is saved instead of it; 0: off
    c.weight_decay_lora = 1e-4
    c.weight_decay_correction = 1e-2
    c.remat = True  # for the gradient, keep only the input of each block
    c.images_at_once = 2  # most images decoded and scored together on a device
    c.clip = 1.0
    return c


def _logging() -> ConfigDict:
    c = ConfigDict()
    c.samples_every = 20
    c.checkpoint_every = 10
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
