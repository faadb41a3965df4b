"""The text the demo model learns from: a small grammar, and nothing else.

Every sentence is written here, so the text has no other licence than the repository's.

The rule that makes the model useful in tests: its greedy answer must not hang on a coin flip.
Where several continuations are possible, each topic has one favourite, taken ``FAVOURITE_SHARE``
of the time (``_pick``).  The trained model then prefers one token clearly at nearly every step,
and still has something to choose from when it samples.
"""

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

END, USER, ASSISTANT, SYSTEM = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"

SPECIAL_TOKENS = (END, USER, ASSISTANT, SYSTEM)
"""Their token ids are their positions here: 0, 1, 2, 3."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|system|>{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}<|assistant|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""What ``Conversation.text`` writes, as a template of the Hugging Face kind."""

FAVOURITE_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer."""

    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow each other, perhaps under a system message."""

    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def text(self) -> str:
        """The conversation as the model reads it, special tokens included."""
        opening = "" if self.system is None else SYSTEM + self.system
        turns = (f"{USER}{turn.user}{ASSISTANT}{turn.assistant}{END}" for turn in self.turns)
        return opening + "".join(turns)


@dataclass(frozen=True, slots=True)
class Animal:
    """Who a story is about."""

    word: str
    nature: str
    home: str
    emoji: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """What goes wrong in a story, what helps, and how it ends."""

    seen: str
    stuck: str
    tools: tuple[str, ...]
    end: str
    lesson: str


