"""Good documents and bad ones whose fault is known."""

import base64
import json
import random
from pathlib import Path

from tests.corpus.stories import story


def prose(text: str) -> str:
    """Paragraphs without the line breaks inside them."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n")) + "\n"


RIVER = prose("""
The river rises in the hills above the village, and for most of its length it is narrow and slow. After long
rain it leaves its bed and covers the meadows, where cows graze in summer. People here have built their houses
on the higher bank, because they remember what the water did to their parents. In the spring of that year the
bridge was carried away, and nobody could reach the mill for three weeks.

The miller did not complain. He had flour enough for himself, and he liked the silence. When the new bridge was
finished, he was the last to cross it, and he said that it was too wide for such a small place. Children still
tell that story when they want to annoy a builder. It is true that the bridge is wide, but two carts can pass on
it.""")
MATHS = prose("""
Let f be a function on the closed interval [a, b] that is continuous there and differentiable inside. Then there
is a point c with f'(c) = (f(b) - f(a)) / (b - a). To see this, take away from f the line through the two ends:
g(x) = f(x) - f(a) - (x - a) (f(b) - f(a)) / (b - a). It is zero at both ends, so that by Rolle's theorem its
derivative is zero at some point c between them, which is what was to be shown. If f' is zero everywhere, the
theorem says that f(b) = f(a) for all a and b: then f is constant.""")
MORE = prose("""
A number is prime if it has exactly two divisors, itself and 1. Suppose there were only finitely many of them,
p_1, ..., p_n, and look at N = p_1 p_2 ... p_n + 1. None of the p_i divides N, since each leaves the remainder
1. But N > 1 has some prime divisor, which is then not among the p_i. So the list was not complete, and there
are infinitely many primes. The proof does not say that N itself is prime: 2 * 3 * 5 * 7 * 11 * 13 + 1 = 59 *
509.""")
CODE = '''"""Greatest common divisors."""


def gcd(a: int, b: int) -> int:
    """The greatest number that divides both, by Euclid."""
    while b:
        a, b = b, a % b
    return abs(a)


def lcm(a: int, b: int) -> int:
    if a == 0 or b == 0:
        return 0
    return abs(a * b) // gcd(a, b)


if __name__ == "__main__":
    for pair in ((12, 18), (7, 5), (0, 3)):
        print(pair, gcd(*pair), lcm(*pair))
'''
GERMAN = prose("""
Der Fluss entspringt in den Bergen oberhalb des Dorfes und ist auf weiten Strecken schmal und langsam. Nach
langem Regen tritt er über seine Ufer und bedeckt die Wiesen, auf denen im Sommer die Kühe weiden. Die Leute
haben ihre Häuser auf dem höheren Ufer gebaut, weil sie noch wissen, was das Wasser ihren Eltern angetan hat. Im
Frühling jenes Jahres wurde die Brücke fortgerissen, und drei Wochen lang kam niemand zur Mühle.""")
MENU = "".join(f"Home | About us | {name} | Contact | Privacy policy | Terms of use | Sign in | Subscribe\n"
               f"Accept cookies\nShare this page\nCopyright {2000 + n} All rights reserved\n"
               for n, name in enumerate(["Rivers", "Bridges", "Mills", "Cows", "Meadows", "Carts"]))
SPAM = "".join(f"BUY CHEAP WATCHES NOW!!! BEST PRICE http://shop{n}.example/deal/{n * 7919} CLICK HERE AND WIN MONEY\n"
               for n in range(12))

#: of the files: what is planted, and how its reason begins; None: it is kept
FILES = {
    "good-code.py": (CODE, None),
    "good-prose.txt": (RIVER, None),
    "prose-copy.txt": (RIVER, "copies: the same text"),
    "prose-near.txt": (RIVER.replace("three weeks", "two weeks"), "copies: nearly the same text"),
    "bad-boilerplate.txt": (MENU, "statistical: "),
    "bad-repeated.txt": ("The mill is closed today and tomorrow, please come again.\n" * 60,
                         "statistical: says the same again and again"),
    "bad-bytes.txt": ("".join(chr(random.Random(1).randrange(1, 0x2fff)) if n % 2 else chr(n % 31 + 1)
                              for n in range(3000)), "statistical: not printable"),
    "bad-letters.txt": ("".join(random.Random(2).choices("abcdefghijklmnopqrstuvwxyz ", k=4000)), "statistical: "),
    "bad-blob.txt": (base64.b64encode(random.Random(3).randbytes(3000)).decode(), "statistical: encoded or random"),
    "bad-german.txt": (GERMAN, "language: de"),
    "bad-spam.txt": (SPAM, "statistical: "),
}


def plant(folder: Path, line_mb: float, stories: int = 20, row_mb: float = 0) -> dict[str, str | None]:
    """Write them, with so many other good stories; what is to become of each, by its id. row_mb: of a row that is
    longer than any source reads (128 MiB), if there is to be one."""
    texts, maths, rows = folder / "texts", folder / "maths", folder / "rows.jsonl"
    texts.mkdir()
    maths.mkdir()
    for name, (text, _) in FILES.items():
        (texts / name).write_text(text, encoding="utf-8")
    (maths / "good-maths.txt").write_text(MATHS, encoding="utf-8")
    (maths / "good-more.txt").write_text(MORE,
                                         encoding="utf-8")
    line = "river and mill " * round(line_mb * 1e6 / 15)
    with open(rows, "w") as file:
        for number in range(stories):
            file.write(json.dumps({"text": story(number)}) + "\n")
        file.write(json.dumps({"text": line}) + "\n")
        file.write(json.dumps({"text": ""}) + "\n")
        if row_mb:
            file.write(json.dumps({"text": "river and mill " * round(row_mb * 1e6 / 15)}) + "\n")
    return {**{name: reason for name, (_, reason) in FILES.items()}, "good-maths.txt": None, "good-more.txt": None,
            **{f"rows.jsonl:{n + 1}": None for n in range(stories)},
            f"rows.jsonl:{stories + 1}": "statistical: a line of a million characters"}


def recipe(folder: Path, judges: str, more: str = "") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"name: planted\nbytes: 1e12\nshard_mb: 0.02\nlanguages: [en]\nsources:\n"
                    "  - {name: texts, source: {type: files, path: texts}}\n"
                    "  - {name: maths, source: {type: files, path: maths, domain: math}}\n"
                    "  - {name: rows, source: {type: files, path: rows.jsonl, bad_rows: skip}}\n"
                    f"judges: {judges}\n{more}")
    return path
