"""The training command of `tiny_process`, which kills itself at the Nth change in its workdir, or after a time.

`KILL_AT=file:17 python tests/killed_process.py WORKDIR --config=…`, or `KILL_AT=time:3.5`, or `KILL_AT=never`.
"""

import os
import signal
import sys
import threading

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(workdir: str, kind: str, when: str) -> None:
    """Kills this process just before a change; of an open file, when it is opened for writing."""
    if kind == "time":
        timer = threading.Timer(float(when), kill)
        timer.daemon = True
        timer.start()
    counted = []

    def look(event: str, given: tuple) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(given[0]).startswith(workdir):
            counted.append(event)
            if kind == "file" and len(counted) == int(when):
                kill()

    sys.addaudithook(look)


if __name__ == "__main__":
    arm(sys.argv.pop(1), *f"{os.environ['KILL_AT']}:".split(":")[:2])
    from tiny_process import main

    main()
