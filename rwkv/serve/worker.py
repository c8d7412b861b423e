"""The thread that owns the models and runs the engine."""

import threading

from rwkv.serve.engine import Engine


class Worker:
    """Calls `engine.step` in a thread while there is work."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests are being processed."""
        return self._thread.is_alive() and not self.engine.closed

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Cancel all requests, and wait until the thread has ended."""
        self.engine.close()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        engine = self.engine
        while True:
            with engine.changed:
                while engine.idle():
                    if engine.closed:
                        return
                    engine.changed.wait()
            engine.step()
