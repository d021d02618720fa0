"""What is freed is kept for the next step."""

import platform

import pytest
import torch

from clearwing.train.memory import keep_freed_memory

resource = pytest.importorskip("resource", reason="page faults are counted on POSIX alone")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc")
def test_large_blocks_are_not_asked_for_twice():
    keep_freed_memory()

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(4 * 2**20) for _ in range(8)]  # of 16 MiB: 4096 pages
        del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert min(faults() for _ in range(3)) < 4096
