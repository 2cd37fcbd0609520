"""Certificate authorities and certificates made on the fly, in PEM files."""

import datetime
import ipaddress
import os
import pathlib

import pytest

pytest.importorskip("cryptography")  # scripts/setup installs it; where tests were brought along it may be missing

from cryptography import x509  # noqa: E402
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from cryptography.x509.oid import NameOID  # noqa: E402

DAY = datetime.timedelta(days=1)


def _name(common_name):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


def _pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM)


def replace(path, content):
    """The file, written as a careful writer does: all at once."""
    beside = pathlib.Path(f"{path}.new")
    beside.write_bytes(content if isinstance(content, bytes) else content.encode())
    beside.chmod(0o600)
    os.replace(beside, path)
    return path


class Authority:
    """Signs certificates, in files NAME.crt and NAME.key of the folder; its own is AUTHORITY.crt."""

    def __init__(self, folder, name="ca"):
        self.folder = pathlib.Path(folder)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _name(name)
        self.certificate = self._sign(self._subject, self._key.public_key(), ca=True)
        self.path = self.folder / f"{name}.crt"
        self.path.write_bytes(_pem(self.certificate))

    def _sign(self, subject, public_key, ca=False, begins=-DAY, ends=DAY, sans=()):
        now = datetime.datetime.utcnow()
        builder = x509.CertificateBuilder(
            self._subject, subject, public_key, x509.random_serial_number(), now + begins, now + ends)
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def issue(self, name, common_name=None, dns=(), uris=(), ips=(), begins=-DAY, ends=DAY):
        """(certificate, key): paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        sans = [x509.UniformResourceIdentifier(u) for u in uris] + [x509.DNSName(d) for d in dns] + [
            x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips]
        certificate = self._sign(_name(common_name), key.public_key(), begins=begins, ends=ends, sans=sans)
        replace(self.folder / f"{name}.key", key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        replace(self.folder / f"{name}.crt", _pem(certificate))
        return self.folder / f"{name}.crt", self.folder / f"{name}.key"

    def issue_for_daemon(self, name="daemon", **settings):
        return self.issue(name, dns=["localhost"], ips=["127.0.0.1"], **settings)
