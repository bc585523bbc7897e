"""What Ctrl-C and SIGTERM do to a command: it saves, says how to go on, and ends. A second Ctrl-C ends it at once.

Python runs the handler of a signal between two operations of the main thread, and one operation, such as compiling or
sampling, may take minutes. Here a thread waits for signals instead, and saves while the operation goes on.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_NAMES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}  # SIGHUP: the terminal was closed
_SIGNALS = {int(getattr(signal, name)): shown for name, shown in _NAMES.items() if hasattr(signal, name)}
_SAME = 0.3  # seconds in which a second Ctrl-C counts as the first, because wrappers send it once more


class Stopping:
    """How a command ends after a signal.

    Attributes:
        advice: the last line that is printed, which says how to go on.
        writing: is held while files are written that belong together. A command that is stopped ends between them.
        together: whether several processes make the run. A signal then only sets `requested`.
        requested: the number of the signal; 0 before.
    """

    def __init__(self, advice: str = ""):
        self.advice, self.writing, self.together, self.requested = advice, threading.RLock(), False, 0
        self._save: Callable[[], str] = lambda: ""

    def save_first(self, save: Callable[[], str]) -> None:
        """Sets what is done before the command ends; it returns what it did as a phrase."""
        self._save = save

    def end(self, number: int) -> None:
        """Saves, prints the advice, and ends the process with the signal's exit code."""
        with self.writing:
            try:
                done = self._save()
            except Exception as error:  # the command ends in any case
                done = f"error: {error}"
            for line in filter(None, (done, self.advice)):
                _tell(line)
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(128 + number)

    def watch(self, wakeups: socket.socket) -> None:
        """Waits for signals until the socket is closed."""
        first = 0.0
        with wakeups:
            while numbers := wakeups.recv(64):
                for number in filter(_SIGNALS.__contains__, numbers):
                    if not self.requested:
                        first, self.requested = time.monotonic(), number
                        what = "ends after this epoch" if self.together else "saves and ends"
                        _tell(f"\n{_SIGNALS[number]}: {what}; Ctrl-C again ends at once")
                        if not self.together:
                            threading.Thread(target=self.end, args=(number,), daemon=True).start()
                    elif number == signal.SIGINT and time.monotonic() - first > _SAME:
                        os._exit(128 + number)


@contextmanager
def stoppable(advice: str) -> Iterator[Stopping]:
    """A context in which a signal saves first. Signals that the process was told to ignore stay ignored."""
    stopping = Stopping(advice)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    numbers = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=stopping.watch, args=(reading,), daemon=True).start()
    try:
        yield stopping
    finally:
        with stopping.writing:  # if a signal has come, the process ends here
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
        writing.close()


def _tell(line: str) -> None:
    with suppress(OSError, ValueError):  # the terminal is gone
        print(line, file=sys.stderr, flush=True)
