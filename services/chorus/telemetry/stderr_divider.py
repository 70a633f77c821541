"""The program that `native_stderr` starts: it reads what a process writes to standard error, and divides it.

It needs the standard library alone, and is run by its path, so that it starts fast and stays small. Arguments: the
descriptor to read, the one for wanted lines, the one for the rest; two regular expressions: what a wanted line starts
with, and what a line may be in full that goes on a wanted one.
"""

import os
import re
import sys

_CHUNK = 64 * 1024
# A line longer than this is no log line; it is passed on in pieces rather than kept.
_LINE_MAX = 256 * 1024
# What a pipe takes whole or not at all (PIPE_BUF is 4096 on Linux), so that no line is torn.
_GIVEN_MAX = 4000


class Divider:
    """Divides the bytes of one stream."""

    def __init__(self, wanted: int, rest: int, start: "re.Pattern[bytes]", continuation: "re.Pattern[bytes]") -> None:
        self._wanted = wanted
        self._rest = rest
        self._start = start
        self._continuation = continuation
        self._pending = b""
        self._previous = False

    def is_wanted(self, line: bytes) -> bool:
        """Whether a line (without its end) is wanted, coming after those that were fed."""
        if self._start.match(line) is not None:
            return True
        return self._previous and self._continuation.fullmatch(line) is not None

    def feed(self, chunk: bytes) -> None:
        """Takes what was read."""
        *lines, self._pending = (self._pending + chunk).split(b"\n")
        for line in lines:
            self._previous = self.is_wanted(line)
            if not (self._previous and self._give(line)):
                self._pass_on(line + b"\n")
        # Half a line that is nobody's log is a progress bar or a question, which must not wait for its end. A full read
        # may have been cut anywhere, so that one waits for the next.
        cut = len(chunk) == _CHUNK and len(self._pending) <= _LINE_MAX
        if self._pending and not cut and (len(self._pending) > _LINE_MAX or not self.is_wanted(self._pending)):
            self._pass_on(self._pending)
            self._pending, self._previous = b"", False

    def end(self) -> None:
        """Passes on what has no end."""
        self._pass_on(self._pending)

    def _give(self, line: bytes) -> bool:
        try:
            os.write(self._wanted, line[:_GIVEN_MAX] + b"\n")
        except BlockingIOError:
            return True  # nobody has time for it; better lost than everybody stopped
        except OSError:
            return False  # the process is gone: whatever it did not read is for the real standard error
        return True

    def _pass_on(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._rest, data) :]
        except OSError:
            pass


def main(arguments: "list[str]") -> None:
    """Runs until the end of the stream."""
    source, wanted, rest = (int(text) for text in arguments[:3])
    start, continuation = (re.compile(text.encode("latin-1")) for text in arguments[3:5])
    os.set_blocking(wanted, False)
    divider = Divider(wanted, rest, start, continuation)
    while chunk := os.read(source, _CHUNK):
        divider.feed(chunk)
    divider.end()


if __name__ == "__main__":
    main(sys.argv[1:])
