"""How hard a question is, guessed from its prompt: what it asks for, counted, then weighed by numbers that were learnt.

The levels mean what `benchmarks/complexity_prompts.py` says. The weights (`complexity_learned.py`) are those of a
logistic regression over the four levels, by `python -m benchmarks.complexity fit`.
"""

from __future__ import annotations

import re
from math import log1p

from chorus.core.ensemble.complexity_learned import WEIGHTS
from chorus.core.ensemble.prompts import question_of
from chorus.core.ensemble.records import Complexity
from chorus.core.generation import Conversation, GenerationRequest, MessageRole

FEATURES = (
    "bias",
    "words",
    "questions",
    "parts",
    "constraints",
    "numbers",
    "code",
    "mathematics",
    "looks_up",
    "explains",
    "builds",
    "proves",
    "compares",
    "brief",
    "domain",
    "long_words",
)
"""What is counted, in this order, each count as log(1 + n)."""

# Beginnings of words, in lower case, unless a bar ends them.
_WORDS = {
    "constraints": "must|should|at most|at least|exactly|without|under|within|no more|not use|only|each|every|all|"
    "budget|deadline|edge case|if ",
    "looks_up": "who|whose|which|when|where|what is the|what's the|what does|how many|how much|how do you say|name a|"
    "translate|spell|convert|correct|capital|opposite|synonym|plural|tense|yes or no|hi|hello|say ",
    "explains": "explain|summar|describe|why|how do|how does|how can|list|tell me|what are|write a short|poem|analogy|"
    "difference|idea|rewrite|reason|e-mail|recipe|function|sentence|line by line",
    "builds": "plan|design|implement|build|refactor|analy[sz]e|evaluate|draft|organi[sz]e|discuss|outline|create|"
    "migrate|recommend|debug|test|schema|class|schedule|step by step|story|essay|novel|argue|weigh|conclusion|scenario|"
    "scene|risk|milestone|find the|cause|algorithm|parser|game",
    "proves": "prove|proof|derive|derivation|show that|formal|verif|architect|rigorous|bound|justify|soundness|"
    "counterexample|calibrat|identif|theorem|lemma|classify|assess|differential",
    "compares": "compar|versus|vs|pros and cons|advantage|disadvantage|trade-off|better|choose between|difference",
    "brief": "in one word|one word|one sentence|yes or no|short|briefly|in a word|sentences|to a child|simple words",
    "domain": "theorem|lemma|axiom|manifold|topolog|eigen|spectral|stochastic|bayes|asymptotic|equilibri|isomorph|"
    "convergen|partial differential|navier|hamilton|lagrang|quantum|relativi|gauge|renormali|entropy|tensor|"
    "np-|turing|halting|lineari[sz]ab|seriali[sz]ab|byzantine|consensus|paxos|raft|crdt|lock-free|memory model|"
    "partition|failover|replicat|throughput|latency|p99|compiler|llvm|cuda|kernel|transformer|backprop|gradient|"
    "posterior|variational|side channel|cryptograph|zero-knowledge|syndrome|carcinom|fibrillat|cirrhos|nephr|"
    "renal|anticoag|pharmaco|contraindic|dos(?:e|age|ing)\\b|comorbid|patholog|immuno|etiolog|randomi[sz]|"
    "endpoint|confound|power analysis|liabilit|indemn|fiduciar|antitrust|arbitrat|jurisdict|statut|governing law|"
    "transfer pricing|tax|derivative|volatil|option|hedg|convertible|credit risk|lattice|econometr|instrument|"
    "causal|panel data|structural|shock|hypothes|clinical|trial|perioperat|audit|compliance|regulat",
}
_PATTERNS = {name: re.compile(rf"(?<!\w)(?:{words})", re.IGNORECASE) for name, words in _WORDS.items()}
_CODE = re.compile(
    r"```|`[^`]+`|\bdef |\bclass |#include|\breturn\b|\b(?:python|javascript|typescript|rust|sql|bash|c\+\+|java|regex|"
    r"api|docker\w*|github?|html|css)\b",
    re.IGNORECASE,
)
_MATHEMATICS = re.compile(
    r"[\d\w)]\s*[=+*/^<>∑∫√≤≥]\s*[\d\w(]|\\[a-z]+|%|"
    r"\b(?:equation|integral|matrix|sum|solve|percent|probability|log|sqrt|mod)\b",
    re.IGNORECASE,
)
_LONG_WORD = 10  # letters
# Of a long prompt, words of each end: there stands what is asked, in between what was pasted.
_END_WORDS = 60
# And characters, since what was pasted may have no spaces.
_END_CHARACTERS = 4000


def features(question: str) -> tuple[float, ...]:
    """What a question has of each of FEATURES."""
    if len(question) > 2 * _END_CHARACTERS:
        question = f"{question[:_END_CHARACTERS]} {question[-_END_CHARACTERS:]}"
    words = question.split()
    if len(words) > 2 * _END_WORDS:
        words = words[:_END_WORDS] + words[-_END_WORDS:]
        question = " ".join(words)
    counts = {name: len(set(map(str.lower, pattern.findall(question)))) for name, pattern in _PATTERNS.items()}
    counts |= {
        "words": len(words),
        "questions": question.count("?"),
        "parts": sum(map(question.count, ",;:\n")) + len(re.findall(r"\band\b", question)),
        "numbers": len(re.findall(r"\d+", question)),
        "code": len(_CODE.findall(question)),
        "mathematics": len(_MATHEMATICS.findall(question)),
        "long_words": sum(len(word.strip(".,;:?!()")) >= _LONG_WORD for word in words),
    }
    return tuple(1.0 if name == "bias" else log1p(counts[name]) for name in FEATURES)


def complexity_of(question: str) -> Complexity:
    """The likeliest level of a question."""
    told = features(question)
    scores = {
        level: sum(w * value for w, value in zip(weights, told, strict=True)) for level, weights in WEIGHTS.items()
    }
    return max(Complexity, key=lambda level: scores[level])


def estimate_complexity(request: GenerationRequest) -> Complexity:
    """That of a request; of a conversation, of what its user said last."""
    prompt = request.prompt
    if isinstance(prompt, Conversation):
        asked = [message for message in prompt.messages if message.role is MessageRole.USER]
        prompt = Conversation(tuple(asked[-1:])) if asked else prompt
    return complexity_of(question_of(prompt))
