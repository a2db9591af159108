"""A hub that is a folder: whole versions, names that stay, and what was changed in it found."""

import os
import signal
from pathlib import Path

import pytest

from heedful import UserError
from hub import folder as hub
from sources import files as on_disk


@pytest.fixture
def given(tmp_path):
    (tmp_path / "given").mkdir()

    def files(**contents):
        for name, content in contents.items():
            (tmp_path / "given" / name).write_text(content)
        return {f"deep/{name}": tmp_path / "given" / name for name in contents}

    return files


def test_versions_tags_and_the_way_back(tmp_path, given):
    shelf = tmp_path / "shelf"
    assert hub.put(shelf, given(a="1", b="2"), tag="v1") == "versions/1"
    assert hub.put(shelf, given(a="1", b="2"), tag="same") == "versions/1", "nothing is added"
    assert hub.put(shelf, given(a="3")) == "versions/2"
    assert [(shelf / name / "deep/a").read_text() for name in ("v1", "same", "main")] == ["1", "1", "3"]
    hub.get(shelf, "v1", tmp_path / "got")
    assert {p.name: p.read_text() for p in (tmp_path / "got/deep").iterdir()} == {"a": "1", "b": "2"}
    assert on_disk.fault(tmp_path / "got") is None
    with pytest.raises(UserError, match="the tag v1 is at versions/1"):
        hub.put(shelf, given(a="4"), tag="v1")
    assert (shelf / "main/deep/a").read_text() == "3", "and nothing was pushed"
    with pytest.raises(UserError, match="no version 'v9'"):
        hub.get(shelf, "v9", tmp_path / "none")
    with pytest.raises(UserError, match="no such folder"):
        hub.get(tmp_path / "nowhere", "main", tmp_path / "none")


def test_what_is_copied_out_is_one_version(tmp_path, given, monkeypatch):
    shelf, plain = tmp_path / "shelf", hub.shutil.copyfile
    hub.put(shelf, given(a="1", b="1"))
    later = given(c="2", d="2") | {f"deep/{name}": tmp_path / f"given/{name}2" for name in "ab"}
    for name in "ab":
        (tmp_path / f"given/{name}2").write_text("2")

    def copyfile(*paths):
        monkeypatch.setattr(hub.shutil, "copyfile", plain)
        hub.put(shelf, later)  # somebody pushes meanwhile
        return plain(*paths)

    monkeypatch.setattr(hub.shutil, "copyfile", copyfile)
    hub.get(shelf, "main", tmp_path / "got")
    assert {p.name: p.read_text() for p in (tmp_path / "got/deep").iterdir()} == {"a": "1", "b": "1"}
    assert (shelf / "main/deep/a").read_text() == "2"


@pytest.mark.fault("a changed file in a folder that serves as hub", "not handed out")
def test_what_was_changed_in_it_is_not_handed_out(tmp_path, given):
    hub.put(tmp_path / "shelf", given(a="1"))
    (tmp_path / "shelf/main/deep/a").write_text("2")
    with pytest.raises(UserError, match="deep/a does not match"):
        hub.get(tmp_path / "shelf", "main", tmp_path / "got")
    assert not (tmp_path / "got").exists()
    assert hub.put(tmp_path / "shelf", given(a="1")) == "versions/2", "a push mends it"
    hub.get(tmp_path / "shelf", "main", tmp_path / "got")


@pytest.mark.parametrize("tag", ["", "main", "versions", "../x", "a/b", ".lock"])
def test_a_tag_is_a_plain_name(tag, tmp_path, given):
    with pytest.raises(UserError, match="no name for a tag"):
        hub.put(tmp_path / "shelf", given(a="1"), tag=tag)


def test_a_folder_of_other_things_is_left_alone(tmp_path, given):
    with pytest.raises(UserError, match="a folder of other things"):
        hub.put(tmp_path, given(a="1"))


@pytest.mark.parametrize(("target", "path"), [("file:///a%20b/c", "/a b/c"), ("file://localhost/a", "/a")])
def test_an_address_is_a_path(target, path):
    assert hub.folder_of(target) == Path(path)


@pytest.mark.parametrize("target", ["file://other/a", "file:a", "file://"])
def test_no_other_machine_is_reached(target):
    with pytest.raises(UserError, match="no folder of this machine"):
        hub.folder_of(target)


def push_and_die(shelf, files, point):
    """Push in a process of its own that kills itself before the so-manieth call that changes the disk."""
    if (child := os.fork()) == 0:
        calls = 0

        def armed(plain):
            def counted(*what, **words):
                nonlocal calls
                calls += 1
                return os.kill(os.getpid(), signal.SIGKILL) if calls == point else plain(*what, **words)

            return counted

        for holder, name in ((os, "replace"), (os, "symlink"), (os, "rename"), (hub.shutil, "copyfile"), (os, "fsync")):
            setattr(holder, name, armed(getattr(holder, name)))
        hub.put(shelf, files, tag="v2")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.fault("`kill -9` of a push into it, anywhere", "the version is whole or not there")
def test_a_push_is_whole_or_not_there_wherever_it_is_killed(tmp_path, given):
    killed, code = 0, None
    while code != 0:
        shelf = tmp_path / str(killed)
        shelf.mkdir()
        (shelf / ".lock").touch()  # of a push that was killed at once
        hub.put(shelf, given(a="1"))
        code = push_and_die(shelf, given(a="2", b="3"), killed + 1)
        for name in {"main", "v2"} & set(os.listdir(shelf)):
            assert on_disk.fault(shelf / name) is None
        assert (shelf / "main/deep/a").read_text() in "12"
        hub.put(shelf, given(a="2", b="3"), tag="v2")
        assert not [*shelf.glob("versions/.*"), *shelf.glob(".link-*")]
        hub.get(shelf, "v2", tmp_path / f"got{killed}")
        killed += 1
    assert killed > 10
