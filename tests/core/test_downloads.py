"""Downloads, from a server of this machine: whole and checked or not at all, and one process at a time."""

import hashlib
import threading

import pytest

from cm_train.core import downloads
from cm_train.core import progress as progress_bar
from cm_train.core.signals import StopFlag, Stopped

CONTENT = bytes(range(256)) * 10_000  # 2.56 MB
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def fetch(website, tmp_path):
    """fetch("/a", "/b") downloads from either of these mirrors, and returns what is in the folder then."""

    def run(*paths):
        try:
            downloads.download([website.url + p for p in paths], tmp_path / "file", "md5", MD5, "pictures")
        finally:
            found = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
            assert found == ({"file": CONTENT} if (tmp_path / "file").exists() else {}), "nothing else is left"
        return found

    return run


@pytest.fixture
def lines_at_once(monkeypatch):
    monkeypatch.setattr(progress_bar, "EVERY_S", 0.0)


def test_download_shows_how_far_it_is(fetch, website, capsys, lines_at_once):
    website.files["/a"] = CONTENT
    assert fetch("/a") == {"file": CONTENT}
    assert "fetching pictures, MB 2/3" in capsys.readouterr().err


def test_download_goes_on_to_the_next_mirror(fetch, website):
    website.files |= {"/other": CONTENT[1:], "/cut": CONTENT[:-1], "/good": CONTENT}
    website.promised["/cut"] = len(CONTENT)
    assert fetch("/missing", "/other", "/cut", "/good", "/unasked") == {"file": CONTENT}
    assert website.asked == ["/missing", "/other", "/cut", "/good"]


def test_download_that_fails_says_what_each_mirror_gave(fetch, website):
    website.files |= {"/other": CONTENT[1:], "/cut": CONTENT[:-1]}
    website.promised["/cut"] = len(CONTENT)
    with pytest.raises(OSError, match="404") as failed:
        fetch("/missing", "/other", "/cut")
    missing, other, cut = str(failed.value).split("; ")
    assert missing.startswith(f"{website.url}/missing: ")
    assert other == f"{website.url}/other: what came has the md5 {hashlib.md5(CONTENT[1:]).hexdigest()}, not {MD5}"
    assert cut == f"{website.url}/cut: the connection ended after 2559999 of 2560000 bytes"


def test_download_gives_up_a_silent_server(fetch, website, monkeypatch):
    monkeypatch.setattr(downloads, "_TIMEOUT_S", 0.1)
    website.holds["/a"] = threading.Event()
    with pytest.raises(OSError, match="/a: timed out"):
        fetch("/a")
    website.holds["/a"].set()


def test_download_stops_when_the_command_does(fetch, website, tmp_path_factory):
    website.files["/a"] = CONTENT
    word = tmp_path_factory.mktemp("parent") / "stop"
    word.touch()
    with StopFlag(file=word), pytest.raises(Stopped):
        fetch("/a")


def test_download_that_can_not_be_written_says_so(website, tmp_path):
    website.files["/a"] = CONTENT
    with pytest.raises(FileNotFoundError):
        downloads.download([f"{website.url}/a"], tmp_path / "none" / "file", "md5", MD5, "pictures")


def test_folder_is_one_process_alone_and_the_others_see_how_far_it_is(tmp_path, capsys, lines_at_once):
    order = []

    def other():
        with downloads.alone_in(tmp_path, "pictures"):
            order.append("other")

    with downloads.alone_in(tmp_path, "pictures"):
        waiting = threading.Thread(target=other)
        (tmp_path / ".file.part").write_bytes(bytes(3 * 10**6))
        waiting.start()
        waiting.join(0.1)
        order.append("first")
    waiting.join()
    assert order == ["first", "other"]
    assert capsys.readouterr().err.startswith("fetching pictures, MB 3\n")
    assert [path.name for path in tmp_path.iterdir()] == [".file.part"]


def test_waiting_for_a_folder_stops_when_the_command_does(tmp_path, tmp_path_factory):
    word = tmp_path_factory.mktemp("parent") / "stop"
    with downloads.alone_in(tmp_path, "pictures"):
        word.touch()
        with StopFlag(file=word), pytest.raises(Stopped), downloads.alone_in(tmp_path, "pictures"):
            pass