@dataclass(frozen=True, slots=True)
class Language:
    """A language, where it is spoken, and ``PHRASES`` said in it, in that order."""

    name: str
    country: str
    capital: str
    flag: str
    phrases: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _rows(table: str) -> list[list[str]]:
    """Split a table of ``|`` and line ends into its trimmed cells."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


ANIMALS = {
    word: Animal(word, nature, home, emoji)
    for word, nature, home, emoji in _rows("""
        fox      | clever       | the forest       | 🦊
        rabbit   | quick        | the meadow       | 🐰
        bear     | strong       | the mountains    | 🐻
        owl      | wise         | the old oak tree | 🦉
        frog     | cheerful     | the pond         | 🐸
        mouse    | tiny         | the barn         | 🐭
        turtle   | patient      | the river        | 🐢
        cat      | curious      | the garden       | 🐱
        dog      | loyal        | the farm         | 🐶
        hedgehog | shy          | the woods        | 🦔
        duck     | funny        | the lake         | 🦆
        squirrel | busy         | the park         | 🐿️
        lion     | brave        | the grassland    | 🦁
        penguin  | playful      | the ice          | 🐧
        horse    | fast         | the stable       | 🐴
        bee      | hard-working | the flowers      | 🐝
    """)
}

# word -> (adjective, purpose)
TOOLS = {
    word: (nature, purpose)
    for word, nature, purpose in _rows("""
        lantern | bright | to see in the dark
        map     | old    | to find the way
        rope    | long   | to climb down
        basket  | big    | to carry apples
        key     | golden | to open the door
        blanket | warm   | to keep warm at night
        boat    | little | to cross the water
        whistle | silver | to call for help
        ladder  | tall   | to reach the top
        drum    | loud   | to make music
    """)
}

TROUBLES = tuple(
    Trouble(seen, stuck, _words(tools), end, lesson)
    for seen, stuck, tools, end, lesson in _rows("""
        took a wrong turn | could not find the way home | map whistle drum | soon they were back home | It is good to ask for help
        saw dark clouds in the sky | heard the thunder | blanket boat | they stayed dry until the rain stopped | It is wise to be prepared
        was very hungry | had nothing to eat | basket drum | everyone shared a good meal | Food tastes better when we share it
        came to a broken bridge | could not cross the river | rope boat | they reached the other side | Together we can solve hard problems
        found a locked door | could not open it | key ladder | the door opened with a soft click | Patience opens many doors
        saw that the sun was going down | was afraid of the dark | lantern blanket | the night was not scary anymore | A small light can be very brave
        saw a kite in a tall tree | could not reach it | ladder rope | the kite was flying again | We find a way when we keep trying
    """)  # noqa: E501
)

NAMES = _words("Mia Tom Lily Ben Zoë José Anna Max Sara Leo Noël Nina Sam Ella Jack Rosa")

PLACES = (
    *("the castle", "the harbor", "the village", "the old mill", "the cave"),
    *("the hill", "the market", "the library", "the little café"),
)

PHRASES = ("hello", "thank you", "good night", "yes", "good luck")

LANGUAGES = tuple(
    Language(name, country, capital, flag, tuple(phrases))
    for name, country, capital, flag, *phrases in _rows("""
        French     | France      | Paris   | 🇫🇷 | bonjour | merci | bonne nuit | oui | bonne chance
        Spanish    | Spain       | Madrid  | 🇪🇸 | hola | gracias | buenas noches | sí | buena suerte
        German     | Germany     | Berlin  | 🇩🇪 | hallo | danke schön | gute Nacht | ja | viel Glück
        Portuguese | Portugal    | Lisbon  | 🇵🇹 | olá | obrigado | boa noite | sim | boa sorte
        Polish     | Poland      | Warsaw  | 🇵🇱 | cześć | dziękuję | dobranoc | tak | powodzenia
        Greek      | Greece      | Athens  | 🇬🇷 | γεια σου | ευχαριστώ | καληνύχτα | ναι | καλή τύχη
        Ukrainian  | Ukraine     | Kyiv    | 🇺🇦 | привіт | дякую | на добраніч | так | удачі
        Japanese   | Japan       | Tokyo   | 🇯🇵 | こんにちは | ありがとう | おやすみなさい | はい | 頑張って
        Chinese    | China       | Beijing | 🇨🇳 | 你好 | 谢谢 | 晚安 | 是 | 祝你好运
        Korean     | South Korea | Seoul   | 🇰🇷 | 안녕하세요 | 감사합니다 | 안녕히 주무세요 | 네 | 행운을 빌어요
    """)  # noqa: E501, RUF001
)

OPPOSITES = tuple(
    pair.split("-")
    for pair in _words(
        "hot-cold big-small fast-slow up-down day-night old-new long-short happy-sad "
        "open-closed light-dark early-late full-empty"
    )
)

SERIES = {
    "the days of the week": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "the months of the year": "January, February, March, April, May, June, July, August, "
    "September, October, November, December",
    "the four seasons": "spring, summer, autumn, winter",
    "the colors of the rainbow": "red, orange, yellow, green, blue, indigo, violet",
    "the alphabet": " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}

SMALL_TALK = (
    (("Hello!", "Hello", "Hi!", "Hi there!"), "Hello! It is nice to meet you. 😊 How can I help?"),
    (("How are you?", "How are you today?"), "I am very well, thank you. How are you?"),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am the pdserve demo model. I am very small, but I like to tell stories. 🤖",
    ),
    (
        ("What can you do?", "Help", "How can you help me?"),
        "I can tell stories, add small numbers, count, and say hello in ten languages. 🌍",
    ),
    (("Thank you!", "Thanks!", "Thank you."), "You are welcome! 🌟"),
    (("Good night!", "Good night."), "Good night! Sleep well. 😴✨"),
    (("Goodbye!", "Bye!"), "Goodbye! Come back soon. 👋"),
    (
        ("Tell me a joke.", "Do you know a joke?"),
        "Why did the duck bring a ladder to the lake? It wanted to jump in at the deep end! 😂",
    ),
    (
        ("Tell me about the moon.", "What is the moon?"),
        "The moon goes around the earth. It shines because the sun shines on it. 🌙",
    ),
    (
        ("Tell me about the sea.", "What is the sea?"),
        "The sea is very big and full of salt water. Fish and whales live in it. 🌊",
    ),
)

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a kind storyteller.",
    "Answer in short sentences.",
)

WORDS = _words(
    "apple river window summer garden cloud paper bread stone music winter candle bridge "
    "mountain silver orange letter flower island pencil"
)

NUMBERS = _words("zero one two three four five six seven eight nine ten")


_T = TypeVar("_T")


def _pick(dice: random.Random, slot: str, topic: str, options: Sequence[_T]) -> _T:
    """Choose one option for ``slot``; mostly the one this topic always favours."""
    if dice.random() < FAVOURITE_SHARE:
        return options[zlib.crc32(f"{slot}/{topic}".encode()) % len(options)]
    return dice.choice(options)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


@dataclass(frozen=True, slots=True)
class Cast:
    """What a story settled on, so that later turns can ask about it."""

    hero: Animal
    name: str
    tool: str


def _cast(dice: random.Random, hero: Animal | None, tool: str | None) -> Cast:
    hero = hero or ANIMALS[_pick(dice, "hero", tool or "", tuple(ANIMALS))]
    tool = tool or _pick(dice, "tool", hero.word, tuple(TOOLS))
    return Cast(hero, _pick(dice, "name", hero.word, NAMES), tool)


def _opening(dice: random.Random, cast: Cast) -> str:
    hero, name, tool = cast.hero, cast.name, cast.tool
    when = _pick(dice, "when", hero.word, ("Once upon a time", "One sunny morning", "Long ago"))
    who = f"{_with_article(hero.nature)} {hero.word} named {name}"
    habit = _pick(
        dice,
        "habit",
        hero.word,
        (
            f"{name} always carried {_with_article(TOOLS[tool][0])} {tool}.",
            f"{name} loved to sing and owned {_with_article(TOOLS[tool][0])} {tool}.",
        ),
    )
    return f"{when}, there was {who} who lived near {hero.home}. {habit}"


def _adventure(dice: random.Random, cast: Cast, trouble: Trouble) -> str:
    """One chapter: a way, a trouble, a friend, an end.  The hero's tool decides most of it."""
    hero, name, tool = cast.hero, cast.name, cast.tool
    topic = f"{hero.word}/{trouble.stuck}"
    friend = ANIMALS[
        _pick(dice, "friend", hero.word, [word for word in ANIMALS if word != hero.word])
    ]
    friend_name = _pick(
        dice, "friend name", friend.word, [other for other in NAMES if other != name]
    )
    place = _pick(dice, "place", topic, PLACES)
    mood = _pick(dice, "mood", topic, ("happy", "proud", "thankful"))
    way = f"On the way to {place}, {name} {trouble.seen} and {trouble.stuck}."
    help_came = _pick(
        dice,
        "help",
        hero.word,
        (
            f'"Do not worry," said {friend_name} the {friend.word}. "I have an idea."',
            f'"What should I do?" asked {name}. {friend_name} the {friend.word} came to help.',
        ),
    )
    used = f"They used the {TOOLS[tool][0]} {tool}, and {trouble.end}."
    thanks = f"{name} was {mood} and said thank you to {friend_name}."
    return f"{way} {help_came} {used} {thanks} {trouble.lesson}."


