"""Certificates of servers: one that is made here, fingerprints to pin one by, and files that are read again.

Both ends need it: the cloud and the gateway make certificates, the edge and the probes compare fingerprints. So it is
here. Only making a certificate, and reading the names of one, need the package `cryptography`, imported there.

A pin is the SHA-256 of a certificate in DER, as browsers and `openssl x509 -fingerprint -sha256` show it.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

FILE = "server.pem"
"""Of a certificate that is made here, with its key, in its folder."""
VALID_DAYS = 3650
RENEW_DAYS = 30
"""So long before its end a certificate is made anew, at the next start."""
MAX_BYTES = 1 << 20
"""Of a PEM file."""
_DNS_NAME = re.compile(r"(\*\.)?([A-Za-z0-9_][A-Za-z0-9_-]{0,62}\.)*[A-Za-z0-9_][A-Za-z0-9_-]{0,62}")
_BEGIN = "-----BEGIN CERTIFICATE-----"
_END = "-----END CERTIFICATE-----"


def fingerprint(pem: str | bytes) -> bytes:
    """Returns the SHA-256 of the first certificate of a PEM text, 32 bytes.

    Raises:
        ValueError: If there is none.
    """
    return hashlib.sha256(_first_der(pem)).digest()


def show(digest: bytes) -> str:
    """Returns a fingerprint for people: pairs of hexadecimal digits with colons."""
    return digest.hex(":").upper()


def read_fingerprint(text: str) -> bytes:
    """Returns a fingerprint that a person gives: 64 hexadecimal digits of any case, colons and spaces or none.

    Raises:
        ValueError: If it is none.
    """
    digits = re.sub(r"[:\s]", "", re.sub(r"(?i)^\s*sha-?256(\s+fingerprint)?\s*[=:]", "", text))
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", digits):
        raise ValueError(
            f"{text[:100]!r} is no SHA-256 fingerprint; give 64 hexadecimal digits, with colons or without, as"
            " `hybridsd-cloud fingerprint` prints them"
        )
    return bytes.fromhex(digits)


def is_pinned(pem: str | bytes, pin: bytes) -> bool:
    """Whether a certificate is the one of a pin; takes the same time whatever differs."""
    return hmac.compare_digest(fingerprint(pem), pin)


def _first_der(pem: str | bytes) -> bytes:
    text = pem.decode("ascii", "replace") if isinstance(pem, bytes) else pem
    begin = text.find(_BEGIN)
    end = text.find(_END, begin)
    if begin < 0 or end < 0:
        raise ValueError("there is no certificate in PEM form")
    return ssl.PEM_cert_to_DER_cert(text[begin : end + len(_END)])


def names_of(pem: str | bytes) -> tuple[str, ...]:
    """Returns the host names and addresses that a certificate is for; the common name where it has none of them.

    Raises:
        ValueError: If it cannot be read.
    """
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    certificate = x509.load_der_x509_certificate(_first_der(pem))
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return tuple(str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME))
    addresses = map(str, extension.get_values_for_type(x509.IPAddress))
    return (*extension.get_values_for_type(x509.DNSName), *addresses)


def name_to_expect(pem: str | bytes, host: str) -> str:
    """Returns the name by which TLS finds a certificate to be right that is known to be so: the host, if it is named.

    Raises:
        ValueError: If it names nobody.
    """
    names = names_of(pem)
    host = host.strip("[]")
    if host in names or not names:
        if not names:
            raise ValueError("the certificate names no host")
        return host
    return names[0].replace("*", "pinned")


def valid_until(pem: str | bytes) -> datetime:
    """Returns when a certificate ends."""
    from cryptography import x509

    return x509.load_der_x509_certificate(_first_der(pem)).not_valid_after_utc


def check_name(name: str) -> None:
    """Refuses what cannot be in a certificate.

    Raises:
        ValueError: If it is neither an address nor a host name in ASCII.
    """
    if not _is_address(name) and not (_DNS_NAME.fullmatch(name) and len(name) <= 253):
        raise ValueError(f"{name[:100]!r} is no host name or address; give one as in cloud.example.org or 192.0.2.1")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def names_of_this_machine(hosts: Iterable[str] = ()) -> tuple[str, ...]:
    """Returns the names and addresses that a server here is called by.

    Args:
        hosts: More of them; addresses that stand for all of this machine are left out.
    """
    name = socket.gethostname()
    names = ["localhost", "127.0.0.1", "::1", name, f"{name}.local", *_own_addresses()]
    names += [host.strip("[]") for host in hosts]
    return tuple(dict.fromkeys(each for each in names if _can_be_named(each)))


def _can_be_named(name: str) -> bool:
    if _is_address(name):
        return not ipaddress.ip_address(name).is_unspecified
    return _DNS_NAME.fullmatch(name) is not None and len(name) <= 253


def _own_addresses() -> list[str]:
    """Returns the addresses from which this machine speaks to others; nothing is sent."""
    found = []
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))
            found.append(str(probe.getsockname()[0]).partition("%")[0])
    return found


@dataclass(frozen=True, slots=True)
class Made:
    """A certificate that was made here."""

    path: Path
    """A PEM file with the key and the certificate."""
    is_new: bool
    replaces: bool = False
    """Whether there was another, near its end: pins of that one are wrong now."""


def own_certificate(folder: Path, names: Iterable[str]) -> Made:
    """Returns the certificate of a folder, which is made where there is none, or where it ends soon.

    It signs itself, with a key on the curve P-256, and stays the same over restarts, so that pins stay good, whatever
    names the machine has then.

    Args:
        folder: Made if need be; for the owner alone.
        names: Host names and addresses that the certificate is for.

    Raises:
        ValueError: If the folder cannot be used, or holds something else.
    """
    path = folder / FILE
    replaces = False
    try:
        if path.exists():
            check_pair(path, path)
            if valid_until(path.read_bytes()) > datetime.now(UTC) + timedelta(days=RENEW_DAYS):
                return Made(path, is_new=False)
            replaces = True
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = folder / f"{FILE}.part-{secrets.token_hex(8)}"  # processes of two containers may have one number
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(_make(tuple(names)))
        if replaces:
            part.replace(path)
        else:
            is_new = _move_to_new(part, path)
            return Made(path, is_new=is_new)
    except OSError as error:
        raise ValueError(f"cannot keep a certificate in {folder}: {error.strerror or error}") from error
    return Made(path, is_new=True, replaces=True)


def _move_to_new(part: Path, path: Path) -> bool:
    """Returns whether a file got its name; False where another process was first."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        part.replace(path)
        return True
    finally:
        part.unlink(missing_ok=True)
    return True


