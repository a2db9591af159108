"""Tag schemes of named entities: what is a tag, which scheme the data has, and how it reads as IOB2.

IOB1 (Ramshaw & Marcus 1995; CoNLL-2003 as published) writes B- only where an entity follows one of its own type; IOB2
begins every entity with B-; BIOES also marks its end (E-) and entities of one word (S-). BILOU (L, U), BMES (M) and
BMEWO (M, W) are BIOES in other letters, and are read as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from heedful import UserError
from sources.conll import TAG

PREFIXES = {"IOB1": "BI", "IOB2": "BI", "BIOES": "BIESLUMW"}
"""The letters that each scheme allows."""
SAME_LETTER = str.maketrans("LUMW", "ESIS")

Tags = Sequence[str]


def check_tags(sentences: Sequence[Tags], *, where: str, scheme: str | None = None) -> None:
    """Refuse what is not ``O`` or ``PREFIX-TYPE``, or has a prefix that the scheme lacks.

    Raises:
        UserError: Naming the first such row and tag.
    """
    letters = PREFIXES["BIOES" if scheme is None else scheme]
    known = {tag for tags in sentences for tag in tags}
    faulty = {tag for tag in known if not TAG.fullmatch(tag) or tag[0] not in "O" + letters}
    if not faulty:
        return
    row, position = next((i, j) for i, tags in enumerate(sentences) for j, tag in enumerate(tags) if tag in faulty)
    raise UserError(
        f"tag {sentences[row][position]!r}",
        where=f"{where}, row {row}, word {position}",
        expected=f"O or PREFIX-TYPE, the prefix one of {', '.join(letters)}" + (f" ({scheme})" if scheme else ""),
        fix="correct the tag" + (", or set ner.scheme" if scheme else ""),
    )


def detect_scheme(sentences: Sequence[Tags], *, where: str) -> tuple[str, str]:
    """Tell the scheme from valid tags, and say from what.

    Any of E, S, L, U, M, W makes it BIOES. Otherwise it is IOB2 if no I- begins an entity: this holds for data that
    fit both, which have no entities at all. It is IOB1 if B- occurs only after its own type. Data that are neither are
    read as IOB1 as well: each B-, and each I- that continues nothing, begins an entity, as conlleval has it. Reading
    valid IOB2 so would change nothing.

    Returns:
        The scheme, and a sentence for the user.

    Raises:
        UserError: Entities end in E- but none begins with B- (IOE1, IOE2).
    """
    letters = {tag[0] for tags in sentences for tag in tags} - {"O"}
    if letters - set("BI"):
        if not letters & set("BSUW"):
            raise UserError(
                f"prefixes {', '.join(sorted(letters))}: entities that end in E- but never begin with B- (IOE)",
                where=where,
                expected=f"one of {', '.join(PREFIXES)}",
                fix="convert the tags",
            )
        return "BIOES", f"tags with the prefixes {', '.join(sorted(letters))}: BIOES"
    openings = [
        (before == tag[2:], tag[0])
        for tags in sentences
        for before, tag in zip(_types_before(tags), tags, strict=True)
        if tag != "O"
    ]
    i_opens = openings.count((False, "I"))
    b_opens = openings.count((False, "B"))
    if not i_opens:
        return "IOB2", "every entity begins with B-: IOB2"
    if not b_opens:
        return "IOB1", "B- only between entities of one type: IOB1"
    return "IOB1", (
        f"neither IOB1 nor IOB2: {b_opens} entities begin with B-, {i_opens} with I-; each is read as an entity, "
        "as conlleval does"
    )


def to_iob2(tags: Tags, scheme: str) -> list[str]:
    """Write the same entities in IOB2; IOB2 itself is left as it is, faults included."""
    if scheme == "IOB2":
        return list(tags)
    converted, before = [], "O"
    for tag in tags:
        converted.append(tag if tag == "O" else f"{'B' if _begins(before, tag) else 'I'}-{tag[2:]}")
        before = tag
    return converted


def opens_with_inside(tags: Tags) -> int | None:
    """Position of the first I- that continues no entity, which is a fault in IOB2."""
    pairs = zip(_types_before(tags), tags, strict=True)
    return next((i for i, (before, tag) in enumerate(pairs) if tag[0] == "I" and before != tag[2:]), None)


def _types_before(tags: Tags) -> Iterator[str]:
    """The entity type of the word before each word, empty for none."""
    yield from ("", *(tag[2:] for tag in tags))[: len(tags)]


def _begins(before: str, tag: str) -> bool:
    """Whether the tag begins an entity, by the rules of conlleval, in every scheme."""
    prefix, last = tag[0].translate(SAME_LETTER), before[0].translate(SAME_LETTER)
    return prefix in "BS" or last in "OES" or before[2:] != tag[2:]
