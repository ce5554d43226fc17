"""What is read from files and folders, and what is said about the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from collegium.errors import InvalidRequest
from collegium.retrieval import Document, read_documents

LATIN = "Über die Größe der Städte steht hier ein kurzer Satz."


def test_reads_a_folder_recursively_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.rst", "a/LICENSE", "c.TXT", "d.markdown", ".hidden.txt", ".git/config.txt", "a/.x/y.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    documents, notes = read_documents([tmp_path])
    assert [document.name for document in documents] == ["a/LICENSE", "a/z.rst", "b.md", "c.TXT", "d.markdown"]
    assert documents[1].text == "text of a/z.rst"
    assert notes == []


def test_a_file_is_named_by_its_file_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_documents([path]) == ([Document("notes.txt", "one\ntwo\nthree\n")], [])


def test_equal_names_from_two_folders_stay_apart_and_a_file_is_read_once(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    documents, notes = read_documents([tmp_path / "one", tmp_path / "two", tmp_path / "one" / "a.txt"])
    assert documents == [Document("a.txt", "one"), Document("a.txt (2)", "two")]
    assert notes == []


def test_everything_that_is_not_read_gets_a_sentence(tmp_path: Path) -> None:
    outside = tmp_path / "secret.txt"
    outside.write_text("a secret")
    folder = tmp_path / "given"
    (folder / "real").mkdir(parents=True)
    (folder / "good.md").write_text("good")
    (folder / "binary.txt").write_bytes(b"\x7fELF\x00\x01")
    (folder / "program").write_bytes(b"\x7fELF\x01\xff\xfe")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "blank.txt").write_text(" \n\t\n")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.7")
    (folder / "russian.txt").write_bytes("Это не UTF-8, но и не западный текст".encode("koi8_r"))
    (folder / "huge.txt").touch()
    os.truncate(folder / "huge.txt", 20 * 1024 * 1024 + 1)
    (folder / "link.txt").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    (folder / "inner").symlink_to(folder / "real", target_is_directory=True)
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "broken.txt").symlink_to("nowhere.txt")
    os.mkfifo(folder / "pipe.txt")
    documents, notes = read_documents([folder])
    assert documents == [Document("good.md", "good")]
    assert notes == [
        "binary.txt was not read: it is a binary file.",
        "blank.txt was not read: it is empty.",
        "broken.txt was not read: it is a link to nothing.",
        "empty.txt was not read: it is empty.",
        "huge.txt was not read: it is larger than 20 MB.",
        "inner was not read: it is a link to a folder.",
        "link.txt was not read: it is a link that leads out of the folder.",
        "linked was not read: it is a link that leads out of the folder.",
        "loop.txt was not read: it is a link to itself.",
        "paper.pdf was not read: files of type .pdf are not supported.",
        "pipe.txt was not read: it is not a regular file.",
        "program was not read: it is a binary file.",
        "russian.txt was not read: its encoding is not UTF-8.",
    ]


def test_a_western_8_bit_text_is_read_and_named(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes(LATIN.encode("latin-1"))
    (tmp_path / "windows.txt").write_bytes(LATIN.encode("utf-16"))
    documents, notes = read_documents([tmp_path])
    assert [document.text for document in documents] == [LATIN, LATIN]
    assert notes == ["old.txt was read as Windows-1252, since it is not UTF-8."]


def test_a_link_inside_the_folder_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert read_documents([tmp_path]) == ([Document("a.txt", "text")], [])


def test_hostile_file_names_become_one_printable_line(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff\nb.txt")).write_text("text")
    documents, _ = read_documents([tmp_path])
    assert documents[0].name == "a\ufffd\ufffdb.txt"


@pytest.mark.parametrize("path", ["missing", "nul\0", "file.txt/below"])
def test_a_path_that_cannot_be_used_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(InvalidRequest, match=path.strip("\0")) as caught:
        read_documents([tmp_path / "file.txt", tmp_path / path])
    assert ".md" in str(caught.value.hint)


def test_nothing_readable_says_why(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.pdf").write_bytes(b"%PDF")
    with pytest.raises(InvalidRequest) as caught:
        read_documents([tmp_path])
    assert "0.pdf was not read: files of type .pdf are not supported." in caught.value.message
    assert "2 more were not read." in caught.value.message
    assert ".txt, .md, .markdown, .rst" in str(caught.value.hint)
    with pytest.raises(InvalidRequest, match="no text to read"):
        read_documents([])
