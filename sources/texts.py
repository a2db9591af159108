"""When two texts count as the same: what the audit looks for, and what keeps the splits of the data sets apart.

And how many there are of something, in words.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache


def normalize(text: str) -> str:
    """Lower case, NFKC, no punctuation, single blanks; a text of punctuation only stays what it is."""
    plain = unicodedata.normalize("NFKC", text).lower()
    return " ".join(_punctuation().sub(" ", plain).split()) or " ".join(plain.split())


def counted(number: int | str, plural: str) -> str:
    """``2 rows``, ``1 row``, ``1 entity``."""
    one = re.sub("(?<=ss)es$|(ie)?s$", lambda end: "y" if end[1] else "", plural)
    return f"{number} {one if str(number) == '1' else plural}"


@cache
def _punctuation() -> re.Pattern[str]:
    """Unicode's categories P*; ``[^\\w\\s]`` would also take the vowel signs of Indic scripts."""
    codes = (chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)).startswith("P"))
    return re.compile("[" + "".join(map(re.escape, codes)) + "]+")
