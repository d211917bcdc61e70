"""Which addresses a URL that a user gave may lead to: public ones only, judged on the address that is then connected to."""

from __future__ import annotations

import ipaddress
import socket

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class PrivateAddress(OSError):
    """A name leads to an address that is not a public one."""


def is_public(address: str) -> bool:
    """Not loopback, link-local (where clouds keep their metadata), private, reserved or multicast; also not wrapped in an IPv6 form."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


def public_address(host: str, port: int) -> str:
    """Resolves a name once; the address to connect to.

    Raises:
        PrivateAddress: one of its addresses is not public (all of them count: which one is used is not up to us).
        OSError: it does not resolve.
    """
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)]
    for address in found:
        if not is_public(address):
            raise PrivateAddress(f"{host} leads to {address}, which is not a public address")
    return found[0]
