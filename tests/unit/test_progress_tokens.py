"""Whose a token is: asked of an API server, and found out by its keys."""

import asyncio
import json
import string
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.progress_parts import API, DOWN, ISSUER, NOW, Signer, encoded, pod_claims

from finetune_operator.jwt import InvalidTokenError, keys_of, verified_claims
from finetune_operator.kube.errors import KubeError
from finetune_operator.plan.pods import PROGRESS_AUDIENCE
from finetune_operator.tokens import PodIdentity, SigningKeys, TokenReviews

THE_POD = PodIdentity("team", "bot-sft-1", "pod-uid")
RSA = Signer(rsa.generate_private_key(65537, 2048))
P256 = Signer(ec.generate_private_key(ec.SECP256R1()))
SIGNERS = [
    RSA,
    P256,
    Signer(ec.generate_private_key(ec.SECP384R1())),
    Signer(ec.generate_private_key(ec.SECP521R1())),
]


def checked(token: str, *signers: Signer, now: float = NOW + 1) -> dict[str, Any]:
    """Its claims, by those keys."""
    keys = keys_of({"keys": [signer.entry for signer in signers or (RSA,)]})
    return verified_claims(token, keys, issuer=ISSUER, audience=PROGRESS_AUDIENCE, now=now)


class Clock:
    """Time that stands still unless told."""

    now = NOW + 1

    def __call__(self) -> float:
        """The time."""
        return self.now


@pytest.mark.parametrize("signer", SIGNERS, ids=[signer.algorithm for signer in SIGNERS])
def test_a_token_that_the_cluster_signed_is_believed(signer: Signer) -> None:
    """With every algorithm that an API server can use."""
    assert checked(signer.token(), signer) == pod_claims()


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (lambda: RSA.token(aud=["https://kubernetes.default.svc"]), "not for the audience"),
        (lambda: RSA.token(aud=[]), "not for the audience"),
        (lambda: RSA.token(aud=None), "not for the audience"),
        (lambda: RSA.token(aud=PROGRESS_AUDIENCE + "/more"), "not for the audience"),
        (lambda: RSA.token(iss="https://elsewhere"), "another issuer's"),
        (lambda: RSA.token(exp=NOW), "is over"),
        (lambda: RSA.token(exp=None), "does not say when it ends"),
        (lambda: RSA.token(exp=float("nan")), "does not say when it ends"),
        (lambda: RSA.token(exp=10**400), "does not say when it ends"),
        (lambda: RSA.token(exp=str(NOW + 9)), "does not say when it ends"),
        (lambda: RSA.token(nbf=NOW + 600), "not valid yet"),
        (lambda: RSA.token(nbf="soon"), "not valid yet"),
        (lambda: RSA.token({"kid": "k2"}), "unknown key"),
        (lambda: RSA.token({"alg": "none"}), "unknown key or algorithm"),
        (lambda: RSA.token({"alg": "HS256"}), "unknown key or algorithm"),
        (lambda: RSA.token({"alg": "ES256"}), "unknown key or algorithm"),
        (lambda: RSA.token({"crit": ["exp"]}), "unknown key or algorithm"),
        (lambda: P256.token(), "unknown key or algorithm"),
        (lambda: Signer(rsa.generate_private_key(65537, 2048)).token(), "signature is wrong"),
        (lambda: RSA.token()[:-8] + "AAAAAAAA", "signature is wrong"),
        (lambda: RSA.token().rpartition(".")[0] + ".", "signature is wrong"),
        (lambda: RSA.token() + "=", "not a token"),
        (lambda: RSA.token() + ".", "not a token"),
        (lambda: " " + RSA.token(), "not a token"),
        (lambda: f"{encoded(b'[]')}.{encoded(b'{}')}.", "not a token"),
        (lambda: f"{encoded({'kid': 1})}.{encoded(b'{}')}.", "not a token"),
        (lambda: f"{encoded({'kid': 'k1'})}.{encoded(b'[' * 100_000)}.", "not a token"),
        (lambda: f"{encoded({'kid': 'k1'})}.{encoded(b'[' * 5_000)}.", "not a token"),
        (lambda: "ä.ö.ü", "not a token"),
        (lambda: "", "not a token"),
    ],
)
def test_any_other_token_is_not(token: Callable[[], str], words: str) -> None:
    """Another audience, issuer, time, key, algorithm or form: each is refused in words."""
    with pytest.raises(InvalidTokenError, match=words):
        checked(token())


def test_a_signature_of_elliptic_curves_has_one_form() -> None:
    """The DER form that other protocols use, or a longer one, is refused."""
    token = P256.token()
    signed = token.rpartition(".")[0]
    assert isinstance(P256.key, ec.EllipticCurvePrivateKey)
    der = P256.key.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))
    with pytest.raises(InvalidTokenError, match="signature is wrong"):
        checked(f"{signed}.{encoded(der)}", P256)


