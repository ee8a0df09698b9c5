"""Write the package's set of general captions: plain sentences about everyday photographs.

A small grammar with a fixed seed. Every topic has its own sentence patterns; `{a thing}` in a pattern is
filled from the topic's or the common word lists, with the right article where it begins with "a ".

    python -m training.captions            # writes src/expunge/captions/general.txt
"""

from __future__ import annotations

import random
import re
from pathlib import Path

TO = Path(__file__).parents[1] / "src" / "expunge" / "captions" / "general.txt"
NUMBER = 1040

COMMON = {
    "colour": "red, blue, green, yellow, white, black, brown, grey, orange, pink, purple, dark blue, pale green",
    "size": "small, large, tiny, huge, long, narrow, wide, tall",
    "age": "old, new, worn, modern, antique, half-finished",
    "number": "two, three, four, five, several, many, a few, a pair of, a row of",
    "person": "woman, man, girl, boy, child, teenager, old man, old woman, young woman, young man, tourist, student",
    "people": "women, men, children, friends, students, tourists, teenagers, workers, neighbours, musicians",
    "light": "in bright sunlight, at sunset, at dawn, at night, in the rain, in the snow, on a foggy morning, "
    "under a cloudy sky, under a clear blue sky, in the evening light, on a hot summer day, in autumn, "
    "just before a storm, on a windy day",
    "view": "seen from above, seen from behind, seen from the side, seen through a window, in the foreground, "
    "in the distance, close up, out of focus in the background, reflected in the water",
    "outdoors": "in a park, on a beach, by a lake, in a forest, on a mountain path, in a field, in a garden, "
    "on a hill, by the river, at the harbour, in the desert, on a farm, in a meadow, beside a canal",
    "town": "on a busy street, in a quiet alley, at a market, in front of a church, on a bridge, at a bus stop, "
    "in a town square, at a train station, outside a café, in a car park, at the corner of two streets",
    "behind": "trees in the background, people walking past, mountains behind, houses in the background, "
    "the sea in the background, a white wall behind, a small dog nearby, a cyclist going by, some chairs to the left, "
    "a clock on the wall, a window on the right, nobody else around, birds in the sky, a fence on one side",
    "indoors": "in a kitchen, in a living room, in an office, in a library, in a classroom, in a hospital, "
    "in a hotel lobby, in a workshop, in a museum, in a basement, in a bedroom, in a supermarket",
}
"""Words that every topic may use."""

