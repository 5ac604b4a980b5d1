"""What a stage is given (``StageRun``, its ``stage.json``) and what it leaves (``Manifest``, ``Termination``)."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_api.types import FineTuneJobSpec


class Record(BaseModel):
    """Written by our own code and read by a possibly newer or older one: unknown fields pass."""

    model_config = ConfigDict(
        extra="ignore",
        alias_generator=to_camel,
        validate_by_name=True,
        frozen=True,
        use_attribute_docstrings=True,
    )


# Bounds of what stands in status, where the API server wants one for every text.
Name = Annotated[str, Field(max_length=256)]
Key = Annotated[str, Field(max_length=1024)]
StoredUri = Annotated[str, Field(max_length=2048)]
Figure = Annotated[float | int | str, Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
"""A number, or a few words. Opaque to the API server: no schema type is both (docs/adr/007-crd.md)."""


class JobRef(Record):
    """Whose stage this is."""

    namespace: str
    name: str
    uid: str


class StageRun(Record):
    """Everything one attempt of a stage needs to know; immutable once it is started."""

    job: JobRef
    stage: str
    """``prepare``, ``baseline``, a name of the pipeline, ``evaluate`` or ``report``."""
    attempt: int
    """From 1; only for names and logs."""
    spec: FineTuneJobSpec
    inputs: dict[str, str] = {}
    """Object key of the committed manifest of every earlier stage that this one reads, by stage name."""


class File(Record):
    """One committed object."""

    path: str
    """Relative, with ``/``."""
    key: str
    """Object key in the bucket."""
    size_bytes: int
    sha256: str


class Artifact(Record):
    """A file that the user may want to pull, under a name."""

    stage: Name
    """Which stage left it."""
    name: Name
    """Unique in the stage: a GGUF's type, or a file's name."""
    uri: StoredUri
    """Where it is: ``s3://bucket/key``."""
    size_bytes: int
    """Size."""
    sha256: Annotated[str, Field(max_length=64)]
    """Of its content, in hexadecimal."""


class StageResult(Record):
    """The short form of a committed result: what status keeps and the termination message carries."""

    digest: Name
    """Of the inputs (spec block, input contents, seed, code version): equal digests mean interchangeable results."""
    manifest: Key
    """Object key of ``manifest.json``."""
    reused: bool = False
    """An earlier committed result was found; nothing was computed."""
    artifacts: Annotated[list[Artifact], Field(max_length=64)] = []
    """Files worth pulling."""
    figures: Annotated[dict[str, Figure], Field(max_length=64)] = {}
    """Key figures, a handful: ``{"evalLoss": 0.31}``."""


class FoundResult(StageResult):
    """A result that ``prepare`` found for a later stage, which therefore need not start."""

    stage: str


class Manifest(Record):
    """``manifest.json``, written last with ``If-None-Match: *``: a result exists when, and only when, this does."""

    job: JobRef
    stage: str
    attempt: int
    digest: str
    inputs: dict[str, str]
    """Logical input name to the digest of its content, as hashed into ``digest``."""
    outputs: dict[str, str]
    """Logical output name (``adapter``, ``model``, ``train``, ...) to the digest of its content."""
    files: list[File]
    artifacts: list[Artifact]
    figures: dict[str, float | int | str]
    started: str
    finished: str
    """RFC 3339, UTC."""


class Termination(Record):
    """The termination message: at most 4,000 bytes of JSON, since the kubelet keeps the last 4,096."""

    result: StageResult | None = None
    error: Annotated[str, Field(max_length=3000)] | None = None
    found: list[FoundResult] = []
    """From ``prepare`` only. Cut to fit: a stage left out here starts, finds its result and ends at once."""
