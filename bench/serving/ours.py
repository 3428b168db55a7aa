"""This project's server as a process of its own: the real Triton, and the gateway before it. Prints where they are, ends with its input.

python -m bench.serving.ours REPOSITORY MODEL LOG_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from teacher_server.serve import Gateway, open_backend
from teacher_server.settings import ServerSettings


def main() -> None:
    """Serve until standard input is closed."""
    repository, name, logs = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    settings = ServerSettings(backend="triton", port=0, auth="none")
    with open_backend(settings, repository, name, logs) as served, Gateway(served.connect, settings) as gateway:
        print(json.dumps({"grpc": served.triton_url, "rest": gateway.url}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
