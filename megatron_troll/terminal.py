"""Text on a terminal: control characters of answers, files and errors are shown, never sent."""

import re
from typing import Any, TextIO

# Everything that moves a cursor, changes colours or the order of letters, or cannot be encoded: C0 without
# tab and line feed, delete, C1, separators of lines and paragraphs, marks of direction, half characters.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def shown(text: str) -> str:
    """The text with every control character but tab and line feed as an escape: `\\x1b[31m`."""
    return CONTROL.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class ShowingStream:
    """A text stream that escapes what is written to it; everything else is that of `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(shown(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
