"""An engine in another process that makes no more steps than a test lets it, so that nothing is over before its time.

Knows Engine.step and one file; nothing of servers or requests.

    brake = Brake(tmp_path); brake.hold(3); live("demo", before=brake.code)  # its engine stands still after three steps
    brake.release()                                                          # and goes on
"""

from __future__ import annotations

import os
from pathlib import Path

CODE = """
import os, time
from finial.engine.generate import Engine
def braked(self, step=Engine.step):
    while self.unfinished and self.steps >= os.stat({path!r}).st_size:
        time.sleep(0.001)
    return step(self)
Engine.step = braked
"""


class Brake:
    """A file whose size is how many steps there may be: another process sees it change at once, and never half.

    Between two steps is where the engine is held, so whatever is cancelled there is gone at once.

    Attributes:
        code: Python that puts it on whatever engine its process makes.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "steps"
        self._file.touch()
        self.code = CODE.format(path=str(self._file))
        self.release()

    def hold(self, steps: float) -> None:
        """No step after so many, counted from the engine's first."""
        os.truncate(self._file, int(steps))

    def release(self) -> None:
        """As many as it likes."""
        self.hold(1 << 30)
