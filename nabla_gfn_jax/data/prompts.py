"""Prompt sets, by name."""

from nabla_gfn_jax.errors import UserError

# The 45 common animals of DDPO (arXiv 2305.13301), which the paper's aesthetic experiments prompt with.
# fmt: off
SIMPLE_ANIMALS = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep",
    "deer", "cow", "goat", "lion", "tiger", "bear", "raccoon", "fox", "wolf",
    "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale", "dolphin", "squirrel",
    "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee",
    "pig", "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo",
)
# fmt: on

# "a face" alone: one prompt with a hundred faces times three vendors behind it, so diversity can be counted.
PROMPT_SETS: dict[str, tuple[str, ...]] = {
    "simple_animals": SIMPLE_ANIMALS,
    "a_face": ("a face",),
}


def prompt_set(name: str) -> tuple[str, ...]:
    """The prompts of a set. Raises `UserError` naming the known sets."""
    if name not in PROMPT_SETS:
        raise UserError(f"prompts = {name!r} is unknown; use one of {sorted(PROMPT_SETS)}")
    return PROMPT_SETS[name]
