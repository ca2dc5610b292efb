"""People's names in a story, by a simple rule."""

import re
from collections import Counter

_NOT_NAMES = frozenset(
    """I God Lord Lady Sir King Queen Prince Princess Mr Mrs Miss Dr Doctor Captain Mayor Major General Colonel Judge
    Father Mother Brother Sister Uncle Aunt Grandmother Grandfather Granny Grandma Grandpa Mama Papa Master
    Mistress Professor Saint St Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March
    April May June July August September October November December Christmas Easter English French German Latin
    Keeper North South East West Saturdays Sundays""".split()
)
_MID_SENTENCE = re.compile(r"(?<=[a-z,;] )([A-Z][a-z]+)\b")
_THING = re.compile(r"\b(?:[Tt]he|[Aa]n?|[Oo]f|[Ii]n|[Oo]n|[Aa]t|[Ff]rom|[Ii]nto) ([A-Z][a-z]+)\b")
_COMPOUND = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+ ([A-Z][a-z]+)\b")


def names_of(text: str) -> list[str]:
    """The names of persons in `text`, most frequent first (ties by first place).

    The rule: capitalised words that stand in the middle of a sentence (after a lower-case letter, comma or
    semicolon), at least twice more than they follow "the", "a", "of", "in", "on", "at", "from", "into" (places and
    things do) or another capitalised word that is no title (second words of compounds), that the text never has in
    lower case, and that are not in a small stop list (titles, days, months, peoples). A rule, not a linguist.
    """
    found = Counter(_MID_SENTENCE.findall(text))
    for match in [*_THING.finditer(text), *_COMPOUND.finditer(text)]:
        if match.group(0).split()[0] not in _NOT_NAMES:
            found[match.group(1)] -= 1
    lower = set(re.findall(r"\b[a-z]+\b", text))
    return [
        name
        for name, count in found.most_common()
        if count > 1 and name not in _NOT_NAMES and name.lower() not in lower
    ]
