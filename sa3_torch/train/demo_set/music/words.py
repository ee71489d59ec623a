"""Define the vocabulary of the set "music": a word-level ``tokenizer.json`` that copes with words it does not know.

Ids: <pad> 0, <eos> 1, <bos> 2, <unk> 3, then WORDS in order. Spellings and other names are joined ("hi-hat", "sax",
"Bb", "B flat", "dnb"), articles and small words dropped, a pitch such as "a#4" is a root and an octave, tempos are
rounded down to even numbers. A word that is not listed is <unk>, and training captions hold some, so that the model has
learnt to pass over them.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from sa3_torch.train.demo_set.vocabulary import FLATS, SPECIAL, UNK, whole_word

NUMBERS = tuple(str(number) for number in range(1, 13))  # octaves, seconds, bars
TEMPOS = tuple(str(bpm) for bpm in range(60, 181, 2))
ROOTS = ("c", "c#", "d", "d#", "e", "f", "f#", "g", "g#", "a", "a#", "b")
# Words of captions, the frequent ones first; the order is that of the ids.
_LINES = """
    bpm note minor major drum bass chord electric guitar piano playing melody seventh acoustic one and synth single
    loop line with played arpeggio harpsichord sound music beat hat shot hit lead vibraphone suspended sample pad
    flute organ brass string ensemble cello hip hop strings diminished rock soft accordion open second fast disco kick
    jazz section samba bossa nova snare bassoon band square fading loud reverb violin choir box reggae solo celesta
    clap conga crash ride tom noise metal funk koto saxophone pizzicato effect out tuba techno short horn long
    woodblock slap distorted banjo kalimba trumpet rim high tambourine clarinet marimba bar happy house dark harp
    cowbell pan warm viola groove oboe closed french rhythm ambient cymbal clean classical trap piece folk harmonica
    pop song slow electronic sad broken trombone plays steel shaker grand steady drone voices glitch sitar tune four
    laser nylon rain brown impact wind tense xylophone hand white beep track pink dramatic riser pipe siren cheerful
    two church fall falling zap calm sweep bright melancholic crackle ocean saw gentle side stick gloomy legato tabla
    digital powerful rising staccato walking deep blowing instrumental low funky peaceful offbeat vinyl boom build up
    waves percussion sea robot downward brush drop hard phone bell glass hum swoosh blip amen buzz trance heavy roll
    chime ping triangle twang wood full breakbeat industrial crow door dub backspin hiss rewind scratch
"""
NAMES = tuple(_LINES.split())
WORDS: tuple[str, ...] = (*ROOTS, *NUMBERS, *TEMPOS, *NAMES)

_SPELLINGS = {
    "beats per minute": "bpm",
    "hi[ -]?hats?": "hat",
    "hats": "hat",
    "hiphop": "hip hop",
    "bossanova|bossa": "bossa nova",
    "bossa nova nova": "bossa nova",
    "dnb|drum n bass|drums and bass music|jungle": "drum and bass",
    "sax": "saxophone",
    "rhodes": "electric piano",
    "upright bass|double bass|contrabass": "acoustic bass",
    "bass guitar": "electric bass",
    "synthesizer|synthesiser": "synth",
    "horn section": "brass section",
    "vibes": "vibraphone",
    "handclaps?": "hand clap",
    "rimshot": "rim shot",
    "bass drum": "kick drum",
    "maj": "major",
    "min": "minor",
    "maj7": "major seventh",
    "m7": "minor seventh",
    "7th": "seventh",
    "dim": "diminished",
    "sus|sus4": "suspended",
    "tones?|notes": "note",
    "sec|secs|s": "second",
    "quick|quickly|uptempo": "fast",
    "slowly|downtempo": "slow",
    "quiet|softly": "soft",
    "basslines?": "bass line",
    "oneshot": "one shot",
    "cymbals": "cymbal",
    "melodies": "melody",
    "arpeggiated|arp": "arpeggio",
}
_PLURALS = (
    "drum",
    "beat",
    "loop",
    "chord",
    "bar",
    "second",
    "arpeggio",
    "line",
    "riser",
    "laser",
    "beep",
    "clap",
    "kick",
)
_DROPPED = "an|the|of|at|in|on|by|for|to"
_AFTER_ROOT = "major|minor|seventh|suspended|diminished|sharp|flat|chord"


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer; it adds no special tokens and neither pads nor truncates."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    steps: list[normalizers.Normalizer] = [
        normalizers.Lowercase(),
        normalizers.Replace("♭", "b"),
        normalizers.Replace("♯", "#"),
        normalizers.Replace(Regex(r"[^a-z0-9#<> ]+"), " "),
        normalizers.Replace(Regex(" +"), " "),
        normalizers.Replace(Regex(r"(?<=\d)(?=(?:bpm|s|sec|seconds)(?!\S))"), " "),
    ]
    steps += [normalizers.Replace(Regex(rf"(?<!\S){flat}(?=\d?(?!\S))"), sharp) for flat, sharp in FLATS.items()]
    steps += [normalizers.Replace(whole_word(f"{flat[0]} flat"), sharp) for flat, sharp in FLATS.items()]
    steps += [normalizers.Replace(whole_word(f"{root[0]} sharp"), root) for root in ROOTS if root.endswith("#")]
    steps += [normalizers.Replace(whole_word(spelling), word) for spelling, word in _SPELLINGS.items()]
    steps += [normalizers.Replace(whole_word(f"{word}s"), word) for word in _PLURALS]
    steps += [normalizers.Replace(Regex(f"{odd}(?= bpm)"), str(odd - 1)) for odd in (1, 3, 5, 7, 9)]
    steps.append(normalizers.Replace(whole_word(_DROPPED), ""))
    steps.append(normalizers.Replace(Regex(rf"(?<!\S)a +(?!(?:{_AFTER_ROOT})(?!\S))(?=\S)"), ""))
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=SPECIAL[UNK]))
    tokenizer.normalizer = normalizers.Sequence(steps)
    octave = pre_tokenizers.Split(Regex(r"(?<=[a-g#])[1-8]$"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), octave])
    return tokenizer