def _story(dice: random.Random, cast: Cast, chapter_count: int) -> str:
    fitting = [trouble for trouble in TROUBLES if cast.tool in trouble.tools]
    first = _pick(dice, "trouble", cast.hero.word, fitting)
    start = TROUBLES.index(first)
    chapters = [
        first,
        *(TROUBLES[(start + step) % len(TROUBLES)] for step in range(1, chapter_count)),
    ]
    links = ("", "The next day, they went out again. ", "At last, they went home. ")
    told = " ".join(
        link + _adventure(dice, cast, trouble)
        for link, trouble in zip(links, chapters, strict=False)
    )
    return f"{_opening(dice, cast)} {told}"


def _about_story(dice: random.Random, cast: Cast) -> Turn:
    """Ask for something that stands in the story just told, and in no weight."""
    word, name, home = cast.hero.word, cast.name, cast.hero.home
    return dice.choice(
        (
            Turn("Who was the story about?", f"The story was about {name} the {word}."),
            Turn(f"What was the name of the {word}?", f"The name of the {word} was {name}."),
            Turn(f"Where did {name} live?", f"{name} lived near {home}."),
            Turn(f"What did {name} use?", f"{name} used the {TOOLS[cast.tool][0]} {cast.tool}."),
        )
    )


def _story_turns(dice: random.Random) -> list[Turn]:
    hero = dice.choice(tuple(ANIMALS.values())) if dice.random() < 0.6 else None
    tool = dice.choice(tuple(TOOLS)) if dice.random() < 0.3 else None
    chapter_count = 3 if dice.random() < 0.25 else 1
    cast = _cast(dice, hero, tool)
    kind = "a long story" if chapter_count > 1 else dice.choice(("a story", "a short story"))
    about = f" about {_with_article(hero.word)}" if hero else ""
    tooled = f" with {_with_article(tool)}" if tool else ""
    asked = dice.choice(("Tell me", "Please tell me", "Write")) + f" {kind}{about}{tooled}."
    turns = [Turn(asked, _story(dice, cast, chapter_count))]
    if dice.random() < 0.5:
        turns.append(_about_story(dice, cast))
    return turns


def _sum_turns(dice: random.Random) -> list[Turn]:
    left, right = dice.randrange(11), dice.randrange(11)
    if dice.random() < 0.3:
        left, right = max(left, right), min(left, right)
        asked, sign, result = "minus", "-", left - right
    else:
        asked, sign, result = "plus", "+", left + right
    if result <= 10 and dice.random() < 0.5:
        said = f"{NUMBERS[left]} {asked} {NUMBERS[right]}"
        return [Turn(f"What is {said}?", f"{_capitalised(said)} is {NUMBERS[result]}.")]
    written = f"{left} {sign} {right}"
    question = dice.choice((f"What is {written}?", f"{written} = ?", f"How much is {written}?"))
    return [Turn(question, f"{written} = {result}")]


def _count_turns(dice: random.Random) -> list[Turn]:
    start = 1 if dice.random() < 0.5 else dice.randrange(1, 60)
    stop = start + (dice.randrange(3, 12) if dice.random() < 0.5 else dice.randrange(12, 41))
    counted = ", ".join(str(number) for number in range(start, stop + 1))
    asked = f"Count to {stop}." if start == 1 else f"Count from {start} to {stop}."
    return [Turn(asked, f"{counted}.")]


