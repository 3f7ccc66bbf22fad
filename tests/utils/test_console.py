"""Text for people."""

import io
import subprocess
import sys

import pytest

from tspipe.utils.console import quote


@pytest.mark.parametrize(("encoding", "word"), [("utf-8", "'é\\'"), ("ascii", r"$'\xc3\xa9\x5c'")])
def test_a_quoted_word_can_be_pasted(monkeypatch: pytest.MonkeyPatch, encoding: str, word: str) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert quote("é\\") == word
    assert subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True).stdout == "é\\".encode()
