"""A text file of any length, line by line."""

import hashlib
import os
import re
from array import array

from runtime.settings import BadInput, require

CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")  # no text has these, but a damaged file may


class Lines:
    """The lines of a UTF-8 text file without the blank ones: lines[i] is a str, stripped.

    In memory is where each begins, eight bytes a line; its text is read when it is asked for.
    sha256: a hash of all of them. Raises BadInput for a file that cannot be read, holds none, or
    has a damaged line, which is named by its number; later for one that was written to since.
    """

    def __init__(self, path):
        self.path = path
        self.starts = array("q")
        digest = hashlib.sha256()
        at = 0
        try:
            self.file = open(path, "rb")
            for number, line in enumerate(self.file, 1):
                text = text_of(line, path, number)
                if text:
                    if self.starts:
                        digest.update(b"\n")
                    digest.update(text.encode())
                    self.starts.append(at)
                at += len(line)
        except OSError as e:
            raise BadInput(f"cannot read prompts from {path}: {e.strerror}") from None
        require(self.starts, f"{path} holds no prompts: one a line is expected")
        self.sha256 = digest.hexdigest()
        self.version = self.written()

    def written(self):
        """When and how the file was last written: (nanoseconds, bytes)."""
        status = os.fstat(self.file.fileno())
        return status.st_mtime_ns, status.st_size

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        require(self.version == self.written(), f"{self.path} was written to while it is read")
        self.file.seek(self.starts[i])
        return self.file.readline().decode("utf-8-sig").strip()


def text_of(line, path, number):
    """A line's bytes as text, stripped. Raises BadInput, naming its number."""
    where = f"line {number} of {path} is damaged"
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadInput(f"{where}: it is not UTF-8 text") from None
    require(not CONTROL.search(text), f"{where}: it has control characters")
    return text
