"""When two texts count as the same: what the audit looks for, and what keeps the splits of the data sets apart.

And how things are said in words: how many there are, which, what went wrong.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable
from functools import cache


def normalize(text: str) -> str:
    """Lower case, NFKC, no punctuation, single blanks; a text of punctuation only stays what it is."""
    plain = unicodedata.normalize("NFKC", text).lower()
    return " ".join(_punctuation().sub(" ", plain).split()) or " ".join(plain.split())


def counted(number: int | str, plural: str) -> str:
    """``2 rows``, ``1 row``, ``1 entity``."""
    one = re.sub("(?<=ss)es$|(ie)?s$", lambda end: "y" if end[1] else "", plural)
    return f"{number} {one if str(number) == '1' else plural}"


def first_few(names: Iterable[object]) -> str:
    """``a, b, c``, and after the eighth ``...``."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def first_line(error: Exception) -> str:
    """What an error of another library says, with its type where that alone would be no words."""
    said = " ".join(str(error).split(":\n")).strip().splitlines()[:1]
    in_words = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return said[0] if said and in_words else ": ".join([type(error).__name__, *said])


@cache
def _punctuation() -> re.Pattern[str]:
    """Unicode's categories P*; ``[^\\w\\s]`` would also take the vowel signs of Indic scripts."""
    codes = (chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)).startswith("P"))
    return re.compile("[" + "".join(map(re.escape, codes)) + "]+")