TOPICS: dict[str, tuple[dict[str, str], str]] = {
    "people": (
        {
            "does": "reading a newspaper, talking on the phone, drinking coffee, laughing, waiting, walking, "
            "tying a shoe, taking a picture, carrying shopping bags, looking at a map, waving, sleeping on a "
            "bench, playing the violin, eating an ice cream, pushing a pram, holding an umbrella",
            "wears": "a wool hat, a raincoat, sunglasses, a striped shirt, a long dress, a suit and tie, jeans, "
            "a scarf, a uniform, an apron, a straw hat, boots, a denim jacket, a backpack, gloves",
            "work": "nurse, baker, farmer, teacher, fisherman, painter, waiter, mechanic, police officer, singer, "
            "gardener, dancer, carpenter, firefighter, judge, scientist, shop assistant, actor, politician",
            "feature": "curly hair, a grey beard, freckles, short blond hair, a moustache, round glasses, braids, "
            "a wide smile, dark eyes, a serious look, wrinkles, earrings",
        },
        "{a person} {does} {town}|{a person} wearing {wears} {outdoors}|{number} {people} sitting {town}|"
        "a portrait of {a person} with {feature}|{a person} with {feature} is {does}|{a work} at work {indoors}|"
        "{a work} with {feature} looks into the camera|a crowd of {people} {town} {light}|a close-up of {a work}'s hands|"
        "a family having dinner {indoors}|{number} {people} {does} {light}|the face of {a person} with {feature}, {light}|"
        "{a person} and {a person} {does}|{a person} in {wears} {indoors}|black and white photo of {a person} {does}",
    ),
    "animals": (
        {
            "animal": "dog, cat, horse, cow, sheep, goat, pig, rabbit, squirrel, fox, deer, bear, elephant, giraffe, "
            "zebra, lion, tiger, monkey, kangaroo, turtle, frog, snake, lizard, mouse, hedgehog, donkey, camel",
            "bird": "sparrow, pigeon, seagull, swan, duck, owl, parrot, eagle, chicken, rooster, penguin, crow, heron",
            "water": "fish, dolphin, whale, seal, crab, octopus, jellyfish, goldfish, shark, otter",
            "insect": "butterfly, bee, ladybird, dragonfly, ant, spider, beetle, moth, snail",
            "colour": "brown, black, white, grey, spotted, golden, striped, young, tame, wild",
            "does": "sleeping, running, eating, looking up, jumping over a fence, scratching its ear, drinking, "
            "standing still, playing with a ball, rolling in the grass, hiding, yawning",
        },
        "{a colour} {animal} {does} {outdoors}|{number} {animal}s {outdoors} {light}|{a animal} {does}|"
        "{a bird} on {a size} branch|{number} {bird}s flying over the water {light}|{a water} in an aquarium|"
        "{a insect} on {a colour} flower, close up|{a animal} and its young {outdoors}|{a person} feeding {a animal} {outdoors}|"
        "a zoo enclosure with {number} {animal}s|{a bird} {does} {town}|the head of {a animal} {view}|"
        "{a animal} is {does} beside {a person}|{a water} swimming near the surface {light}|footprints of {a animal} in the snow",
    ),
    "vehicles": (
        {
            "car": "car, taxi, van, pickup truck, fire engine, school bus, sports car, tractor, ambulance, lorry, jeep",
            "two": "bicycle, motorcycle, scooter, tricycle, skateboard",
            "rail": "train, tram, steam locomotive, freight train, underground train",
            "boat": "sailing boat, ferry, fishing boat, cargo ship, canoe, rowing boat, yacht, tugboat",
            "air": "airplane, helicopter, hot air balloon, glider, small propeller plane, jet",
        },
        "{a colour} {car} parked {town}|{a age} {two} leaning against a wall|{a rail} arriving at a station {light}|"
        "{a boat} on calm water {light}|{a air} above the clouds|{number} {car}s waiting at a traffic light|"
        "{a person} riding {a two} {town}|{a colour} {boat} tied to a wooden pier|{a air} on the ground {light}|"
        "the inside of {a age} {car}|the wheel of {a colour} {two}, close up|traffic on a motorway {light}|"
        "{a rail} crossing a stone bridge {outdoors}|{a person} repairing {a age} {car}|{a colour} {air} takes off {light}|"
        "a toy {car} on a wooden floor|{number} {boat}s {view}",
    ),
    "rooms": (
        {
            "room": "kitchen, bathroom, bedroom, living room, hallway, attic, office, dining room, laundry room, study",
            "piece": "sofa, table, armchair, bed, bookshelf, wardrobe, desk, lamp, mirror, carpet, piano, cupboard",
            "thing": "a vase of flowers, a clock, a pile of books, a laptop, a teapot, some candles, a basket, a globe, "
            "a houseplant, a radio, a framed photograph, a stack of plates, cushions, a telephone",
            "part": "large windows, white walls, a fireplace, wooden beams, a tiled floor, flowered wallpaper, brick walls",
        },
        "{a age} {room} with {part}|{a room} with {a colour} {piece} and {thing}|{thing} on {a age} {piece}|"
        "an empty {room} with {part}|{a colour} {piece} in the corner of {a room}|{a person} cleaning {a room}|"
        "{a size} {room} {light}|a sink full of dishes in {a age} {room}|{thing} beside {a piece}|"
        "a cat asleep on {a colour} {piece}|stairs leading down to {a room}|{a room} under construction, with {part}|"
        "{a piece} and {number} chairs in {a room}|a door that opens into {a colour} {room}",
    ),
    "streets and buildings": (
        {
            "building": "house, church, castle, skyscraper, lighthouse, barn, windmill, temple, factory, school, "
            "theatre, museum, hotel, tower, cottage, stadium, mosque, petrol station, greenhouse",
            "part": "a red roof, tall columns, a clock tower, broken windows, a wooden door, ivy on its walls, a dome, "
            "balconies, a stone arch, solar panels, flags above the entrance",
            "street": "lamp posts, shop windows, parked bicycles, puddles, market stalls, fallen leaves, traffic signs, "
            "old trees, posters on the walls, tram tracks",
        },
        "{a age} {building} with {part}|{a building} {outdoors} {light}|a street with {street} {light}|"
        "{a size} {building} with {part} {view}|the skyline of a city {light}|a narrow street with {street}|"
        "{a person} in front of {a building}|{number} houses with {part}|the entrance of {a building}|"
        "a stop sign and {street} at a crossing|a fountain in front of {a age} {building}|{a building} being built|"
        "a village with {a building} {view}|a bridge over a river {light}|ruins of {a building} {outdoors}|"
        "a park bench {town} {light}|street art on the wall of {a building}",
    ),
    "food": (
        {
            "dish": "pizza, soup, salad, pasta, curry, rice, a sandwich, a hamburger, pancakes, sushi, a stew, noodles, "
            "an omelette, roast chicken, fish and chips, dumplings, tacos",
            "fruit": "apples, bananas, oranges, strawberries, grapes, lemons, tomatoes, carrots, potatoes, onions, "
            "mushrooms, peppers, cherries, pumpkins, peas",
            "sweet": "chocolate cake, apple pie, doughnut, ice cream cone, cupcake, birthday cake, biscuit, croissant",
            "drink": "cup of coffee, glass of water, pot of tea, glass of red wine, bottle of milk, mug of cocoa, "
            "glass of orange juice, pint of beer",
            "on": "on a white plate, on a wooden board, in a blue bowl, on a checked tablecloth, on a tray, in a pan",
        },
        "{dish} {on}|{fruit} and {fruit} {on}|{a sweet} {on}|{a drink} beside {a sweet}|{a person} cooking {dish} {indoors}|"
        "a market stall full of {fruit}|{a person} eating {dish} {town}|{a drink} on a table {light}|"
        "a bowl of {fruit} {view}|a breakfast with {a drink} and fresh bread|{number} {fruit} cut in half|"
        "a chef putting {dish} {on}|{a sweet} with candles|a lunch box with {dish} and {fruit}|a picnic {outdoors} with {dish}|"
        "an open fridge with {fruit} and milk|a loaf of bread {on}",
    ),
    "sport and play": (
        {
            "plays": "football, tennis, basketball, volleyball, cricket, chess, table tennis, baseball, rugby, golf",
            "does": "surfing a big wave, skiing down a slope, climbing a rock, swimming in a pool, running a race, "
            "riding a horse, skating on ice, doing yoga, rowing, diving, boxing, jumping over a hurdle, snowboarding",
            "toy": "kite, ball, doll, teddy bear, kitten, balloon, swing, sandcastle, model train, wooden blocks, puzzle",
        },
        "{a person} playing {plays} {light}|{number} {people} playing {plays} {outdoors}|{a person} {does}|"
        "{a person} in {a colour} helmet {does}|a {plays} match {view}|a child with {a colour} {toy} {outdoors}|"
        "{number} {people} {does} {light}|a trophy and {number} medals on a shelf|a referee talking to {number} {people}|"
        "spectators watching {plays} {light}|a pair of {colour} running shoes|an empty {plays} field {light}|"
        "{a person} stretching before a race|{number} {people} dancing {indoors}|a {colour} {toy} on the floor",
    ),
    "weather and landscape": (
        {
            "land": "mountains, hills, a valley, cliffs, sand dunes, rice fields, a glacier, a waterfall, an island, "
            "a volcano, vineyards, a swamp, a rocky coast, a pine forest, a frozen lake, a wheat field",
            "sky": "dark clouds, a rainbow, lightning, a full moon, stars, a thin mist, northern lights, falling snow, "
            "a bright sun, heavy rain, a flock of birds",
            "plant": "sunflowers, tulips, roses, palm trees, cacti, an oak tree, cherry blossom, ferns, moss, dandelions",
        },
        "{land} {light}|{sky} over {land}|{plant} {outdoors}|a path through {land} {light}|{land} with {sky} above|"
        "{plant} after the rain|waves breaking on the shore {light}|{a person} looking at {land}|a tent {outdoors} {light}|"
        "{plant} {view}|{land} {view}|a wooden fence and {plant}|{a size} river running through {land}|ice on a window|"
        "{sky} above the roofs of a town|autumn leaves floating on a pond|a road through {land} under {sky}",
    ),
    "tools and things": (
        {
            "tool": "hammer, saw, screwdriver, ladder, spade, paintbrush, pair of scissors, drill, wrench, axe, broom, "
            "sewing machine, wheelbarrow, bucket, rope, tape measure, watering can, needle and thread",
            "device": "camera, computer, telephone, television, radio, printer, clock, typewriter, microphone, calculator, "
            "microscope, washing machine, light bulb, keyboard, record player, pair of headphones",
            "small": "key, coin, pencil, book, letter, cup, candle, umbrella, suitcase, bottle, envelope, watch, ring, "
            "pair of glasses, knife and fork, toothbrush, wallet, bell",
            "stuff": "wood, metal, glass, plastic, leather, paper, stone, cloth, copper, clay",
        },
        "{a age} {tool} on a workbench|{a colour} {device} on a desk|{number} {small}s on a table|{a small} made of {stuff}|"
        "{a person} using {a tool} {indoors}|{a size} {small} and {a small}|{a device} {view}|a drawer full of {small}s|"
        "{a age} {device} at a flea market|{a person} holding {a small}|{tool}s hanging on a wall|the screen of {a age} {device}|"
        "a box of {stuff} and {a tool}|{a small} lying on the floor {light}|{a device} next to {a small}|a shop that sells {small}s",
    ),
    "clothes": (
        {
            "item": "coat, dress, shirt, jumper, hat, skirt, jacket, scarf, tie, "
            "swimsuit, wedding dress, cap, handbag, waistcoat, cardigan, blouse, belt",
            "look": "striped, checked, flowered, knitted, silk, woollen, torn, embroidered, spotted, leather",
        },
        "{a look} {item}|{a colour} {item} on a hanger|{a person} trying on {a look} {item}|{a colour} {item} and {a look} {item}|"
        "clothes drying on a line {light}|a shop window with {a colour} {item}|{a person} in {a look} {item} {town}|"
        "a pile of folded shirts|{a age} {item} in a museum|{number} {people} in traditional dress|a tailor measuring {a item}|"
        "{a colour} {item} lying on a bed",
    ),
    "art and signs": (
        {
            "art": "painting, drawing, watercolour, sculpture, mosaic, poster, sketch, stained glass window, tapestry, "
            "woodcut, mural, etching, cartoon, photograph, statue",
            "of": "a landscape, a ship at sea, a bowl of fruit, a battle, an angel, a woman by a window, a king, flowers, "
            "a city at night, geometric shapes, a horse, a mother and her child, a dancer, the sea",
            "event": "a concert, a wedding, a birthday party, a street parade, a theatre play, a school play, "
            "a funfair, a demonstration, a graduation, a flea market, a funeral, a firework display",
        },
        "{a art} of {of}|{a age} {art} of {of} in a gold frame|{a person} looking at {a art} {indoors}|"
        "{a art} of {of} in {colour} and {colour}|an artist working on {a art}|{event} {light}|{number} {people} at {event}|"
        "a gallery wall with {a art} of {of}|flags waving in the wind {light}|a colourful {art} {town}|"
        "a hand-written sign on a door|a page of a book with {a art} of {of}|graffiti {town}|a band playing at {event}|"
        "{a size} statue of {a animal} {town}|a map of the world on a wall|an abstract {art} in {colour} and {colour}",
    ),
}
"""For every topic its words and its patterns."""