def test_keys_that_are_too_weak_or_not_for_signing_do_not_count() -> None:
    """One that cannot be read does not take the good ones away."""
    weak = Signer(rsa.generate_private_key(65537, 1024), "weak")
    entries: list[Any] = [
        weak.entry,
        {**RSA.entry, "kid": "enc", "use": "enc"},
        {**RSA.entry, "kid": "other", "alg": "PS256"},
        {"kty": "oct", "kid": "shared", "k": "c2VjcmV0"},
        {**P256.entry, "kid": "off-curve", "y": P256.entry["x"]},
        {"kty": "RSA"},
        "nonsense",
        None,
        RSA.entry,
    ]
    assert list(keys_of({"keys": entries})) == ["k1"]


@settings(deadline=None)
@given(st.text())
def test_no_text_is_taken_for_a_token(text: str) -> None:
    """Whatever it is, the error is the one that the server expects."""
    with pytest.raises(InvalidTokenError):
        checked(text)


@settings(deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["alg", "kid", "crit", "x"]), st.none() | st.text() | st.lists(st.text())),
    claims=st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    ),
    signature=st.binary(max_size=300),
)
def test_no_forged_token_passes(header: dict[str, Any], claims: Any, signature: bytes) -> None:
    """Any header and claims without the cluster's signature are refused, by the same error."""
    body = json.dumps({**pod_claims(), "kubernetes.io": claims}).encode()
    with pytest.raises(InvalidTokenError):
        checked(f"{encoded({'alg': 'RS256', 'kid': 'k1', **header})}.{encoded(body)}.{encoded(signature)}")


@settings(deadline=None)
@given(position=st.integers(min_value=0), bit=st.integers(min_value=0, max_value=7))
def test_no_changed_token_passes(position: int, bit: int) -> None:
    """One flipped bit anywhere in what is signed, or in the signature."""
    token = bytearray(P256.token().encode())
    token[position % len(token)] ^= 1 << bit
    with pytest.raises(InvalidTokenError):
        checked(token.decode("latin-1"), P256)


def test_a_token_has_one_form() -> None:
    """Of the characters that a decoder would take for the same last bits only one is right."""
    token = P256.token()
    others = [token[:-1] + letter for letter in string.ascii_letters + string.digits + "-_" if letter != token[-1]]
    for other in others:
        with pytest.raises(InvalidTokenError):
            checked(other, P256)


def test_keys_are_fetched_once_and_used_until_they_are_old() -> None:
    """A thousand tokens cost two requests; after an hour the keys are fetched again, and one withdrawn is refused."""
    api, ticks = API(keys=[RSA.entry]), Clock()
    tokens = SigningKeys(api.client, clock=Clock(), ticks=ticks)

    async def many() -> None:
        for _ in range(10):
            assert set(await asyncio.gather(*(tokens.verify(RSA.token()) for _ in range(3)))) == {THE_POD}
        assert api.asked == 2
        ticks.now += 3600
        api.keys = [P256.entry | {"kid": "k2"}]
        with pytest.raises(InvalidTokenError, match="unknown key"):
            await tokens.verify(RSA.token())
        assert api.asked == 4

    asyncio.run(many())


def test_a_new_key_is_fetched_when_a_token_names_it_but_not_for_every_invention() -> None:
    """Rotation is followed at once; unknown ids cost at most two requests in half a minute."""
    api, ticks = API(keys=[RSA.entry]), Clock()
    tokens = SigningKeys(api.client, clock=Clock(), ticks=ticks)
    new = Signer(P256.key, "k2")

    async def rotate() -> None:
        assert await tokens.verify(RSA.token()) == THE_POD
        api.keys.append(new.entry)
        ticks.now += 60
        assert await tokens.verify(new.token()) == THE_POD
        assert await tokens.verify(RSA.token()) == THE_POD
        for i in range(50):
            with pytest.raises(InvalidTokenError, match="unknown key"):
                await tokens.verify(RSA.token({"kid": f"invented-{i}"}))
        assert api.asked == 4

    asyncio.run(rotate())


def test_known_keys_outlast_an_outage() -> None:
    """Without any key the API server's silence is no fault of the token; with one, work goes on."""
    api, ticks = API(keys=[RSA.entry], down=DOWN), Clock()
    tokens = SigningKeys(api.client, clock=Clock(), ticks=ticks)

    async def outage() -> None:
        for _ in range(5):
            with pytest.raises(KubeError):
                await tokens.verify(RSA.token())
        assert api.asked == 1
        ticks.now += 60
        api.down = None
        assert await tokens.verify(RSA.token()) == THE_POD
        api.down = DOWN
        ticks.now += 7200
        assert await tokens.verify(RSA.token()) == THE_POD

    asyncio.run(outage())


