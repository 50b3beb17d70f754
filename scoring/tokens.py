"""Words of a caption as the COCO evaluation counts them: the Stanford tokenizer's rules as one regular expression."""

from __future__ import annotations

import re

# Typography that the Stanford tokenizer writes in ASCII (it does call a pound "#" and a euro "$").
_PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"', "–": " -- ", "—": " -- ", "…": "...", "£": "#"}
    | {"€": "$", "¢": " cents ", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "\u00ad": "", "\u200b": " ", "\ufeff": " "}
)
# Brackets become words: the evaluation's list of punctuation has -LRB-, but only after everything is lower case.
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_TWO_WORDS = {whole: (whole[:3], whole[3:]) for whole in ("cannot", "gonna", "gotta", "wanna", "gimme", "lemme")}

# Abbreviations that own their period anywhere, only when capitalized, and only before a number.
_ABBREVIATIONS = r"""
    jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu(?:rs)?|fri|mr|mrs|ms|drs?|prof|sr|jr|esq|rev|hon
    |pres|govs?|sens?|reps?|gen|lt|col|maj|capt|cpl|sgt|pvt|cmdr|comdr|adm|brig|messrs|mme|mlle|insp|supt|treas|asst
    |ste?|mt|ft|ave|blvd|rd|ct|sq|rt|bldg|inc|cos?|corp|ltd|bros|assn|assoc|plc|cie|mfg|intl|natl|univ|dept|elec
    |ala|ariz|calif|colo|conn|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|nev|neb|okla|penn|tenn|va|vt|wisc?|wyo
    |etc|al|cf|vs|ph|ph\.d|tel|ext|est|seq|adj|adv|det|wm|jos|alex"""
_CAPITALIZED = "Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBERED = "nos?|figs?|pp|art|ca|op|prop"
# After a single letter and a period these open a new sentence, and the period is the end of the old one.
_OPENERS = """
    An?|The|There|This|That|These|It|He|She|They|We|You|In|At|One|Some|Many|Her|But|As|If|When|While|What|Here|Other
    |Our|Their|Then|After|However|Once|Since|So"""

_LETTER = r"[^\W\d_]"
_TOKEN = re.compile(
    rf"""
    # Most words. All that stands next to a mark meets the rules below.
      {_LETTER}++(?=\s)
    # <unk>, http://flickr.com, me@flickr.com
    | </?[A-Za-z][^<>\s]*> | (?i:https?://\S*[\w/]) | [\w.]++@[\w.]*\w
    # rock 'n' roll, 's 'll 'em '50s '08, 't is, is n't
    | (?i:'n' | '(?:[smd]|ll|re|ve|em|till?|cause|n|[2-9]0s|\d\d(?!"))(?!\w) | 't(?=(?:is|was)\b))
    | (?i:n't(?!\w) | {_LETTER}+?(?=n't(?!\w)))
    # words around an apostrophe: o'clock, d'oeuvres, y' all
    | (?i:ma'am|s'mores|c'mon|cap'n|ol'|[en]?e'er|[dol]'{_LETTER}{{2,}} | [dljy]'(?!(?:[smd]|ll|re|ve)\b))
    # and/or, 1/2, 12/25/2010, then t-shirt, 5-year-old, u.s.-made, then AT&T
    | (?:\d+-)?[A-Za-z\d]+(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z\d]+(?:-[A-Za-z]+){{0,2}}){{1,2}}
    | [^\W_]++(?:[.,]+[^\W_]++)*+(?:[.,]*-[^\W_]+)+(?:\.(?=[,;:]))?
    | [A-Z]+(?:[&+][A-Z]+)+
    # 1,000 3.5 5:30, then 22nd 4x4 50s, then -5
    | (?:[-+]?\d*(?:[.,:]\d+)+ | \d+{_LETTER}\w* | [-+]?\d+)(?:\.(?=[,;:]))?
    # periods that stay: u.s. p.m, then j. smith (but not the last word of "plan b."), then mr.
    | {_LETTER}(?:\.{_LETTER})+\.?(?!\.?\w)
    | {_LETTER}\.(?!\w|$|\s(?:{_OPENERS})\b)
    | (?:(?i:{_ABBREVIATIONS})|{_CAPITALIZED}|(?i:{_NUMBERED})(?=\.\s?\d))\.(?!{_LETTER})
    # any other word: "mat" of "mat.", all of flickr.com, wow!what and, before a comma, mat.
    | {_LETTER}\w*(?:[.!?]{_LETTER}\w*)*(?:\.(?=[,;:]))?
    # :) #tag @name ?! and single symbols, among which dropped punctuation is left out
    | [:;=]-?[()DPp](?!\w) | [#@]{_LETTER}+ | \#+ | \*+ | _+ | [?!]{{2,}}
    | [^\w\s.,:;?!'"`\u2010-\u201f\U00010000-\U0010ffff-]
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
    """Words of a caption as the COCO evaluation counts them: lower case, clitics apart, punctuation dropped.

    The rules are those of Stanford's PTBTokenizer 3.4.1 with -preserveLines -lowerCase (Marcus et al. 1993, "Building
    a Large Annotated Corpus of English", and its tokenization sheet) and the list of punctuation of Chen et al. 2015,
    "Microsoft COCO Captions", arXiv:1504.00325. White space is collapsed first, so that no odd line separator inside
    a caption can cut it in two.

    >>> tokenize("A man's dog isn't at the U.S. Open (5:30 p.m.)...")
    ['a', 'man', "'s", 'dog', 'is', "n't", 'at', 'the', 'u.s.', 'open', '-lrb-', '5:30', 'p.m.', '-rrb-']
    """
    found = " ".join(_TOKEN.findall(" ".join(caption.translate(_PLAIN).split())))
    words = found.lower().translate(_BRACKETS).split()
    return [part for word in words for part in _TWO_WORDS.get(word, (word,))]
