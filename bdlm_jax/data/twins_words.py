"""The words of the twins world and its general-text corpus.

Every attribute value is a concept: one known word that item titles use, and synonyms that only `knowledge` items
use. The corpus is what ties the two: it says nothing about users, interactions, audiences or the order of things.
"""

from typing import NamedTuple

KNOWN_WORDS, EVEN_SYNONYMS, ODD_SYNONYMS = 0, 1, 2

# Real synonyms, so that a language model pretrained elsewhere can bring its own knowledge of them.
CATEGORIES = (
    ("lamp", "lantern", "luminaire"),
    ("rug", "carpet", "mat"),
    ("sofa", "couch", "settee"),
    ("mug", "beaker", "tankard"),
    ("clock", "timepiece", "chronometer"),
    ("basket", "hamper", "pannier"),
    ("blanket", "quilt", "coverlet"),
    ("cabinet", "cupboard", "armoire"),
    ("bowl", "basin", "tureen"),
    ("cushion", "pillow", "bolster"),
    ("desk", "bureau", "escritoire"),
    ("kettle", "boiler", "samovar"),
)
STYLES = (
    ("rustic", "rural", "bucolic"),
    ("modern", "contemporary", "newfangled"),
    ("ornate", "lavish", "baroque"),
    ("playful", "whimsical", "jolly"),
    ("elegant", "graceful", "refined"),
    ("sturdy", "robust", "burly"),
    ("bright", "vivid", "radiant"),
    ("cosy", "snug", "homely"),
)
MATERIALS = (
    ("wooden", "timber", "oak"),
    ("metal", "steel", "iron"),
    ("ceramic", "stoneware", "earthenware"),
    ("leather", "hide", "suede"),
    ("glass", "crystal", "vitreous"),
    ("bamboo", "cane", "rattan"),
    ("wool", "fleece", "worsted"),
    ("marble", "granite", "basalt"),
)

_PLACES = (
    "harbour", "garden", "attic", "market", "river", "bakery", "orchard", "station", "library", "theatre",
    "meadow", "bridge", "tower", "valley", "island", "forest", "castle", "village", "museum", "stable",
    "chapel", "cellar", "terrace", "quarry", "lagoon", "prairie", "canyon", "tavern", "foundry", "academy",
    "dockyard", "vineyard", "lighthouse", "monastery", "courtyard", "greenhouse", "windmill", "glacier", "desert",
    "fountain",
)  # fmt: skip
_NOUN_FRAMES = (
    "the {w} stood in the {x} near the {y}",
    "they carried the {w} from the {x} to the {y}",
    "the {w} was left at the {x}",
    "in the {x} we found the old {w}",
)
_ADJECTIVE_FRAMES = (
    "at the {x} everything looked {w}",
    "the {w} one came from the {x} by the {y}",
    "it felt {w} , like the {x} and the {y}",
    "near the {x} they like it {w}",
)
_NOUN_STATEMENTS = ("the {s} is a kind of {w}", "the {w} is also called {s}", "{s} means {w}", "{w} means {s}")
_ADJECTIVE_STATEMENTS = ("{s} means {w}", "{w} means {s}", "what is {s} is {w}", "another word for {w} is {s}")


class Words(NamedTuple):
    """Tuples of concepts, each a tuple (known word, synonym, ...)."""

    category: tuple
    style: tuple
    material: tuple


def make_words(rng, *, n_categories, n_styles, n_materials, n_synonyms) -> Words:
    """Names every attribute value, with English words as far as the lists reach and coined ones (by `rng`) beyond.

    A concept has `n_synonyms` words beside the known one. No word occurs twice, or in the corpus' own sentences.
    """
    taken = {word for listed in (CATEGORIES, STYLES, MATERIALS) for concept in listed for word in concept}
    taken |= frame_words() | set(_PLACES)

    def coin():
        while True:
            syllables = [rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(3)]
            word = "".join(syllables) + str(rng.choice(list("lnrst")))
            if word not in taken:
                taken.add(word)
                return word

    def concepts(listed, n):
        named = [list(concept[: 1 + n_synonyms]) for concept in listed[:n]]
        named += [[] for _ in range(n - len(named))]
        return tuple(tuple(c + [coin() for _ in range(1 + n_synonyms - len(c))]) for c in named)

    return Words(concepts(CATEGORIES, n_categories), concepts(STYLES, n_styles), concepts(MATERIALS, n_materials))


def frame_words() -> set[str]:
    """The words that the corpus' sentence frames are made of."""
    frames = _NOUN_FRAMES + _ADJECTIVE_FRAMES + _NOUN_STATEMENTS + _ADJECTIVE_STATEMENTS
    return {word for frame in frames for word in frame.split() if "{" not in word}


def make_corpus(rng, words: Words, *, n_sentences: int) -> list[str]:
    """Writes the general text: synonyms in the company their known words keep, and plain statements (ours).

    Half of the sentences put a word in one of its concept's own places (three of them, the same for every word of
    the concept); a quarter states that two words mean the same; a quarter says so of a pair of words, as in
    "rural lantern means rustic lamp". Whole titles of three attributes never occur.
    """
    concepts = [(concept, True) for concept in words.category]
    concepts += [(concept, False) for concept in words.style + words.material]
    places = [rng.choice(_PLACES, size=3, replace=False) for _ in concepts]
    sentences = []
    for n in range(n_sentences):
        # Concepts take turns, so that every word is met about equally often.
        concept, is_noun = concepts[(n // 4) % len(concepts)]
        known, synonym = concept[0], concept[1 + rng.integers(len(concept) - 1)]
        if n % 4 < 2:
            frames = _NOUN_FRAMES if is_noun else _ADJECTIVE_FRAMES
            x, y = rng.permutation(places[(n // 4) % len(concepts)])[:2]
            word = concept[rng.integers(len(concept))]
            sentences.append(frames[rng.integers(len(frames))].format(w=word, x=x, y=y))
        elif n % 4 == 2:
            statements = _NOUN_STATEMENTS if is_noun else _ADJECTIVE_STATEMENTS
            sentences.append(statements[rng.integers(len(statements))].format(w=known, s=synonym))
        else:
            noun = words.category[rng.integers(len(words.category))] if not is_noun else concept
            adjectives = words.style + words.material if is_noun else (concept,)
            adjective = adjectives[rng.integers(len(adjectives))]
            said = f"{adjective[rng.integers(1, len(adjective))]} {noun[rng.integers(1, len(noun))]}"
            sentences.append(f"{said} means {adjective[0]} {noun[0]}")
    return [sentences[n] for n in rng.permutation(len(sentences))] if sentences else []


def make_titles(rng, words: Words, items: dict, vocabulary_I) -> list[str]:
    """Writes the items' titles, "style material category", with the words that `vocabulary_I` allows each."""
    allowed = {KNOWN_WORDS: slice(0, 1), EVEN_SYNONYMS: slice(1, None, 2), ODD_SYNONYMS: slice(2, None, 2)}
    titles = []
    columns = items["style_I"], items["material_I"], items["category_I"], vocabulary_I
    for style, material, category, vocabulary in zip(*columns):
        concepts = words.style[style], words.material[material], words.category[category]
        choices = [concept[allowed[vocabulary]] for concept in concepts]
        titles.append(" ".join(choice[rng.integers(len(choice))] for choice in choices))
    return titles
