"""The network interface by which a node reaches the others."""

import socket
import struct
import sys
from contextlib import suppress

GLOO = "GLOO_SOCKET_IFNAME"  # without it, gloo listens where the host's own name points, which may be 127.0.1.1
_GET_ADDRESS = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
_REQUEST, _ADDRESS = 256, slice(20, 24)  # of struct ifreq: its size, more than enough, and where the address stands


def interface_towards(host: str) -> str | None:
    """The name of the interface whose IPv4 address this machine uses to reach `host`; None where that is unknown."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # of a datagram socket, this sends nothing
        ours = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                request = struct.pack(f"{_REQUEST}s", name.encode())
                if fcntl.ioctl(probe, _GET_ADDRESS, request)[_ADDRESS] == ours:
                    return name
    return None
