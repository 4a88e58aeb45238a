"""Prose of a kind, as much as a test wants."""

import random

COMMON = (
    "the of and to in that is was for with as by on not be at which or from this have but one had were "
    "all their she there would been if more when will no out so said what up its about into than them can "
    "only other time new some could these two may first then do any like my now over such our man me even "
    "most made after also did many before must through years where much your way well down should because "
    "each just those people how too little state good very make world still see own work long here "
    "between both life being under never "
)
WORDS = COMMON.split()


def story(seed: int, sentences: int = 12) -> str:
    """Prose of a kind: sentences of common words, a few to a line."""
    draw = random.Random(seed)
    said = [" ".join(draw.choices(WORDS, k=draw.randint(8, 16))).capitalize() + "." for _ in range(sentences)]
    return "\n\n".join(" ".join(said[i:i + 4]) for i in range(0, sentences, 4))