def _series_turns(dice: random.Random) -> list[Turn]:
    topic = dice.choice(tuple(SERIES))
    asked = dice.choice((f"What are {topic}?", f"Tell me {topic}.", f"Name {topic}."))
    return [Turn(asked, f"{_capitalised(SERIES[topic])}.")]


def _language_turns(dice: random.Random) -> list[Turn]:
    language = dice.choice(LANGUAGES)
    index = dice.randrange(len(PHRASES))
    said, name = language.phrases[index], language.name
    asked = dice.choice(
        (f"How do you say {PHRASES[index]} in {name}?", f"Say {PHRASES[index]} in {name}.")
    )
    return [Turn(asked, f"{_capitalised(PHRASES[index])} in {name} is: {said}")]


def _country_turns(dice: random.Random) -> list[Turn]:
    language = dice.choice(LANGUAGES)
    country = language.country
    capital = Turn(
        f"What is the capital of {country}?",
        f"The capital of {country} is {language.capital}. {language.flag}",
    )
    spoken = Turn(
        f"Which language do people speak in {country}?",
        f"In {country}, people speak {language.name}. {language.flag}",
    )
    return [dice.choice((capital, spoken))]


def _animal_turns(dice: random.Random) -> list[Turn]:
    animal = dice.choice(tuple(ANIMALS.values()))
    word = animal.word
    home = Turn(
        f"Where does the {word} live?",
        f"The {word} lives near {animal.home}. It is very {animal.nature}.",
    )
    emoji = Turn(f"Show me an emoji of a {word}.", f"Here is the {word}: {animal.emoji}")
    return [dice.choice((home, emoji))]


def _word_turns(dice: random.Random) -> list[Turn]:
    if dice.random() < 0.5:
        word, opposite = dice.choice(OPPOSITES)
        return [Turn(f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}.")]
    tool, (nature, purpose) = dice.choice(tuple(TOOLS.items()))
    return [Turn(f"What is a {tool} for?", f"You can use a {nature} {tool} {purpose}.")]


def _repeat_turns(dice: random.Random) -> list[Turn]:
    words = " ".join(dice.choices(WORDS + NAMES, k=dice.randrange(2, 9)))
    return [Turn(f"Repeat after me: {words}", words)]


def _memory_turns(dice: random.Random) -> list[Turn]:
    """Ask for something said some turns ago: right only if the old keys and values are."""
    name, word = dice.choice(NAMES), dice.choice(WORDS)
    of_name = (
        Turn(f"Hello, my name is {name}.", f"Hello {name}! It is nice to meet you. 😊"),
        Turn("What is my name?", f"Your name is {name}."),
    )
    of_word = (
        Turn(f"Remember the word {word}.", f"I will remember the word {word}."),
        Turn("Which word did I say?", f"You said the word {word}."),
    )
    told, asked = dice.choice((of_name, of_word))
    between = [turn for _ in range(dice.randrange(3)) for turn in _fact_turns(dice)]
    return [told, *between, asked]


def _small_talk_turns(dice: random.Random) -> list[Turn]:
    asked, answer = dice.choice(SMALL_TALK)
    return [Turn(dice.choice(asked), answer)]


def _fact_turns(dice: random.Random) -> list[Turn]:
    makers: tuple[Callable[[random.Random], list[Turn]], ...] = (
        _sum_turns,
        _series_turns,
        _language_turns,
        _country_turns,
        _animal_turns,
        _word_turns,
    )
    return dice.choice(makers)(dice)


_KINDS: tuple[tuple[Callable[[random.Random], list[Turn]], int], ...] = (
    (_story_turns, 30),
    (_fact_turns, 32),
    (_sum_turns, 6),
    (_count_turns, 8),
    (_memory_turns, 12),
    (_repeat_turns, 6),
    (_small_talk_turns, 6),
)


def conversation(dice: random.Random) -> Conversation:
    """Make one conversation of one to about ten turns."""
    makers, weights = zip(*_KINDS, strict=True)
    turns: list[Turn] = []
    for maker in dice.choices(makers, weights, k=dice.choice((1, 1, 2, 4))):
        turns.extend(maker(dice))
    system = dice.choice(SYSTEM_MESSAGES) if dice.random() < 0.15 else None
    return Conversation(tuple(turns), system)


def documents(seed: int, count: int) -> Iterator[str]:
    """Yield ``count`` training texts, each closed by ``END``; the same for the same seed.

    One in twelve is a bare story, so that plain completions have something to continue.
    """
    dice = random.Random(seed)
    for _ in range(count):
        if dice.random() < 1 / 12:
            hero = dice.choice(tuple(ANIMALS.values()))
            yield _story(dice, _cast(dice, hero, None), 1) + END
        else:
            yield conversation(dice).text
