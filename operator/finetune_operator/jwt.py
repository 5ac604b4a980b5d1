"""A service account's token (JWS, RFC 7515 and 7519), checked against the cluster's public keys without asking anybody.

Only algorithms that a Kubernetes API server can sign with are known: there is no code for ``none`` or for shared
secrets, and a key is used with the one algorithm of its type, whatever a token's header says.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

LONGEST = 8192
"""Characters of a token. A projected one has about 1,200."""
_LEEWAY_SECONDS = 60
"""Clocks of the cluster's machines differ by less; given to the beginning of a token's life alone."""
_NEVER = 2**40
"""No token lives for thirty thousand years."""
_CURVES: dict[str, tuple[str, ec.EllipticCurve, hashes.HashAlgorithm, int]] = {
    "P-256": ("ES256", ec.SECP256R1(), hashes.SHA256(), 32),
    "P-384": ("ES384", ec.SECP384R1(), hashes.SHA384(), 48),
    "P-521": ("ES512", ec.SECP521R1(), hashes.SHA512(), 66),
}
"""By name in a key: algorithm (RFC 7518), curve, hash, bytes of each half of a signature."""
_CURVE_NAMES = {curve.name: name for name, (_, curve, _, _) in _CURVES.items()}


class InvalidTokenError(Exception):
    """The token is no proof of anything."""


@dataclass(frozen=True)
class Key:
    """A public key and what it may verify."""

    algorithm: str
    public: rsa.RSAPublicKey | ec.EllipticCurvePublicKey

    def verify(self, signature: bytes, message: bytes) -> None:
        """Raise InvalidSignature unless the key's owner signed the message."""
        if isinstance(self.public, rsa.RSAPublicKey):
            self.public.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
            return
        _, _, hash_, half = _CURVES[_CURVE_NAMES[self.public.curve.name]]
        if len(signature) != 2 * half:
            raise InvalidSignature
        r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
        self.public.verify(encode_dss_signature(r, s), message, ec.ECDSA(hash_))


def keys_of(key_set: Mapping[str, Any]) -> dict[str, Key]:
    """The usable keys of a JSON Web Key Set by their id; those of unknown kinds are left out."""
    keys: dict[str, Key] = {}
    for entry in key_set.get("keys") or ():
        try:
            key = _key(entry)
            if (
                key is not None
                and entry.get("use", "sig") == "sig"
                and entry.get("alg", key.algorithm) == key.algorithm
            ):
                keys[str(entry["kid"])] = key
        except (AttributeError, KeyError, TypeError, ValueError):
            continue  # one that we cannot read must not take the others away
    return keys


def _key(entry: Mapping[str, Any]) -> Key | None:
    if entry["kty"] == "RSA":
        public = rsa.RSAPublicNumbers(_number(entry["e"]), _number(entry["n"])).public_key()
        return Key("RS256", public) if public.key_size >= 2048 else None
    if entry["kty"] == "EC" and entry["crv"] in _CURVES:
        algorithm, curve, _, _ = _CURVES[entry["crv"]]
        return Key(
            algorithm, ec.EllipticCurvePublicNumbers(_number(entry["x"]), _number(entry["y"]), curve).public_key()
        )
    return None


def key_id(token: str) -> str:
    """Which key a token says that it is signed with. Raises InvalidTokenError."""
    return str(_parts(token)[0]["kid"])


def unverified_claims(token: str) -> dict[str, Any]:
    """What a token says, true or not. Raises InvalidTokenError if it is none."""
    return _parts(token)[1]


def verified_claims(token: str, keys: Mapping[str, Key], *, issuer: str, audience: str, now: float) -> dict[str, Any]:
    """What ``issuer`` says to ``audience`` in the token, at the time ``now`` (Unix seconds).

    Raises InvalidTokenError if it is not signed by one of the keys, is another's or for another, or is over.
    """
    header, claims, signed, signature = _parts(token)
    key = keys.get(header["kid"])
    if key is None or header.get("alg") != key.algorithm or "crit" in header:
        raise InvalidTokenError("the token is signed with an unknown key or algorithm")
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        raise InvalidTokenError("the token's signature is wrong") from None
    if claims.get("iss") != issuer:
        raise InvalidTokenError("the token is another issuer's")
    meant_for = claims.get("aud")
    if audience not in (meant_for if isinstance(meant_for, list) else [meant_for]):
        raise InvalidTokenError(f"the token is not for the audience {audience}")
    if now >= expiry(claims):
        raise InvalidTokenError("the token is over: read its file again")
    if not isinstance(begins := claims.get("nbf", 0), int | float) or now < begins - _LEEWAY_SECONDS:
        raise InvalidTokenError("the token is not valid yet")
    return claims


def expiry(claims: Mapping[str, Any]) -> float:
    """When the token ends, in Unix seconds. Raises InvalidTokenError if it never does."""
    ends = claims.get("exp")
    if not isinstance(ends, int | float) or not 0 < ends < _NEVER:  # neither NaN, which is not after anything
        raise InvalidTokenError("the token does not say when it ends")
    return float(ends)


def _parts(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """Header, claims, what is signed, signature."""
    if len(token) > LONGEST or token.count(".") != 2:
        raise InvalidTokenError("not a token")
    head, body, signature = token.split(".")
    try:
        header, claims = json.loads(_decoded(head)), json.loads(_decoded(body))
        signed = f"{head}.{body}".encode("ascii")
        decoded = _decoded(signature)
    except (ValueError, RecursionError):
        raise InvalidTokenError("not a token") from None
    if not isinstance(header, dict) or not isinstance(claims, dict) or not isinstance(header.get("kid"), str):
        raise InvalidTokenError("not a token")
    return header, claims, signed, decoded


def _decoded(text: str) -> bytes:
    """base64url without padding, in its one form. Raises ValueError."""
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64.urlsafe_b64encode(raw).rstrip(b"=") != text.encode():  # the decoder overlooks what it does not know
        raise ValueError("not base64url")
    return raw


def _number(text: str) -> int:
    return int.from_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), "big")
