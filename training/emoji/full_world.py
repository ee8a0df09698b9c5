"""Writes full.toml, the full world, by rule from the public lists of emoji; world.toml, the small world, is part of it.

Labels: every animal, plant, food, place, vehicle, toy and tool that most sets have drawn, without those that are drawn
alike (measured on the drawings), and every country's flag that is drawn like no other's. Further names of a label are
the tags on which both lists of keywords agree and which no other emoji has; a tenth of them is kept out of training.

    python -m training.emoji.full_world --work training/emoji/made/full
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tarfile
import tomllib
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from training.emoji.tokenizer import broad_words
from training.emoji.world import HERE, PACKAGES, WORK, WORLD, fetch, find_icon, plain_slug, rasterise

STYLES = ("noto", "old noto", "twemoji", "fluent", "flat fluent", "emojione")
FLAG_STYLES = ("round flags", "flag icons")
FEWEST = 4  # styles that must hold a drawing of an object, or of a flag
HELD_OUT = 0.1  # the share of the further names kept out of training

# Subgroup of emojibase -> the super-categories its members answer to; a subgroup that is not here is left out.
SUBGROUPS = {
    "face-costume": (),
    "animal-mammal": ("animal", "mammal"),
    "animal-bird": ("animal",),
    "animal-amphibian": ("animal",),
    "animal-reptile": ("animal", "reptile"),
    "animal-marine": ("animal", "sea creature"),
    "animal-bug": ("animal", "insect"),
    "plant-flower": ("plant", "flower"),
    "plant-other": ("plant",),
    "food-fruit": ("food", "fruit"),
    "food-vegetable": ("food", "vegetable"),
    "food-prepared": ("food",),
    "food-asian": ("food",),
    "food-sweet": ("food", "dessert"),
    "drink": ("drink",),
    "dishware": (),
    "place-map": (),
    "place-geographic": ("landscape",),
    "place-building": ("building",),
    "place-religious": ("building",),
    "place-other": (),
    "transport-ground": ("vehicle",),
    "transport-water": ("vehicle",),
    "transport-air": ("vehicle",),
    "hotel": (),
    "time": (),
    "sky-weather": (),
    "event": (),
    "award-medal": (),
    "sport": (),
    "game": (),
    "arts-crafts": (),
    "clothing": ("piece of clothing",),
    "sound": (),
    "music": (),
    "musical-instrument": ("musical instrument",),
    "phone": (),
    "computer": (),
    "light-video": (),
    "book-paper": (),
    "money": (),
    "mail": (),
    "writing": (),
    "office": (),
    "lock": (),
    "tool": ("tool",),
    "science": (),
    "medical": (),
    "household": (),
    "other-object": (),
}
# What a subgroup holds besides what its super-category says.
NO_MEMBER = {
    "animal": "paw prints; feather; wing; spiral shell; coral; spider web; microbe; pig nose; hatching chick",
    "mammal": "paw prints; pig nose; unicorn",
    "insect": "spider; spider web; scorpion; snail; microbe; worm",
    "reptile": "dragon; sauropod; T-Rex",
    "sea creature": "spiral shell; coral",
    "flower": "rosette; bouquet; wilted flower",
    "plant": "rosette; fallen leaf; empty nest; nest with eggs; leaf fluttering in wind; bouquet",
    "food": "cooking; salt; oden; butter",
    "dessert": "honey pot; custard",
    "drink": """
        baby bottle; teapot; chopsticks; ice; bottle with popping cork; pouring liquid; clinking glasses;
        beverage box
    """,
    "building": "brick; rock; wood; wedding; Statue of Liberty; kaaba; building construction; stadium",
    "vehicle": """
        anchor; ring buoy; station; bus stop; motorway; railway track; oil drum; fuel pump; wheel; police car
        light; horizontal traffic light; vertical traffic light; stop sign; construction; parachute; seat;
        satellite; mountain railway; skateboard; roller skate; suspension railway; mountain cableway; aerial
        tramway; airplane departure; airplane arrival; railway car; wheelchair; manual wheelchair; motorized
        wheelchair
    """,
    "piece of clothing": """
        glasses; sunglasses; goggles; folding hand fan; purse; handbag; clutch bag; shopping bags; backpack;
        hair pick; crown; prayer beads; lipstick; ring; gem stone; military helmet; rescue worker’s helmet;
        graduation cap
    """,
    "tool": """
        shield; balance scale; white cane; link; broken chain; chains; hook; toolbox; magnet; ladder; nut and
        bolt; gear; hammer and pick; hammer and wrench
    """,
}
# Left out: half a phrase, a scene, a variant of another label, or nothing to draw at 64 pixels (* as in a shell).
LEFT_OUT = """
dog face; tiger face; horse face; cow face; pig face; mouse face; rabbit face; dragon face; monkey face; * moon face;
* with face; oncoming *; guide dog; service dog; black cat; two-hump camel; pig nose; front-facing *; wing; dodo;
microbe; leafy green; brown mushroom; airplane *; small airplane; *-thirty; * o’clock; timer clock; * banknote; waxing
*; waning *; * quarter moon; new moon; money with wings; * mailbox *; 1st *; 2nd *; 3rd *; speaker *; muted *; globe
*; map of *; green book; blue book; orange book; * suit; sun behind small *; sun behind large *; sun behind rain *;
cloud with rain; cloud with snow; cloud with lightning; * wheelchair; envelope *; incoming *; outbox *; inbox *; *
with arrow; * tilted right; chart *; bell with slash; hourglass not *; snowman without snow; clinking *; umbrella *;
camera with flash; mahjong *; * with stars; foggy; sunrise*; * at dusk; bridge at night; moon viewing *; tanabata
tree; landslide; houses; * post office; locked with *; unlocked; tear-off *; spiral notepad; card index*; linked *;
round pushpin; low battery; musical notes; computer disk; dvd; nazar *; hamsa; wind face; fog; building construction;
red envelope; love hotel; wedding; water wave; cyclone; seat; pouring *; motorway; monorail; mountain railway; light
rail; ledger; page *; bookmark*; rolled-up *; notebook; white cane; link; broken chain; identification card; old key;
cricket game; e-mail; crutch; spider web; high-speed train; station; tram car; trolleybus; railway car; ferry; motor
boat; passenger ship; *open file*
"""
# Words both lists have that name nothing to draw.
NOT_NAMES = """
absorbing accounting address arctic ashes attraction bait barrier beacon biology bisque bleed bookkeeping burp cafe
caffeine carpenter casino cheering chest chickpea chip claws clay compress controller crochet crook cube curious curve
dam decorated demonstration dental diaper donation driftwood duckling dupe dynamite edge embroidery engaged ensnare
eruption evidence evolution expendable filing filling flamboyant flipper float fluctuate force frying genetics
glittery grave grow herd hollywood honk hoop horseshoe hygiene icecream indecisive interlocking iron judo karaoke
karate kidney kitty knit lather launch laundry lavender lazy lit luge malaria malt maze melted menstruation mining
navigation neck nurturing octagonal opening orienteering ostentatious parasite patrol pepperoni percussion personal
pester picket pickle plush porous proof prophecy protest punk purity quench rays recreational reflection resort rhythm
rotting rung sailing sash saturnine sauce schmear selling semi serve set sharp shedding shipping skating skydive
snorkeling solid sow speculum spiny spots squeeze step sting stitches stringed stripe stub suction sutures sweeping
tada taekwondo tailoring tangled tentacles thanksgiving towels transparent tuk turn tusk ugly ultimate underarm
underwater vaccination vat vice wall warrior welding wildcard wrap zap
"""
# What must be called otherwise than in the list.
RENAMED = {
    "Myanmar (Burma)": "Myanmar",
    "Hong Kong SAR China": "Hong Kong",
    "Macao SAR China": "Macao",
    "Congo - Kinshasa": "DR Congo",
    "Congo - Brazzaville": "Congo",
    "Palestinian Territories": "Palestine",
    "Côte d’Ivoire": "Ivory Coast",
    "Czechia": "Czech Republic",
    "Cocos (Keeling) Islands": "Cocos Islands",
}
# Of flags drawn alike the country's stays, not the territory's or the smaller country's.
TERRITORIES = """
Ascension Island; Bouvet Island; Ceuta & Melilla; Clipperton Island; Diego Garcia; French Guiana; Guadeloupe;
Martinique; Heard & McDonald Islands; Mayotte; Réunion; Sark; St. Martin; St. Barthélemy; St. Pierre & Miquelon;
Svalbard & Jan Mayen; Tristan da Cunha; U.S. Outlying Islands; New Caledonia; Wallis & Futuna; French Southern
Territories; Caribbean Netherlands; Monaco; Chad; St. Helena; South Georgia & South Sandwich Islands; Pitcairn
Islands; Cook Islands; Montserrat; Anguilla; Cayman Islands; British Virgin Islands; Turks & Caicos Islands; Falkland
Islands; British Indian Ocean Territory; Canary Islands; Antarctica
"""
ADJECTIVES = """
Afghanistan=Afghan; Albania=Albanian; Algeria=Algerian; Andorra=Andorran; Angola=Angolan;
Antigua and Barbuda=Antiguan; Argentina=Argentine; Armenia=Armenian; Australia=Australian; Austria=Austrian;
Azerbaijan=Azerbaijani; Bahamas=Bahamian; Bahrain=Bahraini; Bangladesh=Bangladeshi; Barbados=Barbadian;
Belarus=Belarusian; Belgium=Belgian; Belize=Belizean; Benin=Beninese; Bermuda=Bermudian; Bhutan=Bhutanese;
Bolivia=Bolivian; Bosnia and Herzegovina=Bosnian; Botswana=Botswanan; Brazil=Brazilian; Brunei=Bruneian;
Bulgaria=Bulgarian; Burkina Faso=Burkinabe; Burundi=Burundian; Cambodia=Cambodian; Cameroon=Cameroonian;
Canada=Canadian; Cape Verde=Cape Verdean; Central African Republic=Central African; Chile=Chilean; China=Chinese;
Colombia=Colombian; Comoros=Comorian; Congo=Congolese; Costa Rica=Costa Rican; Croatia=Croatian; Cuba=Cuban;
Cyprus=Cypriot; Czech Republic=Czech; Denmark=Danish; Djibouti=Djiboutian; Dominica=Dominiquais;
Dominican Republic=Dominican; Ecuador=Ecuadorian; Egypt=Egyptian; El Salvador=Salvadoran; England=English;
Equatorial Guinea=Equatoguinean; Eritrea=Eritrean; Estonia=Estonian; Eswatini=Swazi; Ethiopia=Ethiopian;
European Union=European; Faroe Islands=Faroese; Fiji=Fijian; Finland=Finnish; France=French;
French Polynesia=Polynesian; Gabon=Gabonese; Gambia=Gambian; Georgia=Georgian; Germany=German; Ghana=Ghanaian;
Gibraltar=Gibraltarian; Greece=Greek; Greenland=Greenlandic; Grenada=Grenadian; Guam=Guamanian; Guatemala=Guatemalan;
Guinea-Bissau=Bissau-Guinean; Guinea=Guinean; Guyana=Guyanese; Haiti=Haitian; Honduras=Honduran; Hungary=Hungarian;
Iceland=Icelandic; India=Indian; Indonesia=Indonesian; Iran=Iranian; Iraq=Iraqi; Ireland=Irish; Isle of Man=Manx;
Israel=Israeli; Italy=Italian; Ivory Coast=Ivorian; Jamaica=Jamaican; Japan=Japanese; Jordan=Jordanian;
Kazakhstan=Kazakh; Kenya=Kenyan; Kiribati=Kiribatian; Kosovo=Kosovar; Kuwait=Kuwaiti; Kyrgyzstan=Kyrgyz;
Laos=Laotian; Latvia=Latvian; Lebanon=Lebanese; Lesotho=Basotho; Liberia=Liberian; Libya=Libyan;
Liechtenstein=Liechtensteiner; Lithuania=Lithuanian; Luxembourg=Luxembourgish; Madagascar=Malagasy; Malawi=Malawian;
Malaysia=Malaysian; Maldives=Maldivian; Mali=Malian; Malta=Maltese; Marshall Islands=Marshallese;
Mauritania=Mauritanian; Mauritius=Mauritian; Mexico=Mexican; Micronesia=Micronesian; Moldova=Moldovan;
Mongolia=Mongolian; Montenegro=Montenegrin; Morocco=Moroccan; Mozambique=Mozambican; Myanmar=Burmese;
Namibia=Namibian; Nauru=Nauruan; Nepal=Nepali; Netherlands=Dutch; Nicaragua=Nicaraguan;
Niger=Nigerien; Nigeria=Nigerian; North Korea=North Korean; North Macedonia=Macedonian; Norway=Norwegian; Oman=Omani;
Pakistan=Pakistani; Palau=Palauan; Palestine=Palestinian; Panama=Panamanian; Papua New Guinea=Papuan;
Paraguay=Paraguayan; Peru=Peruvian; Philippines=Philippine; Poland=Polish; Portugal=Portuguese;
Puerto Rico=Puerto Rican; Qatar=Qatari; Romania=Romanian; Russia=Russian; Rwanda=Rwandan;
Saint Kitts and Nevis=Kittitian; Saint Lucia=Saint Lucian; Saint Vincent and Grenadines=Vincentian; Samoa=Samoan;
San Marino=Sammarinese; Saudi Arabia=Saudi; Scotland=Scottish; Senegal=Senegalese; Serbia=Serbian;
Seychelles=Seychellois; Sierra Leone=Sierra Leonean; Singapore=Singaporean; Slovakia=Slovak; Slovenia=Slovenian;
Solomon Islands=Solomon; Somalia=Somali; South Africa=South African; South Korea=South Korean;
South Sudan=South Sudanese; Spain=Spanish; Sri Lanka=Sri Lankan; Sudan=Sudanese; Suriname=Surinamese; Sweden=Swedish;
Switzerland=Swiss; Syria=Syrian; São Tomé and Príncipe=Santomean; Taiwan=Taiwanese; Tajikistan=Tajik;
Tanzania=Tanzanian; Thailand=Thai; Timor-Leste=Timorese; Togo=Togolese; Tonga=Tongan;
Trinidad and Tobago=Trinidadian; Tunisia=Tunisian; Turkmenistan=Turkmen; Tuvalu=Tuvaluan; Türkiye=Turkish;
Uganda=Ugandan; Ukraine=Ukrainian; United Arab Emirates=Emirati; United Kingdom=British; United States=American;
Uruguay=Uruguayan; Uzbekistan=Uzbek; Vanuatu=Vanuatuan; Venezuela=Venezuelan; Vietnam=Vietnamese; Wales=Welsh;
Yemen=Yemeni; Zambia=Zambian; Zimbabwe=Zimbabwean
"""


def entries(packages: Path) -> list[dict]:
    """emojibase's emoji: label, tags and subgroup, with emojilib's keywords beside the tags."""
    with tarfile.open(packages / "emojibase-data-17.0.0.tgz") as tar:
        emoji = json.load(tar.extractfile("package/en/data.json"))
        subgroups = json.load(tar.extractfile("package/meta/groups.json"))["subgroups"]
    with tarfile.open(packages / "emojilib-4.0.3.tgz") as tar:
        member = next(name for name in tar.getnames() if name.endswith("emoji-en-US.json"))
        keywords = {key.strip("\ufe0f"): words for key, words in json.load(tar.extractfile(member)).items()}
    for entry in emoji:
        entry["subgroup"] = subgroups.get(str(entry.get("subgroup")), "")
        entry["tags"] = {tag.lower() for tag in entry.get("tags", [])}
        words = keywords.get(entry["emoji"].strip("\ufe0f"), [])
        entry["keywords"] = {word.replace("_", " ").lower() for word in words}
    return emoji


def listed(text: str) -> list[str]:
    """The items of a text that semicolons part."""
    return [item.strip() for item in text.replace("\n", " ").split(";")]


def left_out(label: str) -> bool:
    return any(fnmatch(label, pattern) for pattern in listed(LEFT_OUT))


# -- flags -----------------------------------------------------------------------------------------------------------


def country_of(label: str) -> str:
    name = label.removeprefix("flag: ")
    return RENAMED.get(name, name).replace("&", "and").replace("St. ", "Saint ").replace("’", "'")


def code_of(entry: dict) -> str:
    """The country's code, spelt by the flag's characters: "fr", "gb-eng"."""
    points = [int(point, 16) for point in entry["hexcode"].split("-")]
    if points[0] == 0x1F3F4:  # the black flag, tag letters, the end
        letters = "".join(chr(point - 0xE0000) for point in points[1:-1])
        return f"{letters[:2]}-{letters[2:]}"
    return "".join(chr(point - 0x1F1E6 + ord("a")) for point in points)


# -- drawings --------------------------------------------------------------------------------------------------------


def thumbnails(sets: list[dict], names: list[tuple[str, tuple[str, ...]]]) -> torch.Tensor:
    """(styles, labels, numbers): every drawing at 24x24, less the grey it stands on; NaN where there is none."""
    out = torch.full((len(sets), len(names), 3 * 24 * 24), float("nan"))
    for s, icons in enumerate(sets):
        for k, (name, files) in enumerate(names):
            if icon := find_icon(icons, name, files):
                rgba = torch.from_numpy(rasterise(icons, icon).astype(np.float32)).permute(2, 0, 1) / 255
                flat = rgba[:3] - 0.5 * rgba[3:]
                out[s, k] = F.adaptive_avg_pool2d(flat, 24).flatten()
    return out


def alike(pictures: torch.Tensor) -> torch.Tensor:
    """(labels, labels): how far two labels' drawings are apart, over what is drawn: 0 the same, 2 nothing in common.

    The mean over the styles that have both, NaN where none has.
    """
    total = torch.zeros(pictures.shape[1], pictures.shape[1])
    shared = torch.zeros_like(total)
    for style in pictures:
        there = ~style[:, 0].isnan()
        drawn = style.nan_to_num()
        ink = drawn.abs().sum(1).clamp_min(1e-3)
        both = (there[:, None] & there).float()
        total += both * torch.cdist(drawn, drawn, p=1) / ((ink[:, None] + ink) / 2)
        shared += both
    return total / shared


def without_twins(pictures: torch.Tensor, least: float, first: list[bool]) -> list[int]:
    """Rows of the labels that stay: those of `first`, and of the others, in order, what is like none that stays."""
    distance = alike(pictures).nan_to_num(1.0)
    stay = [k for k, always in enumerate(first) if always]
    for k in range(len(first)):
        if not first[k] and (distance[k, stay] > least).all():
            stay.append(k)
    return sorted(stay)


# -- names -----------------------------------------------------------------------------------------------------------


def further_names(objects: list[dict], everything: list[dict], taken: set[str]) -> dict[str, list[str]]:
    """For each object the words that both lists have for it and no other emoji: they call nothing else to mind."""
    uses = Counter(word for entry in everything for word in entry["tags"] | entry["keywords"])
    out = {}
    for entry in objects:
        label = entry["label"].lower()
        words = sorted(word for word in entry["tags"] & entry["keywords"] if uses[word] == 1 and fits(word, label))
        out[entry["label"]] = [word for word in words if word not in taken and word not in NOT_NAMES.split()]
    return out


def fits(word: str, label: str) -> bool:
    """A word of its own, not a part of the label."""
    is_word = word.replace(" ", "").isalpha() and word.isascii() and len(word) > 2
    return is_word and word not in label and label not in word


def chosen(words: list[str], share: float) -> set[str]:
    """That share of the words, the same on every machine."""
    in_order = sorted(words, key=lambda word: hashlib.sha256(word.encode()).digest())
    return set(in_order[: round(share * len(words))])


# -- the file --------------------------------------------------------------------------------------------------------


def toml(value: str | list[str] | tuple[str, ...]) -> str:
    return json.dumps(value, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="its folder `packages` holds the archives of the sets")
    parser.add_argument("--to", type=Path, default=HERE / "full.toml")
    parser.add_argument("--least", type=float, default=0.5, help="objects nearer than this are drawn alike")
    parser.add_argument("--least-flag", type=float, default=0.3, help="the same for flags")
    options = parser.parse_args()
    small = tomllib.loads(WORLD.read_text(encoding="utf8"))
    suite = small["ten"] | small["unsafe"]
    packages = options.work / "packages"
    broad_words(options.work)  # fetches the two lists
    everything = entries(packages)
    sets = {style: fetch(PACKAGES[style], packages) for style in STYLES + FLAG_STYLES}

    flags = [entry for entry in everything if entry["label"].startswith("flag: ")]
    named = [(entry["label"], flag_files(entry)) for entry in flags]
    pictures = thumbnails([sets[style] for style in ("twemoji", "emojione", *FLAG_STYLES)], named)
    enough = (~pictures[:, :, 0].isnan()).sum(0) >= FEWEST - 1
    flags = [entry for entry, there in zip(flags, enough.tolist(), strict=True) if there]
    first = [entry["label"].removeprefix("flag: ") not in listed(TERRITORIES) for entry in flags]
    flags = [flags[k] for k in without_twins(pictures[:, enough], options.least_flag, first)]

    # A label that is another name of one in the small world would be two things at once.
    taken = {name for group in ("ten", "objects", "unsafe") for names in small[group].values() for name in names}
    first_labels = suite | small["objects"]
    objects = [
        entry
        for entry in everything
        if entry["label"] in first_labels or (entry["label"] not in taken and is_candidate(entry, sets))
    ]
    pictures = thumbnails([sets[style] for style in STYLES], [(entry["label"], ()) for entry in objects])
    first = [entry["label"] in first_labels for entry in objects]
    objects = [objects[k] for k in without_twins(pictures, options.least, first)]
    write(options.to, small, objects, flags, everything)


def flag_files(entry: dict) -> tuple[str, ...]:
    """The names of a flag's drawing beside those that follow from the country's."""
    original = entry["label"].removeprefix("flag: ")
    own = plain_slug(original)
    forms = () if country_of(original) == original else (f"flag-{own}", f"flag-for-{own}")
    return (f"flag-{code_of(entry)}", *forms)


def is_candidate(entry: dict, sets: dict[str, dict]) -> bool:
    if entry["subgroup"] not in SUBGROUPS or left_out(entry["label"]):
        return False
    return sum(find_icon(sets[style], entry["label"]) is not None for style in STYLES) >= FEWEST


def write(to: Path, small: dict, objects: list[dict], flags: list[dict], everything: list[dict]) -> None:
    suite = small["ten"] | small["unsafe"]
    others = [entry for entry in objects if entry["label"] not in suite]
    taken = {name for group in ("ten", "objects", "unsafe") for names in small[group].values() for name in names}
    taken |= {entry["label"].lower() for entry in objects} | {kind for kinds in SUBGROUPS.values() for kind in kinds}
    further = further_names(others, everything, taken)
    kept_out = chosen([word for words in further.values() for word in words], HELD_OUT)
    names, held_out = {}, {}
    for entry in others:
        label = entry["label"]
        own = small["objects"].get(label, [label.replace("’", "'")])
        names[label] = [*own, *(word for word in further[label] if word not in kept_out)]
        if rest := [word for word in further[label] if word in kept_out]:
            held_out[label] = rest
    adjectives = dict(pair.split("=") for pair in listed(ADJECTIVES))
    countries = {country_of(entry["label"]): entry for entry in flags}
    kinds: dict[str, list] = {kind: [] for subgroup in SUBGROUPS.values() for kind in subgroup}
    for entry in objects:
        for kind in SUBGROUPS.get(entry["subgroup"], ()):
            if entry["label"] not in (*listed(NO_MEMBER.get(kind, "")), *small["unsafe"]):
                kinds[kind].append(entry["label"])

    def table(title: str, rows: dict) -> list[str]:
        return ["", f"[{title}]", *(f"{toml(key)} = {toml(value)}" for key, value in rows.items())]

    lines = [
        "# The full world, written by full_world.py from world.toml and the lists of emoji: change it there.",
        "",
        f"styles = {toml(STYLES)}",
        f"flag_styles = {toml(FLAG_STYLES)}  # these hold flags and nothing else",
        *table("ten", small["ten"]),
        *table("objects", names),
        *table("unsafe", small["unsafe"]),
        *table("flags", {country: adjectives.get(country, "") for country in countries}),
        *table("kinds", kinds),
        *table("implied", small["implied"]),
        *table("generic", small["generic"]),
        *table("held_out_names", held_out),
        *table("files", {f"flag: {country}": flag_files(entry) for country, entry in countries.items()}),
    ]
    to.write_text("\n".join(lines) + "\n", encoding="utf8")
    print(f"{len(objects)} objects, {len(flags)} flags, {sum(map(len, names.values()))} names of further objects,")
    print(f"{sum(map(len, held_out.values()))} names held out; {to}")


if __name__ == "__main__":
    main()