@pytest.mark.parametrize(
    "about",
    [None, {}, {"namespace": "team"}, {"namespace": "team", "pod": {"name": "n"}}, {"pod": {"name": "n", "uid": "u"}}],
)
def test_a_token_of_no_pod_is_refused(about: Any) -> None:
    """One of a service account alone proves nothing about a stage."""
    tokens = SigningKeys(API(keys=[RSA.entry]).client, clock=Clock())
    with pytest.raises(InvalidTokenError, match="not bound to a pod"):
        asyncio.run(tokens.verify(RSA.token(**{"kubernetes.io": about})))


def test_a_review_is_asked_for_once_until_the_token_ends() -> None:
    """A stage's posts of an hour cost one request; after the token's end it is asked for again, and refused."""
    api, clock = API(), Clock()
    tokens = TokenReviews(api.client, clock=clock)
    token = RSA.token()
    api.accept(token)

    async def an_hour() -> None:
        for _ in range(100):
            assert await tokens.verify(token) == THE_POD
        assert api.asked == 1
        clock.now = NOW + 3600
        api.reviews.clear()
        with pytest.raises(InvalidTokenError, match="does not know the token"):
            await tokens.verify(token)
        assert api.asked == 2

    asyncio.run(an_hour())


def test_a_refusal_is_remembered_briefly() -> None:
    """The same bad token does not reach the API server again and again; a good one is believed seconds later."""
    api, clock = API(), Clock()
    tokens = TokenReviews(api.client, clock=clock)
    token = RSA.token()

    async def refused() -> None:
        for _ in range(100):
            with pytest.raises(InvalidTokenError):
                await tokens.verify(token)
        assert api.asked == 1
        api.accept(token)
        clock.now += 10
        assert await tokens.verify(token) == THE_POD

    asyncio.run(refused())


@pytest.mark.parametrize(
    "changes",
    [
        {"authenticated": False},
        {"audiences": []},
        {"audiences": ["https://kubernetes.default.svc"]},
        {"user": {"username": "system:serviceaccount:team:default"}},
        {"user": {"username": "admin", "extra": {"authentication.kubernetes.io/pod-name": ["n"]}}},
        {"user": None},
    ],
    ids=["unknown", "no-audience", "other-audience", "no-pod", "no-account", "nobody"],
)
def test_a_review_that_is_not_for_us_or_of_no_pod_is_refused(changes: dict[str, Any]) -> None:
    """``authenticated`` alone may mean the API server's own audience."""
    api, token = API(), RSA.token()
    api.accept(token, **changes)
    with pytest.raises(InvalidTokenError):
        asyncio.run(TokenReviews(api.client, clock=Clock()).verify(token))


def test_what_is_no_token_costs_no_request() -> None:
    """Neither nonsense nor megabytes reach the API server."""
    api = API()
    tokens = TokenReviews(api.client, clock=Clock())
    for text in ("", "x", "a.b.c", "x" * 1_000_000, RSA.token(exp=None)):
        with pytest.raises(InvalidTokenError):
            asyncio.run(tokens.verify(text))
    assert api.asked == 0


def test_memory_for_tokens_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was used last is kept."""
    monkeypatch.setattr("finetune_operator.tokens._ACCEPTED", 3)
    monkeypatch.setattr("finetune_operator.tokens._REFUSED", 3)
    api = API()
    tokens = TokenReviews(api.client, clock=Clock())
    good = [P256.token(jti=str(i)) for i in range(5)]

    async def fill() -> None:
        for token in good:
            api.accept(token)
            await tokens.verify(token)
            await tokens.verify(good[0])
        for i in range(5):
            with pytest.raises(InvalidTokenError):
                await tokens.verify(P256.token(jti=f"bad-{i}"))
        asked = api.asked
        await tokens.verify(good[0])
        assert api.asked == asked
        await tokens.verify(good[1])
        assert api.asked == asked + 1

    asyncio.run(fill())
    assert len(tokens._accepted) == len(tokens._refused) == 3


def test_an_api_server_that_is_down_is_no_fault_of_the_token() -> None:
    """The error is another one, and is not remembered."""
    api, token = API(down=DOWN), RSA.token()
    api.accept(token)
    tokens = TokenReviews(api.client, clock=Clock())
    with pytest.raises(KubeError):
        asyncio.run(tokens.verify(token))
    api.down = None
    assert asyncio.run(tokens.verify(token)) == THE_POD
