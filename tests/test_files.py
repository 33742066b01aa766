"""What is no file is not read, and names from files cannot write to a terminal."""

import json
import os

import pytest

from vit_jax import files
from vit_jax.errors import UserError, printable


def test_a_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "x").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert files.read_regular(tmp_path / "x") == files.read_regular(str(tmp_path / "link"), most=7) == b"content"


def test_what_is_no_file_or_too_large_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "large.jpg").touch()
    os.truncate(tmp_path / "large.jpg", 1 << 40)  # takes no room on the disk
    for name, said in {
        "pipe.jpg": "a named pipe",
        "zero.jpg": "a device",
        "large.jpg": "1,099,511,627,776 bytes, allowed are 2,147,483,648",
    }.items():
        with pytest.raises(UserError, match=said):
            files.read_regular(tmp_path / name)
    (tmp_path / "folder.jpg").mkdir()
    for name in ("folder.jpg", "gone.jpg"):
        with pytest.raises(OSError):
            files.read_regular(tmp_path / name)


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        files.write_json(tmp_path / "file" / "a.json", {})
    assert error.value.filename == str(tmp_path / "file" / "a.json")


@pytest.mark.parametrize("names", [["größe 猫", "a\\b"], ["ü", "bad \udcff"], ["two\nlines", "bell\x07\x7f\x9b", "\u202egpj"]])
@pytest.mark.parametrize(("encoding", "indent"), [("utf-8", None), ("utf-8", 2), ("latin-1", None), ("ascii", 2), (None, None)])
def test_json_is_printable_and_gives_names_back(names, encoding, indent):
    text = files.json_text(names, encoding=encoding, indent=indent)
    assert json.loads(text.encode(encoding or "ascii").decode(encoding or "ascii")) == names
    assert all(line.isprintable() for line in text.split("\n"))
    if names[0] == "größe 猫" and encoding == "utf-8":
        assert names[0] in text  # for people to read


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("blocks.0/größe 猫 👩‍🔬 می‌خواهم", "blocks.0/größe 猫 👩‍🔬 می‌خواهم"),
        ("a\x1b[31mred\nerror: b\r\x00\x9b", r"a\x1b[31mred\nerror: b\r\x00\x9b"),
        ("exe.\u202egpj", r"exe.\u202egpj"),
        ("\udcff\u2028", r"\udcff\u2028"),
        ("a" * 150 + "b" * 150, "a" * 100 + " … " + "b" * 100),
        (("x", 1), "('x', 1)"),
    ],
)
def test_names_from_files_are_printed_with_escapes_visible(text, shown):
    assert printable(text) == shown
