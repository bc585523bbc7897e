"""The captions of a drawing, from its CLDR name to its kind, with and without an article."""

# The CLDR subgroups that the base model learns, each with the captions that all of its drawings share.
SUBGROUPS: dict[str, tuple[str, ...]] = {
    "face-smiling": ("a smiling face", "a face"),
    "face-affection": ("an affectionate face", "a face"),
    "face-tongue": ("a face with tongue", "a face"),
    "face-hand": ("a face with hand", "a face"),
    "face-neutral-skeptical": ("a neutral face", "a face"),
    "face-sleepy": ("a sleepy face", "a face"),
    "face-unwell": ("an unwell face", "a face"),
    "face-hat": ("a face with hat", "a face"),
    "face-glasses": ("a face with glasses", "a face"),
    "face-concerned": ("a concerned face", "a face"),
    "face-negative": ("a negative face", "a face"),
    "face-costume": ("a creature",),
    "cat-face": ("a cat face",),
    "monkey-face": ("a monkey face",),
    "animal-mammal": ("a mammal", "an animal"),
    "animal-bird": ("a bird", "an animal"),
    "animal-amphibian": ("an amphibian", "an animal"),
    "animal-reptile": ("a reptile", "an animal"),
    "animal-marine": ("a sea animal", "an animal"),
    "animal-bug": ("a bug", "an animal"),
    "food-fruit": ("a fruit", "a food"),
    "food-vegetable": ("a vegetable", "a food"),
    "food-prepared": ("a dish", "a food"),
    "food-asian": ("an asian dish", "a food"),
    "food-sweet": ("a sweet", "a food"),
    "drink": ("a drink",),
}
# Emoji that are in CLDR's animal subgroups but are not animals.
NO_ANIMALS = frozenset(("paw prints", "pig nose", "feather", "wing", "spiral shell", "coral", "spider web", "microbe"))
# The everyday word for an animal with another CLDR name ("X face" is also called X).
_EVERYDAY = {
    "black bird": "bird",
    "black cat": "cat",
    "blowfish": "fish",
    "chipmunk": "squirrel",
    "ewe": "sheep",
    "guide dog": "dog",
    "honeybee": "bee",
    "lady beetle": "beetle",
    "polar bear": "bear",
    "poodle": "dog",
    "ram": "sheep",
    "rooster": "chicken",
    "service dog": "dog",
    "spouting whale": "whale",
    "tropical fish": "fish",
    "two-hump camel": "camel",
}
# fmt: off
_UNCOUNTED = frozenset((
    "bacon", "baguette bread", "bread", "broccoli", "bubble tea", "butter", "candy", "canned food",
    "cooked rice", "cooking", "curry rice", "custard", "flatbread", "garlic", "ginger root", "ice",
    "ice cream", "mate", "meat on bone", "oden", "popcorn", "pouring liquid", "roasted sweet potato",
    "rolling on the floor laughing", "sake", "salt", "shaved ice", "soft ice cream", "spaghetti",
    "star-struck", "sushi",
))
# fmt: on


def captions(name: str, subgroup: str) -> tuple[str, ...]:
    """The captions of the drawings of one emoji, the most specific first, without duplicates. None names the vendor.

    `name` and `subgroup` are CLDR's. For example, ("tiger face", "animal-mammal") gives "tiger face", "a tiger face",
    "tiger", "a tiger", "a mammal", "an animal".
    """
    levels = [name, _with_article(name, subgroup)]
    short = name
    if (subgroup.startswith("face-") and not name.startswith("face ")) or subgroup == "cat-face":
        short = name.split(" with ")[0]
    elif subgroup.startswith("animal-"):
        short = _EVERYDAY.get(name, name.removesuffix(" face"))
    levels += [short, _with_article(short, subgroup), *SUBGROUPS.get(subgroup, ())]
    return tuple(dict.fromkeys(levels))


def _with_article(name: str, subgroup: str) -> str:
    plural = subgroup.startswith(("food-", "drink")) and name.endswith("s") and not name.endswith("ss")
    if name in _UNCOUNTED or plural:
        return name
    vowel = name[0].lower() in "aeiou" and not name.lower().startswith(("uni", "ewe"))
    return f"{'an' if vowel else 'a'} {name}"
