"""Tokens of the text form and a cursor over them. Text is only ever matched and converted, never evaluated."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import NoReturn

from ..errors import ParseError

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\f]+)|(?P<newline>\n)|(?P<comment>\#[^\n]*)
    |(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<ref>\$\d+)
    |(?P<sign>\.\.|//|==|[()\[\]{},:=@+\-*%.])""",
    re.VERBOSE,
)

MAX_DEPTH = 100
"""Deepest nesting of parentheses and blocks: keeps a hostile file from exhausting the stack."""


@dataclass(frozen=True)
class Token:
    """kind: string, number, name, ref, sign or end; text as written."""

    kind: str
    text: str
    line: int


def tokenize(text: str) -> tuple[list[Token], dict[int, str]]:
    """The tokens, closed by one of kind "end", and the comment that follows token i on its line: i -> text after `#`."""
    tokens: list[Token] = []
    comments: dict[int, str] = {}
    line, at = 1, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ParseError(line=line, reason=f"unexpected character {text[at]!r}")
        kind, at = str(match.lastgroup), match.end()
        if kind == "newline":
            line += 1
        elif kind == "comment":
            if tokens and tokens[-1].line == line:
                comments[len(tokens) - 1] = match.group()[1:].strip()
        elif kind != "space":
            tokens.append(Token(kind, match.group(), line))
    return [*tokens, Token("end", "end of text", line)], comments


class Cursor:
    """A position in a list of tokens."""

    def __init__(self, text: str) -> None:
        self._tokens, self._comments = tokenize(text)
        self._at = 0
        self._depth = 0

    def peek(self, ahead: int = 0) -> Token:
        return self._tokens[min(self._at + ahead, len(self._tokens) - 1)]

    def next(self) -> Token:
        token = self.peek()
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def at(self, text: str, ahead: int = 0) -> bool:
        """True when the token there is this sign or word (never a string)."""
        token = self.peek(ahead)
        return token.text == text and token.kind in ("sign", "name")

    def take(self, text: str) -> bool:
        """Consumes the sign or word if it is next."""
        found = self.at(text)
        if found:
            self.next()
        return found

    def expect(self, text: str) -> None:
        if not self.take(text):
            self.fail(f"expected {text!r}, found {self.peek().text!r}")

    def name(self, what: str) -> str:
        if self.peek().kind != "name":
            self.fail(f"expected {what}, found {self.peek().text!r}")
        return self.next().text

    def string(self) -> str:
        token = self.next()
        if token.kind != "string":
            self.fail(f"expected a string, found {token.text!r}", token)
        try:
            return json.loads(token.text)
        except ValueError:
            self.fail(f"{token.text} is not a valid string", token)

    def integer(self) -> int:
        token = self.next()
        if token.kind != "number" or not token.text.isdigit():
            self.fail(f"expected an integer, found {token.text!r}", token)
        try:
            return int(token.text)
        except ValueError:  # Python limits the digits it converts
            self.fail("that integer is too long", token)

    def comment(self) -> str:
        """The comment that follows the last consumed token on its line, or ""."""
        return self._comments.get(self._at - 1, "")

    def enter(self) -> None:
        """One level deeper; every `enter` is undone by `leave`."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self.fail(f"nested more than {MAX_DEPTH} deep")

    def leave(self) -> None:
        self._depth -= 1

    def fail(self, reason: str, token: Token | None = None) -> NoReturn:
        raise ParseError(line=(token or self.peek()).line, reason=reason)
