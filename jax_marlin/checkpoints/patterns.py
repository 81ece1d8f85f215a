"""Regular expressions out of a config file, matched to module names without running away.

Python's `re` backtracks: `(a+)+$` takes 2**n steps on a name of n letters, and a config is a
stranger's text. So a repeated group that itself holds a repetition or a choice is refused. What is
left has a bound: r repetitions in a row divide a name of n letters in at most (n + r over r) ways,
and each choice multiplies that by its number of alternatives. A match that might take more steps
than any sensible rule does is refused before it begins.
"""

from __future__ import annotations

import functools
import math
import re

_MAX_PATTERN = 1000  # characters
_MAX_STEPS = 10**8  # of one match, about a second; `.*a\.\d+\.b.*` and 60 letters make 40,000
_BOUNDED = 16  # a repetition up to here counts as a choice of numbers
_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_TOKEN = re.compile(
    r"(?P<open>\((?:\?(?:P<\w+>|<?[=!]|[a-zA-Z-]*:|>|P=\w+|\([^)]*\)|[a-zA-Z]+(?=\))))?)"
    r"|(?P<close>\))|(?P<choice>\|)"
    r"|(?P<repeat>[*+?]|\{(?=[\d,])\d*,?\d*\})[?+]?"  # lazy and possessive ones too
)


def check_regex(pattern: str, where: str) -> None:
    """Raises unless `pattern` is a regular expression without repetitions of repetitions.

    Args:
        pattern: as `re.match` takes it.
        where: ends with what it is to the user.

    Raises:
        ValueError: it is none, or may take exponential time.

    >>> check_regex(r".*mlp\\.experts\\.\\d+\\.(gate|up)_proj$", "the rule")
    """
    if len(pattern) > _MAX_PATTERN:
        raise ValueError(
            f"{where} has {len(pattern)} characters, expected at most {_MAX_PATTERN}; write "
            f"several shorter rules"
        )
    try:
        flags = re.compile(pattern).flags
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where} is not a regular expression: {error}; correct it") from error
    if flags & re.VERBOSE or re.search(r"\(\?(#|[a-zA-Z]*x)", pattern):
        raise ValueError(f"{where} has comments or the flag x, expected none; take them out")
    if _shape(pattern)[0]:
        raise ValueError(
            f"{where} repeats a group that holds a repetition or a choice, which may take for "
            f"ever; write it without one of the two, as [ab] for (a|b)"
        )


def matches(pattern: str, module: str) -> bool:
    """Whether `pattern`, which `check_regex` let pass, matches from the left end of the name.

    Raises:
        ValueError: the match might take minutes.

    >>> matches(r".*\\.(gate|up)", "layers.0.up_proj"), matches("up", "layers.0.up_proj")
    (True, False)
    """
    _, repetitions, choices = _shape(pattern)
    steps = math.comb(len(module) + repetitions, repetitions) * choices
    if steps > _MAX_STEPS:
        raise ValueError(
            f"open_checkpoint: the rule {pattern!r} may take {steps:.0e} steps on the module "
            f"{module[:80]!r} of {len(module)} characters, expected at most {_MAX_STEPS:.0e}; "
            f"write it with fewer repetitions"
        )
    return re.match(pattern, module) is not None


@functools.lru_cache(maxsize=1000)
def _shape(pattern: str) -> tuple[bool, int, int]:
    """Whether a repeated group holds a repetition or a choice; repetitions; ways to choose."""
    plain = _ESCAPE_OR_CLASS.sub("a", pattern)
    varies = [False]  # of each open group and of the whole: holds a repetition or a choice
    inside, group_end = False, -1  # the same of the group that closed last, and where it did
    nested, repetitions, choices = False, 0, 1
    for token in _TOKEN.finditer(plain):
        if token["open"]:
            varies.append(False)
            continue
        if token["close"]:
            inside, group_end = varies.pop(), token.end()
            varies[-1] |= inside
            continue
        varies[-1] = True
        if token["choice"]:
            choices += choices  # at least one more alternative; doubled, as groups multiply
            continue
        low, high = _bounds(token["repeat"])
        if high > 1 and inside and token.start() == group_end:
            nested = True
        if high > _BOUNDED:
            repetitions += 1
        else:
            choices *= int(high) - low + 1
    return nested, repetitions, choices


def _bounds(repeat: str) -> tuple[int, float]:
    if repeat in "*+?":
        return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[repeat]
    low, comma, high = repeat[1:-1].partition(",")
    if not comma:
        return int(low), int(low)
    return int(low or 0), int(high) if high else math.inf
