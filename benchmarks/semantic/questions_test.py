"""The test half: other templates, other words, and kinds of near misses that the tuning half has none of.

Written before the gate's rules, by the same author; no weight, threshold or rule was chosen by what comes out here. The
kinds that tuning saw as well (`SEEN_KINDS`) are reported apart.
"""

from __future__ import annotations

from benchmarks.semantic.template import Template

SEEN_KINDS = frozenset({"negated", "swapped", "name", "number", "question word", "tense", "other verb"})

TEMPLATES = (
    Template(
        "train",
        "When does the next train from {a} to {b} leave?",
        slots={
            "a": ["Zurich", "Lyon", "Munich", "Porto", "Leeds"],
            "b": ["Basel", "Paris", "Prague", "Madrid", "York"],
        },
        same={
            "question form": [
                "At what time does the next train from {a} to {b} leave?",
                "What time is the next train from {a} to {b}?",
            ],
            "reordering": [
                "When does the next train to {b} from {a} leave?",
                "From {a} to {b}, when does the next train leave?",
            ],
            "politeness": ["Hi there, could you tell me when the next train from {a} to {b} leaves?"],
            "synonym": ["When does the next train from {a} to {b} depart?"],
        },
        near={
            "direction": [
                "When does the next train from {b} to {a} leave?",
                "When does the next train to {a} from {b} leave?",
            ],
            "time": [
                "When does the last train from {a} to {b} leave?",
                "When did the previous train from {a} to {b} leave?",
            ],
            "antonym": ["When does the next train from {a} to {b} arrive?"],
            "name": [
                "When does the next train from {a} to {b2} leave?",
                "When does the next bus from {a} to {b} leave?",
            ],
        },
    ),
    Template(
        "convert",
        "How do I convert {n} {u} to {v}?",
        slots={
            "n": ["5", "12", "70", "250"],
            "u": ["miles", "pounds", "gallons", "inches"],
            "v": ["kilometers", "grams", "liters", "centimeters"],
        },
        same={
            "question form": ["How can I convert {n} {u} to {v}?", "How would one convert {n} {u} to {v}?"],
            "politeness": ["Please help me convert {n} {u} to {v}.", "I need to know how to convert {n} {u} to {v}."],
            "passive": ["How are {n} {u} converted to {v}?"],
            "synonym": ["How do I change {n} {u} into {v}?"],
        },
        near={
            "direction": ["How do I convert {n} {v} to {u}?", "How do I convert {n} {u} from {v}?"],
            "unit": ["How do I convert {n} {u} to {v2}?", "How do I convert {n} {u2} to {v}?"],
            "number": ["How do I convert {n2} {u} to {v}?", "How do I convert {n}.5 {u} to {v}?"],
        },
    ),
    Template(
        "drug",
        "Should I take {drug} before {meal}?",
        slots={
            "drug": ["ibuprofen", "iron tablets", "antibiotics", "vitamin D"],
            "meal": ["breakfast", "lunch", "dinner", "exercise"],
        },
        same={
            "politeness": [
                "Hello, should I take {drug} before {meal}, please?",
                "I'm wondering if I should take {drug} before {meal}.",
            ],
            "question form": ["Is it better to take {drug} before {meal}?", "Ought I to take {drug} before {meal}?"],
            "passive": ["Should {drug} be taken before {meal}?"],
            "reordering": ["Before {meal}, should I take {drug}?"],
        },
        near={
            "time": ["Should I take {drug} after {meal}?", "Should I take {drug} during {meal}?"],
            "name": ["Should I take {drug2} before {meal}?", "Should I take {drug} before {meal2}?"],
            "negated": ["Should I not take {drug} before {meal}?"],
            "modality": ["Must I take {drug} before {meal}?", "Can I take {drug} before {meal}?"],
            "antonym": ["Should I avoid {drug} before {meal}?", "Should I stop {drug} before {meal}?"],
        },
    ),
    Template(
        "volume",
        "How do I turn {way} the {thing} on my {device}?",
        slots={
            "way": ["up", "down"],
            "thing": ["volume", "brightness", "heating", "contrast"],
            "device": ["laptop", "phone", "television", "tablet"],
        },
        same={
            "question form": [
                "How can I turn {way} the {thing} on my {device}?",
                "What do I do to turn {way} the {thing} on my {device}?",
            ],
            "reordering": [
                "On my {device}, how do I turn {way} the {thing}?",
                "How do I turn the {thing} {way} on my {device}?",
            ],
            "politeness": ["Please explain how to turn {way} the {thing} on my {device}."],
        },
        near={
            "direction": [
                "How do I turn {way2} the {thing} on my {device}?",
                "How do I turn the {thing} {way2} on my {device}?",
                "How do I turn off the {thing} on my {device}?",
            ],
            "name": ["How do I turn {way} the {thing2} on my {device}?"],
            "negated": ["How do I stop turning {way} the {thing} on my {device}?"],
        },
    ),
    Template(
        "largest",
        "What is the {adj} {thing} in {place}?",
        slots={
            "adj": ["largest", "oldest", "tallest", "deepest"],
            "thing": ["lake", "bridge", "cave", "harbour"],
            "place": ["Africa", "Europe", "Alaska", "Brazil"],
        },
        same={
            "contraction": ["What's the {adj} {thing} in {place}?"],
            "question form": ["Which {thing} is the {adj} in {place}?", "Which is the {adj} {thing} in {place}?"],
            "reordering": ["In {place}, what is the {adj} {thing}?"],
            "politeness": ["Do you happen to know what the {adj} {thing} in {place} is?"],
        },
        near={
            "antonym": [
                "What is the smallest {thing} in {place}?",
                "What is the youngest {thing} in {place}?",
                "What is the shallowest {thing} in {place}?",
            ],
            "name": ["What is the {adj} {thing2} in {place}?", "What is the {adj} {thing} in {place2}?"],
            "scope": ["What is the second {adj} {thing} in {place}?", "What is the {adj} {thing} outside {place}?"],
        },
    ),
    Template(
        "war",
        "Did {a} defeat {b} in {year}?",
        slots={
            "a": ["Sweden", "Prussia", "Carthage", "Venice"],
            "b": ["Denmark", "Saxony", "Syracuse", "Genoa"],
            "year": ["1643", "1756", "1380", "1809"],
        },
        same={
            "passive": ["Was {b} defeated by {a} in {year}?"],
            "question form": [
                "Is it true that {a} defeated {b} in {year}?",
                "Is it correct that in {year} {a} defeated {b}?",
            ],
            "reordering": ["In {year}, did {a} defeat {b}?"],
            "synonym": ["Did {a} beat {b} in {year}?"],
        },
        near={
            "swapped": ["Did {b} defeat {a} in {year}?", "Was {a} defeated by {b} in {year}?"],
            "number": ["Did {a} defeat {b} in {year2}?"],
            "time": ["Did {a} defeat {b} before {year}?", "Did {a} defeat {b} after {year}?"],
            "antonym": ["Did {a} surrender to {b} in {year}?", "Did {a} lose to {b} in {year}?"],
            "negated": ["Did {a} fail to defeat {b} in {year}?"],
        },
    ),
    Template(
        "weather",
        "Will it {verb} in {city} {when}?",
        slots={
            "verb": ["rain", "snow", "freeze", "hail"],
            "city": ["Bergen", "Turin", "Quito", "Seattle"],
            "when": ["tomorrow", "tonight", "next week", "on Friday"],
        },
        same={
            "reordering": ["Will it {verb} {when} in {city}?"],
            "question form": ["Is it going to {verb} in {city} {when}?"],
            "politeness": [
                "Can you please say if it will {verb} in {city} {when}?",
                "Good morning! Will it {verb} in {city} {when}?",
            ],
        },
        near={
            "time": [
                "Will it {verb} in {city} {when2}?",
                "Did it {verb} in {city} yesterday?",
                "Will it {verb} in {city} next month?",
            ],
            "tense": ["Did it {verb} in {city} {when}?"],
            "name": ["Will it {verb} in {city2} {when}?", "Will it {verb2} in {city} {when}?"],
            "negated": ["Will it not {verb} in {city} {when}?", "Won't it {verb} in {city} {when}?"],
        },
    ),
    Template(
        "speed",
        "How fast can a {animal} run in {unit}?",
        slots={
            "animal": ["cheetah", "horse", "greyhound", "camel"],
            "unit": ["kilometers per hour", "miles per hour", "meters per second"],
        },
        same={
            "question form": [
                "What speed can a {animal} run at in {unit}?",
                "How fast is a {animal} able to run in {unit}?",
            ],
            "reordering": ["In {unit}, how fast can a {animal} run?"],
            "politeness": ["I'd love to know how fast a {animal} can run in {unit}."],
            "synonym": ["How quickly can a {animal} run in {unit}?"],
        },
        near={
            "unit": [
                "How fast can a {animal} run in {unit2}?",
                "How fast can a {animal} run in knots?",
                "How fast can a {animal} run in feet per second?",
            ],
            "name": ["How fast can a {animal2} run in {unit}?"],
            "question word": ["How far can a {animal} run in {unit}?", "How long can a {animal} run in {unit}?"],
            "antonym": ["How slow can a {animal} run in {unit}?"],
            "modality": ["How fast must a {animal} run in {unit}?", "How fast should a {animal} run in {unit}?"],
        },
    ),
    Template(
        "visa",
        "Do {a} citizens need a visa for {b}?",
        slots={"a": ["German", "Indian", "Mexican", "Irish"], "b": ["Thailand", "Georgia", "Turkey", "Vietnam"]},
        same={
            "passive": ["Is a visa needed by {a} citizens for {b}?"],
            "politeness": ["Could you let me know if {a} citizens need a visa for {b}?"],
            "synonym": ["Do {a} citizens require a visa for {b}?", "Do {a} nationals need a visa for {b}?"],
            "question form": ["Is a visa necessary for {b} for {a} citizens?"],
        },
        near={
            "name": [
                "Do {a2} citizens need a visa for {b}?",
                "Do {a} citizens need a visa for {b2}?",
                "Do {a} citizens need a passport for {b}?",
            ],
            "quantifier": [
                "Do all {a} citizens need a visa for {b}?",
                "Do some {a} citizens need a visa for {b}?",
                "Do only {a} citizens need a visa for {b}?",
            ],
            "negated": [
                "Which citizens other than {a} do not need a visa for {b}?",
                "Don't {a} citizens need a visa for {b}?",
            ],
            "time": ["Did {a} citizens need a visa for {b}?", "Do {a} citizens still need a visa for {b}?"],
            "question word": ["Why do {a} citizens need a visa for {b}?"],
        },
    ),
    Template(
        "install",
        "How do I install {tool} on {system}?",
        slots={"tool": ["Docker", "Postgres", "Node", "Blender"], "system": ["Windows", "Ubuntu", "macOS", "Fedora"]},
        same={
            "question form": [
                "How can {tool} be installed on {system}?",
                "What is the best way to install {tool} on {system}?",
            ],
            "reordering": ["On {system}, how do I install {tool}?"],
            "politeness": [
                "Can you show me how to install {tool} on {system}, please?",
                "I am trying to install {tool} on {system}. How do I do that?",
            ],
            "passive": ["How is {tool} installed on {system}?"],
            "contraction": ["How'd I install {tool} on {system}?"],
        },
        near={
            "antonym": ["How do I uninstall {tool} on {system}?", "How do I remove {tool} on {system}?"],
            "direction": ["How do I install {tool} from {system}?", "How do I install {system} on {tool}?"],
            "name": ["How do I install {tool2} on {system}?", "How do I install {tool} on {system2}?"],
            "scope": [
                "How do I install {tool} on {system} offline?",
                "How do I install an old version of {tool} on {system}?",
            ],
            "other verb": ["How do I update {tool} on {system}?", "How do I configure {tool} on {system}?"],
        },
    ),
    Template(
        "percent",
        "What is {n} percent of {m}?",
        slots={"n": ["5", "15", "20", "75"], "m": ["80", "120", "640", "3500"]},
        same={
            "contraction": ["What's {n} percent of {m}?"],
            "question form": ["How much is {n} percent of {m}?", "Work out {n} percent of {m}."],
            "symbol": ["What is {n}% of {m}?"],
            "politeness": ["Could you please compute {n} percent of {m}?"],
        },
        near={
            "number": ["What is {n2} percent of {m}?", "What is {n} percent of {m2}?"],
            "swapped": ["What is {m} percent of {n}?"],
            "unit": ["What is {n} permille of {m}?", "What is {n} percent of {m} dollars?"],
            "scope": ["What is {n} percent more than {m}?", "What is {n} percent off {m}?"],
        },
    ),
    Template(
        "age",
        "How old must you be to {act} in {place}?",
        slots={"act": ["drive", "vote", "marry", "work"], "place": ["Texas", "Italy", "Scotland", "Japan"]},
        same={
            "question form": ["What age must you be to {act} in {place}?", "At what age can you {act} in {place}?"],
            "reordering": ["In {place}, how old must you be to {act}?", "To {act} in {place}, how old must you be?"],
            "politeness": ["Please tell me how old you must be to {act} in {place}."],
            "synonym": ["How old do you have to be to {act} in {place}?"],
        },
        near={
            "name": ["How old must you be to {act2} in {place}?", "How old must you be to {act} in {place2}?"],
            "question word": [
                "How rich must you be to {act} in {place}?",
                "How healthy must you be to {act} in {place}?",
            ],
            "antonym": ["How young must you be to {act} in {place}?"],
            "modality": ["How old can you be to {act} in {place}?", "How old should you be to {act} in {place}?"],
            "negated": ["How old must you be to not {act} in {place}?"],
        },
    ),
    Template(
        "invent",
        "Who invented the {thing}?",
        slots={"thing": ["telephone", "zipper", "microscope", "bicycle", "dynamo", "stapler"]},
        same={
            "passive": ["Who was the {thing} invented by?", "By whom was the {thing} invented?"],
            "question form": ["Who is the inventor of the {thing}?", "Which person invented the {thing}?"],
            "politeness": ["Any idea who invented the {thing}?", "Tell me who invented the {thing}."],
            "synonym": ["Who devised the {thing}?"],
        },
        near={
            "name": ["Who invented the {thing2}?"],
            "question word": [
                "When was the {thing} invented?",
                "Where was the {thing} invented?",
                "What did the inventor of the {thing} do?",
            ],
            "other verb": ["Who improved the {thing}?", "Who sold the {thing}?", "Who banned the {thing}?"],
            "scope": ["Who first sold the {thing}?", "Who invented the modern {thing}?"],
        },
    ),
    Template(
        "export",
        "Which countries {verb} the most {thing}?",
        slots={"verb": ["import", "export", "buy", "sell"], "thing": ["coffee", "copper", "wheat", "timber"]},
        same={
            "question form": [
                "What countries {verb} the most {thing}?",
                "Which are the countries that {verb} the most {thing}?",
            ],
            "synonym": ["Which nations {verb} the most {thing}?"],
            "politeness": ["Please name the countries that {verb} the most {thing}."],
            "passive": ["By which countries is the most {thing} {verb}ed?"],
        },
        near={
            "antonym": ["Which countries {verb2} the most {thing}?", "Which countries {verb} the least {thing}?"],
            "name": ["Which countries {verb} the most {thing2}?", "Which companies {verb} the most {thing}?"],
            "quantifier": [
                "Which countries {verb} all the {thing}?",
                "Which countries {verb} some {thing}?",
                "Which country {verb}s the most {thing} per person?",
            ],
            "negated": ["Which countries {verb} no {thing}?", "Which countries do not {verb} {thing}?"],
        },
    ),
    Template(
        "meeting",
        "Write an email that moves the meeting with {who} from {d} to {e}.",
        slots={
            "who": ["Karen", "the auditors", "Mr. Patel", "sales"],
            "d": ["Monday", "Tuesday", "9 am", "noon"],
            "e": ["Thursday", "Wednesday", "4 pm", "10 am"],
        },
        same={
            "politeness": [
                "Please write an email that moves the meeting with {who} from {d} to {e}.",
                "Could you write an email that moves the meeting with {who} from {d} to {e}?",
            ],
            "reordering": ["Write an email that moves the meeting with {who} to {e} from {d}."],
            "synonym": [
                "Compose an email that moves the meeting with {who} from {d} to {e}.",
                "Draft an email that shifts the meeting with {who} from {d} to {e}.",
            ],
            "question form": ["How would I write an email that moves the meeting with {who} from {d} to {e}?"],
        },
        near={
            "time": [
                "Write an email that moves the meeting with {who} from {e} to {d}.",
                "Write an email that moves the meeting with {who} from {d} to {e2}.",
            ],
            "direction": ["Write an email that moves the meeting from {who} with {d} to {e}."],
            "antonym": ["Write an email that cancels the meeting with {who} from {d} to {e}."],
            "name": [
                "Write an email that moves the meeting with {who2} from {d} to {e}.",
                "Write a letter that moves the meeting with {who} from {d} to {e}.",
            ],
            "negated": ["Write an email that does not move the meeting with {who} from {d} to {e}."],
        },
    ),
    Template(
        "translate",
        "Translate '{text}' from {a} to {b}.",
        slots={
            "text": ["good night", "the red house", "I am hungry", "see you soon"],
            "a": ["English", "Dutch", "Danish"],
            "b": ["Spanish", "Korean", "Greek"],
        },
        same={
            "politeness": [
                "Please translate '{text}' from {a} to {b}.",
                "Would you translate '{text}' from {a} to {b}?",
            ],
            "reordering": ["From {a} to {b}, translate '{text}'.", "Translate '{text}' to {b} from {a}."],
            "question form": [
                "What is the {b} translation of '{text}' from {a}?",
                "How do I translate '{text}' from {a} to {b}?",
            ],
            "synonym": ["Translate '{text}' from {a} into {b}."],
        },
        near={
            "direction": ["Translate '{text}' from {b} to {a}.", "Translate '{text}' to {a} from {b}."],
            "name": ["Translate '{text2}' from {a} to {b}.", "Translate '{text}' from {a} to {b2}."],
            "negated": ["Do not translate '{text}' from {a} to {b}."],
        },
    ),
    Template(
        "melt",
        "At what temperature does {thing} {verb}?",
        slots={"thing": ["lead", "chocolate", "candle wax", "tin"], "verb": ["melt", "boil", "burn", "harden"]},
        same={
            "question form": [
                "What temperature does {thing} {verb} at?",
                "What is the temperature at which {thing} {verb}s?",
                "How hot must it be for {thing} to {verb}?",
            ],
            "politeness": ["Would you please tell me at what temperature {thing} {verb}s?"],
            "reordering": ["{thing} {verb}s at what temperature?"],
        },
        near={
            "antonym": [
                "At what temperature does {thing} freeze?",
                "At what temperature does {thing} {verb2}?",
                "At what temperature does {thing} solidify?",
            ],
            "name": ["At what temperature does {thing2} {verb}?", "At what pressure does {thing} {verb}?"],
            "unit": [
                "At what temperature in kelvin does {thing} {verb}?",
                "At what temperature in Fahrenheit does {thing} {verb}?",
            ],
            "negated": ["At what temperature does {thing} not {verb}?"],
        },
    ),
    Template(
        "loan",
        "How much interest do I pay on a {n} {cur} loan over {m} years?",
        slots={"n": ["5000", "12,000", "250000", "900"], "cur": ["dollar", "euro", "pound"], "m": ["3", "10", "25"]},
        same={
            "reordering": ["Over {m} years, how much interest do I pay on a {n} {cur} loan?"],
            "question form": [
                "What interest do I pay on a {n} {cur} loan over {m} years?",
                "How much interest is paid on a {n} {cur} loan over {m} years?",
            ],
            "politeness": ["Please calculate how much interest I pay on a {n} {cur} loan over {m} years."],
        },
        near={
            "number": [
                "How much interest do I pay on a {n2} {cur} loan over {m} years?",
                "How much interest do I pay on a {n} {cur} loan over {m2} years?",
            ],
            "unit": [
                "How much interest do I pay on a {n} {cur2} loan over {m} years?",
                "How much interest do I pay on a {n} {cur} loan over {m} months?",
            ],
            "antonym": [
                "How much interest do I earn on a {n} {cur} loan over {m} years?",
                "How much interest do I receive on a {n} {cur} loan over {m} years?",
            ],
            "name": ["How much tax do I pay on a {n} {cur} loan over {m} years?"],
        },
    ),
    Template(
        "clean",
        "What removes {a} from {b}?",
        slots={"a": ["red wine", "ink", "rust", "grease"], "b": ["wool", "cotton", "steel", "marble"]},
        same={
            "question form": ["What can I use to remove {a} from {b}?", "What will remove {a} from {b}?"],
            "passive": ["By what is {a} removed from {b}?"],
            "politeness": ["Excuse me, what removes {a} from {b}?"],
            "synonym": ["What takes {a} out of {b}?", "What eliminates {a} from {b}?"],
        },
        near={
            "swapped": ["What removes {b} from {a}?"],
            "direction": ["What removes {a} with {b}?", "What puts {a} into {b}?"],
            "antonym": ["What adds {a} to {b}?"],
            "name": ["What removes {a2} from {b}?", "What removes {a} from {b2}?"],
            "negated": ["What never removes {a} from {b}?", "What doesn't remove {a} from {b}?"],
            "question word": ["Who removes {a} from {b}?", "Why does {a} come from {b}?"],
        },
    ),
    Template(
        "symptom",
        "What are the {kind} symptoms of {disease}?",
        slots={"kind": ["early", "late", "mild", "severe"], "disease": ["measles", "asthma", "anemia", "gout"]},
        same={
            "contraction": ["What're the {kind} symptoms of {disease}?"],
            "question form": [
                "Which are the {kind} symptoms of {disease}?",
                "What {kind} symptoms does {disease} have?",
            ],
            "politeness": ["Please list the {kind} symptoms of {disease}."],
            "reordering": ["For {disease}, what are the {kind} symptoms?"],
            "synonym": ["What are the {kind} signs of {disease}?"],
        },
        near={
            "antonym": ["What are the {kind2} symptoms of {disease}?"],
            "name": ["What are the {kind} symptoms of {disease2}?", "What are the {kind} causes of {disease}?"],
            "quantifier": ["What are all symptoms of {disease}?", "What is the most {kind} symptom of {disease}?"],
            "scope": ["What are the {kind} symptoms of {disease} in children?"],
        },
    ),
    Template(
        "sun",
        "Is {a} {cmp} than {b}?",
        slots={
            "a": ["Venus", "a panther", "gold", "a ferry"],
            "b": ["Mercury", "a jaguar", "silver", "a canoe"],
            "cmp": ["heavier", "older", "brighter", "faster"],
        },
        same={
            "question form": ["Is it the case that {a} is {cmp} than {b}?"],
            "politeness": [
                "Please let me know if {a} is {cmp} than {b}.",
                "Can you confirm that {a} is {cmp} than {b}?",
            ],
            "reordering": ["Compared with {b}, is {a} {cmp}?"],
        },
        near={
            "swapped": ["Is {b} {cmp} than {a}?"],
            "antonym": [
                "Is {a} lighter than {b}?",
                "Is {a} younger than {b}?",
                "Is {a} slower than {b}?",
                "Is {a} dimmer than {b}?",
            ],
            "quantifier": ["Is {a} much {cmp} than {b}?", "Is {a} as {cmp} as {b}?", "Is {a} twice {cmp} than {b}?"],
            "negated": ["Is {a} no {cmp} than {b}?"],
        },
    ),
    Template(
        "rule",
        "Are {who} allowed to {act} in the {place}?",
        slots={
            "who": ["dogs", "visitors", "children", "students"],
            "act": ["eat", "sleep", "swim", "play"],
            "place": ["library", "garden", "museum", "pool"],
        },
        same={
            "question form": ["May {who} {act} in the {place}?", "Is it allowed for {who} to {act} in the {place}?"],
            "reordering": ["In the {place}, are {who} allowed to {act}?"],
            "politeness": ["Could you please check whether {who} are allowed to {act} in the {place}?"],
            "synonym": ["Are {who} permitted to {act} in the {place}?"],
        },
        near={
            "antonym": ["Are {who} forbidden to {act} in the {place}?", "Are {who} required to {act} in the {place}?"],
            "negated": [
                "Are {who} not allowed to {act} in the {place}?",
                "Aren't {who} allowed to {act} in the {place}?",
            ],
            "direction": [
                "Are {who} allowed to {act} outside the {place}?",
                "Are {who} allowed to {act} near the {place}?",
            ],
            "quantifier": [
                "Are all {who} allowed to {act} in the {place}?",
                "Are only {who} allowed to {act} in the {place}?",
            ],
            "name": ["Are {who2} allowed to {act} in the {place}?", "Are {who} allowed to {act2} in the {place}?"],
            "time": [
                "Were {who} allowed to {act} in the {place}?",
                "Are {who} always allowed to {act} in the {place}?",
            ],
        },
    ),
    Template(
        "login",
        "Why does the {app} {verb} when I {act}?",
        slots={
            "app": ["server", "printer", "browser", "camera"],
            "verb": ["crash", "restart", "stop", "hang"],
            "act": ["log in", "press save", "open a file", "plug it in"],
        },
        same={
            "reordering": ["When I {act}, why does the {app} {verb}?"],
            "question form": ["How come the {app} {verb}es when I {act}?", "What makes the {app} {verb} when I {act}?"],
            "politeness": ["Please help: why does the {app} {verb} when I {act}?"],
        },
        near={
            "time": [
                "Why does the {app} {verb} before I {act}?",
                "Why does the {app} {verb} after I {act}?",
                "Why did the {app} {verb} when I {act}?",
            ],
            "negated": [
                "Why doesn't the {app} {verb} when I {act}?",
                "Why does the {app} {verb} when I don't {act}?",
                "Why does the {app} {verb} unless I {act}?",
            ],
            "antonym": ["Why does the {app} start when I {act}?"],
            "name": ["Why does the {app2} {verb} when I {act}?", "Why does the {app} {verb2} when I {act}?"],
            "swapped": ["Why do I {act} when the {app} {verb}s?"],
        },
    ),
    Template(
        "dose",
        "How many {unit} of {thing} are in a {food}?",
        slots={
            "unit": ["grams", "milligrams", "calories"],
            "thing": ["sugar", "fat", "fiber", "protein"],
            "food": ["banana", "bagel", "croissant", "burger"],
        },
        same={
            "question form": [
                "How many {unit} of {thing} does a {food} have?",
                "What number of {unit} of {thing} is in a {food}?",
            ],
            "reordering": ["In a {food}, how many {unit} of {thing} are there?"],
            "politeness": ["Please say how many {unit} of {thing} are in a {food}."],
            "synonym": ["How many {unit} of {thing} does a {food} contain?"],
        },
        near={
            "unit": [
                "How many {unit2} of {thing} are in a {food}?",
                "How many ounces of {thing} are in a {food}?",
                "How many teaspoons of {thing} are in a {food}?",
            ],
            "name": ["How many {unit} of {thing2} are in a {food}?", "How many {unit} of {thing} are in a {food2}?"],
            "number": [
                "How many {unit} of {thing} are in 2 {food}s?",
                "How many {unit} of {thing} are in half a {food}?",
            ],
            "direction": ["How many {unit} of {food} are in a {thing}?"],
        },
    ),
    Template(
        "hire",
        "Can a {a} fire a {b}?",
        slots={"a": ["manager", "director", "coach", "landlord"], "b": ["worker", "player", "clerk", "cook"]},
        same={
            "passive": ["Can a {b} be fired by a {a}?"],
            "question form": ["Is a {a} able to fire a {b}?", "Is it possible for a {a} to fire a {b}?"],
            "politeness": ["I was asking myself whether a {a} can fire a {b}.", "Tell me, can a {a} fire a {b}?"],
            "synonym": ["Can a {a} dismiss a {b}?"],
        },
        near={
            "antonym": ["Can a {a} hire a {b}?", "Can a {a} keep a {b}?"],
            "swapped": ["Can a {b} fire a {a}?", "Can a {a} be fired by a {b}?"],
            "negated": ["Can a {a} not fire a {b}?", "Can't a {a} fire a {b}?"],
            "modality": ["Must a {a} fire a {b}?", "Should a {a} fire a {b}?", "Would a {a} fire a {b}?"],
            "quantifier": ["Can any {a} fire every {b}?"],
        },
    ),
    Template(
        "history",
        "What happened in {place} in {year}?",
        slots={"place": ["Hungary", "Cuba", "Iceland", "Seoul"], "year": ["1956", "1962", "2008", "1988"]},
        same={
            "reordering": ["In {year}, what happened in {place}?", "What happened in {year} in {place}?"],
            "politeness": ["Can you tell me what happened in {place} in {year}?"],
            "synonym": ["What took place in {place} in {year}?", "What occurred in {place} in {year}?"],
            "question form": ["What events happened in {place} in {year}?"],
        },
        near={
            "time": [
                "What happened in {place} before {year}?",
                "What happened in {place} since {year}?",
                "What happened in {place} until {year}?",
            ],
            "number": ["What happened in {place} in {year2}?"],
            "name": ["What happened in {place2} in {year}?"],
            "negated": ["What did not happen in {place} in {year}?"],
            "quantifier": ["What rarely happened in {place} in {year}?"],
        },
    ),
    Template(
        "stock",
        "Explain why the {thing} {verb} in {when}.",
        slots={
            "thing": ["price of oil", "value of the yen", "birth rate", "demand for steel"],
            "verb": ["rose", "fell", "doubled", "collapsed"],
            "when": ["March", "2015", "the spring", "the 1970s"],
        },
        same={
            "question form": [
                "Why did the {thing} {verb} in {when}?",
                "What is the reason the {thing} {verb} in {when}?",
            ],
            "reordering": ["Explain why in {when} the {thing} {verb}."],
            "politeness": ["Please explain to me why the {thing} {verb} in {when}."],
        },
        near={
            "antonym": ["Explain why the {thing} {verb2} in {when}.", "Explain why the {thing} recovered in {when}."],
            "time": [
                "Explain why the {thing} {verb} in {when2}.",
                "Explain why the {thing} {verb} after {when}.",
                "Explain why the {thing} will fall in {when}.",
            ],
            "name": ["Explain why the {thing2} {verb} in {when}."],
            "negated": ["Explain why the {thing} hardly {verb} in {when}."],
        },
    ),
    Template(
        "garden",
        "When is the best time to {act} {plant}?",
        slots={"act": ["plant", "prune", "water", "harvest"], "plant": ["roses", "tomatoes", "garlic", "apple trees"]},
        same={
            "contraction": ["When's the best time to {act} {plant}?"],
            "question form": ["What is the best time to {act} {plant}?", "When should I {act} {plant}?"],
            "politeness": ["Hi! When is the best time to {act} {plant}? Thank you."],
            "passive": ["When are {plant} best {act}ed?"],
            "synonym": ["When is the ideal time to {act} {plant}?"],
        },
        near={
            "antonym": ["When is the worst time to {act} {plant}?"],
            "name": ["When is the best time to {act} {plant2}?", "When is the best time to {act2} {plant}?"],
            "question word": ["Where is the best place to {act} {plant}?", "Who is the best person to {act} {plant}?"],
            "negated": ["When is the best time not to {act} {plant}?"],
            "time": ["When was the best time to {act} {plant}?", "When is the earliest time to {act} {plant}?"],
        },
    ),
    Template(
        "distance",
        "How far is {a} from {b} in {unit}?",
        slots={
            "a": ["Earth", "Dublin", "Perth", "Mecca"],
            "b": ["the Sun", "Cork", "Adelaide", "Medina"],
            "unit": ["kilometers", "miles", "light minutes"],
        },
        same={
            "question form": [
                "What is the distance from {a} to {b} in {unit}?",
                "How far away is {a} from {b} in {unit}?",
            ],
            "reordering": ["In {unit}, how far is {a} from {b}?"],
            "politeness": ["May I ask how far {a} is from {b} in {unit}?"],
        },
        near={
            "unit": [
                "How far is {a} from {b} in {unit2}?",
                "How far is {a} from {b} in hours?",
                "How far is {a} from {b} in nautical miles?",
            ],
            "name": ["How far is {a2} from {b}  in {unit}?", "How far is {a} from {b2} in {unit}?"],
            "question word": ["How long is {a} from {b} in {unit}?", "How big is {a} from {b} in {unit}?"],
            "antonym": ["How near is {a} to {b} in {unit} at its closest?"],
        },
    ),
    Template(
        "merge",
        "How do I merge branch {a} into branch {b} in git?",
        slots={"a": ["dev", "feature", "hotfix", "docs"], "b": ["main", "release", "staging", "master"]},
        same={
            "reordering": ["In git, how do I merge branch {a} into branch {b}?"],
            "question form": [
                "How can I merge branch {a} into branch {b} in git?",
                "How to merge branch {a} into branch {b} in git?",
            ],
            "passive": ["How is branch {a} merged into branch {b} in git?"],
            "politeness": ["Please tell me how to merge branch {a} into branch {b} in git."],
        },
        near={
            "direction": [
                "How do I merge branch {b} into branch {a} in git?",
                "How do I merge branch {a} out of branch {b} in git?",
            ],
            "antonym": [
                "How do I split branch {a} into branch {b} in git?",
                "How do I unmerge branch {a} from branch {b} in git?",
            ],
            "name": ["How do I merge branch {a2} into branch {b} in git?"],
            "other verb": [
                "How do I rename branch {a} into branch {b} in git?",
                "How do I rebase branch {a} into branch {b} in git?",
            ],
            "negated": ["How do I merge branch {a} without branch {b} in git?"],
        },
    ),
    Template(
        "borrow",
        "How much money did {a} lend {b}?",
        slots={"a": ["Alice", "Victor", "the bank", "Uncle Ben"], "b": ["Bruno", "Sarah", "the bakery", "Nadia"]},
        same={
            "passive": ["How much money was {b} lent by {a}?"],
            "question form": ["What sum of money did {a} lend {b}?", "How much money did {a} lend to {b}?"],
            "politeness": ["Please work out how much money {a} lent {b}."],
            "synonym": ["How much money did {a} loan {b}?"],
        },
        near={
            "antonym": ["How much money did {a} borrow from {b}?", "How much money did {a} owe {b}?"],
            "swapped": ["How much money did {b} lend {a}?", "How much money was {a} lent by {b}?"],
            "direction": ["How much money did {a} lend for {b}?"],
            "negated": ["How much money did {a} refuse to lend {b}?"],
            "time": ["How much money will {a} lend {b}?", "How much money does {a} lend {b} each year?"],
        },
    ),
    Template(
        "cook",
        "How long do I {verb} a {n} kg {meat}?",
        slots={
            "verb": ["roast", "grill", "smoke", "thaw"],
            "n": ["1", "2", "3.5", "6"],
            "meat": ["turkey", "ham", "salmon", "goose"],
        },
        same={
            "question form": ["How long should I {verb} a {n} kg {meat}?", "For how long do I {verb} a {n} kg {meat}?"],
            "politeness": ["Can you please tell me how long to {verb} a {n} kg {meat}?"],
            "passive": ["How long is a {n} kg {meat} {verb}ed?"],
            "synonym": ["How much time do I {verb} a {n} kg {meat}?"],
        },
        near={
            "unit": ["How long do I {verb} a {n} pound {meat}?", "How long do I {verb} a {n} g {meat}?"],
            "number": ["How long do I {verb} a {n2} kg {meat}?"],
            "antonym": ["How long do I {verb2} a {n} kg {meat}?", "How long do I cool a {n} kg {meat}?"],
            "name": ["How long do I {verb} a {n} kg {meat2}?"],
            "question word": ["How hot do I {verb} a {n} kg {meat}?", "How often do I {verb} a {n} kg {meat}?"],
        },
    ),
)
