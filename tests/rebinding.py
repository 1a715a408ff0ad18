"""The gateway on a machine whose name server is a stranger's: what it says to names below `rebound.test` leads inside, at once or later.

`python -m tests.rebinding` is `python -m gateway`, with another `getaddrinfo`."""

from __future__ import annotations

import socket
from typing import Any

from gateway.__main__ import main

PUBLIC, LOOPBACK, METADATA = "93.184.215.14", "127.0.0.1", "169.254.169.254"
# Nobody is there; the deployment is told that it may be gone to.
ALLOWED = "127.0.0.2"
ANSWERS = {
    "private.rebound.test": ["10.0.0.7"],
    "both.rebound.test": [PUBLIC, LOOPBACK],
    "metadata.google.internal": [METADATA],
    "second.rebound.test": [ALLOWED],
}
_real = socket.getaddrinfo
_seen = set[str]()


def look_up(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
    if host not in ANSWERS:
        return _real(host, port, *args, **kwargs)
    # Whoever asks again is led to this machine.
    addresses = [LOOPBACK] if host == "second.rebound.test" and host in _seen else ANSWERS[host]
    _seen.add(host)
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0)) for address in addresses]


if __name__ == "__main__":
    socket.getaddrinfo = look_up
    main()
