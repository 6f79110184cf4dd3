"""Stop strings: the text that gets through does not depend on how it was cut into pieces."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from infer.stopping import StopStrings


def passed(text: str, stops: list[str], cuts: list[int]) -> tuple[str, bool]:
    """What comes out when `text` is pushed in pieces that end at `cuts`."""
    filtered, out, begin = StopStrings(stops), "", 0
    for end in [*sorted(cut % (len(text) + 1) for cut in cuts), len(text)]:
        out += filtered.push(text[begin:end])
        begin = end
    return out + filtered.finish(), filtered.found


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first place where some stop string is complete decides, the longest one there wins."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(max_examples=300)
@given(
    text=st.text("abc", max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=6),
)
@example(text="abca", stops=["abca", "bc"], cuts=[])
@example(text="aab", stops=["ab"], cuts=[1, 2])
def test_any_split_of_the_text_lets_the_same_through(text: str, stops: list[str], cuts: list[int]) -> None:
    assert passed(text, stops, cuts) == expected(text, stops)


def test_nothing_that_may_become_a_stop_string_is_let_through_early() -> None:
    filtered = StopStrings(["STOP"])
    assert [filtered.push(piece) for piece in ("go S", "T", "AR S", "TO")] == ["go ", "", "STAR ", ""]
    assert filtered.finish() == "STO"
    assert not filtered.found


def test_text_after_a_stop_string_is_dropped() -> None:
    filtered = StopStrings(["\n\n"])
    assert filtered.push("one\n\ntwo") == "one"
    assert filtered.push("three") == ""
    assert filtered.finish() == ""
    assert filtered.found


def test_without_stop_strings_text_passes_at_once() -> None:
    assert StopStrings(()).push("text") == "text"
