"""Run a server in a thread, for a program that is not one itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from .app import make_server
from .listening import listen
from .settings import Settings
from .studio import Studio


@contextmanager
def running(settings: Settings) -> Iterator[Studio]:
    """Serve on this machine until the ``with`` statement ends; port 0 takes a free one, which ``settings.port`` says.

    Raises as ``Studio``, and RuntimeError where the server does not start.
    """
    listening = listen("127.0.0.1", settings.port)
    studio = Studio(replace(settings, host="127.0.0.1", port=listening.getsockname()[1]))
    server = make_server(studio)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="sa3-server", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.005)
        yield studio
    finally:
        server.should_exit = True
        thread.join()
