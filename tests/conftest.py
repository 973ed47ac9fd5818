"""Every test runs offline and from the same seed."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # tests run in as many processes as there are cores

import ipaddress
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, as sae_lens does

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

LONGEST = ("test_resume.py", "test_runner.py", "test_parallel.py", "test_judged.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: a worker takes whole files, and else ends alone with one of them."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection that leaves the machine raises, unless the test is marked `network`."""
    if request.node.get_closest_marker("network"):
        return

    def check(host: object) -> None:
        # Not an OSError: hub clients catch those and fall back on a cache.
        if not is_local(host):
            raise RuntimeError(f"A test not marked `network` tried to reach {host!r}.")

    def guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
        def guard(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return connect(self, address)

        return guard

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return resolve(host, *args, **kwargs)

    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int | str, str, str]]:
    """The command line: call it with arguments; returns exit code, output and errors."""
    from sae_lens_gemma4 import cli

    def call(*args: object) -> tuple[int | str, str, str]:
        monkeypatch.setattr(sys, "argv", ["sae-lens-gemma4", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call