def _make(names: tuple[str, ...]) -> bytes:
    """Returns a new key and its certificate in PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Hybrid SD")])
    now = datetime.now(UTC)
    general = [
        x509.IPAddress(ipaddress.ip_address(name)) if _is_address(name) else x509.DNSName(name) for name in names
    ]
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName(general), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private + certificate.public_bytes(pem)


def certificate_only(pem: bytes) -> str:
    """Returns the first certificate of a PEM text, without its key."""
    return ssl.DER_cert_to_PEM_cert(_first_der(pem))


def check_pair(cert: Path, key: Path, *, labels: tuple[str, str] = ("", "")) -> None:
    """Refuses a certificate chain and a key that TLS cannot use.

    Args:
        cert: Chain in PEM.
        key: In PEM; may be the same file.
        labels: What messages put before the two, such as names of options.

    Raises:
        ValueError: If one is no PEM file, is encrypted, or they do not belong together.
    """
    shown_cert, shown_key = (f"{label} {path}".strip() for label, path in zip(labels, (cert, key), strict=True))

    def no_password() -> str:
        raise ValueError(f"{shown_key} is encrypted; give one without a password")

    for path, shown, marker, what in (
        (cert, shown_cert, b"-----BEGIN CERTIFICATE", "certificate"),
        (key, shown_key, b"PRIVATE KEY-----", "private key"),
    ):
        if marker not in _read(path, shown):
            raise ValueError(f"{shown} is no PEM file with a {what}; give one that begins with -----BEGIN")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{shown_key} is not the key of {shown_cert}; give the pair") from error
        raise ValueError(
            f"{shown_cert} and {shown_key} cannot be used: {error.reason or error}; give a certificate chain and its"
            " key in PEM"
        ) from error


def check_authorities(path: Path, *, label: str = "") -> None:
    """Refuses a file without certificates of authorities.

    Args:
        path: In PEM.
        label: What messages put before it, such as the name of an option.

    Raises:
        ValueError: If it cannot be read, or holds none.
    """
    shown = f"{label} {path}".strip()
    content = _read(path, shown)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_verify_locations(cadata=content.decode("ascii"))
        is_empty = not context.cert_store_stats()["x509"]
    except (ssl.SSLError, ValueError):
        is_empty = True
    if is_empty:
        raise ValueError(f"{shown} holds no certificate in PEM form; give the file of the authority")


def _read(path: Path, shown: str = "") -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES)
    except OSError as error:
        raise ValueError(f"{shown or path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True, repr=False)
class Contents:
    """What the files held that were last found to be good."""

    cert: bytes
    """Chain in PEM, the server's own certificate first."""
    key: bytes
    client_ca: bytes | None = None
    """Authorities of the certificates that clients must have; None asks for none."""


