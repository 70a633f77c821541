"""Prompts of four levels, out of templates and by hand. No template, filling or hand-written prompt is in both halves.

The rubric, by what an answer that is right and whole takes, not by the prompt's form:

    simple    one step, and at most a sentence: one fact, one word, a short text changed in one way
    medium    two to four steps, or a paragraph: an explanation, a summary, a sum in words, a function of a few lines
    complex   more than four steps, or several parts or constraints that depend on each other: a comparison by several
              criteria, a plan, a component with its tests, a fault to be found
    expert    a specialist's training, and many steps: proofs beyond school, designs under requirements that conflict,
              judgement in law, medicine, finance or research

Some are made to mislead who goes by length: long prompts with a simple question, short ones that need an expert.
Templates and labels are one author's, so what a benchmark on them shows is an upper bound for other people's prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chorus.core.ensemble.records import Complexity

SEED = 20261126
FILLINGS = 6
_SLOT = re.compile(r"\{([a-z]+)\}")


@dataclass(frozen=True)
class Labelled:
    """A prompt, its level, and the template that it was made from (its own text where it was written by hand)."""

    text: str
    level: Complexity
    template: str


_TEXT_TUNE = (
    "The ferry left the harbour at nine with forty passengers and a crate of oranges. By noon a fog had come up, and "
    "the captain slowed down near the lighthouse. Nobody was hurt when the boat touched a sandbank, and the tide "
    "lifted it off again two hours later. The oranges arrived a day late."
)
_TEXT_TEST = (
    "Our town library has been closed for repairs since March. The roof leaked above the reading room, and some three "
    "hundred books had to be dried. Volunteers carried the rest into the school's gymnasium, where they can be "
    "borrowed on Tuesdays. The council hopes to open the doors again before the first snow."
)

# Each slot's fillings: of the tuning half, then of the test half.
_SLOTS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "country": (
        ("France", "Peru", "Kenya", "Japan", "Norway", "Chile", "Egypt"),
        ("Spain", "Ghana", "Vietnam", "Poland", "Canada", "Brazil", "Iran"),
    ),
    "word": (
        ("bread", "window", "quickly", "river", "honest", "shoulder", "to carry"),
        ("butter", "ladder", "slowly", "mountain", "brave", "elbow", "to follow"),
    ),
    "language": (
        ("German", "Spanish", "Polish", "Turkish", "Dutch", "Finnish"),
        ("French", "Italian", "Czech", "Greek", "Swedish", "Danish"),
    ),
    "topic": (
        ("photosynthesis", "inflation", "vaccination", "plate tectonics", "compound interest", "a rainbow", "yeast"),
        ("gravity", "unemployment", "digestion", "erosion", "a mortgage", "the seasons", "rust"),
    ),
    "pair": (
        (
            "solar panels and heat pumps",
            "trains and planes",
            "cats and dogs",
            "renting and buying",
            "paper and e-books",
        ),
        (
            "gas and induction stoves",
            "cars and bicycles",
            "cities and villages",
            "leasing and owning",
            "radio and podcasts",
        ),
    ),
    "thing": (
        ("a birthday party", "a week in Rome", "a school play", "a vegetable garden", "a second-hand book shop"),
        ("a wedding", "a hike in the Alps", "a charity run", "a home office", "a small bakery"),
    ),
    "code": (
        ("reverses a string", "counts the vowels of a text", "checks whether a number is even", "removes duplicates"),
        ("sums a list", "finds the longest word", "tells whether a year is a leap year", "counts lines of a file"),
    ),
    "tool": (
        ("a to-do list", "an image gallery", "a chat room", "a rate limiter", "a CSV importer", "a bookmark manager"),
        ("a shopping cart", "a file uploader", "a poll", "a job queue", "a log parser", "a recipe collection"),
    ),
    "system": (
        ("a payment ledger", "a video platform", "a hospital's records", "a stock exchange's matching engine"),
        ("a ride-hailing service", "a national voter roll", "a power grid's telemetry", "an airline's reservations"),
    ),
    "theorem": (
        ("the Bolzano-Weierstrass theorem", "Sylow's theorems", "the spectral theorem", "Stone-Weierstrass"),
        (
            "the Banach fixed-point theorem",
            "Hilbert's Nullstellensatz",
            "the Riesz representation theorem",
            "Zorn's lemma",
        ),
    ),
    "illness": (
        ("atrial fibrillation", "stage 4 chronic kidney disease", "decompensated cirrhosis", "lupus nephritis"),
        ("acute pancreatitis", "refractory epilepsy", "septic shock", "pulmonary embolism in pregnancy"),
    ),
    "contract": (
        ("a software licence", "a joint venture", "a cross-border merger", "a clinical trial"),
        ("a franchise", "an outsourcing deal", "a loan under English law", "a data-processing agreement"),
    ),
    "n": (("12", "35", "48", "7", "90", "64"), ("15", "26", "54", "9", "80", "33")),
    "m": (("3", "4", "6", "5", "8"), ("2", "9", "7", "11", "10")),
    "person": (("Anna", "Tom", "Maria", "Ken"), ("Lucy", "Omar", "Peter", "Ines")),
}

_TUNE: Mapping[Complexity, Sequence[str]] = {
    Complexity.SIMPLE: (
        "What is the capital of {country}?",
        "Translate '{word}' into {language}.",
        "How many letters has the word '{word}'?",
        "Which currency is used in {country}?",
        "{n} + {m} =",
        "What is the opposite of '{word}'?",
        "Is {n} greater than {m}? Answer yes or no.",
        "Which continent is {country} in?",
        f"Read this: {_TEXT_TUNE} How late were the oranges? Give {{n}} words at most.",
        "Correct the spelling: '{word} is verry nice'.",
        "Name a colour that goes with {word}.",
        "Write '{word}' in capital letters.",
        "Who wrote the national anthem of {country}?",
        "What does the Python function len() return for a list of {n} items?",
        "q: past tense of go\na: went\nq: {language} for {word}\na:",
        "Say hello to {person} in one short sentence.",
    ),
    Complexity.MEDIUM: (
        "Explain {topic} to a child.",
        "Summarise what {topic} is in three sentences.",
        "Write a Python function that {code}.",
        "{person} has {n} apples, gives {m} to each of two friends and buys ten more. How many are left?",
        "Write a short poem about {word}.",
        "What are the main causes of {topic}?",
        "Describe a typical day in {country} for a tourist.",
        f"Summarise the following text in two sentences. Keep to {{language}}. {_TEXT_TUNE}",
        "Why does {topic} matter? Give two reasons.",
        "Write a polite e-mail to {person} that moves our meeting to Friday.",
        "What is the difference between {pair}?",
        "List five ideas for {thing}.",
        "A train goes {n} km in {m} hours. How fast is it, and how far does it get in five hours?",
        "Rewrite this so that it sounds friendlier, in {language}: 'Send me the papers, {person}, now.'",
        "What does this do? `for i in range({n}): print(i * {m})` Explain it line by line.",
        "How does {topic} work?",
    ),
    Complexity.COMPLEX: (
        "Compare {pair} by cost, comfort, safety and effect on the climate, and recommend one for a family of {m}.",
        "Plan {thing} for {n} people on a budget of 900 euros: schedule, shopping list, who does what, and what to do "
        "if it rains.",
        "Implement {tool} in Python with a class, error handling, type hints, and unit tests for the edge cases.",
        "My web page for {tool} shows old data after an update, but only for some users and only since we added a "
        "cache. Find likely causes and tell me step by step how to narrow them down.",
        "Write a story of 600 words about {person} and {word} with three scenes, a turning point, dialogue, and an "
        "ending that takes up the first sentence. It must not use the word 'suddenly'.",
        "Three friends share a flat. {person} pays twice as much as the second, who pays {n} euros more than the "
        "third; the rent is 1{n}0 euros and rises by {m}% each year. What does each pay after three years? Show every "
        "step.",
        "Refactor a 300-line script that is {tool} into modules. Explain the order of the steps and how to keep it "
        "working after each of them.",
        "Design a database schema for {tool} with users, permissions, and history. Give the tables, the keys, and "
        "three queries that it must answer quickly.",
        "Analyse the advantages and disadvantages of {topic} for poor and rich households, for the short and the long "
        "run, and draw a conclusion.",
        "Make a weekly plan to learn {language} in {m} months: vocabulary, grammar, listening and speaking, with a "
        "test at the end of each month.",
        "Write an essay of five paragraphs on whether {country} should change its school year. Weigh arguments of "
        "pupils, parents and teachers against each other.",
        "Write a SQL query and an index for {tool}: the top {m} users of each month of the last year, ties included, "
        "users without activity as zero.",
        "Given a list of meetings with start and end, find the least number of rooms. Describe the algorithm, prove "
        "its running time, and implement it for {n} meetings.",
        "Draft a letter to our landlord in {country} that asks for repairs, names deadlines, cites the lease, offers "
        "two dates, and stays friendly.",
        "Evaluate three ways of paying for {thing}: savings, credit, instalments. Use {n} euros a month and {m}% "
        "interest.",
    ),
    Complexity.EXPERT: (
        "Prove {theorem}.",
        "Design {system} for 200 million users across five regions: consistency model, partitioning, failover without "
        "loss of acknowledged writes, capacity, cost, and a migration from a single database without downtime.",
        "A {n}-year-old with {illness}, a mechanical valve and a penicillin allergy needs surgery. Work out "
        "perioperative anticoagulation and antibiotics, with doses adjusted for renal function, and cite the evidence "
        "for each.",
        "Review {contract} between companies of {country} and Delaware: governing law, limitation of liability, "
        "indemnities, tax, and which clauses a court wouldn't enforce.",
        "Derive the Black-Scholes equation under stochastic volatility, discuss incompleteness of the market, and "
        "calibrate the model to a surface of {n} implied volatilities.",
        "Derive the backpropagation equations of a transformer with rotary embeddings and show their numerical "
        "stability in bfloat16.",
        "Give a lock-free multi-producer queue in C++, prove it linearizable under the C11 memory model, and say where "
        "hazard pointers are needed for {n} threads.",
        "Is {theorem} valid constructively? Justify.",
        "Write a research proposal on {illness}: hypotheses, power analysis for {n} centres, endpoints, confounders, "
        "ethics, and the statistical analysis plan.",
        "Show that the halting problem reduces to the word problem for groups.",
        "Estimate the causal effect of {topic} on wages in {country} from panel data: identification, instruments, "
        "tests of the assumptions, heterogeneous treatment effects, and what would refute it.",
        "Design a Byzantine fault tolerant consensus for {system}, prove safety and liveness under partial synchrony, "
        "and bound the message complexity.",
        "Write a compiler pass that does escape analysis for {tool} in LLVM, argue its soundness, and its interaction "
        "with garbage collection.",
        "Solve the Navier-Stokes equations for a pulsating flow in an elastic tube with a {n}% stenosis, by asymptotic "
        "expansion, and state the boundary layers.",
        "Structure the tax of {contract} for a fund with investors from {country}, Luxembourg and Singapore.",
    ),
}

_TEST: Mapping[Complexity, Sequence[str]] = {
    Complexity.SIMPLE: (
        "Which language do most people speak in {country}?",
        "What's the plural of '{word}'?",
        "{n} minus {m}?",
        "How do you say '{word}' in {language}?",
        f"{_TEXT_TEST} On which day can books be borrowed, {{person}} asks?",
        "In what year did {country} last host the Olympic Games?",
        "Does '{word}' rhyme with 'batter'?",
        "Give me a synonym of '{word}'.",
        "What flag has {country}: colours only.",
        "Put a full stop after this: {person} likes {word}",
        "Which Python keyword defines a function?\n```python\n___ f(x): return x * {m}\n```",
        "Good morning! I'm {person}.",
    ),
    Complexity.MEDIUM: (
        "Tell me in simple words how {topic} comes about.",
        "Give me a bash one-liner that {code}, and say what each part does.",
        "{person} earns {n} euros an hour, works {m} hours and pays a fifth as tax. What remains?",
        "Write four lines of verse for {person}'s birthday.",
        "How do I cook a simple dish from {country}?",
        f"{_TEXT_TEST}\n\nWrite a headline and a two-sentence summary of this, in {{language}}.",
        "Which are the pros and cons of {pair}?",
        "What should I think of before I start {thing}?",
        "Write a JavaScript function that {code}.",
        "Can you describe {topic} with an everyday analogy?",
        "Turn this into a short announcement for the office: {person} leaves us on Monday after {n} years.",
        "Why do people in {country} celebrate New Year the way they do?",
    ),
    Complexity.COMPLEX: (
        "We must choose between {pair}. Build a table with six criteria, weigh them for a household of {m}, and "
        "justify the result.",
        "Organise {thing}: a timeline over {m} weeks, costs in three scenarios, risks and what to do about each.",
        "Build {tool} as a REST service: endpoints, validation, storage, tests, and a Dockerfile.",
        "After the last release {tool} uses twice the memory and crashes every {m} hours. Here is what we know: no new "
        "dependencies, a bigger thread pool, more logging. How would you find the fault?",
        "Write a scene for a play in which {person} learns that the house is sold, told by three voices, each with a "
        "style of its own, and ending where it began.",
        "A tank is filled by two pipes in {n} and {m} minutes and emptied by a third in an hour. The third is opened "
        "halfway through. When is it full? Explain each equation.",
        "Write a class in TypeScript for {tool} that works offline and merges changes of two devices; cover conflicts "
        "with tests.",
        "Discuss how {topic} affects farmers, consumers and the state in {country}, with arguments on both sides and a "
        "recommendation.",
        "Create a twelve-week training plan for {person}, who can run {m} km, has a sore knee, and trains at most four "
        "days.",
        "Draft a project plan for {thing} with milestones, dependencies, a budget of {n} thousand, and three "
        "alternatives.",
        "Migrate {tool} from callbacks to async: in what order, what can break, and how do I test it on the way?",
        "Compare the school systems of {country} and Finland by funding, selection, teachers' pay and results, and say "
        "what one could learn from the other.",
    ),
    Complexity.EXPERT: (
        "State and prove {theorem}, and give a counterexample where a hypothesis is dropped.",
        "Architect {system} so that it survives the loss of a data centre, meets strict serializability at p99 under "
        "50 ms, and passes an audit; quantify the trade-offs.",
        "Differential diagnosis and management of {illness} in a patient on immunosuppressants, with interactions and "
        "contraindications.",
        "Advise the board on {contract}: fiduciary duties, antitrust clearance in {country}, arbitration, and exposure "
        "if it is terminated.",
        "Price a callable convertible bond with credit risk by a trinomial lattice and show convergence.",
        "Why is P versus NP not settled by relativizing proofs?",
        "Derive the renormalization group flow of the {m}-dimensional Ising model to second order in epsilon.",
        "Formally verify {tool} in TLA+ or Coq: invariants, refinement mapping, and proof obligations.",
        "Design a phase III trial for {illness} with adaptive randomisation, an interim analysis for futility, and "
        "control of the family-wise error.",
        "Write a CUDA kernel for fused attention with online softmax and derive its arithmetic intensity on an H100.",
        "Identify the monetary policy shock in a structural VAR for {country} and defend the sign restrictions.",
        "Is the axiom of choice needed for {theorem}?",
    ),
}

_BY_HAND: Mapping[Complexity, Sequence[str]] = {
    Complexity.SIMPLE: (
        "hi",
        "boiling point of water in fahrenheit",
        "spell necessary",
        "what time is it in Tokyo when it's noon in London?",
        "Who painted the Mona Lisa?",
        "I have a long question about something that has bothered me since this morning, when I stood in the kitchen "
        "and made tea and my daughter came in and wanted to know it for school: how many legs does a spider have?",
        "sqrt(144)",
        "Which HTTP status means not found?",
        "is a tomato a fruit",
        "Convert 5 miles to km.",
        "Fix the typo: teh cat",
        "What does NASA stand for?",
    ),
    Complexity.MEDIUM: (
        "why is the sky blue",
        "How do noise-cancelling headphones work?",
        "Write a haiku about autumn and explain its form.",
        "regex for a date like 2024-05-17, and how it works",
        "Give me a recipe for pancakes for four.",
        "What's the difference between TCP and UDP?",
        "If 3 painters need 8 hours for a wall, how long do 4 need?",
        "Write a cover note of five lines for my job application as a nurse.",
        "Explain what a git rebase does.",
        "Who was Ada Lovelace and why is she remembered?",
        "Shorten this to a tweet: our bakery has a new oven, opens at six from Monday on, and gives each first guest a "
        "roll.",
        "What are some good questions for a first date?",
    ),
    Complexity.COMPLEX: (
        "I earn 3,100 a month, pay 950 rent, have 8,000 in debt at 9% and want to buy a car and start saving for a "
        "child. Make me a plan for three years.",
        "Write a snake game for the terminal in Rust with levels, a high score file and tests.",
        "Our team of seven loses half a day a week to flaky tests. What would you do in the next quarter, in what "
        "order, and how would we know that it worked?",
        "Compare Kubernetes, Nomad and plain systemd for five small services at a company of ten people.",
        "Outline a novel in twelve chapters in which a lighthouse keeper finds letters from his own future.",
        "Here's my traceback: KeyError: 'user' in session middleware, only behind the load balancer and only for every "
        "second request. What's going on, and how do I fix it for good?",
        "Was the Treaty of Versailles a cause of the Second World War? Argue both sides with sources, then decide.",
        "Design a board game for two about bees: rules, pieces, winning condition, and how you would balance it.",
        "Two cyclists start 90 km apart toward each other at 18 and 27 km/h, a fly goes to and fro between them at 40. "
        "How far does the fly get, and how often does it turn before they are a metre apart?",
        "Write a parser for arithmetic with precedence, variables and good error messages.",
        "Put together a vegan menu for a week for a runner with a nut allergy, 2,800 kcal a day, and a shopping list.",
        "Turn our spreadsheet of 40 tabs into a small database: how do we clean, import, check and hand it over?",
    ),
    Complexity.EXPERT: (
        "Prove that there are infinitely many primes congruent to 1 mod n.",
        "Explain the proof of the Poincaré conjecture through Ricci flow with surgery.",
        "Derive ELBO gradients for a hierarchical VAE and analyse posterior collapse.",
        "Is our SPAC's forward-looking statement protected by the PSLRA safe harbor?",
        "Workup of a 54-year-old with ANCA-negative pulmonary-renal syndrome",
        "Design a CRDT for collaborative rich text with move operations, prove convergence, and bound its metadata.",
        "Optimal execution with transient impact: solve the HJB equation for power-law resilience.",
        "What breaks in Paxos if acceptors lose fsynced state, and how would you recover a cluster safely?",
        "Classify all groups of order 2024.",
        "Assess transfer pricing exposure of an Irish IP holding under Pillar Two.",
        "Reverse-engineer a side channel in a constant-time AES on a CPU with speculative execution, and propose a "
        "mitigation with proof of non-interference.",
        "Why does the Standard Model need anomaly cancellation? Compute it for one generation.",
    ),
}


def tuning() -> list[Labelled]:
    """The prompts that may be learnt from."""
    return _made(_TUNE, 0)


def test() -> list[Labelled]:
    """Those that are kept away from learning."""
    return _made(_TEST, 1) + [Labelled(text, level, text) for level, texts in _BY_HAND.items() for text in texts]


def _made(templates: Mapping[Complexity, Sequence[str]], half: int) -> list[Labelled]:
    rng = random.Random(SEED + half)
    found: dict[str, Labelled] = {}
    for level, texts in templates.items():
        for template in texts:
            for _ in range(FILLINGS):
                text = _SLOT.sub(lambda slot: rng.choice(_SLOTS[slot[1]][half]), template)
                found.setdefault(text, Labelled(text, level, template))
    return list(found.values())
