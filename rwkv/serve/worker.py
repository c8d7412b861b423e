"""The thread that owns the models and runs the engine."""

import threading

from rwkv.serve.engine import Engine


class Worker:
    """Calls `engine.step` in a thread while there is work.

    Attributes:
        alive: whether the thread is running.
    """

    def __init__(self, engine: Engine):
        self.engine, self._closing = engine, False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests are being processed."""
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Cancel all requests, and wait until the thread has ended."""
        with self.engine.changed:
            self._closing = True
            self.engine.changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        engine = self.engine
        while True:
            with engine.changed:
                while engine.idle() and not self._closing:
                    engine.changed.wait()
                if self._closing:
                    break
            engine.step()
        engine.cancel_all()
