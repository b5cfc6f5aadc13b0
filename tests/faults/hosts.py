"""Hosts of their own on this machine: network namespaces with a name each, joined by one cable."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from types import TracebackType
from typing import Self

NEW_NETWORK, NEW_NAME = 0x40000000, 0x04000000  # CLONE_NEWNET, CLONE_NEWUTS


class Hosts:
    """Two hosts, first and second; within, processes may `enter` them. Raises: OSError where that is not allowed."""

    def __init__(self) -> None:
        self.names = [f"mega{os.getpid()}{letter}" for letter in "ab"]
        self.addresses = ["10.217.0.1", "10.217.0.2"]
        self.interface = "cable"  # in each of them

    def __enter__(self) -> Self:
        try:
            for name in self.names:
                _ip("netns", "add", name)
            _ip("-n", self.names[0], "link", "add", self.interface, "type", "veth",
                "peer", "name", self.interface, "netns", self.names[1])  # fmt: skip
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", self.interface)
                for device in ("lo", self.interface):
                    _ip("-n", name, "link", "set", device, "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def cut(self) -> None:
        """The cable is pulled: nobody is told, packets are lost both ways."""
        _ip("-n", self.names[1], "link", "set", self.interface, "down")

    def mend(self) -> None:
        """The cable is back."""
        _ip("-n", self.names[1], "link", "set", self.interface, "up")

    def lose_one_way(self) -> None:
        """What the second host sends is lost; what it is sent arrives."""
        wrong = "02:00:00:00:00:99"
        _ip("-n", self.names[1], "neighbour", "replace", self.addresses[0], "lladdr", wrong, "nud", "permanent",
            "dev", self.interface)  # fmt: skip


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def why_not() -> str:
    """Why there can be no hosts here; empty where they can."""
    try:
        with Hosts():
            return ""
    except OSError as error:
        return str(error)


def enter(host: str) -> None:
    """From here on this process is on `host`, and called so."""
    libc = ctypes.CDLL(None, use_errno=True)
    network = os.open(f"/run/netns/{host}", os.O_RDONLY)
    if libc.setns(network, NEW_NETWORK) or libc.unshare(NEW_NAME):
        raise OSError(ctypes.get_errno(), f"cannot enter {host}")
    os.close(network)
    socket.sethostname(host)
