"""Addresses that a server listens on, taken before a model is loaded.

Takes host and port, returns listening sockets; ToolkitError, one sentence, for an address that
cannot be had.
"""

import errno
import resource
import socket

from runtime.common.errors import ToolkitError

BACKLOG = 128  # connections that wait to be accepted, which happens many at a time
OTHER_FILES = 384  # weights, pictures, and connections accepted before they are counted
FEWEST_CONNECTIONS = 16


def open_listeners(host: str, port: int) -> list[socket.socket]:
    """A socket for every address of `host`."""
    listeners = []
    problem = None
    for family, _, _, _, address in addresses_of(host, port):
        try:
            listeners.append(listen(family, address))
        except OSError as error:
            problem = error
            if error.errno == errno.EADDRINUSE:
                break
    if problem and (not listeners or problem.errno == errno.EADDRINUSE):
        close_all(listeners)
        raise address_error(host, port, problem)
    return listeners


def check_address(host: str, port: int):
    """ToolkitError unless a server could listen there now."""
    close_all(open_listeners(host, port))


def close_all(listeners: list[socket.socket]):
    for listener in listeners:
        listener.close()


def addresses_of(host: str, port: int) -> list:
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        found = []
    if not host or not found:
        raise ToolkitError(
            f"--host {host!r} is not known on this machine; give an address, e.g. 127.0.0.1, or "
            "0.0.0.0 for the whole network"
        )
    return list(dict.fromkeys(found))


def listen(family, address) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def address_error(host: str, port: int, error: OSError) -> ToolkitError:
    if error.errno == errno.EADDRINUSE:
        other = port + 1 if port < 65535 else port - 1
        return ToolkitError(
            f"--port {port} of {host} is taken by another program; end it, or give another port, "
            f"e.g. --port {other}"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return ToolkitError(
            f"--port {port} may not be used by this user (ports below 1024 are root's); give "
            "another, e.g. --port 8000"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return ToolkitError(
            f"--host {host} is no address of this machine; give one of its own, 127.0.0.1, or "
            "0.0.0.0 for the whole network"
        )
    return ToolkitError(
        f"nothing can listen on --host {host} --port {port}: {error.strerror}; give another "
        "address, e.g. --host 127.0.0.1 --port 8000"
    )


def url_of(host: str, port: int) -> str:
    host = host.strip("[]")
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def possible_connections(wanted: int) -> int:
    """As many connections, up to `wanted`, as this process may have open files for; its own limit
    is raised where the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    if hard == resource.RLIM_INFINITY or hard > soft:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(min(wanted, soft - OTHER_FILES), FEWEST_CONNECTIONS)
