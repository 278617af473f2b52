"""Captions of the emoji drawings: the thing, its keywords, its colour and its style, in several phrasings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from latentdiff.evaluate.compose.words import COLORS, STYLE_PHRASES, with_article, without_article

_WRITING = re.compile(
    r"""["\u201c\u201d]|\b(texts?|words?|letters?|letterings?|says|saying|reads|reading|writes|writing|written|titled?"""
    r"""|fonts?|logos?|signs?|labels?|labelled|labeled|numbers?|digits?|flags?|maps?|clocks?|calendars?|newspapers?)\b""",
    re.IGNORECASE,
)


def colored(thing: str, color: str) -> str:
    """Put a colour word before the thing: "a fox", "blue" -> "a blue fox"; a colour already in the name gives way."""
    words = [word for word in without_article(thing).split() if word not in COLORS]
    name = " ".join([color, *words])
    return with_article(name) if thing != without_article(thing) else name


def phrase(thing: str, style: str, tags: Sequence[str] = (), color: str | None = None) -> list[str]:
    """Return the phrasings of one drawing, the plainest first.

    Args:
        thing: the noun phrase with its article, "a fox".
        style: a key of `STYLE_PHRASES`.
        tags: keywords, of which two that are not in the name are used, other ones in each style, so that all of them
            are heard ("a hot beverage, cafe, coffee" here, "tea" there).
        color: the drawing's dominant colour, when it has one.
    """
    styled = STYLE_PHRASES[style]
    captions = [f"{thing}, {styled}", thing, f"a drawing of {thing}"]
    if (name := without_article(thing)) != thing:
        captions.append(name)
    if color:
        captions.append(colored(thing, color))
        captions.append(f"{colored(thing, color)}, {styled}")
    keywords = [tag for tag in tags if tag not in thing.split()]
    if keywords:
        first = 2 * list(STYLE_PHRASES).index(style) % len(keywords)
        pair = ", ".join((keywords * 2)[first : first + min(2, len(keywords))])
        captions += [f"{thing}, {pair}, {styled}", pair]
    return captions


def swap_sides(caption: str) -> str:
    """Exchange the words left and right (also leftward, rightwards, ...), as a mirrored picture demands."""

    def swap(match: re.Match[str]) -> str:
        word, other = match.group(), {"left": "right", "right": "left"}[match.group().lower()]
        return other if word.islower() else other.upper() if word.isupper() else other.capitalize()

    return re.sub(r"\b(left|right)(?!over|eous|ful|ly)", swap, caption, flags=re.IGNORECASE)


def may_mirror(captions: Sequence[str]) -> bool:
    """Say whether a picture may be mirrored, as far as its captions tell: not where they speak of writing.

    Letters, numbers, flags, maps and clocks read from left to right; so does what stands in quotation marks.
    """
    return not any(_WRITING.search(caption) for caption in captions)
