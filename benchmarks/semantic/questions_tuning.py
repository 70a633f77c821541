"""The tuning half: what the gate's weights are learned from. Nothing here appears in the test half, nor the reverse.

A template is a question with slots; `same` are ways to ask it, `near` are questions that look alike and are others.
`{x2}` is another value of slot `x` than `{x}`.
"""

from __future__ import annotations

from benchmarks.semantic.template import Template

TEMPLATES = (
    Template(
        "capital",
        "What is the capital of {country}?",
        slots={"country": ["France", "Japan", "Kenya", "Peru", "Norway", "Egypt", "Canada", "Chile", "Poland"]},
        same={
            "contraction": ["What's the capital of {country}?"],
            "politeness": [
                "Could you please tell me what the capital of {country} is?",
                "Hi, what is the capital of {country}? Thanks!",
            ],
            "question form": ["Tell me the capital of {country}.", "Which city is the capital of {country}?"],
            "reordering": ["{country}'s capital is which city?"],
            "synonym": ["What is the capital city of {country}?"],
        },
        near={
            "name": ["What is the capital of {country2}?"],
            "question word": ["Where is the capital of {country}?", "How big is the capital of {country}?"],
            "negated": ["What is not the capital of {country}?"],
        },
    ),
    Template(
        "flight",
        "How much does a flight from {a} to {b} cost?",
        slots={"a": ["Oslo", "Rome", "Delhi", "Boston", "Lima"], "b": ["Vienna", "Tokyo", "Cairo", "Sydney", "Denver"]},
        same={
            "politeness": ["Please tell me how much a flight from {a} to {b} costs."],
            "question form": [
                "What does a flight from {a} to {b} cost?",
                "What is the cost of a flight from {a} to {b}?",
            ],
            "reordering": ["How much does a flight to {b} from {a} cost?"],
            "synonym": ["What is the price of a flight from {a} to {b}?"],
        },
        near={
            "swapped": ["How much does a flight from {b} to {a} cost?", "How much does a flight to {a} from {b} cost?"],
            "name": ["How much does a flight from {a2} to {b} cost?", "How much does a flight from {a} to {b2} cost?"],
            "question word": [
                "How long does a flight from {a} to {b} take?",
                "How often does a flight from {a} to {b} go?",
            ],
        },
    ),
    Template(
        "chase",
        "Why does the {a} chase the {b}?",
        slots={"a": ["dog", "wolf", "hawk", "fox"], "b": ["cat", "rabbit", "mouse", "hen"]},
        same={
            "passive": ["Why is the {b} chased by the {a}?"],
            "politeness": ["Can you explain why the {a} chases the {b}?"],
            "question form": [
                "For what reason does the {a} chase the {b}?",
                "What is the reason that the {a} chases the {b}?",
            ],
        },
        near={
            "swapped": ["Why does the {b} chase the {a}?", "Why is the {a} chased by the {b}?"],
            "negated": ["Why doesn't the {a} chase the {b}?", "Why does the {a} never chase the {b}?"],
            "question word": ["How does the {a} chase the {b}?", "When does the {a} chase the {b}?"],
            "name": ["Why does the {a2} chase the {b}?"],
        },
    ),
    Template(
        "product",
        "What is {n} times {m}?",
        slots={"n": ["7", "12", "15", "23", "48"], "m": ["3", "9", "11", "16", "60"]},
        same={
            "contraction": ["What's {n} times {m}?"],
            "politeness": ["Please tell me what {n} times {m} is."],
            "question form": ["How much is {n} times {m}?", "Calculate {n} times {m}."],
            "synonym": ["What is {n} multiplied by {m}?"],
        },
        near={
            "number": ["What is {n2} times {m}?", "What is {n} times {m2}?", "What is {n} times {m} times {m}?"],
            "operator": ["What is {n} plus {m}?", "What is {n} divided by {m}?"],
        },
    ),
    Template(
        "python-sort",
        "How do I sort a {thing} in {language}?",
        slots={
            "thing": ["list", "dictionary", "string", "matrix", "table"],
            "language": ["Python", "Rust", "Java", "Go", "Swift"],
        },
        same={
            "question form": [
                "How can I sort a {thing} in {language}?",
                "What is the way to sort a {thing} in {language}?",
                "How to sort a {thing} in {language}",
            ],
            "reordering": ["In {language}, how do I sort a {thing}?"],
            "politeness": [
                "I'd like to know how to sort a {thing} in {language}.",
                "Show me how to sort a {thing} in {language}, please.",
            ],
            "passive": ["How is a {thing} sorted in {language}?"],
            "synonym": ["How do I order a {thing} in {language}?"],
        },
        near={
            "name": ["How do I sort a {thing} in {language2}?", "How do I sort a {thing2} in {language}?"],
            "question word": ["Why do I sort a {thing} in {language}?", "When do I sort a {thing} in {language}?"],
            "negated": [
                "How do I not sort a {thing} in {language}?",
                "How do I avoid sorting a {thing} in {language}?",
            ],
            "qualifier": [
                "How do I sort a {thing} of numbers in {language}?",
                "How do I partially sort a {thing} in {language}?",
            ],
        },
    ),
    Template(
        "convert-number",
        "Write {n} as a roman numeral.",
        slots={"n": ["14", "40", "1999", "88", "2024", "6"]},
        same={
            "politeness": ["Please write {n} as a roman numeral.", "Could you write {n} as a roman numeral for me?"],
            "question form": ["How is {n} written as a roman numeral?", "How do I write {n} as a roman numeral?"],
            "passive": ["How is {n} written as a roman numeral?"],
        },
        near={
            "number": ["Write {n2} as a roman numeral.", "Write {n}0 as a roman numeral."],
            "name": ["Write {n} as a binary number.", "Write {n} as a hexadecimal numeral."],
        },
    ),
    Template(
        "author",
        "Who wrote {book}?",
        slots={"book": ["Hamlet", "Emma", "Dracula", "Ulysses", "Dune", "Faust"]},
        same={
            "passive": ["By whom was {book} written?", "{book} was written by whom?"],
            "question form": ["Who is the author of {book}?", "Which author wrote {book}?"],
            "politeness": ["Do you know who wrote {book}?", "Please tell me who wrote {book}."],
        },
        near={
            "name": ["Who wrote {book2}?"],
            "question word": ["When was {book} written?", "Where was {book} written?", "Why was {book} written?"],
            "negated": ["Who did not write {book}?"],
            "other verb": ["Who translated {book}?", "Who read {book}?", "Who published {book}?"],
        },
    ),
    Template(
        "allergic",
        "Can people who are allergic to {a} eat {b}?",
        slots={"a": ["milk", "eggs", "peanuts", "shellfish"], "b": ["cheese", "pasta", "bread", "tofu"]},
        same={
            "question form": ["Is it possible for people who are allergic to {a} to eat {b}?"],
            "politeness": [
                "Can you tell me whether people who are allergic to {a} can eat {b}?",
                "I wonder if people who are allergic to {a} can eat {b}.",
            ],
            "synonym": ["Can persons who are allergic to {a} eat {b}?"],
        },
        near={
            "negated": [
                "Can people who are not allergic to {a} eat {b}?",
                "Can people who aren't allergic to {a} eat {b}?",
            ],
            "swapped": ["Can people who are allergic to {b} eat {a}?"],
            "name": ["Can people who are allergic to {a2} eat {b}?", "Can people who are allergic to {a} eat {b2}?"],
            "question word": ["Why can people who are allergic to {a} eat {b}?"],
        },
    ),
    Template(
        "teach",
        "How did {a} help {b}?",
        slots={"a": ["Anna", "Peter", "Maria", "Tom"], "b": ["Julia", "Frank", "Oscar", "Lena"]},
        same={
            "passive": ["How was {b} helped by {a}?"],
            "question form": ["In what way did {a} help {b}?"],
            "politeness": ["Please explain how {a} helped {b}."],
            "synonym": ["How did {a} aid {b}?", "How did {a} assist {b}?"],
        },
        near={
            "swapped": ["How did {b} help {a}?", "How was {a} helped by {b}?"],
            "name": ["How did {a2} help {b}?"],
            "question word": ["Why did {a} help {b}?", "When did {a} help {b}?", "Where did {a} help {b}?"],
            "negated": ["How did {a} not help {b}?"],
            "tense": ["How will {a} help {b}?", "How does {a} help {b}?"],
        },
    ),
    Template(
        "boil",
        "How many minutes should I boil {n} {food}?",
        slots={"n": ["2", "3", "6", "10"], "food": ["eggs", "potatoes", "carrots", "beets"]},
        same={
            "question form": ["For how many minutes should I boil {n} {food}?"],
            "politeness": ["Please tell me how many minutes I should boil {n} {food}."],
            "passive": ["How many minutes should {n} {food} be boiled?"],
        },
        near={
            "number": ["How many minutes should I boil {n2} {food}?"],
            "name": ["How many minutes should I boil {n} {food2}?"],
            "negated": ["How many minutes should I not boil {n} {food}?"],
            "question word": ["Why should I boil {n} {food}?"],
            "other verb": ["How many minutes should I fry {n} {food}?", "How many minutes should I cool {n} {food}?"],
        },
    ),
    Template(
        "meaning",
        "What does the word {word} mean?",
        slots={"word": ["serene", "obtuse", "frugal", "tacit", "lucid", "candid"]},
        same={
            "question form": ["What is the meaning of the word {word}?", "What is meant by the word {word}?"],
            "politeness": ["Could you explain what the word {word} means?", "Hello! What does the word {word} mean?"],
            "synonym": ["What does the word {word} signify?"],
            "passive": ["What is meant by the word {word}?"],
        },
        near={
            "name": ["What does the word {word2} mean?"],
            "question word": ["Why does the word {word} mean that?", "Where does the word {word} come from?"],
            "negated": ["What does the word {word} not mean?"],
            "qualifier": ["What does the word {word} mean in law?"],
        },
    ),
    Template(
        "sugar",
        "Is {a} healthier than {b}?",
        slots={"a": ["honey", "butter", "rice", "tea"], "b": ["sugar", "margarine", "pasta", "coffee"]},
        same={
            "politeness": [
                "Please tell me if {a} is healthier than {b}.",
                "Do you know whether {a} is healthier than {b}?",
            ],
            "question form": ["Is it true that {a} is healthier than {b}?", "{a} is healthier than {b}, right?"],
            "reordering": ["Than {b}, is {a} healthier?"],
        },
        near={
            "swapped": ["Is {b} healthier than {a}?"],
            "negated": ["Isn't {a} no healthier than {b}?", "Is {a} not healthier than {b}?"],
            "name": ["Is {a} healthier than {b2}?", "Is {a2} healthier than {b}?"],
            "question word": ["Why is {a} healthier than {b}?", "How much healthier is {a} than {b}?"],
            "other adjective": ["Is {a} cheaper than {b}?", "Is {a} sweeter than {b}?"],
        },
    ),
    Template(
        "plants",
        "Why do plants need {thing}?",
        slots={"thing": ["water", "light", "nitrogen", "soil", "carbon dioxide"]},
        same={
            "question form": ["What do plants need {thing} for?", "For what reason do plants need {thing}?"],
            "passive": ["Why is {thing} needed by plants?"],
            "politeness": ["Can you tell me why plants need {thing}?"],
            "synonym": ["Why do plants require {thing}?"],
        },
        near={
            "name": ["Why do plants need {thing2}?", "Why do animals need {thing}?"],
            "negated": ["Why don't plants need {thing}?", "Why do plants need no {thing}?"],
            "question word": ["How do plants get {thing}?", "How much {thing} do plants need?"],
            "swapped": ["Why does {thing} need plants?"],
        },
    ),
    Template(
        "story",
        "Write a short story about a {a} and a {b}.",
        slots={"a": ["pirate", "robot", "queen", "baker"], "b": ["parrot", "dragon", "ghost", "whale"]},
        same={
            "politeness": [
                "Please write a short story about a {a} and a {b}.",
                "Could you write me a short story about a {a} and a {b}?",
            ],
            "reordering": ["Write a short story about a {b} and a {a}."],
            "synonym": ["Compose a short story about a {a} and a {b}.", "Write a short tale about a {a} and a {b}."],
        },
        near={
            "name": ["Write a short story about a {a2} and a {b}.", "Write a short poem about a {a} and a {b}."],
            "negated": [
                "Write a short story about a {a} and no {b}.",
                "Write a short story about a {a} without a {b}.",
            ],
            "qualifier": ["Write a sad short story about a {a} and a {b}.", "Write a short story about a {a}."],
        },
    ),
    Template(
        "parents",
        "Was {a} the {relation} of {b}?",
        slots={
            "a": ["Isaac", "Ruth", "Henry", "Edith"],
            "b": ["George", "Clara", "Ivan", "Nora"],
            "relation": ["teacher", "boss", "doctor", "lawyer"],
        },
        same={
            "reordering": ["Was {a} {b}'s {relation}?"],
            "question form": [
                "Is it true that {a} was the {relation} of {b}?",
                "{a} was the {relation} of {b}, right?",
            ],
            "politeness": ["I want to know whether {a} was the {relation} of {b}."],
        },
        near={
            "swapped": ["Was {b} the {relation} of {a}?", "Was {b} {a}'s {relation}?"],
            "negated": ["Was {a} never the {relation} of {b}?"],
            "name": ["Was {a} the {relation2} of {b}?", "Was {a2} the {relation} of {b}?"],
            "tense": ["Is {a} the {relation} of {b}?", "Will {a} be the {relation} of {b}?"],
            "question word": ["When was {a} the {relation} of {b}?"],
        },
    ),
    Template(
        "moons",
        "How many moons does {planet} have?",
        slots={"planet": ["Mars", "Jupiter", "Saturn", "Neptune", "Uranus", "Pluto"]},
        same={
            "contraction": ["How many moons has {planet} got?"],
            "question form": ["What is the number of moons of {planet}?", "How many moons are there around {planet}?"],
            "politeness": [
                "Hey, how many moons does {planet} have?",
                "I would like to know how many moons {planet} has.",
            ],
        },
        near={
            "name": ["How many moons does {planet2} have?", "How many rings does {planet} have?"],
            "question word": ["Which moons does {planet} have?", "Why does {planet} have moons?"],
            "negated": ["How many planets have no moons like {planet}?"],
            "number": ["Does {planet} have 2 moons?"],
        },
    ),
    Template(
        "lose",
        "What happens if you {verb} too much {thing}?",
        slots={"verb": ["eat", "drink", "buy", "use"], "thing": ["salt", "water", "oil", "vinegar", "caffeine"]},
        same={
            "reordering": ["If you {verb} too much {thing}, what happens?"],
            "question form": [
                "What happens when you {verb} too much {thing}?",
                "What will happen if you {verb} too much {thing}?",
            ],
            "politeness": ["Please explain what happens if you {verb} too much {thing}."],
            "synonym": ["What occurs if you {verb} too much {thing}?"],
        },
        near={
            "negated": ["What happens if you don't {verb} too much {thing}?"],
            "antonym-free": ["What happens if you {verb} {thing}?"],
            "name": ["What happens if you {verb} too much {thing2}?", "What happens if you {verb2} too much {thing}?"],
            "question word": ["Who says that you {verb} too much {thing}?"],
        },
    ),
    Template(
        "difference",
        "What is the difference between {a} and {b}?",
        slots={"a": ["a virus", "a lake", "a comet", "jam"], "b": ["a bacterium", "a sea", "an asteroid", "jelly"]},
        same={
            "contraction": ["What's the difference between {a} and {b}?"],
            "reordering": ["What is the difference between {b} and {a}?"],
            "question form": ["How does {a} differ from {b}?", "How is {a} different from {b}?"],
            "politeness": ["Explain the difference between {a} and {b}, please."],
        },
        near={
            "name": ["What is the difference between {a2} and {b}?", "What is the similarity between {a} and {b}?"],
            "negated": ["Why is there no difference between {a} and {b}?"],
            "question word": ["Who found the difference between {a} and {b}?"],
        },
    ),
    Template(
        "president",
        "Who was the {job} of {country} in {year}?",
        slots={
            "job": ["president", "king", "chancellor"],
            "country": ["Spain", "Austria", "Mexico", "Greece"],
            "year": ["1920", "1955", "1968", "1990", "2003"],
        },
        same={
            "reordering": ["In {year}, who was the {job} of {country}?", "Who was {country}'s {job} in {year}?"],
            "politeness": ["Please tell me who was the {job} of {country} in {year}."],
            "question form": ["Which person was the {job} of {country} in {year}?"],
        },
        near={
            "number": ["Who was the {job} of {country} in {year2}?"],
            "name": ["Who was the {job} of {country2} in {year}?", "Who was the {job2} of {country} in {year}?"],
            "negated": ["Who was not the {job} of {country} in {year}?"],
            "question word": ["What did the {job} of {country} do in {year}?"],
        },
    ),
    Template(
        "list",
        "Name {n} {things}.",
        slots={
            "n": ["two", "three", "five", "7", "10"],
            "things": ["rivers in Asia", "famous painters", "kinds of bread", "desert animals"],
        },
        same={
            "politeness": ["Please name {n} {things}.", "Can you name {n} {things}?"],
            "question form": ["Give me {n} {things}.", "What are {n} {things}?"],
            "synonym": ["List {n} {things}."],
        },
        near={
            "number": ["Name {n2} {things}.", "Name one hundred {things}."],
            "name": ["Name {n} {things2}."],
            "negated": ["Name {n} things that are not {things}."],
            "question word": ["Where do I find {n} {things}?"],
        },
    ),
)
