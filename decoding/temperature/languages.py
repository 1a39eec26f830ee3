"""Whether a request is written in English, which is all that an English encoder can read.

Words count as evidence: frequent words of ten other languages and words in other letters against English; frequent
words of English, and words that the encoder's tokenizer keeps whole, for it. A prompt may hold texts of several
languages ("Translate into English: Guten Morgen"): it is the request that counts, and that stands at its begin or end.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from unicodedata import combining, normalize

_REACH = 600  # characters at each end of a prompt
_SEGMENTS = re.compile(r"(?<=[.?!:;])\s+|\n+|[\"“”„«»<>()|=—]|->|→|(?<=[。？！：，])")
_WORDS = re.compile(r"[^\W\d_]+")
_ENGLISH_WORDS = """
a about after all an and any are as at be because been before being between but by can could did do does each
every explain for from give good had has have he hello her here hi him his how i if in into is it its just list
make may me mean means might more most must my no not of on only or other our out over please say she should so
some tell than thank thanks that the their them then there these they this those to too translate up us very was
we were what when where which who why will with without would write yes you your
"""
# What asks for something in English, and decides where a prompt holds both.
_ASKING_WORDS = """
arabic chinese continue convert correct czech danish detect dutch english example examples express finnish
follow french german greek hindi how hungarian italian japanese korean label language mean meaning means pattern
please polish portuguese proverb put read render reply russian said say saying says spanish summarise summarize
summary swedish translate translation turkish ukrainian understand vietnamese what what's word words
"""
# Frequent words that are none of English, of German, French, Spanish, Italian; and of Portuguese, Dutch, Polish,
# Swedish and Turkish.
_FOREIGN_WORDS = """
der das den dem ein eine einen einem einer eines und oder nicht ist sind sein wird werden ich du er sie es wir
ihr mir mich dir dich uns euch für über auf mit von zu zum zur aus bei nach wie wo warum wann wer wenn dass kann
kannst könnte bitte schreibe schreib erkläre erzähl erzähle gib nenne fasse übersetze zusammen mein meine meinen
deine guten morgen danke auch noch nur sehr mehr im vom beim ins einige kurze kurzen kurzes deutsch habe haben
le les un une au aux et ou est sont été être je tu il elle nous vous ils elles mon ma mes ton ta tes sa ses
notre votre leur ce cet cette ces qui que quoi quel quelle quels quelles où quand comment pourquoi avec sans
dans sur sous par ne pas plus très écris écrivez rédige explique raconte donne traduis traduisez résume fais
peux peut bonjour merci moi toi quelques français en qu
el los las una unos unas del al está están ser yo tú él ella nosotros mi su sus este esta estos esto qué quién
cómo dónde cuándo cuál cuáles con sin para por pero muy más escribe explica cuéntame dame traduce resume haz
puedes gracias hola sobre entre hay tres frases español
lo gli uno della dello dei delle degli nel nella sul sulla di che chi cosa dove quando perché non è sono essere
io lui lei noi voi mio mia tuo tua questo questa tra fra più molto scrivi spiega raccontami dammi traduci
riassumi puoi grazie ciao poesia frasi seguente italiano
os uma um dos na nos não são ele ela eu você meu minha com sem mais muito escreva obrigado het een van niet zijn
ik jij hij wij voor met op te naar hoe waarom schrijf vertel vertaal geef leg się nie jest jak dlaczego czy na
dla napisz wyjaśnij przetłumacz proszę dziękuję och att det är jag inte varför hur skriv förklara berätta
översätt bir ve bu için nasıl neden yaz anlat çevir
"""
_ENGLISH, _ASKING, _FOREIGN = (frozenset(words.split()) for words in (_ENGLISH_WORDS, _ASKING_WORDS, _FOREIGN_WORDS))


def is_english(text: str, known: Collection[str] = ()) -> bool:
    """Whether what a prompt asks is asked in English, as far as its words tell.

    Args:
        text: the prompt.
        known: words that the encoder's tokenizer does not take apart, in lower case.
    """
    ends = [text] if len(text) <= 2 * _REACH else [text[:_REACH], text[-_REACH:]]
    segments = [part for end in ends for part in _SEGMENTS.split(end) if part and _WORDS.search(part)]
    evidence = [_evidence(part, known) for part in segments]
    if not any(foreign >= 1 for _, foreign, _ in evidence):
        return True
    english, foreign = (sum(each[i] for each in evidence) for i in (0, 1))
    asked = any(asks for _, _, asks in (*evidence[:2], *evidence[-2:]))
    if asked and not _asks_otherwise(evidence[0], evidence[-1]):
        return True
    return english > foreign and evidence[0][0] >= evidence[0][1]


def _asks_otherwise(first: tuple[float, float, bool], last: tuple[float, float, bool]) -> bool:
    """Whether a prompt begins in another language and ends in English that asks for nothing, or only asks inside."""
    return first[1] > first[0] and not first[2] and not last[2]


def _plain(word: str) -> str:
    """Without accents, as the tokenizers of English encoders read it."""
    return "".join(letter for letter in normalize("NFD", word) if not combining(letter))


def _evidence(segment: str, known: Collection[str]) -> tuple[float, float, bool]:
    """For English, against it, and whether it asks in English."""
    words = _WORDS.findall(segment.lower())
    english = foreign = 0.0
    for word in words:
        if word in _FOREIGN:
            foreign += 1
        elif word in _ENGLISH:
            english += 1
        elif len(word) > 2 and _plain(word) in known:
            english += 0.5  # café
        elif not word.isascii():
            foreign += max(1.0, len(word) / 4) if ord(max(word)) > 0x24F else 1.0
        elif len(word) > 2:
            foreign += 0.3
    return english, foreign, english > 0 and english >= foreign - 1 and not _ASKING.isdisjoint(words)
