import numpy as np
import pytest
import tokenizers

from dynaexq_jax.errors import InputError
from dynaexq_jax.text import read_windows, split_documents

DOMAINS = ("python", "go", "fr", "ru", "en")


class Letters:
    """Each character is a token; 0 ends a document."""

    eos_id = 0

    def encode(self, text):
        return [ord(c) for c in text]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\n<|endoftext|>\ntwo\n<|endoftext|>\n", ["one", "two"]),
        ("one\n<|endoftext|>\ntwo", ["one", "two"]),
        ("one\n<|endoftext|>", ["one"]),
        ("\n\n  one\n\n<|endoftext|>\n<|endoftext|>\n\n<|endoftext|>\n", ["\n\n  one\n"]),
        ("not a line <|endoftext|>\n<|endoftext|> nor this\n", None),
        ("a\n\nb\n", ["a\n\nb\n"]),
        ("", []),
    ],
)
def test_documents(text, documents):
    assert split_documents(text) == ([text] if documents is None else documents)


def test_windows_overlap_by_one_token(tmp_path):
    path = tmp_path / "text"
    path.write_text("abcd\n<|endoftext|>\nefgh\n<|endoftext|>\n")
    a, e = ord("a"), ord("e")
    stream = [a, a + 1, a + 2, a + 3, 0, e, e + 1, e + 2, e + 3, 0]
    windows = read_windows(path, Letters(), 3)
    assert windows.tolist() == [stream[0:4], stream[3:7], stream[6:10]]
    assert windows.dtype == np.int32
    assert read_windows(path, Letters(), 3, 2).tolist() == windows[:2].tolist()
    assert read_windows(path, Letters(), 4, 9).tolist() == [stream[0:5], stream[4:9]]
    assert read_windows(path, Letters(), 9).tolist() == [stream]


def test_line_ends_of_windows_are_those_of_unix(tmp_path):
    (tmp_path / "unix").write_bytes(b"a\nb\n<|endoftext|>\nc\n")
    (tmp_path / "dos").write_bytes(b"a\r\nb\r\n<|endoftext|>\r\nc\r\n")
    unix, dos = (read_windows(tmp_path / name, Letters(), 5) for name in ("unix", "dos"))
    np.testing.assert_array_equal(unix, dos)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_shipped_texts_give_what_the_reference_scores_were_made_with(
    domain, nano_dir, text_dir, tokenizer
):
    """Split so, the losses of nano are those of its reference.json to a millionth."""
    reference = tokenizers.Tokenizer.from_file(str(nano_dir / "tokenizer.json"))
    path = text_dir / f"{domain}.txt"
    ids = []
    for document in path.read_text(encoding="utf-8").split("\n<|endoftext|>\n"):
        if document:
            ids += [*reference.encode(document, add_special_tokens=False).ids, 8189]
    assert len(ids) >= 8 * 512 + 1
    windows = read_windows(path, tokenizer, 512, 8)
    assert windows.tolist() == [ids[i * 512 : i * 512 + 513] for i in range(8)]


def test_every_shipped_text_names_its_source(text_dir):
    sources = (text_dir / "SOURCES.md").read_text(encoding="utf-8")
    texts = sorted(path.name for path in text_dir.glob("*.txt"))
    assert texts == sorted(f"{domain}.txt" for domain in DOMAINS)
    assert all(f"`{name}`" in sources for name in texts)


def test_bad_files_are_refused(tmp_path):
    missing = tmp_path / "missing.txt"
    with pytest.raises(InputError, match=r"missing\.txt: No such file"):
        read_windows(missing, Letters(), 4)
    with pytest.raises(InputError, match="Is a directory"):
        read_windows(tmp_path, Letters(), 4)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("déjà".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 1"):
        read_windows(latin, Letters(), 4)
    short = tmp_path / "short.txt"
    short.write_text("abc")
    with pytest.raises(InputError, match="has 4 tokens, one window of 4 needs 5"):
        read_windows(short, Letters(), 4)
    for sizes in ((0, 1), (4, 0)):
        with pytest.raises(InputError, match="must be at least 1, got 0"):
            read_windows(short, Letters(), *sizes)
