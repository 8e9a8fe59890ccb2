"""Several workers of one port, stopped so that nobody waits in a queue that none of them reads."""

from typing import Any

import uvicorn
from uvicorn.supervisors import Multiprocess

_HEALTH_S = 15  # a worker with too much to do is slow to say that it lives; killing it helps nobody


def run(app: str, *, workers: int, **options: Any) -> None:
    """Serve with uvicorn until told to stop, by one process or a parent of several."""
    if workers == 1:
        uvicorn.run(app, **options)
        return
    config = uvicorn.Config(app, workers=workers, timeout_worker_healthcheck=_HEALTH_S, **options)
    Supervisor(config, [config.bind_socket()]).run()


class Supervisor(Multiprocess):
    """uvicorn's, but for its end: it lets go of the port, and passes on a second SIGTERM."""

    def join_all(self) -> None:
        """Wait for the workers, which go on listening for as long as they drain."""
        for listener in self.sockets:  # while it is open here, the system accepts for nobody
            listener.close()
        self.signal_queue.clear()
        for worker in self.processes:
            while worker.process.is_alive():
                worker.process.join(0.1)
                if self.signal_queue:
                    self.signal_queue.clear()
                    self.terminate_all()
