"""The object store that a job uses, from this machine: the one that it names, or the embedded one."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.types import Storage
from finetune_cli.errors import INVALID, CommandError

if TYPE_CHECKING:
    from finetune_jobs.store.client import Store


@dataclass(frozen=True)
class Access:
    """How to reach the store."""

    storage: Storage
    """With the endpoint filled in."""
    environment: Mapping[str, str]
    """For every process that uses it: credentials, and the rest of this process's environment."""
    revive: Callable[[], None] = lambda: None
    """To be called now and then while stages use it: starts the embedded server anew if it has ended."""

    @contextlib.contextmanager
    def store(self, progress: Callable[[str, int, int], None] | None = None) -> "Iterator[Store]":
        """A client for use in this process; ``progress`` is told (key, bytes done, bytes in all)."""
        from finetune_jobs.store.client import Store

        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(self.environment)
        try:
            yield Store.of(self.storage, progress)
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def opened(storage: Storage, root: Path) -> Iterator[Access]:
    """Reach the store while the block lasts; the embedded one runs as long as anybody uses it.

    Raises CommandError (64) when a store of the user's own has no credentials.
    """
    if storage.endpoint:
        _require_credentials(storage)
        yield Access(storage, dict(os.environ))
        return
    from finetune_cli.embedded import EmbeddedStore

    with EmbeddedStore(root, storage.bucket) as embedded:
        # The user's AWS settings belong to other stores: a session token beside generated keys would be refused.
        own = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
        environment = {**own, **embedded.environment()}
        yield Access(storage.model_copy(update={"endpoint": embedded.endpoint}), environment, embedded.revive)


def _require_credentials(storage: Storage) -> None:
    # The SDK's own search also asks the cloud's metadata service, which takes seconds to fail elsewhere.
    if os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY"):
        return
    from botocore.session import Session

    if Session().get_credentials() is None:
        raise CommandError(
            "spec.storage.secretRef: on one machine the environment takes the secret's place, and it has no "
            f"credentials for {storage.endpoint}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(and AWS_SESSION_TOKEN if there is one), or AWS_PROFILE",
            INVALID,
        )
