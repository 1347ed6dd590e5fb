"""JSON Web Tokens (RFC 7519): our own, given for a key and good for half an hour, and those of another issuer."""

import time
from collections.abc import Callable
from typing import Any

import jwt

from bento.auth import Caller
from ft_resources.api_keys import ROLES
from ft_resources.errors import RequestError, SpecError

SECONDS = 30 * 60
ISSUER, AUDIENCE = "ft", "ft-service"
ALGORITHM = "HS256"
REQUIRED = ["exp", "iat", "iss", "aud", "sub"]


class Tokens:
    """Signs and checks tokens; the algorithm follows from the key, never from the token.

    Args:
        secret: Signs our own (HS256); 32 bytes or more.
        public_key: PEM of another issuer's key (RSA, P-256 or Ed25519); its tokens carry `iss`, the audience
            `ft-service`, and may carry `role` (default reader) and `tasks` (default none; an admin has all).
        issuer: The `iss` of that issuer's tokens.
        clock: Seconds since the epoch.

    Raises:
        SpecError: The public key cannot be used.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        public_key: str = "",
        issuer: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._secret, self._issuer, self._clock = secret, issuer, clock
        self._public: Any = None
        if public_key:
            self._public, self._public_algorithm = _public(public_key)

    def issue(self, caller: Caller) -> str:
        """A token that says who `caller` is."""
        at = int(self._clock())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": caller.name,
            "iat": at,
            "exp": at + SECONDS,
            "role": caller.role,
            "tasks": None if caller.tasks is None else sorted(caller.tasks),
            "rate": caller.rate,
            "key": caller.key_id,
        }
        return jwt.encode(claims, self._secret, algorithm=ALGORITHM)

    def caller(self, token: bytes) -> Caller:
        """Whom a token stands for.

        Raises:
            RequestError: `unauthorized`: expired, forged, for another audience, or not a token.
        """
        try:
            if jwt.get_unverified_header(token).get("alg") == ALGORITHM:
                claims = jwt.decode(
                    token,
                    self._secret,
                    algorithms=[ALGORITHM],
                    audience=AUDIENCE,
                    issuer=ISSUER,
                    options={"require": REQUIRED},
                )
                return _caller(claims, str(claims.get("key", "")), without=None)
            if self._public is None:
                raise jwt.InvalidAlgorithmError("signed in a way that is not accepted")
            claims = jwt.decode(
                token,
                self._public,
                algorithms=[self._public_algorithm],
                audience=AUDIENCE,
                issuer=self._issuer,
                options={"require": REQUIRED},
            )
            return _caller(claims, "", without=frozenset())
        except jwt.ExpiredSignatureError:
            raise _refused("the token has expired") from None
        except jwt.InvalidAudienceError:
            raise _refused("the token is for another audience") from None
        except (jwt.InvalidTokenError, ValueError, TypeError):
            raise _refused("the token is not valid") from None


def _caller(claims: dict[str, Any], key_id: str, *, without: frozenset[str] | None) -> Caller:
    """Whom claims stand for; `without`: the tasks of a token that names none.

    Raises:
        ValueError: A claim does not hold what it should.
    """
    role, tasks, rate = claims.get("role", "reader"), claims.get("tasks"), claims.get("rate")
    if role not in ROLES or not (tasks is None or (isinstance(tasks, list) and tasks)):
        raise ValueError("role or tasks")
    return Caller(
        str(claims["sub"])[:128],
        role,
        None if role == "admin" else without if tasks is None else frozenset(map(str, tasks)),
        None if rate is None else float(rate),
        key_id,
    )


def _refused(what: str) -> RequestError:
    return RequestError("unauthorized", what, status=401, mend="Exchange a key for a new one at POST /auth/token.")


def _public(pem: str) -> tuple[Any, str]:
    """The key, and the one algorithm its tokens may be signed with."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem.encode())
    except ValueError as error:
        raise SpecError(
            f"the public key cannot be read: {error}", where="FT_JWT_PUBLIC_KEY", mend="Give PEM, or a path to it."
        ) from error
    if isinstance(key, rsa.RSAPublicKey):
        return key, "RS256"
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key, "ES256"
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key, "EdDSA"
    raise SpecError(
        f"{type(key).__name__} is not supported", where="FT_JWT_PUBLIC_KEY", mend="Use RSA, P-256 or Ed25519."
    )
