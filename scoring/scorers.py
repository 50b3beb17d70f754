"""Metrics that need more than NumPy: METEOR, SPICE and the Java tokenizer, CHAIR, CLIPScore and RefCLIPScore.

Java runs the jars that lie inside an installed pycocoevalcap
(requirements-full.txt), driven from here because its own drivers know no time limit, let the machine's language into
the numbers and may block on a full pipe. What a metric needs and does not find is said in one line, and then the metric
is left out: it is never imitated, and nothing is downloaded for Java.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm  # type: ignore[import-untyped]

from config import UserError
from data.pictures import PictureSource, decode, in_one_line, reason
from scoring.metrics import tokenize
from utils import hub_folder

SECONDS = 1800.0
"""Longest that one Java program may run unless told otherwise, in seconds; SPICE, which parses every caption, needs the most."""

# METEOR reads back the numbers it has written, which fails where the language puts a comma for the point.
_LOCALE = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class JavaScores(NamedTuple):
    """METEOR and SPICE, those of them that could be had, under the names "meteor" and "spice"."""

    corpus: dict[str, float]
    """The numbers papers report, fractions."""
    per_picture: dict[str, list[float]]
    """The same metrics for each of the N pictures by itself."""
    notes: list[str]
    """One line for what was left out, with the reason."""


def java_scores(candidates: Sequence[str], references: Sequence[Sequence[str]], seconds: float = SECONDS) -> JavaScores:
    """METEOR 1.5 (Denkowski and Lavie 2014, WMT) and SPICE 1.0 (Anderson et al. 2016, arXiv:1607.08822) by their jars.

    candidates[i] is the caption under test of picture i, references[i] what people wrote for it; both go through the
    Java tokenizer first, as in the COCO evaluation. METEOR's number for the corpus is its own aggregate, SPICE's the
    mean over the pictures. Each scorer has `seconds` to itself, and one that fails leaves the other alone. SPICE needs
    Stanford's models, which pycocoevalcap leaves to be fetched, and a Java below 15.

    Raises UserError only for lists that do not fit together.
    """
    if not candidates or len(candidates) != len(references):
        raise UserError(
            f"{len(candidates)} captions for {len(references)} pictures: give one for each, and at least one"
        )
    if not all(references):
        raise UserError(f"picture {[bool(captions) for captions in references].index(False)} has no reference")
    scores = JavaScores({}, {}, [])
    try:
        words = iter(java_tokenize([*candidates, *itertools.chain.from_iterable(references)], seconds))
    except UserError as error:
        scores.notes.append(f"METEOR and SPICE left out: {error}")
        return scores
    tested = [" ".join(next(words)) for _ in candidates]
    known = [[" ".join(next(words)) for _ in captions] for captions in references]
    for name, scorer in (("meteor", _meteor), ("spice", _spice)):
        try:
            scores.corpus[name], scores.per_picture[name] = scorer(tested, known, seconds)
        except UserError as error:
            scores.notes.append(f"{name.upper()} left out: {error}")
    return scores


def java_tokenize(captions: Sequence[str], seconds: float = SECONDS) -> list[list[str]]:
    """Each caption's words by Stanford's PTBTokenizer 3.4.1, less the COCO evaluation's list of punctuation.

    metrics.tokenize gives the same words without Java but for one caption in thousands. White space is collapsed
    first, as a line separator inside one caption would shift all after it. Raises UserError where Java or
    pycocoevalcap is missing, fails, or takes longer than `seconds`.
    """
    arguments = ["-cp", str(_jar("tokenizer", "stanford-corenlp-3.4.1.jar")), "edu.stanford.nlp.process.PTBTokenizer"]
    lines = [" ".join(caption.split()) for caption in captions]
    with _java([*arguments, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"], seconds) as program:
        answers = program.ask(lines, len(lines), last=True)
    return [[word for word in line.split() if word not in _PUNCTUATION] for line in answers]


def _meteor(
    candidates: Sequence[str], references: Sequence[Sequence[str]], seconds: float
) -> tuple[float, list[float]]:
    """METEOR of tokenized captions: the corpus, and each picture."""
    jar = _jar("meteor", "meteor-1.5.jar")
    pictures = [" ||| ".join([*known, tested]) for tested, known in zip(candidates, references, strict=True)]
    with _java(["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"], seconds, jar.parent) as program:
        counts = program.ask([f"SCORE ||| {captions}" for captions in pictures], len(pictures))
        # Answers with every picture's number, then with that of their summed counts.
        *each, corpus = map(float, program.ask([" ||| ".join(["EVAL", *counts])], len(pictures) + 1, last=True))
    return corpus, each


def _spice(candidates: Sequence[str], references: Sequence[Sequence[str]], seconds: float) -> tuple[float, list[float]]:
    """SPICE of tokenized captions: the corpus, and each picture."""
    jar = _jar("spice", "spice-1.0.jar")
    missing = [name for name in _SPICE_MODELS if not (jar.parent / "lib" / name).is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is not in {jar.parent / 'lib'}: fetch Stanford's models once with "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    if (version := _java_version()) >= 15:
        # Its results are written through the JavaScript engine that Java 15 dropped: it would fail at the very end.
        raise UserError(f"its jar needs a Java from 8 to 14, and the one on the PATH is {version}")
    pictures = [
        {"image_id": i, "test": tested, "refs": list(known)}
        for i, (tested, known) in enumerate(zip(candidates, references, strict=True))
    ]
    with tempfile.TemporaryDirectory(prefix="spice-") as directory:
        source, results = Path(directory, "captions.json"), Path(directory, "scores.json")
        source.write_text(json.dumps(pictures), encoding="ascii")
        arguments = ["-Xmx8G", "-jar", str(jar), str(source), "-out", str(results), "-silent"]
        with _java(arguments, seconds, jar.parent) as program:
            program.wait()
            scores = {one["image_id"]: float(one["scores"]["All"]["f"]) for one in json.loads(results.read_text())}
            each = [scores[i] for i in range(len(pictures))]
    return float(np.mean(each)), each


def _jar(*parts: str) -> Path:
    """A jar inside the installed pycocoevalcap."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise UserError("pycocoevalcap is not installed: pip install -r requirements-full.txt")
    jar = Path(next(iter(package.submodule_search_locations)), *parts)
    if not jar.is_file():
        raise UserError(f"{jar} is missing: install pycocoevalcap 1.2")
    return jar


