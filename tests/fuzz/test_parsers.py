"""Every reader of bytes from outside answers rubbish with a typed refusal, in bounded time and memory.

The kept inputs are read first, all of them; then mutations of them, a few for each parser. `make fuzz` goes on for as
long as it is told to.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ota.errors import OtaError, Reason
from tests.fuzz.engine import CORPUS, Parser, judge, mutate
from tests.fuzz.parsers import all_parsers

PARSERS = all_parsers()
every_parser = pytest.mark.parametrize("parser", PARSERS, ids=[parser.name for parser in PARSERS])


@every_parser
def test_valid_kept_inputs_are_accepted(parser: Parser) -> None:
    """A corpus of inputs that are refused at the first byte would find nothing behind it."""
    valid = [path for path in parser.corpus() if path.name.startswith("valid-")]
    assert valid, f"{parser.name} has no valid input"
    for path in valid:
        parser.read(path.read_bytes())


@every_parser
def test_no_kept_input_does_any_harm(parser: Parser) -> None:
    findings = {path.name: finding for path in parser.corpus() if (finding := judge(parser, path.read_bytes()))}
    assert not findings


@every_parser
def test_no_mutation_of_a_kept_input_does_any_harm(parser: Parser) -> None:
    seeds = [path.read_bytes() for path in parser.corpus()]

    @settings(
        max_examples=parser.examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def run(rng: random.Random) -> None:
        data = mutate(rng, seeds, parser.form)
        finding = judge(parser, data)
        assert finding is None, f"{finding}\n{data[:2000]!r}"

    run()


def test_every_folder_of_the_corpus_belongs_to_a_parser() -> None:
    assert {path.name for path in CORPUS.iterdir()} == {parser.name for parser in PARSERS}


# -- the fuzzer itself -------------------------------------------------------------------------------------------------


def _hungry(data: bytes) -> object:
    return bytearray(80 << 20)


@pytest.mark.parametrize(
    ("read", "kind"),
    [(_hungry, "memory"), (lambda data: {}[data], "KeyError"), (lambda data: 1 // 0, "ZeroDivisionError")],
)
def test_a_parser_that_misbehaves_is_found(read, kind: str) -> None:
    finding = judge(Parser("x", read), b"")
    assert finding is not None
    assert finding.kind.startswith(kind)


@pytest.mark.parametrize(
    ("message", "hint"),
    [("two\nlines", "hint"), ("\x1b[31m", "hint"), ("x" * 1000, "hint"), ("no", ""), ("no", "a\nb")],
)
def test_a_refusal_without_a_hint_or_on_two_lines_is_found(message: str, hint: str) -> None:
    refusal = OtaError(Reason.BAD_JSON, "no")
    refusal.message, refusal.hint = message, hint

    def read(data: bytes) -> object:
        raise refusal

    assert judge(Parser("x", read, person=True), b"") is not None


def test_a_changed_state_after_a_refusal_is_found() -> None:
    state: list[int] = []

    def read(data: bytes) -> object:
        state.append(1)
        raise OtaError(Reason.BAD_JSON, "no")

    finding = judge(Parser("x", read, state=lambda: len(state)), b"")
    assert finding is not None
    assert finding.kind == "state"
