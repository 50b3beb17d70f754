"""Split captions into words as the COCO evaluation does: the Stanford tokenizer's rules as one regular expression."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from config import UserError

# Typographic characters that the Stanford tokenizer writes in ASCII (it does turn a pound into "#", a euro into "$").
_PLAIN = {
    **dict.fromkeys("\u2018\u0091", "`"),
    **dict.fromkeys("\u201c\u201d\u0093\u0094\u00ab\u00bb", '"'),
    **dict.fromkeys("\u2013\u2014\u0096\u0097", " -- "),
    **dict.fromkeys("\u20ac\u20a0\u00a4\u0080", " $ "),
    **{"\u2026": "...", "\u00a3": " # ", "\u00a2": " cents ", "\u00ad": ""},
    **{"\u00bc": " 1/4 ", "\u00bd": " 1/2 ", "\u00be": " 3/4 ", "\u2153": " 1/3 ", "\u2154": " 2/3 "},
}
# HTML entities: those that it decodes, those that it takes as letters, and those that it leaves unchanged.
_ENTITIES = {"amp": "&", "lt": " < ", "gt": " > ", "quot": '"', "apos": "'", "nbsp": " "}
_ENTITIES |= dict.fromkeys(("mdash", "ndash", "md"), " -- ")
_ENTITY = re.compile("&(AMP|MDASH|amp|quot|apos|nbsp|[mn]dash|(?i:lt|gt|md));")
_HYPHENS = "\u058a\u2010\u2011"  # belong to a word only inside it
_JOINER = re.compile(rf"&[aeiouAEIOU](?:acute|grave|uml);|(?<=\w)[{_HYPHENS}](?=\w)")
_UNREAD = r"\#\d+ | (?i: ht | lr | q[clr] | tl | ur | [oc]dq | quot | apos | nbsp )"
# Brackets stay as words: the evaluation's list of punctuation has -LRB-, but the words are in lower case by then.
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_TWO_WORDS = {whole: (whole[:3], whole[3:]) for whole in ("cannot", "gonna", "gotta", "wanna", "gimme", "lemme")}

# Abbreviations that include their period: always, only when capitalized, only before a number.
_ABBREVIATIONS = r"""
    jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu(?:rs)?|fri|mr|mrs|ms|drs?|prof|sr|jr|esq|rev|hon
    |pres|govs?|sens?|reps?|gen|lt|col|maj|capt|cpl|sgt|pvt|cmdr|comdr|adm|brig|messrs|mme|mlle|insp|supt|treas|asst
    |ste?|mt|ft|ave|blvd|rd|ct|sq|rt|bldg|inc|cos?|corp|ltd|bros|assn|assoc|plc|cie|mfg|intl|natl|univ|dept|elec
    |ala|ariz|calif|colo|conn|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|nev|neb|okla|penn|tenn|va|vt|wisc?|wyo
    |etc|al|cf|vs|ph|ph\.d|tel|ext|est|seq|adj|adv|det|wm|jos|alex"""
_CAPITALIZED = "Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBERED = "nos?|figs?|pp|art|ca|op|prop"
# After a single letter and a period, these words start a new sentence, so the period ends the previous one.
_OPENERS = """
    An?|The|There|This|That|These|It|He|She|They|We|You|In|At|One|Some|Many|Her|But|As|If|When|While|What|Here|Other
    |Our|Their|Then|After|However|Once|Since|So"""

_LETTER = r"[^\W\d_]"
_CURLY, _ANY = "[\u2019\u0092]", "['\u2019\u0092]"
_STRAIGHT = re.compile(rf"(?i:(?<!\S){_CURLY}(?=(?:[smd]|ll|re|ve)(?!\S))|(?<=\bn){_CURLY}(?=t(?!\S)))")
_TOKEN = re.compile(
    rf"""
    # most words; a word next to a mark is left to the rules below
      {_LETTER}++(?=\s)
    # <unk>, http://flickr.com, me@flickr.com
    | </?[A-Za-z][^<>\s]*> | (?i:https?://\S*[\w/]) | [\w.]++@[\w.]*\w
    # rock 'n' roll, 's 'll 'em '50s '08, 't is, is n't; after a curly apostrophe the word need not end
    | (?i:{_ANY}n{_ANY} | {_ANY}n(?!\S) | {_ANY}em | {_ANY}(?:till?|cause|[2-9]0s|\d\d(?!["']))(?!\w) | 't(?=(?:is|was)\b))
    | (?i:(?<!')'(?:[smd]|ll|re|ve)(?!\w) | {_CURLY}(?:[smdn]|ll|re|ve))
    | (?i:n{_ANY}t(?!\w) | {_LETTER}+?(?=n{_ANY}t(?!\w)))
    # words around an apostrophe: o'clock, d'oeuvres, qu'il, hawai'i, y' all
    | (?i:ma{_ANY}am|s'mores|c'mon|cap{_ANY}n|ol{_ANY}|e'er|ne{_ANY}er|dunkin{_ANY}|li{_ANY}l|hallowe{_ANY}en
      | [dol]{_ANY}{_LETTER}{{2,}} | (?:jus)?qu{_ANY}{_LETTER}+ | [a-z]+[aeiou]{_ANY}[aeiou][a-z]*
      | [dljy]{_ANY}(?!(?:[smd]|ll|re|ve)\b))
    # and/or, 1/2, 12/25/2010, then t-shirt, 5-year-old, u.s.-made, then AT&T, c++
    | (?:\d+-)?[A-Za-z\d]+(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z\d]+(?:-[A-Za-z]+){{0,2}}){{1,2}}
    | [^\W_]++(?:[.,]+[^\W_]++)*+(?:[.,]*-[^\W_]+)+(?:\.(?=[,;:]))?
    | [A-Z]+(?:[&+][A-Z]+)+ | [Cc](?:\+\+|\#)
    # 1,000 3.5 5:30, then 22nd 4x4 50s, then -5
    | (?:[-+]?\d*(?:[.,:]\d+)+ | \d+{_LETTER}\w* | [-+]?\d+)(?:\.(?=[,;:]))?
    # words that include their period: u.s. p.m, then j. smith (but not the last word of "plan b."), then mr.
    | {_LETTER}(?:\.{_LETTER})+\.?(?!\.?\w)
    | {_LETTER}\.(?!\w|$|\s(?:{_OPENERS})\b)
    | (?:(?i:{_ABBREVIATIONS})|{_CAPITALIZED}|(?i:{_NUMBERED})(?=\.\s?\d))\.(?!{_LETTER})
    # any other word: "mat" of "mat.", all of flickr.com, wow!what and, before a comma, mat.
    | {_LETTER}\w*(?<!_)(?:[.!?]{_LETTER}\w*(?<!_))*(?:\.(?=[,;:]))?
    | &(?:{_UNREAD});
    # :) #tag @name ?! << and single symbols, except punctuation, which is dropped
    | << | >>
    | [:;=]-?[()DPp](?!\w) | [#@]{_LETTER}+ | \#+ | \*+ | _+ | [?!]{{2,}}
    | [^\w\s.,:;?!'"`\u2019\x00-\x1f\x7f\x92-]
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
    """Words of a caption as in the COCO evaluation: in lower case, clitics separated, punctuation dropped.

    The rules are those of Stanford's PTBTokenizer 3.4.1 with -preserveLines -lowerCase (Marcus et al. 1993, "Building
    a Large Annotated Corpus of English", and its tokenization sheet) and the list of punctuation of Chen et al. 2015,
    "Microsoft COCO Captions", arXiv:1504.00325. White space is collapsed first, so that a rare line separator inside a
    caption cannot split it.

    >>> tokenize("A man's dog isn't at the U.S. Open (5:30 p.m.)...")
    ['a', 'man', "'s", 'dog', 'is', "n't", 'at', 'the', 'u.s.', 'open', '-lrb-', '5:30', 'p.m.', '-rrb-']
    """
    caption, back = (caption, {}) if caption.isascii() and "&" not in caption else _in_letters(caption)
    found = " ".join(_TOKEN.findall(" ".join(caption.split())))
    words = _STRAIGHT.sub("'", found).translate(back).lower().translate(_BRACKETS).split()
    return [part for word in words for part in _TWO_WORDS.get(word, (word,))]


_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    "[\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u102b-\u103e\u17b4-\u17d3\u3099\u309a\u30fc]*"
)
"""A character of a script without spaces between words (Thai, Lao, Burmese, Khmer, Japanese, Chinese), with its marks."""
_UNSPACED_RUN = re.compile(f"((?:{_UNSPACED.pattern})+)")


def characters(caption: str) -> list[str]:
    """Words as by tokenize, but each character of a script without spaces is a word; no punctuation.

    >>> characters("两只dogs在雪地。")
    ['两', '只', 'dogs', '在', '雪', '地']
    """
    return _segmented(caption, _UNSPACED.findall)


def icu(caption: str) -> list[str]:
    """Words as by tokenize, but in scripts without spaces by the dictionaries of ICU, the Unicode Consortium's library
    (package icu4py); no punctuation. Raises UserError where icu4py is missing.

    >>> icu("两只dogs在雪地里奔跑。")
    ['两', '只', 'dogs', '在', '雪地', '里', '奔跑']
    """
    try:
        from icu4py.breakers import WordBreaker
    except ImportError as error:
        raise UserError("--tokenizer icu needs icu4py: pip install -r requirements/full.txt") from error
    return _segmented(caption, lambda run: WordBreaker(run, "root"))


def _segmented(caption: str, words_of: Callable[[str], Iterable[str]]) -> list[str]:
    """Words of a caption, split by words_of in scripts without spaces, else by tokenize."""
    runs = enumerate(_UNSPACED_RUN.split(caption))  # every second one is in such a script
    words = itertools.chain.from_iterable(words_of(run) if i % 2 else tokenize(run) for i, run in runs)
    return [word for word in words if word.isascii() or unicodedata.category(word[0])[0] != "P"]


def without_spaces(caption: str) -> bool:
    """Whether a caption's script has no spaces between words: more than two of its characters for each word."""
    return not caption.isascii() and len(_UNSPACED.findall(caption)) > 2 * len(tokenize(caption))


def tokenizer_for(captions: Sequence[str]) -> str:
    """Name of the default tokenizer to score these captions: ptb, or characters where most have no spaces between
    words."""
    return "characters" if 2 * sum(map(without_spaces, captions)) > len(captions) else "ptb"


class _Characters(dict[int, str]):
    """A table for str.translate: characters that it lacks become a space, except ASCII, which stays unchanged."""

    def __missing__(self, code: int) -> str:
        if code < 128:
            raise LookupError
        return " "


def _in_letters(caption: str) -> tuple[str, dict[int, str]]:
    """Make a caption fit for Python's regular expressions: what Stanford's tokenizer takes as letters becomes letters
    of Python, and what it drops is removed. Also return the table for str.translate that turns stand-ins back."""
    caption = _ENTITY.sub(lambda entity: _ENTITIES[entity[1].lower()], caption)
    table, stand_ins, back = _characters()
    caption = _JOINER.sub(lambda joiner: stand_ins[joiner[0]], caption)
    return caption.translate(table), back


@functools.cache
def _characters() -> tuple[_Characters, dict[str, str], dict[int, str]]:
    """(table for str.translate, stand-in letters, table that turns these back). The stand-ins replace what is a letter
    for Stanford's tokenizer, but not for Python's regular expressions. They are rare Chinese characters above U+FFFF,
    which are never in a caption by then, as Stanford's tokenizer drops them."""
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="ascii").splitlines()
    kinds: dict[str, list[str]] = {"joins": [], "stands alone": []}
    for line in lines:
        if line in kinds:
            kind = line
        elif not line.startswith("#"):
            for ends in line.split():
                first, last = (int(end, 16) for end in (ends.split("-") * 2)[:2])
                kinds[kind] += map(chr, range(first, last + 1))
    accented = [f"&{letter}{accent};" for letter in "aeiouAEIOU" for accent in ("acute", "grave", "uml")]
    joins = [character for character in kinds["joins"] if not character.isalnum()]
    stand_ins = {text: chr(0x20000 + i) for i, text in enumerate([*joins, *accented, *_HYPHENS])}
    table = _Characters({ord(c): c for c in [*kinds["joins"], *stand_ins.values()]})
    table |= {ord(c): stand_ins[c] for c in joins} | {ord(c): f" {c} " for c in kinds["stands alone"]}
    table |= {ord(c): text for c, text in _PLAIN.items()} | {ord(c): c for c in "\u2019\u0092"}
    return table, stand_ins, {ord(letter): text for text, letter in stand_ins.items()}


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"ptb": tokenize, "characters": characters, "icu": icu}