def _java_version() -> int:
    """8 for "1.8.0_392", 17 for "17.0.15"."""
    with _java(["-version"], 60) as program:
        program.wait()
        found = re.search(r'version "(?:1\.)?(\d+)', program.complaints())
        if not found:
            raise ValueError("java does not tell its version")
        return int(found[1])


@contextlib.contextmanager
def _java(arguments: Sequence[str], seconds: float, directory: Path | None = None) -> Iterator[_Program]:
    """A Java program that is ended, with all its children, on leaving the block or after `seconds`.

    Raises UserError, in one line, where there is no Java, where time ran out, and for any OSError, ValueError or
    KeyError in the block: what an answer that is cut off leads to.
    """
    java = shutil.which("java")
    if java is None:
        raise UserError("there is no java on the PATH")
    environment = dict(os.environ)
    if "_JAVA_OPTIONS" in environment:  # it beats the command line
        environment["_JAVA_OPTIONS"] += " " + " ".join(_LOCALE)
    with tempfile.TemporaryFile() as errors:  # a file, because a pipe that nobody reads fills up
        try:
            process = subprocess.Popen(
                [java, *_LOCALE, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                env=environment,
                cwd=directory,
                start_new_session=True,  # a group of its own, so that its children can be ended with it
            )
        except OSError as error:
            raise UserError(f"{java} cannot be started ({error.strerror})") from error
        program = _Program(process, errors)
        timer = threading.Timer(seconds, program.time_out)
        timer.daemon = True
        timer.start()
        try:
            yield program
        except (OSError, ValueError, KeyError) as error:
            if not program.late:
                raise UserError(f"java failed ({program.why(error)})") from error
            raise UserError(f"it took longer than {seconds:g} seconds") from error
        finally:
            timer.cancel()
            timer.join()
            program.kill()


class _Program:
    """A running program whose pipes cannot block it or us."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self.process, self.errors, self.late = process, errors, False

    def ask(self, lines: Sequence[str], number: int, last: bool = False) -> list[str]:
        """Sends lines, then end of file if these are the last, and reads `number` lines of answer meanwhile."""
        assert self.process.stdout is not None
        writer = threading.Thread(target=self._send, args=(lines, last), daemon=True)
        writer.start()
        answers = [line.rstrip("\n") for line in itertools.islice(self.process.stdout, number)]
        if len(answers) < number:
            raise ValueError(f"{len(answers)} of {number} answers")
        writer.join()
        return answers

    def _send(self, lines: Sequence[str], last: bool) -> None:
        assert self.process.stdin is not None
        # A program that has died is noticed where its answers are read.
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.writelines(f"{line}\n" for line in lines)
            self.process.stdin.flush()
            if last:
                self.process.stdin.close()

    def wait(self) -> None:
        """Until it ends by itself; what it prints is thrown away. Raises ValueError for a status other than 0."""
        assert self.process.stdout is not None
        for _ in self.process.stdout:
            pass
        if status := self.process.wait():
            raise ValueError(f"exit status {status}")

    def time_out(self) -> None:
        """Ends it, and says so."""
        self.late = True
        self._signal()

    def kill(self) -> None:
        """Ends it and its children, and closes the pipes."""
        self._signal()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was still to be sent
                if pipe is not None:
                    pipe.close()

    def _signal(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def complaints(self) -> str:
        """What it has written to the standard error so far, the first 64 KiB of it."""
        self.errors.seek(0)
        return self.errors.read(1 << 16).decode("utf-8", "replace")

    def why(self, error: Exception) -> str:
        """Why it failed: the line of its own in which an error is named, or its last, or else what happened here."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)  # it may still be writing
        lines = [line.strip() for line in self.complaints().splitlines() if not line.startswith("Picked up ")]
        named = [line for line in lines if re.search("Exception|Error|error", line)]
        return in_one_line((named[:1] or lines[-1:] or [str(error)])[0])


class Chair(NamedTuple):
    """CHAIR over N captions, fractions: the lower, the better."""

    chair_s: float
    """Share of the captions that name an object which is not in the picture."""
    chair_i: float
    """Share of the mentions of objects that are of such an object; 0 where no object is named."""
    invented: dict[Any, list[str]]
    """Image id -> COCO's names of the objects that its caption made up, each mention; only captions with any."""


def chair(
    captions: Mapping[Any, str],
    instances_json: Path,
    references: Mapping[Any, Sequence[str]] | None = None,
) -> Chair:
    """How often captions name one of COCO's 80 kinds of objects that the picture has not got.

    Rohrbach et al. 2018, "Object Hallucination in Image Captioning", arXiv:1809.02156. A picture has the objects that
    COCO's instances_*.json outlines in it and, with references (image id -> captions), those that people named: the
    paper counts both, and without them the numbers are higher. Every mention counts.

    Its limits: the synonyms are our own, so the numbers come close to published ones and are to be compared only with
    others of this function. Words are looked up, not understood: "no dog", "a toy car", "a painting of a boat" and
    "ties a knot" count as the objects; words with more than one common meaning ("orange", "glass", "computer",
    "plant", "chicken") count only in phrases that settle it; and an object outside the 80 kinds is never noticed.

    Raises UserError where pycocotools is missing, the file cannot be used, or a caption's picture is not in it.
    """
    present = _objects_in_pictures(instances_json)
    unknown = [image for image in captions if image not in present]
    if unknown:
        raise UserError(
            f"{instances_json}: {len(unknown)} of the captions' pictures are not in it ({unknown[0]!r}, ...)"
        )
    mentions, invented = 0, {}
    for image, caption in captions.items():
        seen = present[image].union(*map(objects_in, (references or {}).get(image, ())))
        named = objects_in(caption)
        mentions += len(named)
        if absent := [name for name in named if name not in seen]:
            invented[image] = absent
    wrong = sum(map(len, invented.values()))
    return Chair(len(invented) / max(1, len(captions)), wrong / max(1, mentions), invented)


def _objects_in_pictures(instances_json: Path) -> dict[Any, set[str]]:
    """Image id -> names of the kinds of objects outlined in it."""
    try:
        from pycocotools.coco import COCO  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("CHAIR needs pycocotools: pip install -r requirements-full.txt") from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports every step
            coco = COCO(str(instances_json))
        names = {number: category["name"] for number, category in coco.cats.items()}
        present = {image: {names[one["category_id"]] for one in coco.imgToAnns.get(image, ())} for image in coco.imgs}
    except OSError as error:
        raise UserError(f"{instances_json}: cannot be read ({error.strerror})") from error
    except Exception as error:  # pycocotools checks nothing, so a wrong file fails with anything
        why = in_one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{instances_json}: not COCO's instances ({why}): use instances_*.json") from error
    if not present or not names or not set(names.values()) <= set(_SYNONYMS):
        raise UserError(f"{instances_json}: has none or others than COCO's 80 kinds of objects: use instances_*.json")
    return present


def objects_in(caption: str) -> list[str]:
    """COCO's names of the objects that a caption mentions, in its order, each mention; the longest phrase counts.

    >>> objects_in("Two men eat hot dogs by a fire engine near the bus stop")
    ['person', 'hot dog', 'truck']
    """
    phrases = _phrases()
    longest = max(map(len, phrases))
    words = [part for word in tokenize(caption) for part in word.split("-")]
    found, at = [], 0
    while at < len(words):
        lengths = (n for n in range(longest, 0, -1) if tuple(words[at : at + n]) in phrases)
        length = next(lengths, 0)
        if length and (name := phrases[tuple(words[at : at + length])]):
            found.append(name)
        at += max(1, length)
    return found


@lru_cache(maxsize=1)
def _phrases() -> dict[tuple[str, ...], str]:
    """Words of a phrase -> COCO's name, or nothing for phrases that only sound like an object."""
    table = dict.fromkeys(_listed(_NOTHING), "")
    for name, synonyms in _SYNONYMS.items():
        table |= dict.fromkeys(_listed(f"{name}, {synonyms}"), name)
        if name in _ANIMALS:  # or the baby and the mother would be persons
            table |= {(young, *words): name for young in _YOUNG for words in _listed(f"{name}, {synonyms}")}
    # A colour more often than a fruit.
    del table[("orange",)]
    table |= {("an", "orange", after): "orange" for after in ("on", "in", "is", "sitting", "next", "with")}
    return table


def _listed(phrases: str) -> list[tuple[str, ...]]:
    """The phrases of a list with commas, in the singular and the plural."""
    singular = [phrase.strip() for phrase in phrases.split(",") if phrase.strip()]
    return [tuple(form.split()) for phrase in singular for form in (phrase, _plural(phrase))]


def _plural(phrase: str) -> str:
    """By rule, and by _ENDINGS where the rules fail.

    >>> [_plural(word) for word in ("wine glass", "pony", "fireman", "toy", "knife")]
    ['wine glasses', 'ponies', 'firemen', 'toys', 'knives']
    """
    for ending, plural in _ENDINGS.items():
        if phrase.endswith(ending):
            return phrase.removesuffix(ending) + plural
    if re.search("[^aeiou]y$", phrase):
        return phrase[:-1] + "ies"
    return phrase + ("es" if re.search("(s|x|z|ch|sh)$", phrase) else "s")


_ENDINGS = {
    "person": "people",
    "child": "children",
    "man": "men",
    "goose": "geese",
    "mouse": "mice",
    "knife": "knives",
    "calf": "calves",
    "ox": "oxen",
    "sheep": "sheep",
    "scissors": "scissors",
    "skis": "skis",
}
_YOUNG = ("baby", "mother", "mama", "mommy", "momma", "parent", "father", "daddy", "child", "infant")
_ANIMALS = frozenset(["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"])

# Everyday words for the 80 names, collected for this project; plurals follow by rule.
_SYNONYMS = {
    "person": """man, woman, boy, girl, child, kid, toddler, infant, baby, teen, teenager, lady, guy, gentleman, dude,
        human, people, someone, somebody, crowd, pedestrian, passenger, driver, rider, cyclist, bicyclist, biker,
        motorcyclist, surfer, kite surfer, skier, snowboarder, skateboarder, skater, swimmer, golfer, athlete, player,
        ball player, batter, catcher, umpire, referee, goalie, spectator, jockey, cowboy, cow boy, cowgirl,
        cow girl, farmer, worker, fireman, firefighter, fire fighter, policeman, policewoman, police officer, officer,
        cop, soldier, sailor, chef, waiter, waitress, bartender, vendor, customer, shopper, student, teacher, doctor,
        businessman, businesswoman, bride, mother, father, mom, dad, son, daughter, brother, sister,
        grandmother, grandfather, wife, husband, tourist, hiker, fisherman, photographer, musician, artist""",
    "bicycle": "bike, tricycle, mountain bike, push bike",
    "car": """automobile, sedan, taxi, taxi cab, taxicab, cab, suv, minivan, van, jeep, convertible, hatchback,
        limousine, limo, station wagon, sports car, police car, race car""",
    "motorcycle": "motorbike, motor bike, motor cycle, dirt bike, moped, scooter, motor scooter, vespa",
    "airplane": """plane, aeroplane, air plane, aircraft, jet, jetliner, jet liner, airliner, air liner, biplane,
        passenger jet, fighter jet, jumbo jet, seaplane, sea plane""",
    "bus": "double decker, minibus, school bus, tour bus, trolley bus",
    "train": "locomotive, steam engine, train engine, train car, subway car, subway train, railcar",
    "truck": """lorry, pickup, pick up truck, fire truck, firetruck, fire engine, semi, semi truck, tractor trailer,
        dump truck, tow truck, truck bed, food truck, delivery truck""",
    "boat": """ship, sailboat, sail boat, rowboat, row boat, motorboat, motor boat, speedboat, speed boat, houseboat,
        house boat, tugboat, tug boat, canoe, kayak, yacht, ferry, barge, gondola, dinghy, raft, vessel""",
    "traffic light": "traffic signal, stoplight, stop light, traffic lamp",
    "fire hydrant": "hydrant, firehydrant, fire plug",
    "stop sign": "stopsign",
    "parking meter": "parking metre",
    "bench": "park bench, pew",
    "bird": """pigeon, dove, duck, duckling, goose, gosling, swan, gull, seagull, sea gull, parrot, parakeet, cockatoo,
        owl, hawk, eagle, falcon, vulture, ostrich, emu, peacock, penguin, flamingo, pelican, heron, egret, stork,
        sparrow, robin, crow, raven, hummingbird, woodpecker, rooster, hen""",
    "cat": "kitten, kitty, feline",
    "dog": """puppy, pup, doggy, doggie, canine, poodle, terrier, bulldog, bull dog, retriever, labrador, dachshund,
        beagle, hound, corgi, collie, chihuahua, pug, rottweiler, dalmatian, husky, german shepherd, sheepdog, sheep dog""",
    "horse": "pony, foal, colt, mare, stallion",
    "sheep": "lamb, ewe, ram",
    "cow": "bull, calf, ox, heifer, cattle, bovine",
    "elephant": "elephant calf, pachyderm",
    "bear": "grizzly, grizzly bear, polar bear, brown bear, black bear, panda, panda bear, bear cub",
    "zebra": "zebra foal",
    "giraffe": "giraffe calf",
    "backpack": "back pack, rucksack, knapsack",
    "umbrella": "parasol, beach umbrella",
    "handbag": "hand bag, purse, pocketbook, shoulder bag",
    "tie": "necktie, neck tie, bow tie, bowtie",
    "suitcase": "suit case, luggage, baggage, piece of luggage",
    "frisbee": "frisbie, frizbee, flying disc, flying disk",
    "skis": "pair of skis, set of skis",
    "snowboard": "snow board",
    "sports ball": "ball, soccer ball, tennis ball, beach ball, volley ball, rugby ball, soccerball",
    "kite": "",
    "baseball bat": "bat, base ball bat",
    "baseball glove": "baseball mitt, catcher 's mitt, catchers mitt, catcher 's glove, mitt",
    "skateboard": "skate board, longboard",
    "surfboard": "surf board, boogie board, body board, bodyboard",
    "tennis racket": "racket, racquet, tennis racquet, tennis raquet",
    "bottle": "water bottle, beer bottle, wine bottle",
    "wine glass": "wineglass, glass of wine, glass of red wine, glass of white wine, glasses of wine, champagne glass",
    "cup": "mug, teacup, tea cup, coffee cup, coffee mug",
    "fork": "",
    "knife": "butter knife, steak knife",
    "spoon": "tablespoon, teaspoon",
    "bowl": "",
    "banana": "plantain",
    "apple": "",
    "sandwich": "sandwhich, sub sandwich, burger, hamburger, ham burger, cheeseburger, cheese burger, panini",
    "orange": "tangerine, mandarin, clementine, orange slice, slice of orange, orange half, sliced orange, peeled orange",
    "broccoli": "brocolli, broccoli floret",
    "carrot": "carrot stick",
    "hot dog": "hotdog, chili dog, corn dog, corndog",
    "pizza": "pizza pie, pepperoni pizza",
    "donut": "doughnut, dough nut",
    "cake": "cupcake, cup cake, birthday cake, wedding cake, cheesecake, cheese cake, carrot cake, shortcake",
    "chair": "armchair, arm chair, recliner, stool, barstool, high chair, highchair, lawn chair, rocking chair",
    "couch": "sofa, loveseat, love seat, settee, futon",
    "potted plant": "house plant, houseplant, pot plant, flower pot, flowerpot, plant in a pot, planter, potted flower",
    "bed": "bunk bed, hospital bed",
    "dining table": "table, dinner table, kitchen table, dining room table, coffee table, picnic table, desk",
    "toilet": "toilet bowl, toilet seat, commode, urinal",
    "tv": "television, television set, tv set, flat screen, flatscreen, flat screen tv, tv screen, computer monitor",
    "laptop": "laptop computer, lap top, notebook computer, macbook, netbook",
    "mouse": "computer mouse",
    "remote": "remote control, remote controller, wii remote, wiimote, wii controller, game controller, controller",
    "keyboard": "computer keyboard, key board",
    "cell phone": "cellphone, phone, mobile phone, smartphone, smart phone, iphone, telephone",
    "microwave": "microwave oven",
    "oven": "stove, stovetop, stove top, pizza oven, cooker",
    "toaster": "",
    "sink": "washbasin, wash basin, basin",
    "refrigerator": "fridge, freezer, mini fridge, refridgerator",
    "book": "textbook, text book, paperback",
    "clock": "alarm clock, wall clock, clock tower, clocktower, clock face",
    "vase": "flower vase",
    "scissors": "pair of scissors, shears, scissor",
    "teddy bear": "teddy, stuffed bear, toy bear, stuffed animal, stuffed teddy bear, plush bear",
    "hair drier": "hair dryer, hairdryer, hairdrier, blow dryer, blow drier, blowdryer",
    "toothbrush": "tooth brush",
}
_NOTHING = """
    bus stop, bus station, bus terminal, train station, train track, train depot, train yard, truck stop, boat dock,
    boat house, gravy boat, car park, toy store, parking lot, traffic jam, ticket booth, phone booth,
    bird house, bird feeder, bird cage, bird bath, dog house, dog park, dog food, dog bowl, cat food, cat nap, cat tail,
    hot tub, sea horse, horse shoe, bull pen, bull dozer, guinea pig, bear claw, mouse pad, mouse trap,
    snow man, man made, tie dye, tie dyed, umbrella stand, book shelf, book case, book store, book bag, clock work,
    flower bed, bed of flowers, bed room, bed spread, bed sheet, bed frame, table cloth, table tennis, table top,
    ping pong table, pool table, pool ball, tennis table, toilet paper, toilet brush, toilet paper roll, sink hole,
    oven mitt, knife block, apple juice, apple pie, apple sauce, orange juice, orange peel, carrot top, banana bread,
    banana split, banana tree, orange tree, apple tree, banana boat, pizza box, pizza cutter, pizza pan, pizza dough,
    pizza parlor, pizza place, pizza sauce, pizza crust, pan cake, cake stand, cake pan, meat ball, snow ball,
    disco ball, ball park, ball field, ball game, ball cap, ball room, basket ball court, kite surfing, kite board,
    kite boarding, ski ball, record player, dvd player, cd player, mp3 player, music player, piano keyboard,
    musical keyboard, remote area, remote location, remote place, remote beach, chair lift, wheel chair, world cup,
    cup holder, bowl cut, jet ski, bike rack, bike path, bike lane, bicycle rack, bike seat, bicycle seat"""


class ClipScores(NamedTuple):
    """CLIPScore and, with references, RefCLIPScore of N pictures."""

    corpus: dict[str, float]
    """clip_score and ref_clip_score, the means."""
    per_picture: dict[str, NDArray[np.float64]]
    """(N,) each."""


CLIP_WEIGHT = 2.5
CLIP_PREFIX = "A photo depicts "


def clip_scores(
    candidates: Sequence[str],
    pictures: Sequence[PictureSource],
    references: Sequence[Sequence[str]] | None = None,
    model: str | Path = "openai/clip-vit-base-patch32",
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    progress: bool = True,
) -> ClipScores:
    """CLIPScore and RefCLIPScore (Hessel et al. 2021, arXiv:2104.08718).

    With CLIP's embeddings c of the caption, r of a reference and v of the picture, CLIPScore is 2.5 max(cos(c, v), 0),
    and RefCLIPScore the harmonic mean of it and max(0, the largest cos(c, r)). Captions and references begin with "A
    photo depicts ", and what CLIP cannot hold is cut off. model names a CLIP on the Hub or a folder with its weights
    (safetensors) and processor; the paper's is ViT-B/32, and numbers of another are not to be compared with it. The
    arithmetic is fp32.

    Raises UserError where the weights cannot be had, a picture cannot be read, or the lists do not fit together.
    """
    if not candidates or len(candidates) != len(pictures) or len(candidates) != len(references or candidates):
        raise UserError("CLIPScore needs a caption, and where there are references some of them, for every picture")
    if references is not None and not all(references):
        raise UserError(f"picture {[bool(captions) for captions in references].index(False)} has no reference")
    clip = _Clip(model, torch.device(device), batch_size, progress)
    seen = clip.pictures(pictures)
    said = clip.captions(candidates)
    clip_score = CLIP_WEIGHT * (said * seen).sum(-1).clamp(min=0)  # (N,)
    scores = {"clip_score": clip_score}
    if references is not None:
        texts = list(dict.fromkeys(itertools.chain.from_iterable(references)))
        place = {text: i for i, text in enumerate(texts)}
        known = clip.captions(texts)
        nearest = torch.stack(
            [
                (known[[place[text] for text in captions]] @ caption).max()
                for caption, captions in zip(said, references, strict=True)
            ]
        ).clamp(min=0)
        total = clip_score + nearest
        scores["ref_clip_score"] = torch.where(total > 0, 2 * clip_score * nearest / total, torch.zeros(()))
    each = {name: values.numpy() for name, values in scores.items()}
    return ClipScores({name: float(values.mean()) for name, values in each.items()}, each)


class _Clip:
    """A CLIP of transformers' that gives embeddings of length 1, float64 (N, D), on the CPU."""

    def __init__(self, name: str | Path, device: torch.device, batch_size: int, progress: bool) -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:  # nothing but safetensors: a pickle can run code
            if not Path(name).is_dir():
                name = hub_folder(str(name), ["*.json", "model*.safetensors", "merges.txt"])
            loaded: Any = CLIPModel.from_pretrained(name, use_safetensors=True, output_loading_info=True)
            self.model, missing = loaded[0].float().to(device).eval(), sorted(loaded[1]["missing_keys"])
            if missing:  # transformers would go on with random weights
                raise ValueError(f"{len(missing)} weights are missing, {missing[0]} among them")
            self.processor: Any = CLIPProcessor.from_pretrained(name)
        except Exception as error:  # offline, absent, damaged: the Hub client raises many kinds
            why = str(error).strip().split("\n")[0]
            raise UserError(f"CLIP {str(name)!r} cannot be loaded ({why}): name a folder with its weights") from error
        self.device, self.batch_size, self.progress = device, batch_size, progress

    def captions(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of captions, the prefix put before each."""
        longest = self.model.config.text_config.max_position_embeddings

        def embed(batch: Sequence[str]) -> Tensor:
            words = [CLIP_PREFIX + text for text in batch]
            inputs = self.processor.tokenizer(
                words, padding=True, truncation=True, max_length=longest, return_tensors="pt"
            ).to(self.device)
            return self.model.text_projection(self.model.text_model(**inputs).pooler_output)

        return self._in_batches(texts, embed, "CLIP reads")

    def pictures(self, sources: Sequence[PictureSource]) -> Tensor:
        """Embeddings of pictures."""

        def embed(batch: Sequence[PictureSource]) -> Tensor:
            inputs = self.processor.image_processor([_pixels(source) for source in batch], return_tensors="pt")
            pixel_values = inputs["pixel_values"].to(self.device)
            return self.model.visual_projection(self.model.vision_model(pixel_values).pooler_output)

        return self._in_batches(sources, embed, "CLIP looks")

    @torch.no_grad()
    def _in_batches(self, items: Sequence[Any], embed: Any, what: str) -> Tensor:
        starts = tqdm(range(0, len(items), self.batch_size), what, unit="batch", disable=not self.progress)
        parts = [embed(items[start : start + self.batch_size]).cpu().double() for start in starts]
        return normalize(torch.cat(parts), dim=-1)


def _pixels(source: PictureSource) -> NDArray[np.uint8]:
    """A picture as uint8 (H, W, 3) at its full size, as CLIP's own preprocessing wants it."""
    try:
        return decode(source, 1 << 15)
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        name = "picture" if isinstance(source, bytes) or not isinstance(source, str | os.PathLike) else str(source)
        raise UserError(in_one_line(f"{name}: not a picture that can be read ({reason(error)})")) from error
