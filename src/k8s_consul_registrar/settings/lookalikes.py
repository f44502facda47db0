"""Names that resemble a setting and are none: misspelt, abbreviated, or with a word too few or too many.

There are two measures: the edit distance of the names without underscores, for misspelling; and for names that
begin with the same word, the share of letters in words that both have.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from k8s_consul_registrar.settings.field import SERVICE_LINK

# Kubernetes sets these for each Service, whatever it is called; the value of `<SERVICE>_PORT` is a SERVICE_LINK.
_SERVICE_NAME = re.compile(r".+_SERVICE_(HOST|PORT(_.+)?)|.+_PORT_[0-9]+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?")
# Variables of Kubernetes manifests, of Consul and of other programs that are close to a setting.
_OTHERS = re.compile(
    "MODE|(POD|NODE|SERVICE)_NAME|SERVICE_ID|SCRAPE_INTERVAL|NODE_PATH|(HTTP|PROXY)_PORT"
    "|CONSUL_(HTTP_AUTH|DATACENTER|(GRPC_)?CAPATH|GRPC_(ADDR|CACERT))"
)
_MOST_WRONG = 2  # letters of a misspelt name
_LETTERS_FOR_ONE = 6  # letters of a name for each that may be wrong
_SHORTEST_CUT = 4  # letters of a word that was cut off
_LEAST_SHARE = 0.6
_CLOSE = 0.1  # names this much less alike than the nearest are named too
_MOST = 2


def lookalikes(environment: Mapping[str, str], known: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the variables that resemble a `known` name and are none, each with the nearest names."""
    found = {}
    for name, value in environment.items():
        is_of_a_service = _SERVICE_NAME.fullmatch(name) or SERVICE_LINK.fullmatch(value)
        if is_of_a_service or name in known or _OTHERS.fullmatch(name):
            continue
        if near := nearest(name, known):
            found[name] = near
    return found


def nearest(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """Return at most two known names that another name resembles, the nearest first.

    A wrong first letter is not forgiven: it is rare, and most variables have nothing to do with settings.
    """
    alike = {
        one: max(_spelling(name, one), _shared_words(name.split("_"), one.split("_")))
        for one in known
        if name[:1] == one[0]
    }
    least = max(max(alike.values(), default=0.0) - _CLOSE, 0.0)
    near = sorted((one for one in alike if alike[one] > least), key=lambda one: (-alike[one], one))
    return tuple(near[:_MOST])


def _spelling(name: str, known: str) -> float:
    """Return how alike the letters of two names are, 0 if too many are wrong for a misspelling."""
    name, known = name.replace("_", ""), known.replace("_", "")
    limit = min(_MOST_WRONG, len(known) // _LETTERS_FOR_ONE)
    if not limit or abs(len(name) - len(known)) > limit or len(set(name) ^ set(known)) > 2 * limit:
        return 0.0
    distance = _distance(known, name)
    return 1 - distance / len(known) if distance <= limit else 0.0


def _shared_words(words: Sequence[str], known: Sequence[str]) -> float:
    """Return the share of letters in words that both names have.

    It is 0 if it is small, if the first words differ, and if each name has words that the other lacks.
    """
    if words[0] != known[0] or min(len(words), len(known)) < 2:
        return 0.0
    left = list(known)
    matched = extra = 0
    for word in words:
        same = next((one for one in left if _is_same_word(word, one)), None)
        if same is None:
            extra += 1
        else:
            left.remove(same)
            matched += min(len(word), len(same))
    share = matched / max(sum(map(len, words)), sum(map(len, known)))
    return share if share >= _LEAST_SHARE and not (extra and left) else 0.0


def _is_same_word(word: str, known: str) -> bool:
    """Return True for the same word, cut off or with one letter wrong."""
    if word == known:
        return True
    shorter, longer = sorted((word, known), key=len)
    return len(shorter) >= _SHORTEST_CUT and (longer.startswith(shorter) or _distance(word, known) == 1)


def _distance(one: str, other: str) -> int:
    """Return how many letters to insert, delete, replace or swap with their neighbour turn one into the other."""
    last: list[int] = []
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        last, before, row = before, row, [i]
        for j, theirs in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != theirs))
            if i > 1 and j > 1 and letter == other[j - 2] and theirs == one[i - 2]:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
