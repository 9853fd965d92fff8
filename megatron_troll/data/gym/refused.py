"""The data sets of reasoning-gym that cannot be trained on, found by reading and trying every scorer."""

RELEASE = "0.1.25"
REFUSED = {
    "boxnet": "its scorer accepts plans that move the targets to the boxes, and no question comes with a "
    "right answer to check it by",
    "coin_flip": "its scorer gives full marks to every beginning of the right number: to 0 for 0.25",
    "complex_arithmetic": "its scorer gives full marks to nan",
    "composite": "it is a mixture itself: name its data sets as sources, with their weights",
    "game_of_life_halting": "its scorer gives full marks to any text that is not empty",
    "propositional_logic": "its scorer gives full marks to a premise copied word for word",
    "puzzle24": "its scorer does not look which numbers are used: one expression is right everywhere",
    "time_intervals": "its items depend on the day on which they are made",
}