class CertificateFiles:
    """A certificate, its key and the authorities of clients, as files that may be replaced at any time. Thread-safe.

    Attributes:
        current: What is good now.
    """

    def __init__(
        self, cert: Path, key: Path, client_ca: Path | None = None, *,
        on_reload: Callable[[str | None], None] = lambda _wrong: None,
    ) -> None:  # fmt: skip
        """Reads the files.

        Args:
            cert: Chain in PEM.
            key: In PEM; may be the same file.
            client_ca: Authorities of clients' certificates, in PEM.
            on_reload: Called after each later reading: with None, or with what is wrong; then what was read before
                stays good.

        Raises:
            ValueError: If they cannot be used.
        """
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._on_reload, self._lock = on_reload, threading.Lock()
        self._stamps = self._look()
        self.current = self._load()

    def reload(self) -> Contents | None:
        """Returns what the files hold if that has changed and is good; None if there is nothing new."""
        with self._lock:
            stamps = self._look()
            if stamps == self._stamps:
                return None
            wrong, loaded = None, None
            try:
                loaded = self._load()
            except ValueError as error:
                wrong = str(error)
            if self._look() != stamps:  # in the middle of being replaced: the next who asks looks again
                return None
            self._stamps = stamps
            self.current = loaded or self.current
        self._on_reload(wrong)
        return loaded

    def _load(self) -> Contents:
        check_pair(self._cert, self._key)
        if self._client_ca is not None:
            check_authorities(self._client_ca)
        client_ca = None if self._client_ca is None else _read(self._client_ca)
        return Contents(_read(self._cert), _read(self._key), client_ca)

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(stamp, filter(None, (self._cert, self._key, self._client_ca))))


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Returns what changes with the content of a file; None if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def server_context(
    cert: Path, key: Path, *, on_reload: Callable[[str | None], None] = lambda _wrong: None
) -> ssl.SSLContext:
    """Returns a context of a server that follows two files: each new connection has what they hold then.

    Args:
        cert: Chain in PEM.
        key: In PEM; may be the same file.
        on_reload: As of `CertificateFiles`.

    Raises:
        ValueError: If they cannot be used at first.
    """
    files = CertificateFiles(cert, key, on_reload=on_reload)
    newest = outer = _server_context(cert, key)

    def on_hello(connection: ssl.SSLObject, _name: str | None, _of: ssl.SSLContext) -> None:
        """Runs at the begin of each handshake, whether the client names a host or not."""
        nonlocal newest
        if files.reload() is not None:
            with contextlib.suppress(OSError):  # replaced once more, this moment: the next who comes looks again
                newest = _server_context(cert, key)
        connection.context = newest

    outer.sni_callback = on_hello
    return outer


def _server_context(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


def fetch(
    host: str, port: int, timeout_s: float, *, client: tuple[Path, Path] | None = None, protocol: str = "h2"
) -> str:
    """Returns the certificate that a server shows, in PEM; whose it is, is not looked at.

    Args:
        host: Name or address.
        port: Its port.
        timeout_s: How long the connection, and then the handshake, may take. Looking up a name takes what it takes.
        client: Certificate chain and key of the client, for a server that asks for them.
        protocol: That is spoken inside.

    Raises:
        OSError: If there is no connection, or no TLS on it (then it is an ssl.SSLError); TimeoutError if it takes too
            long.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    if client is not None:
        with contextlib.suppress(OSError):  # files that are being replaced; few servers ask before they show theirs
            context.load_cert_chain(*client)
    host = host.strip("[]")
    with (
        socket.create_connection((host, port), timeout=timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=host) as encrypted,
    ):
        return ssl.DER_cert_to_PEM_cert(encrypted.getpeercert(binary_form=True) or b"")
