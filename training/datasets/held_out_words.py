"""Words that no caption has, to see whether a model draws what it has not read: near names of things that it knows.

`tests/benchmarks/unknown_words.py` asks for them; `near_words` leaves them out, in the plural too.
"""

from __future__ import annotations

# What each may be drawn as, by the names of concepts.
WORDS = {
    "hound": ["dog", "dog face", "guide dog", "service dog", "poodle"],
    "hare": ["rabbit", "rabbit face"],
    "pony": ["horse", "horse face", "carousel horse"],
    "stallion": ["horse", "horse face", "horse racing"],
    "piglet": ["pig", "pig face", "boar"],
    "hog": ["pig", "pig face", "boar"],
    "calf": ["cow", "cow face", "ox", "water buffalo"],
    "hen": ["chicken", "rooster", "hatching chick", "turkey"],
    "toad": ["frog"],
    "alligator": ["crocodile", "lizard"],
    "moth": ["butterfly"],
    "mansion": ["house", "house with garden", "houses", "castle", "classical building"],
    "cottage": ["house", "house with garden", "houses", "hut", "derelict house"],
    "aircraft": ["airplane", "small airplane", "airplane arrival", "helicopter"],
    "sedan": ["automobile", "oncoming automobile", "sport utility vehicle", "taxi", "oncoming taxi"],
    "motorbike": ["motorcycle", "motor scooter"],
    "vessel": ["ship", "passenger ship", "ferry", "motor boat", "sailboat"],
    "biscuit": ["cookie", "fortune cookie"],
    "spud": ["potato", "roasted sweet potato"],
    "daisy": ["white flower", "blossom", "sunflower", "cherry blossom"],
    "fir": ["evergreen tree", "christmas tree"],
    "oak": ["deciduous tree", "evergreen tree", "chestnut"],
    "spectacles": ["glasses", "sunglasses"],
    "telly": ["television"],
    "cello": ["violin"],
    "wristwatch": ["watch"],
    "sofa": ["couch and lamp"],
    "gown": ["dress"],
    "phantom": ["ghost"],
    "bonfire": ["fire"],
}
