"""Encrypted connections made up after the fact, with their secrets: what lets Wireshark open a masked capture.

Owns: TLS 1.3 over TCP and QUIC version 1 as the bytes of packets, for given payload. In: payload, with times.
Out: packets and key log lines. Never: protects anything: the keys are published with the packets.

*Strategy*: a capture holds what was inside the encryption, with secrets masked, so the real packets (which still hold
them) cannot be exported. These are new ones with the same contents: one AES-128-GCM suite, traffic secrets out of a
hash of a label, no real key exchange, no certificate. Wireshark takes the secrets from the file and asks for no more.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

RECORD_SIZE = 16_384
"""Bytes of a TLS record's plaintext at most (RFC 8446 section 5.1)."""

QUIC_PAYLOAD = 1_150
"""Bytes of a STREAM frame, so that a packet stays below 1,200 bytes."""

_INITIAL_SALT = bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a")  # RFC 9001 section 5.2


def expand(secret: bytes, label: str, length: int) -> bytes:
    """HKDF-Expand-Label with SHA-256 and an empty context (RFC 8446 section 7.1)."""
    name = b"tls13 " + label.encode()
    info = length.to_bytes(2, "big") + bytes((len(name),)) + name + b"\0"
    out, block, number = b"", b"", 1
    while len(out) < length:
        block = hmac.digest(secret, block + info + bytes((number,)), "sha256")
        out += block
        number += 1
    return out[:length]


class Secrets:
    """The made-up secrets of one connection, all out of its `seed`."""

    def __init__(self, seed: bytes) -> None:
        def make(label: str) -> bytes:
            return hashlib.sha256(label.encode() + b"\0" + seed).digest()

        self.client_random = make("client random")
        self.server_random = make("server random")
        self.handshake = (make("client handshake"), make("server handshake"))
        self.traffic = (make("client traffic"), make("server traffic"))

    def keylog(self) -> str:
        """Return the lines of a key log file (NSS format)."""
        random = self.client_random.hex()
        names = ("CLIENT_HANDSHAKE_TRAFFIC_SECRET", "SERVER_HANDSHAKE_TRAFFIC_SECRET")
        lines = [f"{name} {random} {secret.hex()}" for name, secret in zip(names, self.handshake, strict=True)]
        names = ("CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0")
        lines += [f"{name} {random} {secret.hex()}" for name, secret in zip(names, self.traffic, strict=True)]
        return "\n".join(lines) + "\n"

    def client_hello(self, name: str, alpn: bytes, *, quic: bool) -> bytes:
        """Return the handshake message."""
        server_name = name.encode()
        sni = (len(server_name) + 3).to_bytes(2, "big") + b"\0" + len(server_name).to_bytes(2, "big") + server_name
        extensions = [
            _extension(0, sni),
            _extension(10, b"\0\x02\0\x1d"),
            _extension(13, b"\0\x02\x04\x03"),
            _extension(16, _alpn(alpn)),
            _extension(43, b"\x02\x03\x04"),
            _extension(51, b"\0\x24\0\x1d\0\x20" + self.client_random),
        ]
        if quic:
            extensions.append(_extension(57, b"\x04\x04\x80\x10\x00\x00"))  # initial_max_data
        joined = b"".join(extensions)
        session = b"\0" if quic else b"\x20" + self.server_random
        body = b"\x03\x03" + self.client_random + session + b"\0\x02\x13\x01" + b"\x01\0"
        return _message(1, body + len(joined).to_bytes(2, "big") + joined)

    def server_hello(self, *, quic: bool) -> bytes:
        """Return the handshake message."""
        joined = _extension(43, b"\x03\x04") + _extension(51, b"\0\x1d\0\x20" + self.server_random)
        session = b"\0" if quic else b"\x20" + self.server_random
        body = b"\x03\x03" + self.server_random + session + b"\x13\x01" + b"\0"
        return _message(2, body + len(joined).to_bytes(2, "big") + joined)

    def encrypted_extensions(self, alpn: bytes, *, quic: bool) -> bytes:
        """Return EncryptedExtensions and Finished of the server."""
        joined = _extension(16, _alpn(alpn)) + (_extension(57, b"\x04\x04\x80\x10\x00\x00") if quic else b"")
        return _message(8, len(joined).to_bytes(2, "big") + joined) + _message(20, bytes(32))


def _extension(number: int, data: bytes) -> bytes:
    return number.to_bytes(2, "big") + len(data).to_bytes(2, "big") + data


def _alpn(name: bytes) -> bytes:
    return (len(name) + 1).to_bytes(2, "big") + bytes((len(name),)) + name


def _message(kind: int, body: bytes) -> bytes:
    return bytes((kind,)) + len(body).to_bytes(3, "big") + body


class RecordLayer:
    """One direction of TLS 1.3 records under one traffic secret."""

    def __init__(self, secret: bytes) -> None:
        self._aead = AESGCM(expand(secret, "key", 16))
        self._iv = int.from_bytes(expand(secret, "iv", 12), "big")
        self._number = 0

    def seal(self, data: bytes, kind: int = 23) -> bytes:
        """Return records with `data` of content type `kind`."""
        out = bytearray()
        for start in range(0, max(len(data), 1), RECORD_SIZE):
            plain = data[start : start + RECORD_SIZE] + bytes((kind,))
            head = b"\x17\x03\x03" + (len(plain) + 16).to_bytes(2, "big")
            nonce = (self._iv ^ self._number).to_bytes(12, "big")
            self._number += 1
            out += head + self._aead.encrypt(nonce, plain, head)
        return bytes(out)


