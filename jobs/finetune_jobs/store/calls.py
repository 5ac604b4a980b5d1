"""One request to the store: tried again while that can help, and its failure put into words for the user.

botocore's own retries are off. They count tries, not time; and they draw from Python's global random generator, so
one retry in the upload thread would change the data order of the training beside it. (s3transfer draws from it for
the names of its temporary files, with or without retries.)
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
    SSLError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.parsers import ResponseParserError

from finetune_jobs.run.errors import ConfigurationError, InputMissingError, StageError, StorageError

_log = logging.getLogger("finetune.store")
T = TypeVar("T")

RETRY_SECONDS = 120.0
"""How long a request is tried again after its first failure."""
_FIRST_DELAY, _LONGEST_DELAY = 0.2, 10.0

_TRANSIENT = (
    HTTPClientError,
    NoConnectionError,
    IncompleteReadError,
    ResponseStreamingError,
    ConnectionError,
    TimeoutError,
)
_TRANSIENT_CODES = {
    "BadDigest",  # damaged on the way
    "ConditionalRequestConflict",  # two conditional writes at the same instant: AWS asks for another try
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
_CREDENTIALS = {"AccessDenied", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}


class RejectedError(StorageError):
    """The store answered, and would give the same answer again."""

    def __init__(self, words: str, code: str) -> None:
        super().__init__(words)
        self.code = code
        """As in S3: ``PreconditionFailed``, ``NoSuchUpload``."""


class CorruptObjectError(StorageError):
    """An object is there, but it is not what was committed."""


class AbandonedError(StorageError):
    """We were told to give up the transfer."""


def never() -> bool:
    """For ``abandoned``: go on to the end."""
    return False


@dataclass(frozen=True)
class Calls:
    """How requests to one bucket are made. Safe to share between threads."""

    host: str
    """Of the endpoint, for messages."""
    bucket: str
    retry_seconds: float = RETRY_SECONDS
    _random: random.Random = field(default_factory=random.Random, repr=False)

    def __call__(self, operation: str, key: str, request: Callable[[], T], abandoned: Callable[[], bool] = never) -> T:
        """Make the request until it succeeds, cannot succeed, or ``retry_seconds`` have passed since it first failed.

        Raises InputMissingError (no such key), ConfigurationError (credentials, bucket, region, endpoint: at once),
        RejectedError (any other refusal: at once), AbandonedError, StorageError (no success in time).
        """
        deadline: float | None = None
        delay = _FIRST_DELAY
        while True:
            if abandoned():
                raise AbandonedError(f"{operation} of {self._object(key)} was given up")
            try:
                return request()
            except (ClientError, BotoCoreError, ResponseParserError, ConnectionError, TimeoutError) as error:
                final = self._final(error, operation, key)
                if final is not None:
                    raise final from error
                now = time.monotonic()
                if deadline is None:
                    deadline = now + self.retry_seconds
                    _log.warning("%s of %s failed, trying again: %s", operation, self._object(key), _words(error))
                if now >= deadline:
                    raise self._exhausted(error, operation, key) from error
                # Full jitter would sometimes not wait at all; half of it spreads the clients just as well.
                self._sleep(min(delay * self._random.uniform(0.5, 1), deadline - now), abandoned)
                delay = min(2 * delay, _LONGEST_DELAY)

    @staticmethod
    def _sleep(seconds: float, abandoned: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not abandoned():
            time.sleep(min(left, 0.25))

    def _object(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def _exhausted(self, error: Exception, operation: str, key: str) -> StorageError:
        return StorageError(
            f"{operation} of {self._object(key)} failed for {self.retry_seconds:.0f} s at {self.host}: "
            f"{_words(error)}; check that the store runs, has free space and can be reached from here "
            "(spec.storage.endpoint)"
        )

    def _final(self, error: Exception, operation: str, key: str) -> StageError | None:
        """The error that no retry mends, in words; None if the next try may succeed."""
        if isinstance(error, ClientError):
            return self._refused(error, operation, key)
        what = f"{operation} of {self._object(key)}"
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return ConfigurationError(
                f"spec.storage.secretRef: no credentials for {self.host} ({what}); set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the Secret, or in the environment on one machine"
            )
        if isinstance(error, ResponseParserError):
            return ConfigurationError(f"spec.storage.endpoint: {self.host} does not speak S3 ({what}: {_words(error)})")
        if isinstance(error, SSLError) and any(w in str(error) for w in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION")):
            return ConfigurationError(
                f"spec.storage.endpoint: no trusted TLS connection to {self.host} ({_words(error)}); use http:// if "
                "the store has no TLS, or name its certificate authority in AWS_CA_BUNDLE"
            )
        if isinstance(error, _TRANSIENT):
            return None
        return StorageError(f"{what} failed at {self.host}: {_words(error)}")

    def _refused(self, error: ClientError, operation: str, key: str) -> StageError | None:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        words = _words(error)
        what = f"{operation} of {self._object(key)} at {self.host}"
        if code in _TRANSIENT_CODES or status in (408, 429) or (status >= 500 and status != 501):
            return None
        if code == "NoSuchBucket":
            return ConfigurationError(
                f"spec.storage.bucket: {self.host} has no bucket {self.bucket!r}; create it or name another"
            )
        if code == "ExpiredToken":
            return StorageError(f"{what}: the credentials have expired; renew AWS_SESSION_TOKEN and its keys")
        if code in _REGION:
            return ConfigurationError(
                f"spec.storage.region: {what} was sent elsewhere: {words}; name the bucket's region"
            )
        if code in _CREDENTIALS or status == 403:
            return ConfigurationError(
                f"spec.storage.secretRef: {what} was refused: {words}; check AWS_ACCESS_KEY_ID and "
                f"AWS_SECRET_ACCESS_KEY, and that they may read, write, list and delete in bucket {self.bucket!r}"
            )
        if code == str(status) and operation != "HeadObject":  # an answer to HEAD has no body and so no code
            return ConfigurationError(f"spec.storage.endpoint: {self.host} does not speak S3 ({what}: {words})")
        if code in ("NoSuchKey", "404"):
            return InputMissingError(
                f"{self._object(key)} is not at {self.host}; if it was deleted, "
                "delete the stage's result and run the job again"
            )
        return RejectedError(f"{what} was rejected: {words}", code)


def _words(error: Exception) -> str:
    if isinstance(error, ClientError):
        detail = error.response.get("Error", {})
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", "no status")
        return f"{status} {detail.get('Code', '')}: {detail.get('Message', '')}".rstrip(": ")
    return f"{type(error).__name__}: {error}"
