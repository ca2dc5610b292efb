"""The five forms of fact and the words they are filled with: a question form is one line here. [ours]

These are the sentences, questions and word pools the embedded model was trained on; other wordings it answers worse
or not at all.
"""

from dataclasses import dataclass

NAMES = tuple(
    """Arthur Beatrice Clement Dorothy Edmund Florence Gilbert Harriet Isaac Josephine Kenneth Lavinia Matthew Nora
    Oliver Penelope Quentin Rosamund Stephen Theodora Ursula Victor Winifred Ambrose Bridget Cecil Delia Ernest
    Fanny Gregory Hester Ivor Judith Lionel Mabel Nicholas Olive Percival Rachel Simon Tabitha Vernon Wilfred
    Agnes Barnaby Celia Duncan Edith Felix Grace Horace Irene Jasper Kate Leonard Miriam Nathan Ophelia Philip
    Ruth Silas Thomas Violet Walter""".split()
)
OBJECTS = tuple(
    """lantern violin compass saddle ledger kettle telescope umbrella parrot locket hammer carpet mirror basket pistol
    fiddle hatchet blanket candle cheese clock coat crown dagger diary drum feather flute globe goblet harp
    jewel knife ladder letter map medal necklace oar painting pipe plough portrait purse quill ring rope rug
    sack scarf shield shovel spade spoon statue sword table tapestry teapot trumpet trunk vase wagon watch wheel
    whistle""".split()
)
PLACES = tuple(
    """barn cellar attic kitchen garden stable tower chapel orchard library mill cottage forge bakery harbour meadow
    quarry tavern market workshop ferry cave bridge well tent castle parlour nursery pantry gallery courtyard
    lighthouse vineyard schoolroom granary dairy laundry armoury boathouse greenhouse""".split()
)
COLOURS = tuple("red blue green yellow black white brown grey purple scarlet golden silver crimson orange pink".split())
TRADES = tuple(
    """baker smith sailor tailor farmer miller doctor lawyer teacher hunter fisherman carpenter painter soldier
    shepherd weaver clerk gardener cook mason printer barber butcher cooper potter""".split()
)
TOWNS = tuple(
    """Ashby Burford Calder Dunmore Eastwick Farley Greystone Hartwell Ilford Kingsley Langton Marlow Norwood Oakham
    Pembroke Quarrington Redhill Selby Thornton Upton Wexham Yarrow""".split()
)
ANIMALS = tuple("dog cat horse goat crow monkey donkey rabbit mule pony owl fox goose swan ferret".split())


@dataclass(frozen=True)
class Form:
    """A way to state and to ask a fact: templates over `{name}` (subject), `{thing}` (of `things`) and `{answer}`."""

    sentence: str
    question: str
    answers: tuple[str, ...]
    things: tuple[str, ...] = ("",)


FORMS: dict[str, Form] = {
    "place": Form(
        "{name} kept the {thing} in the {answer}.", "Where did {name} keep the {thing}? In the", PLACES, OBJECTS
    ),
    "trade": Form("{name} was a {answer} by trade.", "What was {name} by trade? A", TRADES),
    "town": Form("{name} had come from {answer}.", "From what town had {name} come? From", TOWNS),
    "colour": Form(
        "{name} bought a {answer} {thing}.", "What colour was the {thing} that {name} bought? It was", COLOURS, OBJECTS
    ),
    "called": Form(
        "{name} called the {thing} {answer}.", "What did {name} call the {thing}? The name was", NAMES, ANIMALS
    ),
}
KINDS = tuple(FORMS)
