"""Files that several threads need are made once."""

from __future__ import annotations

import threading
from pathlib import Path

from training.processes import alone_at, sharing
from training.spec import Scaling


def test_who_waits_for_a_file_finds_it_made(tmp_path: Path) -> None:
    target, makers, together = tmp_path / "made", [], threading.Barrier(4)

    def make(number: int) -> None:
        together.wait()
        with alone_at([target, tmp_path / "another"]):
            if not target.exists():
                makers.append(number)
                target.touch()

    threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makers) == 1


def test_processes_that_share_a_gpu_claim_their_part_of_it() -> None:
    assert sharing(Scaling(gpus_per_worker=1), 4).gpus_per_worker == 0.25
    assert sharing(Scaling(), 4) == Scaling()
