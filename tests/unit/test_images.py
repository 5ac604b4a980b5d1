import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
NAMES = ("operator", "gguf", "trainer", "trainer-unsloth", "objectstore")


def test_trainer_and_gguf_share_their_layers() -> None:
    """Both say the same until all of gguf's packages are installed, so with the same CUDA these are kept once."""
    gguf, trainer = (
        (IMAGES / name / "Containerfile").read_text().partition("\nARG BASE")[2] for name in ("gguf", "trainer")
    )
    shared = gguf.partition("\nFROM packages\n")[0]
    assert "requirements/gguf.txt" in shared
    assert gguf.count("\nARG CUDA=no\n") == trainer.count("\nARG CUDA=yes\n") == 1
    assert trainer.replace("ARG CUDA=yes", "ARG CUDA=no").startswith(shared)


@pytest.mark.parametrize("name", ["build", "operator", "gguf", "trainer", "objectstore", "torch"])
def test_images_install_what_the_lock_pins(name: str) -> None:
    """Every requirement of an image is one of lock.txt, to the letter: version and hashes."""
    lock = _entries(ROOT / "requirements/lock.txt")
    part = _entries(ROOT / f"requirements/{name}.txt")
    assert part
    assert {package: lock.get(package) for package in part} == part


def test_the_operator_installs_nothing_of_the_stages() -> None:
    """No torch, no object storage client."""
    packages = set(_entries(ROOT / "requirements/operator.txt"))
    assert {"kubernetes", "pydantic"} <= packages
    assert not packages & {"torch", "numpy", "boto3", "transformers"}


def test_the_trainer_has_all_that_gguf_has() -> None:
    """Stages with GPUs run there whatever they do."""
    gguf, trainer = (set(_entries(ROOT / f"requirements/{name}.txt")) for name in ("gguf", "trainer"))
    assert gguf < trainer


def test_unsloth_installs_what_it_can_work_with() -> None:
    """Its own, older versions, all by hash, from whatever index the caller has."""
    text = (ROOT / "requirements/unsloth.txt").read_text()
    found = _entries(ROOT / "requirements/unsloth.txt")
    assert all("--hash=sha256:" in entry for entry in found.values())
    assert "://" not in text
    pinned = {name: found[name].partition("==")[2].split()[0] for name in ("unsloth", "transformers", "torch", "trl")}
    assert pinned["unsloth"] == "2026.10.9"
    bounds = {"transformers": (5, 17), "torch": (2, 14), "trl": (1, 15)}
    assert {name: tuple(map(int, pinned[name].split(".")[:2])) for name in bounds} == bounds


@pytest.mark.parametrize("name", NAMES)
def test_images_run_as_nobody(name: str) -> None:
    """A numeric user, so that runAsNonRoot can be checked; the base is the caller's to choose."""
    text = (IMAGES / name / "Containerfile").read_text()
    assert text.splitlines()[1] == "ARG BASE=python:3.12-slim"
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE)[0] == "${BASE}"
    assert "\nUSER 65532:65532\nENTRYPOINT [" in text
    for label in ("title", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{label}=" in text


@pytest.mark.parametrize(("builder", "verb"), [("buildah", "bud --layers"), ("podman", "build"), ("docker", "build")])
def test_make_images_uses_the_builder_that_is_there(tmp_path: Path, builder: str, verb: str) -> None:
    """One build for each image, with base, names and options as asked for."""
    settings = {"BASE": "debian", "TAG": "7", "REPOSITORY": "host/team", "BUILD_OPTIONS": "--network host"}
    done = _images(tmp_path, builder, "true", settings, "operator", "objectstore")
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith(f"{verb} --tag host/team/operator:7 --file images/operator/Containerfile ")
    assert "--build-arg BASE=debian " in first
    assert first.endswith(" --network host .")
    assert "--tag host/team/object-store:7 " in second


def test_large_images_are_built_only_if_named(tmp_path: Path) -> None:
    """Of all by default, Unsloth's is none."""
    assert _images(tmp_path, "docker", "true", {}).returncode == 0
    assert _images(tmp_path, "docker", "true", {}, "trainer-unsloth").returncode == 0
    *rest, last = (tmp_path / "calls").read_text().splitlines()
    assert len(rest) == 4
    assert not any("unsloth" in call for call in rest)
    assert last.startswith("build --tag finetunejob/trainer-unsloth:")


def test_a_failed_build_is_an_error_that_names_the_image(tmp_path: Path) -> None:
    """And the next is not begun."""
    done = _images(tmp_path, "docker", "false", {})
    assert done.returncode == 1
    assert "building finetunejob/operator:0.1.0 failed: docker build" in done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_without_a_builder_it_says_what_is_needed(tmp_path: Path) -> None:
    """No traceback."""
    done = subprocess.run(
        [sys.executable, "scripts/images.py"], cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "images are built by one of buildah, podman, docker: install one, or set BUILDER\n"


def _images(
    directory: Path, builder: str, then: str, settings: dict[str, str], *names: str
) -> subprocess.CompletedProcess[str]:
    """Run the script with a builder that only writes down how it was called."""
    program = directory / builder
    program.write_text(f'#!/bin/sh\necho "$@" >> {directory}/calls\n{then}\n')
    program.chmod(0o755)
    environment = {"PATH": f"{directory}:{os.environ['PATH']}", "BUILDER": builder, **settings}
    command = [sys.executable, "scripts/images.py", *names]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _entries(path: Path) -> dict[str, str]:
    """Package -> its whole entry, hashes too."""
    found = re.split(r"^(?=[a-z0-9])", path.read_text(), flags=re.MULTILINE)[1:]
    return {entry.partition("==")[0]: entry for entry in found}