def tls_handshake(secrets: Secrets, name: str, alpn: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (direction, bytes) of a handshake; direction 0 is the TLS client's."""
    hello = secrets.client_hello(name, alpn, quic=False)
    yield 0, b"\x16\x03\x01" + len(hello).to_bytes(2, "big") + hello
    hello = secrets.server_hello(quic=False)
    server = RecordLayer(secrets.handshake[1])
    rest = server.seal(secrets.encrypted_extensions(alpn, quic=False), 22)
    yield 1, b"\x16\x03\x03" + len(hello).to_bytes(2, "big") + hello + b"\x14\x03\x03\0\x01\x01" + rest
    client = RecordLayer(secrets.handshake[0])
    yield 0, b"\x14\x03\x03\0\x01\x01" + client.seal(_message(20, bytes(32)), 22)


class QuicConnection:
    """One made-up QUIC connection. `handshake`, then `stream` per piece of payload: UDP payloads come out."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._client_id = secrets.client_random[:8]  # what each side calls itself
        self._server_id = secrets.server_random[:8]
        initial = hmac.digest(_INITIAL_SALT, self._server_id, "sha256")
        self._keys = {
            "initial": (_Keys(expand(initial, "client in", 32)), _Keys(expand(initial, "server in", 32))),
            "handshake": (_Keys(secrets.handshake[0]), _Keys(secrets.handshake[1])),
            "traffic": (_Keys(secrets.traffic[0]), _Keys(secrets.traffic[1])),
        }
        self._numbers: dict[tuple[str, int], int] = {}
        self._offsets: dict[tuple[int, int], int] = {}

    def handshake(self, name: str, alpn: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield (direction, UDP payload); direction 0 is the client's."""
        yield 0, self._long("initial", 0, _crypto(self._secrets.client_hello(name, alpn, quic=True)), pad=1_162)
        first = self._long("initial", 1, _crypto(self._secrets.server_hello(quic=True)), pad=1)
        extensions = self._secrets.encrypted_extensions(alpn, quic=True)
        yield 1, first + self._long("handshake", 1, _crypto(extensions), pad=1)
        yield 0, self._long("handshake", 0, _crypto(_message(20, bytes(32))), pad=1)

    def stream(self, direction: int, stream_id: int, data: bytes, *, fin: bool = False) -> Iterator[bytes]:
        """Yield packets that carry the next bytes of a stream."""
        key = (direction, stream_id)
        starts = range(0, len(data), QUIC_PAYLOAD) or range(1)
        for start in starts:
            part = data[start : start + QUIC_PAYLOAD]
            offset = self._offsets.get(key, 0)
            self._offsets[key] = offset + len(part)
            last = fin and start + QUIC_PAYLOAD >= len(data)
            frame = bytes((0x0E | last,)) + _varint(stream_id) + _varint(offset) + _varint(len(part)) + part
            yield self._short(direction, frame)

    # -- packets (RFC 9000 section 17, RFC 9001 section 5)

    def _next(self, space: str, direction: int) -> int:
        number = self._numbers.get((space, direction), 0)
        self._numbers[space, direction] = number + 1
        return number

    def _long(self, space: str, direction: int, frames: bytes, *, pad: int) -> bytes:
        keys = self._keys[space][direction]
        number = self._next(space, direction)
        frames += bytes(max(0, pad - len(frames)))
        target, source = (self._server_id, self._client_id) if direction == 0 else (self._client_id, self._server_id)
        first = 0xC3 if space == "initial" else 0xE3
        head = bytes((first,)) + b"\0\0\0\x01" + bytes((8,)) + target + bytes((8,)) + source
        if space == "initial":
            head += b"\0"
        head += (0x4000 | len(frames) + 4 + 16).to_bytes(2, "big")
        return keys.protect(head, number, frames)

    def _short(self, direction: int, frames: bytes) -> bytes:
        keys = self._keys["traffic"][direction]
        target = self._server_id if direction == 0 else self._client_id
        frames += bytes(max(0, 4 - len(frames)))
        return keys.protect(b"\x43" + target, self._next("traffic", direction), frames)


class _Keys:
    """Packet protection under one secret."""

    def __init__(self, secret: bytes) -> None:
        self._aead = AESGCM(expand(secret, "quic key", 16))
        self._iv = int.from_bytes(expand(secret, "quic iv", 12), "big")
        self._mask = expand(secret, "quic hp", 16)

    def protect(self, head: bytes, number: int, frames: bytes) -> bytes:
        """Return the packet: four bytes of packet number behind `head`."""
        packet = bytearray(head + number.to_bytes(4, "big"))
        sealed = self._aead.encrypt((self._iv ^ number).to_bytes(12, "big"), frames, bytes(packet))
        # The mask of header protection is one block of AES in ECB: the sample is 16 bytes of ciphertext.
        block = Cipher(algorithms.AES(self._mask), modes.ECB()).encryptor()  # noqa: S305
        mask = block.update(sealed[:16])
        packet[0] ^= mask[0] & (0x0F if packet[0] & 0x80 else 0x1F)
        for place in range(4):
            packet[len(head) + place] ^= mask[1 + place]
        return bytes(packet) + sealed


def _crypto(data: bytes) -> bytes:
    return b"\x06" + _varint(0) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    for size, limit in ((1, 6), (2, 14), (4, 30), (8, 62)):
        if value < 1 << limit:
            return (value | ({1: 0, 2: 1, 4: 2, 8: 3}[size] << (8 * size - 2))).to_bytes(size, "big")
    raise ValueError(value)