ANIMALS = "lion, horse, bull, dog, eagle, fish"
"""Of which there are statues."""

OPENINGS = (
    "a photo of",
    "a photograph of",
    "a picture of",
    "a snapshot of",
    "an image of",
    "a close view of",
)


def article(words: str) -> str:
    """The words with "a" or "an" before them.

    >>> article("old man"), article("uniform")
    ('an old man', 'a uniform')
    """
    an = words[0] in "aeiou" and not words.startswith(("uni", "one", "eu"))
    return f"{'an' if an else 'a'} {words}"


def fill(pattern: str, words: dict[str, list[str]], rng: random.Random) -> str:
    """A sentence from a pattern; the same place filled twice gets two different words."""
    used: set[str] = set()

    def choose(match: re.Match[str]) -> str:
        with_article, name = match[1], match[2]
        left = [word for word in words[name] if word not in used] or words[name]
        word = rng.choice(left)
        used.add(word)
        return article(word) if with_article else word

    return re.sub(r"\{(a )?(\w+)\}", choose, pattern)


def mended(text: str) -> str:
    """English, where the grammar is too simple for it."""
    for wrong, right in (
        ("sheeps", "sheep"), ("deers", "deer"), ("mouses", "mice"), ("foxs", "foxes"),
        ("knife and forks", "knives and forks"), ("watchs", "watches"), ("pair of glassess", "pairs of glasses"),
        ("needle and threads", "needles and thread"), ("pair of scissorss", "pairs of scissors"),
        ("school buss", "school buses"), ("lorrys", "lorries"), ("ferrys", "ferries"),
        ("a pair of pairs of", "two pairs of"), ("a pair of pair of", "two pairs of"), ("toothbrushs", "toothbrushes"),
        ("a row of many", "a row of"),
    ):  # fmt: skip
        text = text.replace(wrong, right)
    return text


def main() -> None:
    """Write the captions, topic by topic in turn, each once."""
    rng = random.Random(2024)
    common = {name: text.split(", ") for name, text in COMMON.items()}
    found: dict[str, None] = {}
    topics = [
        (
            {**common, "animal": ANIMALS.split(", "), **{n: t.split(", ") for n, t in own.items()}},
            patterns.split("|"),
        )
        for own, patterns in TOPICS.values()
    ]
    turn = 0
    while len(found) < NUMBER:
        words, patterns = topics[turn % len(topics)]
        text = mended(fill(patterns[turn // len(topics) % len(patterns)], words, rng))
        if rng.random() < 0.15:
            text = f"{text}, with {rng.choice(words['behind'])}"
        if text.startswith(("a ", "an ")) and rng.random() < 0.12:
            text = f"{rng.choice(OPENINGS)} {text}"
        if rng.random() < 0.4:
            text = f"{text[0].upper()}{text[1:]}."
        found.setdefault(text)
        turn += 1
    TO.parent.mkdir(exist_ok=True)
    TO.write_text("\n".join(found) + "\n", "utf8")
    print(f"{TO.name}: {len(found)} captions, {TO.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
