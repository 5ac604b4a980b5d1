import logging

import pytest

from finetune_jobs.run import lifecycle


def test_long_transfers_are_spoken_of_and_quick_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A line every ten seconds while parts are on their way, none at the end."""
    clock = iter([0.0, 5.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(lifecycle.time, "monotonic", lambda: next(clock))
    said = lifecycle._Transfers()
    with caplog.at_level(logging.INFO, "finetune.lifecycle"):
        for done in (16, 32, 48, 64):
            said("model.safetensors", done << 20, 64 << 20)
    assert [record.getMessage() for record in caplog.records] == ["transfer of model.safetensors: 32 of 64 MiB"]
