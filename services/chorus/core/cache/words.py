"""The little words of English by what they do in a question; all in lower case."""

from __future__ import annotations


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


WH = _set("what which who whom whose when where why how")
BE = _set("is are was were be been being am")
AUXILIARY = BE | _set("do does did has have had will would can could shall")
MODAL = _set("should must may might ought shall")
NEUTRAL = _set("a an the there it that")
NEGATORS = _set(
    "not no never without none nobody nothing nowhere neither nor unless hardly barely rarely seldom except cannot"
)
DEGREE = _set(
    "all every each some any only most more less least few many much several both half always often sometimes usually "
    "still already yet ever just even also too very so as or other another else first second third last next previous "
    "twice double once"
)
PRONOUNS = _set("i you we one me us my our your he she they him her them his their someone somebody")
PARTICLES = _set("up down off out away back")
PREPOSITIONS = _set(
    "from to in on at by with for of into onto over under before after during until till since between among against "
    "about outside inside near than when while if because through across per like via within beyond behind above below "
    "around toward towards upon"
)
ALIKE = {"into": "to", "onto": "on", "till": "until", "towards": "toward", "upon": "on", "inside": "in"}
MEASURES = _set(
    "many much long far old fast big large tall high deep wide heavy hot cold often soon quickly early late hard easy "
    "close near common good bad well likely expensive rich"
)

# Of "what's", "it's": whose 's is an is, and not an owner's.
SPEAKERS = _set("what who where when how why it that there he she here which let whats")
SHORT_ENDINGS = {"re": "are", "ll": "will", "ve": "have", "m": "am", "d": "would"}
SHORT_NOT = {"can": "can", "won": "will", "shan": "shall", "ain": "is"}

# What surrounds a question and asks nothing by itself, and what of that asks to be told.
FRAME = (
    _set(
        "hi hello hey good morning evening afternoon please kindly can could would will you i we me us am like want "
        "need to tell explain say show help let know wonder wondering was were do does happen have any idea love ask "
        "asking myself may might describe check confirm clarify find out see understand learn curious about interested "
        "in excuse give thanks thank ok okay so well quick question d just be able and trying sure"
    )
    - NEGATORS
)
ASKS = _set(
    "tell explain say show know wonder wondering ask asking describe check confirm clarify find see understand learn "
    "curious idea help let work"
)
CIVIL = _set("hi hello hey please kindly thanks thank excuse ok okay")
HANDS_OVER = _set("tell give show")
WHAT_IS = _set("calculate compute evaluate explain describe")
SAYS = {"compose": "write", "list": "name", "give": "name", "enumerate": "name", "mention": "name"}

# Several words that ask what one does, what stands for them, and what then comes at the end.
_FIXED = (
    ("is it true that", "?yes"),
    ("is it correct that", "?yes"),
    ("is it the case that", "?yes"),
    ("is it possible for", "?can"),
    ("is it possible that", "?can"),
    ("what is the reason that", "why"),
    ("what is the reason why", "why"),
    ("what is the reason", "why"),
    ("for what reason", "why"),
    ("how come", "why"),
    ("at what time", "when"),
    ("at which time", "when"),
    ("what time", "when"),
    ("in what way", "how"),
    ("in which way", "how"),
    ("by what means", "how"),
    ("what is the best way to", "how"),
    ("what is the way to", "how"),
    ("what is a way to", "how"),
    ("how to", "how"),
    ("which person", "who"),
    ("what is the number of", "how many"),
    ("what number of", "how many"),
    ("what is meant by", "what does", "mean"),
    ("what is the meaning of", "what does", "mean"),
    ("what is the cost of", "how much does", "cost"),
    ("what is the price of", "how much does", "cost"),
    ("for how long", "how long"),
    ("how much time", "how long"),
    ("at what", "what"),
    ("at which", "what"),
    ("for how many", "how many"),
    ("is able to", "can"),
    ("are able to", "can"),
    ("have to", "must"),
    ("has to", "must"),
    ("is going to", "will"),
    ("are going to", "will"),
    ("by whom", "whom"),
)
PHRASES = sorted(([part.split() for part in (*fixed, "")[:3]] for fixed in _FIXED), key=lambda parts: -len(parts[0]))
